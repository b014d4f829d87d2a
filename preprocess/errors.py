"""The exception whose message the preprocessing scripts show to the user."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """An input or option that cannot be used; the message is one sentence with the value, the limit and the option."""


def require_package(module: str, purpose: str, package: str = "", extra: str = "") -> ModuleType:
    """Import a package that only some inputs need.

    Args:
        module: Name of the package, or of a module in it.
        purpose: Input or option that needs the package, for the message.
        package: Name by which pip installs the package, if it is not that of the module.
        extra: Extra of longmem_fairseq that contains the package, for the message; empty for one that needs no mention.

    Returns:
        The module.

    Raises:
        InputError: The package is not installed, or does not fit the others.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = package or module
        more = f", or install longmem_fairseq with its extra {extra}" if extra else ""
        raise InputError(f"{purpose} needs the Python package {package}: pip install {package}{more}") from None
    except ImportError as error:
        raise InputError(f"{purpose} needs {module}, which cannot be imported: {error}") from None
