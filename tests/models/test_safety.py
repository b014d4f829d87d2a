"""No file that is given as a checkpoint can run code, and none that is damaged is read, whatever reads it."""

import os
import pickle
import sys

import pytest
import torch
from fairseq import checkpoint_utils

from longmem_fairseq.backbones.loading import load_backbone
from longmem_fairseq.evaluation.scoring.scorer import Scorer
from longmem_fairseq.hub import LongMem
from longmem_fairseq.released.released_model import load_released
from longmem_fairseq.tasks.checkpoints import DamagedCheckpoint, prepare_restore, read_checkpoint
from preprocess import convert_huggingface, convert_released, convert_safetensors
from tests.models.tiny import VOCABULARY, stock_config, stock_model, write_checkpoint


class Payload:
    """Pickled, it is a call that creates a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(params=["model", "cfg", "extra_state"])
def malicious(request, tmp_path):
    """A checkpoint with a payload in one of its parts."""
    payload = Payload(tmp_path / "created")
    parts = {
        "model": {"decoder.x": payload},
        "cfg": {"_name": None, "model": {**stock_config(), "dropout": payload}},
        "extra_state": {"x": payload},
    }
    path = write_checkpoint(
        tmp_path / "malicious.pt", stock_model(), stock_config(), {request.param: parts[request.param]}
    )
    yield path
    assert not (tmp_path / "created").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "created").exists(), "so it would have been, had the code been run"


def convert(module, *options):
    def read(path, monkeypatch):
        monkeypatch.setattr(sys, "argv", [module.__name__, *options, path, path + ".safetensors"])
        module.main()

    return read


READERS = {
    "fairseq's commands": lambda path, _: checkpoint_utils.load_model_ensemble_and_task([path]),
    "fairseq in Python": lambda path, _: checkpoint_utils.load_model_ensemble([path]),
    "--path": lambda path, _: read_checkpoint(path),
    "--restore-file": lambda path, _: prepare_restore(path, os.path.dirname(path), None, VOCABULARY),
    "--finetune-from-model": lambda path, _: prepare_restore("checkpoint_last.pt", "none", path, VOCABULARY),
    "--pretrained-model-path": lambda path, _: load_backbone(path, VOCABULARY, [1]),
    "load_released": lambda path, _: load_released(path),
    "the hub": lambda path, _: LongMem.from_pretrained(path),
    "evaluations": lambda path, _: Scorer.load(path),
    "convert_released.py": convert(convert_released),
    "convert_safetensors.py": convert(convert_safetensors),
    "convert_huggingface.py --export": convert(convert_huggingface, "--export"),
}


@pytest.mark.parametrize("reader", READERS)
def test_code_is_not_run(malicious, monkeypatch, reader):
    with pytest.raises((ValueError, SystemExit, pickle.UnpicklingError)) as caught:
        READERS[reader](malicious, monkeypatch)
    assert "posix.mkdir" in str(caught.value) or isinstance(caught.value, DamagedCheckpoint)
    assert os.listdir(os.path.dirname(malicious)) == ["malicious.pt"], "nothing is left half-written"


# fairseq's own functions compare no checksums; its commands set up a task, which reads --path before they do.
@pytest.mark.parametrize("reader", [reader for reader in READERS if not reader.startswith("fairseq")])
def test_a_flipped_bit_is_refused(tmp_path, monkeypatch, reader):
    model = stock_model()
    path = write_checkpoint(tmp_path / "model.pt", model, stock_config())
    with open(path, "r+b") as file:
        weights = model.state_dict()["decoder.layers.1.fc1.weight"].numpy().tobytes()
        place = file.read().index(weights) + 401
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 2]))
    with pytest.raises((ValueError, SystemExit), match="it is damaged: the checksum of its part .+ is wrong"):
        READERS[reader](path, monkeypatch)
    assert os.listdir(tmp_path) == ["model.pt"]
