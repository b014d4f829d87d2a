"""Models converted to safetensors files are the same models: language models and back, LongMem models."""

import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from longmem_fairseq.backbones.loading import load_backbone
from longmem_fairseq.hub import LongMem
from preprocess.convert_safetensors import main, to_directory, to_fairseq, to_safetensors
from tests.models.checkpoints import load_stock
from tests.models.tiny import VOCABULARY, documents, stock_config, stock_model, write_checkpoint
from tests.text_models import sentencepiece_model


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
    same = load_backbone(str(tmp_path / "c.pt"), VOCABULARY).fingerprint
    assert (same == load_backbone(path, VOCABULARY).fingerprint) != half


@pytest.fixture(scope="module")
def longmem(tmp_path_factory):
    """Directory of a LongMem checkpoint, its dictionary and its tokenizer."""
    return sentencepiece_model(tmp_path_factory.mktemp("longmem"))


@pytest.mark.parametrize("half", [False, True])
def test_a_model_directory_is_the_checkpoint(longmem, tmp_path, half):
    main([str(longmem / "model.pt"), str(tmp_path / "directory"), *(["--half"] if half else [])])
    assert sorted(path.name for path in (tmp_path / "directory").iterdir()) == [
        *("backbone.safetensors", "config.json", "dict.txt", "sentencepiece.model", "side_network.safetensors")
    ]
    expected = LongMem.from_pretrained(str(longmem / "model.pt"), device="cpu")
    if half:
        expected.model.half().float()
    loaded = LongMem.from_pretrained(str(tmp_path / "directory"), device="cpu")
    text = "A text of more than one segment, of which the first is in the memory when the second is read. " * 4
    assert loaded.task.args.tokens_per_sample == expected.task.args.tokens_per_sample < len(loaded.encode(text))
    assert torch.equal(loaded.score(text).log_probabilities, expected.score(text).log_probabilities)
    backbone = tmp_path / "directory" / "backbone.safetensors"
    weights = load_file(backbone)
    weights["decoder.backbone.decoder.layers.0.fc1.bias"] += 1
    save_file(weights, backbone, {"format": "pt"})
    config = json.loads((tmp_path / "directory" / "config.json").read_text())
    del config["sha256"]  # as in a directory of an earlier version
    (tmp_path / "directory" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"backbone.safetensors is not the backbone .* it has fingerprint \w{12}, and"):
        LongMem.from_pretrained(str(tmp_path / "directory"), device="cpu")


def test_a_full_disk_is_one_sentence(tmp_path):
    model, soft_and_hard = sentencepiece_model(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    main([str(model / "backbone.pt"), str(tmp_path / "whole.safetensors")])
    before = sorted(os.listdir(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, soft_and_hard[1]))
    try:
        for source, name in (("backbone.pt", "a.safetensors"), ("whole.safetensors", "a.pt"), ("model.pt", "model")):
            with pytest.raises(SystemExit, match="cannot be written: .*File too large"):
                main([str(tmp_path / source), str(tmp_path / name)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
    assert sorted(os.listdir(tmp_path)) == before
    for name in ("none/a.safetensors", "none/a.pt"):
        with pytest.raises(SystemExit, match="the directory .*none does not exist"):
            main([str(tmp_path / "backbone.pt"), str(tmp_path / name)])


def flip_last_bit(path):
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["backbone", "side_network"])
def test_a_damaged_model_directory_is_refused(longmem, tmp_path, name):
    to_directory(str(longmem / "model.pt"), str(tmp_path))
    flip_last_bit(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=rf"{name}.safetensors is not as it was written, its SHA-256 differs"):
        LongMem.from_pretrained(str(tmp_path), device="cpu")


def test_a_damaged_file_is_refused(longmem, tmp_path):
    to_safetensors(str(longmem / "model.pt"), str(tmp_path / "model.safetensors"))
    flip_last_bit(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="its checksum .crc32. differs"):
        to_fairseq(str(tmp_path / "model.safetensors"), str(tmp_path / "model.pt"))
    shutil.copytree(longmem, tmp_path / "directory")
    to_directory(str(longmem / "model.pt"), str(tmp_path / "directory"))
    config = json.loads((tmp_path / "directory" / "config.json").read_text())
    del config["sha256"]  # as in a directory that was put together by hand
    (tmp_path / "directory" / "config.json").write_text(json.dumps(config))
    os.replace(tmp_path / "model.safetensors", tmp_path / "directory" / "backbone.safetensors")
    with pytest.raises(ValueError, match="its checksum .crc32. differs"):
        LongMem.from_pretrained(str(tmp_path / "directory"), device="cpu")


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
    assert "asks for posix.mkdir, which may run code" in refusal(file, out)
    assert not (tmp_path / "created").exists()
    torch.save({"weight": torch.ones(1)}, file)
    assert "is not a fairseq checkpoint: it lacks the weights" in refusal(file, f"{out}.safetensors")
    assert "or not a safetensors file" in refusal(file, f"{out}.pt")
    assert "none.pt" in refusal(tmp_path / "none.pt", f"{out}.safetensors")
    assert "none.pt" in refusal(tmp_path / "none.pt", out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left half-written"
