"""Which checkpoints torch's safe loader accepts, and when."""

import pickle
import re
import subprocess
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch

from longmem_fairseq.safe_load import allow_plain_data, load_safely


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
        allow_plain_data()
        load_safely(str(checkpoint))
        assert torch.load(checkpoint, weights_only=True)["args"].layers == 2
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_importing_the_package_allows_nothing():
    code = "import longmem_fairseq as _, torch; print([x.__name__ for x in torch.serialization.get_safe_globals()])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Namespace" not in result.stdout.splitlines()[-1]


def test_numbers_of_numpy_are_plain_data(tmp_path):
    numbers = [np.float64(2.5), np.float32(0.1), np.int64(-3), np.uint8(7), np.bool_(True), np.complex64(1j)]
    torch.save({"best": numbers, "model": torch.ones(2)}, tmp_path / "checkpoint.pt")
    restored = load_safely(str(tmp_path / "checkpoint.pt"))["best"]
    assert restored == numbers and [type(x) for x in restored] == [type(x) for x in numbers]
    for other in (np.str_("x"), np.void(b"x"), np.array([1.0]), np.dtype("O"), np.datetime64("2020-01-01")):
        torch.save({"best": other}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="may run code|damaged"):
            load_safely(str(tmp_path / "other.pt"))


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_either_numpy(module, tmp_path):
    """numpy 2 has moved the function that a pickle names."""
    data = pickle.dumps(np.float64(2.5), protocol=2)
    written = re.search(rb"numpy\.\w+\.multiarray", data)[0]
    torch.save({"best": "number"}, tmp_path / "checkpoint.pt")
    with zipfile.ZipFile(tmp_path / "checkpoint.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, data.replace(written, module.encode()) if name.endswith("data.pkl") else content)
    assert load_safely(str(tmp_path / "checkpoint.pt")) == 2.5


def test_any_flipped_bit_is_noticed(tmp_path):
    """In tensors, where no reader would, and in the archive around them."""
    weights = torch.arange(64.0)
    torch.save({"model": {"fc1.weight": weights}}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    begin = whole.index(weights.numpy().tobytes())
    for place in range(begin, begin + 256, 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "damaged.pt").write_bytes(damaged)
        for mapped in (False, True):
            with pytest.raises(ValueError, match=r"it is damaged: the checksum of its part \S+data/0 is wrong"):
                load_safely(str(tmp_path / "damaged.pt"), mapped)
