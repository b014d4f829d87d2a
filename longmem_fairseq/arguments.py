"""Checks of arguments of the Python API: what is not a text or a path is refused by a sentence, not taken for one."""

import os
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any, List, Type, Union

_ADVICE = {
    bytes: ": decode it first, as by .decode('utf-8')",
    PurePath: ": read it first, as by .read_text(encoding='utf-8')",
    list: ": call it once for each text",
    tuple: ": call it once for each text",
}


def require_text(function: str, value: Any, part: str = "a text") -> str:
    """Return a text.

    Args:
        function: Name of the function that was called, for the message.
        value: Argument of the function, which must be a string.
        part: Words for the argument.

    Raises:
        TypeError: It is not a string.
        ValueError: It has characters that UTF-8 cannot encode.
    """
    if not isinstance(value, str):
        advice = next((words for kind, words in _ADVICE.items() if isinstance(value, kind)), "")
        raise TypeError(f"{function} takes {part} (str), not {_kind(value)}{advice}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{function} received a text that is not valid Unicode: its character {error.start} is a lone surrogate "
            f"({ascii(value[error.start])}); replace it first"
        ) from None
    return value


def require_texts(function: str, value: Any) -> List[str]:
    """Return a list of texts.

    Args:
        function: Name of the function that was called, for the message.
        value: Argument of the function: a list or tuple of strings.

    Raises:
        TypeError: It is not.
        ValueError: A text has characters that UTF-8 cannot encode.
    """
    if not isinstance(value, (list, tuple)):
        return [require_text(function, value, "a text or a list of texts")]
    for number, text in enumerate(value):
        if not isinstance(text, str):
            raise TypeError(f"{function} takes a list of texts (str), but number {number} of it is {_kind(text)}")
    return [require_text(function, text) for text in value]


def require_path(function: str, value: Any) -> str:
    """Return a path as a string.

    Args:
        function: Name of the function that was called, for the message.
        value: Argument of the function: a string or a ``pathlib.Path``.

    Raises:
        TypeError: It is not.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise TypeError(f"{function} takes the path of a file (str or pathlib.Path), not {_kind(value)}")
    return path


def require_number(name: str, value: Any, kind: Union[Type[int], Type[float]]) -> None:
    """Refuse what is not a number of a kind; numbers of numpy are.

    Args:
        name: Name of the argument, for the message.
        value: Value of the argument.
        kind: ``int`` for whole numbers, ``float`` for any.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, Integral if kind is int else Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {_kind(value)}: it must be a {'whole number' if kind is int else 'number'}")


def _kind(value: Any) -> str:
    """Return words for a value of a wrong type."""
    return "None" if value is None else f"{type(value).__name__} ({repr(value)[:40]})"
