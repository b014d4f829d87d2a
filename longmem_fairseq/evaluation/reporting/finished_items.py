"""Finished items of an evaluation as JSON lines, so that an interrupted run continues where it stopped."""

import hashlib
import json
import os
from typing import Any, Dict, Iterable, Iterator, Tuple

from ...files import parse_json, require_file_place

FILE = "items.jsonl"


class FinishedItems:
    """Results by item, each appended to a file as soon as it is known.

    The first line of the file describes the run; the results of another run are refused.

    Args:
        directory: Path of the directory of the file; made if it does not exist.
        run: Description of all that decides the results, plain JSON types.

    Raises:
        ValueError: The directory has results of another run.
        OSError: The directory cannot be made, or the file cannot be written.
    """

    def __init__(self, directory: str, run: Dict[str, Any]):
        self.path = os.path.join(directory, FILE)
        self._results: Dict[str, Any] = {}
        os.makedirs(directory, exist_ok=True)
        require_file_place(self.path)
        # Written with the first result, so that a run that fails before leaves no file.
        self._unwritten_run = json.loads(json.dumps(run))
        if os.path.exists(self.path):
            self._read(self._unwritten_run)

    def _read(self, run: Dict[str, Any]) -> None:
        with open(self.path, "rb") as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # a line that was being written when the run stopped
            with open(self.path, "r+b") as file:
                file.truncate(whole)
        try:
            first, *entries = map(parse_json, data[:whole].split(b"\n")[:-1])
            saved_run = dict(first["run"])
            self._results = {entry["item"]: entry["result"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not a file of results: remove it, or name another --results-path"
            ) from error
        for name in {**saved_run, **run}:
            if saved_run.get(name) != run.get(name):
                raise ValueError(
                    f"{self.path} has results of another run ({name}: {_short(saved_run.get(name))} there, "
                    f"{_short(run.get(name))} here): name another --results-path, or remove the file"
                )
        self._unwritten_run = None

    def add(self, item: str, result: Any) -> None:
        """Append the result of an item.

        Args:
            item: Name of the item.
            result: Result of plain JSON types.

        Raises:
            OSError: The file cannot be written.
        """
        if self._unwritten_run is not None:
            self._append({"run": self._unwritten_run})
            self._unwritten_run = None
        self._append({"item": item, "result": result})
        self._results[item] = json.loads(json.dumps(result))

    def _append(self, entry: Dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.strerror}): free the disk or change --results-path"
            ) from error

    def __contains__(self, item: str) -> bool:
        return item in self._results

    def __getitem__(self, item: str) -> Any:
        return self._results[item]

    def of(self, items: Iterable[str]) -> Iterator[Tuple[str, Any]]:
        """Iterate over (item, result) of those of some items that are finished."""
        return ((item, self._results[item]) for item in items if item in self._results)


def digest(paths: Iterable[str]) -> str:
    """Return the SHA-256, in hexadecimal, of the contents of files in the given order."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
