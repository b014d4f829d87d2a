"""The files of one split while they are written: fairseq's mmap format, appended block by block, resumable."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from preprocess.errors import InputError
from preprocess.package_manifest import manifest as manifests
from preprocess.package_manifest import mmap_index
from preprocess.workspace import Workspace


def smallest_dtype(symbols: int) -> type:
    """The type in which fairseq stores the tokens of a dictionary of this size."""
    return np.uint16 if symbols < 65500 else np.uint32


class SplitWriter:
    """Appends the documents of one split to the workspace, in fairseq's mmap format.

    The journal remembers how far the files were complete; on opening, anything after that is cut off.

    Args:
        workspace: where to write.
        split: ``train``, ``valid``, ``test``.
        dtype: of the tokens.

    Raises:
        InputError: what a killed run left is not what its journal says.
    """

    _ENDS = ("bin", "sizes", "documents.jsonl")
    _COUNTS = ("documents", "tokens", "characters", "skipped", "left_out")

    def __init__(self, workspace: Workspace, split: str, dtype: type):
        self.workspace, self.split, self.dtype = workspace, split, dtype
        self.state = workspace.journal.setdefault("splits", {}).setdefault(
            split,
            {**dict.fromkeys(self._COUNTS, 0), "subsets": {}, "files": {}, "position": None},
        )
        self._files = {end: _AppendedFile(self._path(end), self.state["files"].get(end)) for end in self._ENDS}

    def _path(self, end: str) -> Path:
        return self.workspace.path(f"{self.split}.{end}")

    def append(self, encoded) -> None:
        """Add an ``EncodedSegment`` block."""
        self._files["bin"].write(encoded.ids.tobytes())
        self._files["sizes"].write(encoded.sizes.tobytes())
        self._files["documents.jsonl"].write(encoded.records)
        state = self.state
        state["documents"] += len(encoded.sizes)
        state["tokens"] += len(encoded.ids)
        for count in ("characters", "skipped", "left_out"):
            state[count] += getattr(encoded, count)
        for subset, counts in encoded.subsets.items():
            before = state["subsets"].get(subset, [0, 0])
            state["subsets"][subset] = [before[0] + counts[0], before[1] + counts[1]]

    def save(self, position: object) -> None:
        """Make everything appended durable and remember the ``position`` in the input to go on from."""
        self.state["files"] = {end: file.save() for end, file in self._files.items()}
        self.state["position"] = position
        self.workspace.save()

    def finish(self) -> dict:
        """Write the index and describe the split for the manifest."""
        described = {end: file.save() for end, file in self._files.items()}
        for file in self._files.values():
            file.close()
        index = self._path("idx")
        write_index(index, self._path("sizes"), self.dtype)
        described["idx"] = {"bytes": index.stat().st_size, "sha256": manifests.file_sha256(index)}
        state = self.state
        return {
            **{count: state[count] for count in self._COUNTS},
            "subsets": {
                name: {"documents": documents, "tokens": tokens}
                for name, (documents, tokens) in sorted(state["subsets"].items())
            },
            "files": {f"{self.split}.{end}": described[end] for end in ("bin", "idx", "documents.jsonl")},
        }


class _AppendedFile:
    """A file that only grows, with the SHA-256 of what it holds."""

    def __init__(self, path: Path, saved: dict | None):
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._stream = open(path, "r+b" if saved and path.exists() else "w+b")
        if saved:
            self._check(path, saved)
            self._stream.truncate(self._bytes)
        self._stream.seek(self._bytes)

    def _check(self, path: Path, saved: dict) -> None:
        while self._bytes < saved["bytes"]:
            data = self._stream.read(min(1 << 22, saved["bytes"] - self._bytes))
            if not data:
                break
            self._digest.update(data)
            self._bytes += len(data)
        if self._digest.hexdigest() != saved["sha256"]:
            raise InputError(f"the unfinished file {path} was changed: start again with --overwrite")

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def save(self) -> dict:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._stream.close()


def write_index(path: Path, sizes_path: Path, dtype: type) -> None:
    """The index of fairseq's mmap format from a file of int32 document lengths, in constant memory.

    The same bytes as fairseq's writer, which holds two Python integers per document and, given numpy ones, overflows at
    2 GB of data.
    """
    sizes = np.memmap(sizes_path, dtype=np.int32, mode="r") if sizes_path.stat().st_size else np.empty(0, np.int32)
    with open(path, "wb") as stream:
        stream.write(mmap_index.pack_header(dtype, len(sizes)))
        stream.write(sizes)
        start = 0
        for first in range(0, len(sizes), 1 << 20):
            ends = start + np.cumsum(sizes[first : first + (1 << 20)], dtype=np.int64) * np.dtype(dtype).itemsize
            stream.write(np.concatenate([[start], ends[:-1]]).astype(np.int64))
            start = int(ends[-1])
        stream.flush()
        os.fsync(stream.fileno())
