"""The unfinished data of a data directory, in its folder ``.partial``, from which a killed run continues.

The data directory shows nothing before all files are finished; then they are renamed into place, the manifest last.
Only regular files are written, replaced and removed, never what a symbolic link in ``.partial`` points to.
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
from preprocess.package_modules import files
from preprocess.package_modules import manifest as manifests

_JOURNAL, _CHECKSUM = "journal.json", "sha256"
_WORTH_SECONDS = 60
_SPLIT_FILES = [f"{split}.{end}" for split in ("train", "valid", "test") for end in ("bin", "idx", "documents.jsonl")]
_TOKENIZER_FILES = ["tokenizer.json", "sentencepiece.model", "encoder.json", "vocab.bpe"]


class Workspace:
    """Directory, lock and journal of a run.

    ``finished`` is true if the data directory already holds the requested data.

    Args:
        destination: Path of the data directory.
        request: Value of every setting that decides the data, by the name of its option.
        overwrite: If true, discard the data and unfinished work in the directory.

    Raises:
        InputError: The directory holds other data, unfinished work with other settings or that is damaged, or
            something that is not a regular file, or is being written by another process.
    """

    def __init__(self, destination: Path, request: dict[str, object], overwrite: bool = False):
        self.destination = destination
        self.directory = destination / ".partial"
        self.request = json.loads(json.dumps(request))
        self.request_sha256 = hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()
        if destination.exists() and not destination.is_dir():
            raise InputError(f"--destdir {destination} is not a directory")
        self._require_regular_files()
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
        """Return whether the data directory holds the requested data."""
        try:
            manifest = manifests.read_manifest(self.destination)
            if manifest is None or manifest.get("request_sha256") != self.request_sha256:
                return False
            for split in manifest["splits"]:
                manifests.verify(self.destination, split)
        except manifests.ManifestError as error:
            raise InputError(f"{error}; --overwrite replaces the data") from None
        return True

    def _require_regular_files(self) -> None:
        """Refuse to write where something else is in the place of a file, or a link in that of the workspace."""
        if self.directory.is_symlink() or self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{self.directory} is not a directory of unfinished data: remove it")
        for path in self.directory.iterdir() if self.directory.exists() else ():
            # write_whole leaves a directory where it is killed
            if path.is_symlink() or not (path.is_file() or path.is_dir() and path.suffix == ".part"):
                raise InputError(f"{path} is not a file of unfinished data: remove it")
        for name in (manifests.MANIFEST, "dict.txt", *_SPLIT_FILES, *_TOKENIZER_FILES):
            try:
                files.require_file_place(self.destination / name)
            except OSError as error:
                raise InputError(str(error)) from None

    def _require_free(self) -> None:
        """Refuse a data directory with other data."""
        if self.path(_JOURNAL).exists():
            journal = self._load_journal()
            if journal["overwrite"] or "publishing" in journal:
                return  # a killed run with --overwrite, or one that was killed while renaming
        for name in (manifests.MANIFEST, "dict.txt", *_SPLIT_FILES):
            if (self.destination / name).exists():
                raise InputError(
                    f"--destdir {self.destination} already holds {name}, made from other input or with other settings: "
                    "give another directory, or replace it with --overwrite"
                )

    def _lock(self) -> None:
        """Refuse a workspace that another process writes."""
        self._lock_file = open(self.path("lock"), "w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is writing --destdir {self.destination}: wait for it to end") from None

    def _clear(self) -> None:
        """Remove all unfinished work."""
        for path in self.directory.iterdir():
            if path.name != "lock":
                files.remove_tree(path)

    def _read_journal(self) -> None:
        """Read the journal of a killed run with the same settings, or start a new one."""
        self._is_new = not self.path(_JOURNAL).exists()
        if self._is_new:
            self._clear()
            self.save()
            return
        journal = self._load_journal()
        saved = journal["request"]
        changed = sorted(key for key in {*saved, *self.request} if saved.get(key) != self.request.get(key))
        if changed:
            raise InputError(
                f"--destdir {self.destination} holds unfinished work with another {', '.join(changed)}: "
                "repeat that command, or discard the work with --overwrite"
            )
        self.journal = journal

    def _load_journal(self) -> dict:
        """Read the journal of a killed run and compare its checksum."""
        path = self.path(_JOURNAL)
        try:
            journal = files.read_json(path)
            if journal.pop(_CHECKSUM) != _checksum(journal):
                raise ValueError("its checksum differs")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}): discard the unfinished work with --overwrite") from None
        return journal

    def path(self, name: str) -> Path:
        """Return the path of a file of the unfinished data.

        Args:
            name: Name of the file.
        """
        return self.directory / name

    def save(self) -> None:
        """Make the journal durable; the files that it describes must be on disk already."""
        self.journal["request"] = self.request
        files.write_text(self.path(_JOURNAL), json.dumps({**self.journal, _CHECKSUM: _checksum(self.journal)}))

    def abandon(self) -> None:
        """Remove the unfinished work of a run that met an error in its input, unless the work is worth keeping."""
        if self._is_new and time.monotonic() - self._started < _WORTH_SECONDS:
            shutil.rmtree(self.directory)
            if not any(self.destination.iterdir()):
                self.destination.rmdir()

    def publish(self, names: list[str]) -> None:
        """Rename the finished files into the data directory, replacing those there, and remove the workspace.

        Args:
            names: Names of the finished files.
        """
        self.journal["publishing"] = names
        self.save()
        # the manifest first, since a half replaced set must not look whole; then files that the new data does not have
        for name in (manifests.MANIFEST, *_SPLIT_FILES, *_TOKENIZER_FILES):
            if name == manifests.MANIFEST or name not in names:
                (self.destination / name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == manifests.MANIFEST):
            if self.path(name).exists():  # else a killed run renamed it
                os.replace(self.path(name), self.destination / name)
        shutil.rmtree(self.directory)


def _checksum(journal: dict) -> str:
    """Return the SHA-256, in hexadecimal, of a journal."""
    return hashlib.sha256(json.dumps(journal, sort_keys=True).encode()).hexdigest()
