"""The exception whose message the preprocessing scripts show to the user."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """An input or option that cannot be used; the message is one sentence with the value, the limit and the option."""


def require_package(package: str, purpose: str, extra: str | None = None) -> ModuleType:
    """Import a package that only some inputs need.

    Args:
        package: Name of the package.
        purpose: Input or option that needs the package, for the message.
        extra: Extra of this package that contains the other, for the message; None for one that needs no mention.

    Returns:
        The package.

    Raises:
        InputError: The package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        alternative = "" if extra is None else f", or install longmem_fairseq with its extra {extra}"
        raise InputError(f"{purpose} needs the Python package {package}: pip install {package}{alternative}") from None
