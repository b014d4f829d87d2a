"""Test the comparison with transformers as a whole command on a tiny Llama, and its refusals."""

import json

import pytest

from examples.benchmark import huggingface_speed
from tests.examples.huggingface_models import source_texts, write_llama
from tests.preprocess import gguf_files
from tests.preprocess.test_gguf_tokenizer import bpe_metadata, original_tokenizer


def test_a_directory_in_both_precisions(tmp_path, capsys):
    tiny = "--segment 24 --prompt 12 --new-tokens 8 --rounds 2 --batch 2".split()
    outputs = ["--json", str(tmp_path / "speed.json"), "--markdown", str(tmp_path / "speed.md")]
    huggingface_speed.main(["--model", str(write_llama(tmp_path / "model", 64)), *tiny, *outputs])
    result = json.loads((tmp_path / "speed.json").read_text())
    names = [(row["dtype"], row["implementation"]) for row in result["rows"]]
    assert names == [(d, name) for d in ("float32", "bfloat16") for name in ("this project", "transformers")]
    for row, reference in (result["rows"][:2], result["rows"][2:]):
        assert row["prefill_ratio"] == pytest.approx(row["tokens_per_second"] / reference["tokens_per_second"])
        assert row["token_ratio"] == pytest.approx(reference["token_ms"] / row["token_ms"])
    # Both compute the same model: in float32 to the last digits, and the same continuation.
    assert result["agreement"]["float32"]["largest_logit_difference"] < 1e-5
    assert result["agreement"]["float32"]["same_tokens"] == 8
    assert 0 < result["agreement"]["bfloat16"]["largest_logit_difference"] < 0.05
    assert "8 of 8 generated tokens are the same" in (tmp_path / "speed.md").read_text()
    assert "| float32 | this project |" in capsys.readouterr().out


def test_a_gguf(tmp_path):
    """transformers gets the directory that the GGUF is exported to."""
    model = gguf_files.tiny("llama", vocab_size=800, num_hidden_layers=1)
    metadata = gguf_files.metadata_of(
        model, **bpe_metadata(original_tokenizer("smollm", list(source_texts().values())), "smollm")
    )
    path = gguf_files.write(tmp_path / "model.gguf", metadata, gguf_files.tensors_of(model, gguf_files.F32))
    arguments = "--segment 16 --prompt 8 --new-tokens 4 --rounds 1 --dtypes float32".split()
    result = huggingface_speed.run(huggingface_speed.parse(["--model", str(path), *arguments]))
    agreement = result["agreement"]["float32"]
    assert agreement["largest_logit_difference"] < 1e-4 and agreement["same_tokens"] == 4


def test_refusals(tmp_path):
    with pytest.raises(SystemExit, match="config.json cannot be read"):
        huggingface_speed.main(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="--prompt 1 is less than 2"):
        huggingface_speed.parse(["--model", str(tmp_path), "--prompt", "1"])
