"""``longmem_fairseq.data.manifest`` without the rest of the package.

Importing the package registers its models with fairseq, which takes seconds that a script does not have to spend. The
modules here need numpy alone, so they are loaded from their files.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent.parent / "longmem_fairseq"


def _load(name: str) -> ModuleType:
    """Load a module of the package from its file, unless it is loaded: its exceptions must be the same classes."""
    full_name = f"longmem_fairseq.{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, _PACKAGE.joinpath(*name.split(".")).with_suffix(".py"))
        module = sys.modules[full_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full_name]


_load("files")  # the manifest imports it
mmap_index = _load("data.mmap_index")
manifest = _load("data.manifest")
