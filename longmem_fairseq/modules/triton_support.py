"""Whether Triton kernels can be built and run on this machine."""

import functools
import importlib.util
import os
import shutil
from typing import Optional

import torch


@functools.lru_cache(maxsize=None)
def missing_triton() -> Optional[str]:
    """Return what is missing to build and run Triton kernels, or None: Triton, a C compiler, a GPU of sm_70 or up.

    The C compiler builds the functions that launch the kernels.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang"))):
        return "Triton finds no C compiler"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() < (7, 0):
        return f"{torch.cuda.get_device_name()} is older than what Triton supports"
    return None
