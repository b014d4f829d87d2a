"""A pair of fairseq's memory-mapped data files (``PREFIX.bin``, ``PREFIX.idx``), checked once and read by slices."""

import os
import struct
from typing import Tuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQ")  # magic, version, code of the token type, number of items
OTHER_FORMATS = {b"TNTIDX\x00\x00": "cached or lazy", b"HUFFIDX\x00": "huffman"}
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32}


class TokenFile:
    """The items of one ``.bin``/``.idx`` pair, without fairseq's reading of the whole file at the start.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Attributes:
        offsets: where each item starts, in tokens, and where the last ends, shape (items + 1,), int64. Taken from what
            agrees with the length of the ``.bin`` file, because both columns of the index can be wrong: sizes are 32
            bits wide, and pointers overflow where fairseq merges the files of several workers under numpy 2.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the files are not of this format, are truncated, or do not belong together.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        for end in (".bin", ".idx"):
            if not os.path.isfile(prefix + end):
                raise FileNotFoundError(f"data file {prefix + end} is missing")
        dtype, self.offsets = _read_index(prefix)
        self._open(dtype)

    def _open(self, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self._tokens = np.memmap(self.prefix + ".bin", dtype=self.dtype, mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, item: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop - 1`` of an item, shape (stop - start,), int64 (a copy)."""
        begin = self.offsets[item]
        return self._tokens[begin + start : begin + stop].astype(np.int64)

    def __getstate__(self):
        return {"prefix": self.prefix, "offsets": self.offsets, "dtype": self.dtype}

    def __setstate__(self, state):  # a memory map would be pickled as all of its data
        self.prefix, self.offsets = state["prefix"], state["offsets"]
        self._open(state["dtype"])


def _read_index(prefix: str) -> Tuple[type, np.ndarray]:
    """The token type and the offsets, shape (items + 1,), that agree with the length of the data file."""
    index, data = prefix + ".idx", prefix + ".bin"
    with open(index, "rb") as f:
        head = f.read(HEADER.size)
        if head[:8] in OTHER_FORMATS:
            raise ValueError(
                f"{index} is in fairseq's {OTHER_FORMATS[head[:8]]} format, but only memory-mapped data can be read "
                "by slices: write it with --dataset-impl mmap"
            )
        if len(head) < HEADER.size or head[:9] != MAGIC:
            raise ValueError(f"{index} is not an index of fairseq's memory-mapped data, or is cut short: write it anew")
        _, version, code, items = HEADER.unpack(head)
        if version != 1 or code not in TOKEN_TYPES:
            raise ValueError(f"{index} has version {version} and token type {code}, which fairseq does not write")
        expected = HEADER.size + items * 12
        actual = os.path.getsize(index)
        if actual != expected:
            raise ValueError(f"{index} has {actual} bytes, but {items} items need {expected}: write it anew")
        sizes = np.fromfile(f, dtype="<i4", count=items).astype(np.int64)
        pointers = np.fromfile(f, dtype="<i8", count=items)
    if items == 0:
        raise ValueError(f"{index} lists no items: there is nothing to read")
    dtype = TOKEN_TYPES[code]
    width = np.dtype(dtype).itemsize
    total = os.path.getsize(data)

    by_size = np.concatenate([[0], np.cumsum(sizes)])
    by_pointer = np.append(pointers, total) // width
    lengths = np.diff(by_pointer)
    wrapped = np.array_equal(lengths & 0xFFFFFFFF, sizes & 0xFFFFFFFF)  # what is left of sizes still tells
    if sizes.min() >= 0 and by_size[-1] * width == total:
        offsets = by_size
    elif total % width == 0 and by_pointer[0] == 0 and lengths.min() >= 0 and wrapped:
        offsets = by_pointer
    else:
        raise ValueError(
            f"{data} has {total} bytes, but {index} describes {by_size[-1] * width}: "
            "one of the two is truncated or belongs to other data; write both anew"
        )
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if len(empty):
        raise ValueError(
            f"document {empty[0]} of {prefix}.bin is empty ({len(empty)} of {items} are): write the data without them"
        )
    return dtype, offsets
