"""The index of fairseq's memory-mapped data (``PREFIX.idx``): header, lengths and offsets of the items.

Layout: magic (9 bytes), version (uint64), code of the token type (uint8), number of items N (uint64), then N lengths in
tokens (int32) and N offsets into ``PREFIX.bin`` in bytes (int64).
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQ")  # magic, version, code of the token type, number of items
BYTES_PER_ITEM = 12  # int32 length and int64 offset
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32}
OTHER_FORMATS = {b"TNTIDX\x00\x00": "cached or lazy", b"HUFFIDX\x00": "huffman"}


class MmapIndexError(ValueError):
    """A file is not an index of fairseq's memory-mapped data; the message is one sentence that names the file."""


class MmapIndex(NamedTuple):
    """Content of an index.

    Attributes:
        dtype: NumPy type of the stored tokens.
        sizes: Length of each item in tokens, shape (items,), int32.
        pointers: Offset of each item in the ``.bin`` file in bytes, shape (items,), int64.
    """

    dtype: type
    sizes: np.ndarray
    pointers: np.ndarray


def read_index(path: str | os.PathLike) -> MmapIndex:
    """Read an index and check its header and length.

    Args:
        path: Path of the ``.idx`` file.

    Returns:
        The token type, and the lengths and offsets as stored.

    Raises:
        MmapIndexError: The file has another format, version or token type, or another length than its header states.
    """
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
        if head[:8] in OTHER_FORMATS:
            raise MmapIndexError(
                f"{path} has fairseq's {OTHER_FORMATS[head[:8]]} format, which cannot be read by slices: write the "
                "data with --dataset-impl mmap"
            )
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise MmapIndexError(f"{path} is not the index of a fairseq mmap dataset, or is truncated: write it again")
        _, version, code, items = HEADER.unpack(head)
        if version != VERSION or code not in TOKEN_TYPES:
            raise MmapIndexError(f"{path} has version {version} and token type {code}, which fairseq does not write")
        expected, actual = HEADER.size + items * BYTES_PER_ITEM, os.path.getsize(path)
        if actual != expected:
            raise MmapIndexError(f"{path} has {actual} bytes, but {items} documents need {expected}: write it again")
        sizes = np.fromfile(file, dtype="<i4", count=items)
        pointers = np.fromfile(file, dtype="<i8", count=items)
    return MmapIndex(TOKEN_TYPES[code], sizes, pointers)


def pack_header(dtype: type, items: int) -> bytes:
    """Encode the header of an index.

    Args:
        dtype: NumPy type of the stored tokens, one of :data:`TOKEN_TYPES`.
        items: Number of items.

    Returns:
        The header's bytes.
    """
    code = next(code for code, token_type in TOKEN_TYPES.items() if token_type is dtype)
    return HEADER.pack(MAGIC, VERSION, code, items)
