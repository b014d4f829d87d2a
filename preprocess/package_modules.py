"""Modules of ``longmem_fairseq`` that need no torch, loaded without the rest of the package.

Importing the package registers its models with fairseq and takes seconds, which neither a worker process nor a script
that only writes data has to spend.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent.parent / "longmem_fairseq"


def _load(name: str) -> ModuleType:
    """Load a module from its file, unless the package or another caller did: its exceptions must be the same classes.

    Args:
        name: Name of the module inside the package; modules of the package that it imports must be loaded before.

    Returns:
        The module.
    """
    full_name = f"longmem_fairseq.{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, _PACKAGE.joinpath(*name.split(".")).with_suffix(".py"))
        module = sys.modules[full_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full_name]


files = _load("files")
mmap_index = _load("data.mmap_index")
manifest = _load("data.manifest")
json_tokenizer = _load("text.json_tokenizer")
sentence_pieces = _load("text.sentence_pieces")
