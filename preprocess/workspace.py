"""The unfinished data of one data directory: ``D/.partial``, from which a killed run continues.

Nothing is seen in ``D`` before all of it is finished; then the files are renamed into place, the manifest last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from preprocess.errors import InputError
from preprocess.package_manifest import manifest as manifests

_JOURNAL = "journal.json"
_WORTH_SECONDS = 60
_SPLIT_FILES = [f"{split}.{end}" for split in ("train", "valid", "test") for end in ("bin", "idx", "documents.jsonl")]
_TOKENIZER_FILES = ["sentencepiece.model", "encoder.json", "vocab.bpe"]


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
        self.journal: dict = {"overwrite": overwrite}
        self.finished = not overwrite and self._is_finished()
        if self.finished:
            shutil.rmtree(self.directory, ignore_errors=True)  # left by a run that was killed at its very end
            return
        if not overwrite:
            self._require_free()
        self._started = time.monotonic()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock()
        if overwrite:
            self._clear()
        self._read_journal()

    def _is_finished(self) -> bool:
        try:
            manifest = manifests.read_manifest(self.destination)
            if manifest is None or manifest["request_sha256"] != self.request_sha256:
                return False
            for split in manifest["splits"]:
                manifests.verify(self.destination, split)
        except manifests.ManifestError as error:
            raise InputError(f"{error} (--overwrite does)") from None
        return True

    def _require_free(self) -> None:
        if self.path(_JOURNAL).exists():
            journal = json.loads(self.path(_JOURNAL).read_text(encoding="utf-8"))
            if journal["overwrite"] or "publishing" in journal:
                return  # replacing it was asked for, or the run was killed while renaming
        for name in (manifests.MANIFEST, "dict.txt", *_SPLIT_FILES):
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
        self._is_new = not self.path(_JOURNAL).exists()
        if self._is_new:
            self._clear()
            self.save()
            return
        journal = json.loads(self.path(_JOURNAL).read_text(encoding="utf-8"))
        before = journal["request"]
        changed = sorted(key for key in {*before, *self.request} if before.get(key) != self.request.get(key))
        if changed:
            raise InputError(
                f"--destdir {self.destination} holds unfinished work with another {', '.join(changed)}: "
                "repeat that command, or throw the work away with --overwrite"
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

    def abandon(self) -> None:
        """Remove what this run began before it met an error in its input, unless that is work worth keeping."""
        if self._is_new and time.monotonic() - self._started < _WORTH_SECONDS:
            shutil.rmtree(self.directory)
            if not any(self.destination.iterdir()):
                self.destination.rmdir()

    def publish(self, names: list[str]) -> None:
        """Rename the finished files into the data directory, replacing what is there, and remove the workspace."""
        self.journal["publishing"] = names
        self.save()
        # the manifest first, since a half replaced set must not look whole; then what the new data does not replace
        for name in (manifests.MANIFEST, *_SPLIT_FILES, *_TOKENIZER_FILES):
            if name == manifests.MANIFEST or name not in names:
                (self.destination / name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == manifests.MANIFEST):
            if self.path(name).exists():  # else a killed run renamed it
                os.replace(self.path(name), self.destination / name)
        shutil.rmtree(self.directory)
