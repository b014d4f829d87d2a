"""Test the command that writes the real keys and queries of a text."""

import torch
from safetensors.torch import load_file

from longmem_fairseq.hub import LongMem
from tests.examples.commands import run_example
from tests.text_models import sentencepiece_model


def test_real_keys(tmp_path):
    directory = sentencepiece_model(tmp_path, retrieval_layer_index=1)
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / name).write_text(f"The text {name} that is memorized and read.\n" * 9)
    done = run_example(
        "benchmark.real_keys",
        "--path",
        directory,
        "--text",
        tmp_path / "texts",
        "--tokens",
        90,
        "--queries",
        20,
        "--chunk-size",
        3,
        "--output",
        tmp_path / "keys.safetensors",
    )
    assert done.returncode == 0, done.stderr
    model = LongMem.from_pretrained(str(directory), memory_size=90, chunk_size=3, k=48, device="cpu")
    tensors, eos = load_file(tmp_path / "keys.safetensors"), torch.tensor([model.task.dictionary.eos()])
    texts = [model.encode((tmp_path / "texts" / name).read_text()) for name in "ab"]
    tokens = torch.cat([eos, texts[0], eos, texts[1]])
    keys = model.model.decoder.backbone.encode_for_memory(tokens[: model.task.args.tokens_per_sample][None]).keys[0]
    chunks = keys.size(1) // 3
    means = keys[:, : 3 * chunks].unflatten(1, (chunks, 3)).mean(dim=2)
    assert tensors["means"].shape == (keys.size(0), 30, keys.size(2)) and tensors["queries"].shape[1] == 20
    torch.testing.assert_close(tensors["means"][:, :chunks], means)
    done = run_example(
        "benchmark.real_keys",
        "--path",
        directory,
        "--text",
        tmp_path / "texts" / "a",
        "--tokens",
        9000,
        "--output",
        tmp_path / "no",
    )
    assert done.returncode == 1 and "but 10,024 are needed: name more with --text" in done.stderr
    assert not (tmp_path / "no").exists()
