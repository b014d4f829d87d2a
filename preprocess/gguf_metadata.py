"""The metadata of a GGUF file: values by their names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from preprocess.errors import InputError


class GgufMetadata:
    """Values of a GGUF file by their names.

    Args:
        path: Path of the file, for messages.
        values: Values by their names; lists for arrays.
    """

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path = path
        self._values = values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value.

        Args:
            name: Name of the value.
            default: Value to return for a missing one.
        """
        return self._values.get(name, default)

    def require(self, name: str) -> Any:
        """Return a value that must be there.

        Args:
            name: Name of the value.

        Raises:
            InputError: The file does not hold it.
        """
        if name not in self._values:
            raise InputError(f"{self.path} lacks {name} in its metadata: convert the model to GGUF again")
        return self._values[name]

    def refuse(self, name: str, supported: Iterable[str]) -> InputError:
        """Return the error for a value that is not supported.

        Args:
            name: Name of the value.
            supported: Values that are supported.
        """
        return InputError(
            f"{self.path}: {name}={self.get(name)} is not supported; supported are {', '.join(supported)}"
        )
