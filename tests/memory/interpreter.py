"""Whether Triton's kernels can run here: on a GPU, or on the CPU in Triton's interpreter (see tests/conftest.py)."""

import importlib.util
import os

import pytest
import torch

installed = importlib.util.find_spec("triton") is not None
INTERPRETED = installed and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
needs_triton = pytest.mark.skipif(
    not (INTERPRETED or (installed and DEVICE.type == "cuda")), reason="Triton is not installed, or finds no GPU"
)
needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="Triton's interpreter is not used: see tests/conftest.py"
)
