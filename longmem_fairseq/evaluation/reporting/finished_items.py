"""Finished items of an evaluation as JSON lines, so that a run that was interrupted goes on where it stood."""

import hashlib
import json
import os
from typing import Any, Dict, Iterable, Iterator, Tuple

FILE = "items.jsonl"


class Records:
    """Results by item, each written as soon as it is there.

    The file's first line says what run it is of; what is found there of another run is not mixed in.

    Args:
        directory: made if need be.
        run: all that decides the results, plain JSON types.

    Raises:
        ValueError: the directory has results of another run.
        OSError: it cannot be made, or the file cannot be written.
    """

    def __init__(self, directory: str, run: Dict[str, Any]):
        self.path = os.path.join(directory, FILE)
        self._found: Dict[str, Any] = {}
        os.makedirs(directory, exist_ok=True)
        run = json.loads(json.dumps(run))
        self._run = run  # written with the first result, so that a run that fails before leaves nothing
        if os.path.exists(self.path):
            self._read(run)

    def _read(self, run: Dict[str, Any]) -> None:
        with open(self.path, "rb") as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # a line that was being written when the run ended
            with open(self.path, "r+b") as file:
                file.truncate(whole)
        lines = data[:whole].splitlines()
        try:
            first, *others = (json.loads(line) for line in lines)
            theirs = first["run"]
            self._found = {entry["item"]: entry["result"] for entry in others}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no file of results: remove it, or name another --results-path") from error
        for name in {**theirs, **run}:
            if theirs.get(name) != run.get(name):
                raise ValueError(
                    f"{self.path} has results of another run ({name}: {_short(theirs.get(name))} there, "
                    f"{_short(run.get(name))} here): name another --results-path, or remove the file"
                )
        self._run = None

    def add(self, item: str, result: Any) -> None:
        """Keep the result of an item, plain JSON types."""
        if self._run is not None:
            self._append({"run": self._run})
            self._run = None
        self._append({"item": item, "result": result})
        self._found[item] = json.loads(json.dumps(result))

    def _append(self, entry: Dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.strerror}): free the disk or change --results-path"
            ) from error

    def __contains__(self, item: str) -> bool:
        return item in self._found

    def __getitem__(self, item: str) -> Any:
        return self._found[item]

    def of(self, items: Iterable[str]) -> Iterator[Tuple[str, Any]]:
        """(item, result) of those items that are finished."""
        return ((item, self._found[item]) for item in items if item in self._found)


def digest(paths: Iterable[str]) -> str:
    """SHA-256, in hexadecimal, of the contents of files in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
