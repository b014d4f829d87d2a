"""A pair of fairseq's memory-mapped data files (``PREFIX.bin``, ``PREFIX.idx``), checked once and read by slices."""

import os
from typing import Tuple

import numpy as np

from .mmap_index import read_index


class TokenFile:
    """Items of one ``.bin``/``.idx`` pair, read by slices; fairseq's own reader reads the whole file at the start.

    Args:
        prefix: Path of the pair without ``.bin`` and ``.idx``.

    Attributes:
        prefix: As above.
        dtype: NumPy dtype of the stored tokens.
        offsets: Offset of each item in tokens, and the end of the last, shape (items + 1,), int64. Taken from the
            column of the index that agrees with the length of the ``.bin`` file, because both columns can be wrong:
            sizes are 32 bits wide, and pointers overflow where fairseq merges the files of several workers under
            NumPy 2.

    Raises:
        FileNotFoundError: One of the files is missing.
        ValueError: The files have another format, are truncated, or do not belong together.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        for end in (".bin", ".idx"):
            if not os.path.isfile(prefix + end):
                raise FileNotFoundError(f"data file {prefix + end} is missing")
        dtype, self.offsets = _read_offsets(prefix)
        self._open(dtype)

    def _open(self, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self._tokens = np.memmap(self.prefix + ".bin", dtype=self.dtype, mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read(self, item: int, start: int, stop: int) -> np.ndarray:
        """Copy a slice of an item.

        Args:
            item: Number of the item, from 0.
            start: Position of the first token in the item.
            stop: Position behind the last token.

        Returns:
            Token ids, shape (stop - start,), int64.
        """
        begin = self.offsets[item]
        return self._tokens[begin + start : begin + stop].astype(np.int64)

    def __getstate__(self):
        return {"prefix": self.prefix, "offsets": self.offsets, "dtype": self.dtype}

    def __setstate__(self, state):  # a memory map would be pickled with all of its data
        self.prefix, self.offsets = state["prefix"], state["offsets"]
        self._open(state["dtype"])


def _read_offsets(prefix: str) -> Tuple[type, np.ndarray]:
    """Return the token type and the offsets, shape (items + 1,), that agree with the length of the data file."""
    index, data = prefix + ".idx", prefix + ".bin"
    dtype, sizes, pointers = read_index(index)
    items = len(sizes)
    if items == 0:
        raise ValueError(f"{index} lists no items: there is nothing to read")
    sizes = sizes.astype(np.int64)
    width = np.dtype(dtype).itemsize
    total = os.path.getsize(data)

    by_size = np.concatenate([[0], np.cumsum(sizes)])
    by_pointer = np.append(pointers, total) // width
    lengths = np.diff(by_pointer)
    wrapped = np.array_equal(lengths & 0xFFFFFFFF, sizes & 0xFFFFFFFF)  # the lower 32 bits of a size still agree
    if sizes.min() >= 0 and by_size[-1] * width == total:
        offsets = by_size
    elif total % width == 0 and by_pointer[0] == 0 and lengths.min() >= 0 and wrapped:
        offsets = by_pointer
    else:
        raise ValueError(
            f"{data} has {total} bytes, but {index} describes {by_size[-1] * width}: "
            "one of the two is truncated or belongs to other data; write both again"
        )
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if len(empty):
        raise ValueError(
            f"document {empty[0]} of {prefix}.bin is empty ({len(empty)} of {items} are): write the data without them"
        )
    return dtype, offsets
