"""Modules of ``longmem_fairseq`` that need no torch, imported without the rest of the package.

Importing the package registers its models with fairseq and takes seconds, which neither a worker process nor a script
that only writes data has to spend.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = "longmem_fairseq"
_DIRECTORY = Path(__file__).resolve().parent.parent / _PACKAGE
_FOLDERS = {_PACKAGE: _DIRECTORY, f"{_PACKAGE}.data": _DIRECTORY / "data"}


def _import_alone(name: str) -> ModuleType:
    """Import a module without running the ``__init__`` of the packages that it is in.

    For the time of the import empty packages take their places. The module itself stays in ``sys.modules``, so a later
    import of the whole package uses it, and its exceptions are the same classes everywhere.

    Args:
        name: Full name of a module that imports nothing but light modules.

    Returns:
        The module.
    """
    if _PACKAGE in sys.modules or name in sys.modules:
        return importlib.import_module(name)
    for package, directory in _FOLDERS.items():
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(directory)]
    try:
        return importlib.import_module(name)
    finally:
        for package in _FOLDERS:
            del sys.modules[package]


files = _import_alone(f"{_PACKAGE}.files")
manifest = _import_alone(f"{_PACKAGE}.data.manifest")
