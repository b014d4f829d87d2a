"""Streams of decompressed bytes, in memory that does not depend on how far a file is compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from preprocess.errors import require_package

# First bytes of a compressed file, by the suffix that its name usually has.
_MAGIC = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\x00", ".bz2": b"BZh"}
_BZ2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # first bytes after "BZh" and the level
COMPRESSED = tuple(_MAGIC)
ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)

# A few bytes may stand for a megabyte; these make at most about 16 of them.
_INPUT_BYTES = 512
_XZ_MEMORY = 1 << 28  # four times what the strongest setting of xz needs


def compression_of(suffix: str, head: bytes) -> str:
    """Recognize the compression of a file.

    Args:
        suffix: Last suffix of the file's name.
        head: First bytes of the file, 16 or more if it has them.

    Returns:
        One of :data:`COMPRESSED`, or an empty string.
    """
    if suffix in COMPRESSED:
        return suffix
    for name, magic in _MAGIC.items():
        if head.startswith(magic) and (name != ".bz2" or head[4:].startswith(_BZ2_BLOCKS)):
            return name
    return ""


def decompressed(raw: io.BufferedIOBase, compression: str) -> io.BufferedIOBase:
    """Decompress a file while it is read.

    Args:
        raw: Stream of the compressed bytes.
        compression: Value of :func:`compression_of`.

    Returns:
        A stream of the decompressed bytes; it raises one of :data:`ERRORS` where the file is damaged or cut.
    """
    if not compression:
        return raw
    if compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if compression == ".zst":
        zstandard = require_package("zstandard", f"the compressed file {raw.name}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        reader = _FrameReader(raw, decompressor.decompressobj, zstandard.ZstdError)
    elif compression == ".xz":
        reader = _FrameReader(raw, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), lzma.LZMAError)
    else:
        reader = _FrameReader(raw, bz2.BZ2Decompressor, OSError)
    return io.BufferedReader(reader, 1 << 20)


class _FrameReader(io.RawIOBase):
    """Decompressed bytes of a file of any number of frames; reports a cut file.

    Args:
        raw: Stream of the compressed bytes.
        new_frame: Function that makes the decompressor of one frame.
        error: Exception that a decompressor raises at damaged bytes.
    """

    def __init__(self, raw: io.BufferedIOBase, new_frame: Callable[[], Any], error: type):
        self._raw, self._new_frame, self._error = raw, new_frame, error
        self._frame = None
        self._pending = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            data = self._pending or self._raw.read(_INPUT_BYTES)
            self._pending = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end-of-stream marker was reached")
                return 0
            if self._frame is None:
                data = data.lstrip(b"\0")  # padding of xz
                if not data:
                    continue
                self._frame = self._new_frame()
            try:
                self._output = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
