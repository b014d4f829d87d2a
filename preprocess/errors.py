"""The one exception the preprocessing scripts show to their user."""

import importlib
from types import ModuleType


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence naming the value, the limit and the option."""


def need(module: str, purpose: str) -> ModuleType:
    """Import a module that only some inputs need; raises InputError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{purpose} needs the Python package {module}: pip install {module}") from None
