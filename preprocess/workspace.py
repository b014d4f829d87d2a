"""The unfinished data of one data directory: ``D/.partial``, from which a killed run continues.

Nothing is seen in ``D`` before all of it is finished; then the files are renamed into place, the manifest last.
"""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from longmem_fairseq.data.manifest import (
    INDEX_DTYPES,
    INDEX_HEADER,
    INDEX_MAGIC,
    MANIFEST,
    file_sha256,
    read_manifest,
    verify,
)
from preprocess.errors import InputError

_JOURNAL = "journal.json"


class Workspace:
    """Directory, lock and journal of a run.

    Args:
        destination: the data directory.
        request: setting → value, everything that decides what the data will be.
        overwrite: throw away what is there.

    Raises:
        InputError: the directory holds other data, unfinished work with other settings, or is being written to.
    """

    def __init__(self, destination: Path, request: dict[str, object], overwrite: bool = False):
        self.destination = destination
        self.directory = destination / ".partial"
        self.request = json.loads(json.dumps(request))
        self.request_sha256 = hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()
        if destination.exists() and not destination.is_dir():
            raise InputError(f"--destdir {destination} is not a directory")
        self.finished = not overwrite and self._is_finished()
        self.journal: dict = {}
        if self.finished:
            return
        if not overwrite:
            self._require_free()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock()
        if overwrite:
            self._clear()
        self._read_journal()

    def _is_finished(self) -> bool:
        manifest = read_manifest(self.destination)
        if manifest is None or manifest["request_sha256"] != self.request_sha256:
            return False
        for split in manifest["splits"]:
            verify(self.destination, split)
        return True

    def _require_free(self) -> None:
        if self.path(_JOURNAL).exists() and json.loads(self.path(_JOURNAL).read_text()).get("publishing"):
            return  # killed while renaming
        there = [
            MANIFEST,
            "dict.txt",
            *(f"{split}.{end}" for split in ("train", "valid", "test") for end in ("bin", "idx")),
        ]
        for name in there:
            if (self.destination / name).exists():
                raise InputError(
                    f"--destdir {self.destination} already holds {name}, made from other input or with other settings: "
                    "give another directory, or replace it with --overwrite"
                )

    def _lock(self) -> None:
        self._lock_file = open(self.path("lock"), "w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is writing --destdir {self.destination}: wait for it to end") from None

    def _clear(self) -> None:
        for path in self.directory.iterdir():
            if path.name != "lock":
                path.unlink()

    def _read_journal(self) -> None:
        if not self.path(_JOURNAL).exists():
            self._clear()
            self.save()
            return
        journal = json.loads(self.path(_JOURNAL).read_text(encoding="utf-8"))
        before = journal["request"]
        changed = sorted(key for key in {*before, *self.request} if before.get(key) != self.request.get(key))
        if changed:
            raise InputError(
                f"--destdir {self.destination} holds unfinished work with another {', '.join(changed)}: repeat that command, "
                "or throw the work away with --overwrite"
            )
        self.journal = journal

    def path(self, name: str) -> Path:
        """A file of the unfinished data."""
        return self.directory / name

    def save(self) -> None:
        """Make the journal durable; what it says about the other files must be on disk already."""
        self.journal["request"] = self.request
        temporary = self.path(f"{_JOURNAL}.tmp")
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(self.journal, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.path(_JOURNAL))

    def publish(self, names: list[str]) -> None:
        """Rename the finished files into the data directory, replacing what is there, and remove the workspace."""
        self.journal["publishing"] = names
        self.save()
        (self.destination / MANIFEST).unlink(missing_ok=True)  # a half replaced set must not look whole
        for name in sorted(names, key=lambda name: name == MANIFEST):
            if self.path(name).exists():  # else a killed run renamed it
                os.replace(self.path(name), self.destination / name)
        shutil.rmtree(self.directory)


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

    def __init__(self, workspace: Workspace, split: str, dtype: type):
        self.workspace, self.split, self.dtype = workspace, split, dtype
        self.state = workspace.journal.setdefault("splits", {}).setdefault(
            split,
            {"documents": 0, "tokens": 0, "characters": 0, "skipped": 0, "subsets": {}, "files": {}, "position": None},
        )
        self._files = {end: _AppendedFile(self._path(end), self.state["files"].get(end)) for end in self._ENDS}

    def _path(self, end: str) -> Path:
        return self.workspace.path(f"{self.split}.{end}")

    def append(self, encoded) -> None:
        """Add an ``Encoded`` block."""
        self._files["bin"].write(encoded.ids.tobytes())
        self._files["sizes"].write(encoded.sizes.tobytes())
        self._files["documents.jsonl"].write(encoded.records)
        state = self.state
        state["documents"] += len(encoded.sizes)
        state["tokens"] += len(encoded.ids)
        state["characters"] += encoded.characters
        state["skipped"] += encoded.skipped
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
        described["idx"] = {"bytes": index.stat().st_size, "sha256": file_sha256(index)}
        state = self.state
        return {
            **{key: state[key] for key in ("documents", "tokens", "characters", "skipped")},
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
    code = next(code for code, known in INDEX_DTYPES.items() if known is dtype)
    with open(path, "wb") as stream:
        stream.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, code, len(sizes)))
        stream.write(sizes)
        start = 0
        for first in range(0, len(sizes), 1 << 20):
            ends = start + np.cumsum(sizes[first : first + (1 << 20)], dtype=np.int64) * np.dtype(dtype).itemsize
            stream.write(np.concatenate([[start], ends[:-1]]).astype(np.int64))
            start = int(ends[-1])
        stream.flush()
        os.fsync(stream.fileno())
