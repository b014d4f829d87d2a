"""The exception whose message the preprocessing scripts show to the user."""

import importlib
from types import ModuleType


class InputError(ValueError):
    """An input or option that cannot be used; the message is one sentence with the value, the limit and the option."""


def require_package(package: str, purpose: str) -> ModuleType:
    """Import a package that only some inputs need.

    Args:
        package: Name of the package.
        purpose: Input or option that needs the package, for the message.

    Returns:
        The package.

    Raises:
        InputError: The package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(f"{purpose} needs the Python package {package}: pip install {package}") from None
