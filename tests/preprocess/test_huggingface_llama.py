"""Models of the Llama family from Hugging Face: the same logits as transformers', and back."""

import json

import pytest
import torch
import transformers
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.data import Dictionary
from safetensors.torch import load_file, save_file

from longmem_fairseq.backbones.loading import load_backbone
from preprocess.convert_huggingface import from_huggingface, to_huggingface
from preprocess.errors import InputError

V, PAD, EOS, FIRST = 50, 1, 2, 4  # rows of the embedding; ids of padding, end-of-sentence and the first token
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
# name: (class of the configuration, settings that differ)
MODELS = {
    "Llama 2": (transformers.LlamaConfig, {"num_key_value_heads": 4, "head_dim": 6}),
    "Llama 3": (transformers.LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "Llama with YaRN and biases": (transformers.LlamaConfig, {"rope_parameters": YARN, "attention_bias": True}),
    "Llama, linear": (transformers.LlamaConfig, {"rope_parameters": LINEAR, "rms_norm_eps": 1e-3}),
    "SmolLM2": (transformers.LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 6}),
    "Mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "Mistral with a window": (transformers.MistralConfig, {"sliding_window": 32}),
    "Qwen2": (transformers.Qwen2Config, {"head_dim": 6, "tie_word_embeddings": True}),
    "Qwen3": (transformers.Qwen3Config, {"eos_token_id": [2, 7], "bos_token_id": None}),
}


def huggingface_model(name, **changes):
    """A model with random weights in evaluation mode; all of them differ from what they start as."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**SIZES, **settings, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.eval()


def convert(model, tmp_path, **options):
    model.save_pretrained(tmp_path / "hf", **options)
    from_huggingface(tmp_path / "hf", tmp_path / "fairseq")
    dictionary = Dictionary.load(str(tmp_path / "fairseq" / "dict.txt"))
    return load_backbone(str(tmp_path / "fairseq" / "checkpoint.pt"), dictionary, memory_layers=[1])


def tokens(B=2, T=31):
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_equals_transformers(tmp_path, name):
    """A whole window, rows padded at either end, and one token at a time; then the model that comes back."""
    model = huggingface_model(name)
    backbone, x = convert(model, tmp_path), tokens()
    decoder, expected = backbone.decoder, model(x).logits

    def check(logits, reference):
        torch.testing.assert_close(logits[..., FIRST : FIRST + V], reference, rtol=0, atol=1e-4)

    encoded = backbone.encode(x + FIRST)
    check(backbone.output(backbone.final_hidden(encoded)), expected)
    for columns in (slice(5, None), slice(0, 26)):
        padded = torch.full_like(x, PAD)
        padded[0, columns], padded[1] = x[0, columns] + FIRST, x[1] + FIRST
        logits = decoder(padded)[0]
        check(logits[:1, columns], model(x[:1, columns]).logits)
        check(logits[1:], expected[1:])
    state = {}
    steps = [decoder(x[:, : t + 1] + FIRST, incremental_state=state)[0] for t in range(x.size(1))]
    check(torch.cat(steps, dim=1), expected)

    to_huggingface(tmp_path / "fairseq" / "checkpoint.pt", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(again.eval()(x).logits, expected)
    config, original = again.config, model.config
    end = original.eos_token_id[0] if isinstance(original.eos_token_id, list) else original.eos_token_id
    assert (config.bos_token_id or end, config.eos_token_id) == (original.bos_token_id or end, end)


@torch.no_grad()
def test_a_document_starts_as_the_model_starts_texts(tmp_path):
    """fairseq's ``</s>`` before a document is the model's first token, and its score that of the model's last one."""
    model = huggingface_model("Llama 3")
    backbone, x = convert(model, tmp_path), tokens()
    inputs = torch.cat([torch.full((2, 1), EOS), x + FIRST], dim=1)
    expected = model(torch.cat([torch.full((2, 1), model.config.bos_token_id), x], dim=1)).logits
    logits = backbone.output(backbone.final_hidden(backbone.encode(inputs)))
    torch.testing.assert_close(logits[..., FIRST : FIRST + V], expected, rtol=0, atol=1e-4)
    assert torch.equal(logits[..., EOS], logits[..., FIRST + model.config.eos_token_id])
    (stock,), _, task = load_model_ensemble_and_task(
        [str(tmp_path / "fairseq" / "checkpoint.pt")], arg_overrides={"data": str(tmp_path / "fairseq")}
    )
    assert task.args._name == "language_modeling"
    torch.testing.assert_close(stock.eval()(inputs)[0], logits, rtol=0, atol=1e-4)


def test_shards_and_half_precision(tmp_path):
    """bfloat16 weights stay as they are in the checkpoint, from one file or several."""
    model = huggingface_model("SmolLM2").to(torch.bfloat16)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    convert(model, whole)
    convert(model, parts, max_shard_size="8KB")
    assert len(list((parts / "hf").glob("*.safetensors"))) > 2
    weights, others = (torch.load(path / "fairseq" / "checkpoint.pt")["model"] for path in (whole, parts))
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    size = sum(x.numel() for x in model.parameters()) * 2
    assert (whole / "fairseq" / "checkpoint.pt").stat().st_size < size + FIRST * 24 * 4 + 50_000


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mixtral"}, r"model_type=mixtral in config.json is not supported \(a mixture of experts\)"),
        (
            {"model_type": "deepseek_v3"},
            r"\(multi-head latent attention\); supported are gpt2",
        ),
        ({"model_type": "qwen2_5_vl"}, r"\(vision\)"),
        ({"model_type": "gemma3"}, r"\(layers with sliding windows\)"),
        ({"model_type": "unheard_of"}, "model_type=unheard_of in config.json is not supported; supported are"),
        ({"num_local_experts": 8}, "num_local_experts=8 in config.json: a mixture of experts is not supported"),
        ({"vision_config": {"depth": 1}}, "a vision model is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu in config.json is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true in config.json"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "scaling 'dynamic' are not supported: default",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "the llama3 scaling .* lacks 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"eos_token_id": 50}, "eos_token_id=50 in config.json is not a token of the vocabulary of 50"),
        ({"eos_token_id": None}, "eos_token_id=None in config.json"),
        ({"bos_token_id": 77}, "bos_token_id=77 in config.json is not a token"),
        ({"hidden_size": 26}, r"embed_tokens.weight has shape \(50, 24\), but config.json requires \(50, 26\)"),
    ],
)
def test_refused(tmp_path, changes, message):
    huggingface_model("Llama 3").save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=message) as error:
        from_huggingface(tmp_path / "hf", tmp_path / "fairseq")
    assert "\n" not in str(error.value) and not (tmp_path / "fairseq").exists()


def test_an_adapter_and_quantized_weights_are_refused(tmp_path):
    huggingface_model("Llama 3").save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight is torch.int8, so the weights are quantized"):
        from_huggingface(tmp_path / "hf", tmp_path / "fairseq")
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter .*: merge it into its base model first"):
        from_huggingface(tmp_path / "hf", tmp_path / "fairseq")
    assert not (tmp_path / "fairseq").exists()


def test_what_no_huggingface_model_has_is_not_exported(tmp_path):
    convert(huggingface_model("Qwen2"), tmp_path)
    path = tmp_path / "fairseq" / "checkpoint.pt"
    state = torch.load(path)
    state["cfg"]["model"]["qk_norm"] = True
    for i in range(3):
        for letter in "qk":
            state["model"][f"decoder.layers.{i}.self_attn.{letter}_norm.weight"] = torch.ones(6)
    torch.save(state, path)
    with pytest.raises(InputError, match="no model type of Hugging Face has these parts together: qkv_bias=True"):
        to_huggingface(path, tmp_path / "back")
