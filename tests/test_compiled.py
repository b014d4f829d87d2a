"""Triton's kernels compile for GPUs, with the options that they are launched with, on machines without one."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.repository import ROOT

SHARED = {"80": 163 * 1024, "90": 227 * 1024}  # bytes of shared memory that a program may have
# Capability, launches and width of a head, and the number of kernels.
CASES = {"80:search:64": 4, "90:search:64": 4, "90:search:128": 4, "90:attention:64": 2, "90:causal:64": 4}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compiled", *CASES]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == sum(CASES.values())
    assert all(kernel["shared"] <= SHARED[kernel["capability"]] for kernel in kernels), kernels
