"""Writing one split: files in fairseq's mmap format, appended block by block, resumable."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from preprocess.encoder import EncodedBlock
from preprocess.errors import InputError
from preprocess.package_modules import manifest as manifests
from preprocess.package_modules import mmap_index
from preprocess.workspace import Workspace


def smallest_dtype(symbols: int) -> type:
    """Choose the dtype in which fairseq stores the tokens of a dictionary.

    Args:
        symbols: Number of symbols in the dictionary, special ones included.

    Returns:
        A numpy dtype.
    """
    return np.uint16 if symbols < 65500 else np.uint32


class SplitWriter:
    """Append the documents of one split to the workspace, in fairseq's mmap format.

    The journal records the size up to which the files are complete; on opening, anything after that is cut off.

    Args:
        workspace: Workspace that the files are written to.
        split: Name of the split, ``train``, ``valid`` or ``test``.
        dtype: Type of the tokens, of numpy.

    Raises:
        InputError: A file of a killed run does not match its journal.
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

    def append(self, encoded: EncodedBlock) -> None:
        """Append the documents of a block.

        Args:
            encoded: The encoded documents.
        """
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
        """Make everything appended durable.

        Args:
            position: Position in the input to continue from, as plain JSON types.
        """
        self.state["files"] = {end: file.save() for end, file in self._files.items()}
        self.state["position"] = position
        self.workspace.save()

    def finish(self) -> dict:
        """Write the index and close the files.

        Returns:
            The description of the split for the manifest.
        """
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
    """A file that only grows, with the SHA-256 of its content.

    Args:
        path: Path of the file.
        saved: Size and SHA-256 returned by an earlier ``save``, to continue from; None for a new file.
    """

    def __init__(self, path: Path, saved: dict | None):
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._stream = open(path, "r+b" if saved and path.exists() else "w+b")
        if saved:
            self._check(path, saved)
            self._stream.truncate(self._bytes)
        self._stream.seek(self._bytes)

    def _check(self, path: Path, saved: dict) -> None:
        """Read the file up to its saved size and compare the SHA-256."""
        while self._bytes < saved["bytes"]:
            data = self._stream.read(min(1 << 22, saved["bytes"] - self._bytes))
            if not data:
                break
            self._digest.update(data)
            self._bytes += len(data)
        if self._digest.hexdigest() != saved["sha256"]:
            raise InputError(f"the unfinished file {path} was changed: start again with --overwrite")

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._stream.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def save(self) -> dict:
        """Make the content durable; returns its size and SHA-256."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def write_index(path: Path, sizes_path: Path, dtype: type) -> None:
    """Write the index of fairseq's mmap format in constant memory.

    The bytes are those of fairseq's writer, which holds two Python integers per document and, given numpy ones,
    overflows at 2 GB of data.

    Args:
        path: Path of the index to write.
        sizes_path: Path of a file of the documents' numbers of tokens, int32.
        dtype: Type of the tokens, of numpy.
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
