"""``longmem_fairseq.data.manifest`` without the rest of the package.

Importing the package registers its models with fairseq, which takes seconds that a script does not have to spend. The
module itself needs numpy alone, so it is loaded from its file.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_NAME = "longmem_fairseq.data.manifest"


def _load() -> ModuleType:
    if _NAME in sys.modules:  # the package is there already; its exceptions must be the same classes
        return sys.modules[_NAME]
    path = Path(__file__).resolve().parent.parent / "longmem_fairseq" / "data" / "manifest.py"
    spec = importlib.util.spec_from_file_location(_NAME, path)
    module = sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


manifest = _load()
