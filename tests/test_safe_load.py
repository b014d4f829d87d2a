"""Which checkpoints torch's safe loader accepts, and when."""

import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from longmem_fairseq.safe_load import allow_namespaces, load_safely


@pytest.fixture
def checkpoint(tmp_path):
    torch.save({"args": Namespace(layers=2)}, tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def test_a_namespace_is_plain_data(checkpoint):
    before = torch.serialization.get_safe_globals()
    assert load_safely(str(checkpoint))["args"].layers == 2
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_what_was_allowed_stays_allowed(checkpoint):
    """fairseq reads checkpoints after the package has read others."""
    before = torch.serialization.get_safe_globals()
    try:
        allow_namespaces()
        load_safely(str(checkpoint))
        assert torch.load(checkpoint, weights_only=True)["args"].layers == 2
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_importing_the_package_allows_nothing():
    code = "import longmem_fairseq as _, torch; print([x.__name__ for x in torch.serialization.get_safe_globals()])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Namespace" not in result.stdout.splitlines()[-1]
