"""Data of evaluations as files that anyone may have written: text, and values of the expected type."""

from typing import Any, List

from ..text import read_text


def read_file(path: str) -> str:
    """Read a UTF-8 text.

    Args:
        path: Path of the file.

    Raises:
        ValueError: The file is not UTF-8; the message names it.
        OSError: The file cannot be read.
    """
    try:
        return read_text(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def text_of(value: Any) -> str:
    """Return a value of a record that must be text.

    Args:
        value: Value as JSON gives it.

    Raises:
        TypeError: It is not text.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not text")
    return value


def texts_of(values: Any) -> List[str]:
    """Return a value of a record that must be a list of texts.

    Args:
        values: Value as JSON gives it.

    Raises:
        TypeError: It is not a list of texts.
    """
    if not isinstance(values, list):
        raise TypeError(f"{values!r:.40} is not a list")
    return [text_of(value) for value in values]
