"""A fairseq language model converted to one safetensors file and back is the same model."""

import os

import pytest
import torch

from longmem_fairseq.backbones.loading import load_backbone
from preprocess.convert_safetensors import main, to_fairseq, to_safetensors
from tests.models.checkpoints import load_stock
from tests.models.tiny import VOCABULARY, documents, stock_config, stock_model, write_checkpoint


@pytest.mark.parametrize("model", ["transformer_lm", "alibi_lm"])
@pytest.mark.parametrize("half", [False, True])
def test_there_and_back(tmp_path, model, half):
    stock = stock_model(model)
    path = write_checkpoint(tmp_path / "a.pt", stock, stock_config(model))
    to_safetensors(path, str(tmp_path / "b.safetensors"), half)
    to_fairseq(str(tmp_path / "b.safetensors"), str(tmp_path / "c.pt"))
    assert (tmp_path / "b.safetensors").stat().st_size < os.path.getsize(path)
    loaded, tokens = load_stock(tmp_path / "c.pt", VOCABULARY), documents([20])[0][None]
    with torch.no_grad():
        expected = (stock.half().float() if half else stock)(tokens)[0]
        assert torch.equal(loaded(tokens)[0], expected)
    same = load_backbone(str(tmp_path / "c.pt"), VOCABULARY, 1).fingerprint
    assert (same == load_backbone(path, VOCABULARY, 1).fingerprint) != half


def test_refusals(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "created"),)

    def refusal(*arguments) -> str:
        with pytest.raises(SystemExit) as error:
            main(list(map(str, arguments)))
        return str(error.value)

    file, out = tmp_path / "file", tmp_path / "out"
    torch.save({"model": {}, "cfg": {"model": Payload()}}, file)
    assert "asks for posix.mkdir, which may run code" in refusal(file, f"{out}.safetensors")
    assert not (tmp_path / "created").exists()
    torch.save({"weight": torch.ones(1)}, file)
    assert "is not a fairseq checkpoint: it lacks the weights" in refusal(file, f"{out}.safetensors")
    assert "is not a safetensors file" in refusal(file, f"{out}.pt")
    assert "none.pt" in refusal(tmp_path / "none.pt", f"{out}.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left half-written"
