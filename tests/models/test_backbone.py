"""The frozen backbone: the same numbers as fairseq's own decoder, and nothing that changes it."""

import copy

import pytest
import torch
from fairseq.utils import get_available_activation_fns
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.backbones.loading import BackboneError, backbone_fingerprint, load_backbone
from tests.models.tiny import LAYERS, POSITIONS, VOCABULARY, stock_config, stock_model, write_checkpoint

M = 2  # the memory layer

VARIANTS = {
    "learned positions": {},
    "sinusoidal positions": {"decoder_learned_pos": False},
    "no positions": {"no_token_positional_embeddings": True},
    "scaled embeddings off": {"no_scale_embedding": True},
    "untied output": {"share_decoder_input_output_embed": False},
    "narrow embeddings": {"decoder_input_dim": 8, "decoder_output_dim": 8},
    "narrow input": {"decoder_input_dim": 8, "share_decoder_input_output_embed": False},
    "no final norm": {"no_decoder_final_norm": True},
    "normalized embeddings": {"layernorm_embedding": True},
    "NormFormer": {"scale_attn": True, "scale_fc": True, "scale_heads": True, "scale_resids": True},
    "memory layer on top": {"decoder_layers": M + 1},
    **{name: {"activation_fn": name} for name in get_available_activation_fns()},
}


@pytest.fixture
def load(tmp_path):
    """Build a stock model and load it as a backbone: (stock model, backbone)."""

    def load(model="transformer_lm", **changes):
        stock = stock_model(model, **changes)
        path = write_checkpoint(tmp_path / "backbone.pt", stock, stock_config(model, **changes))
        return stock, load_backbone(path, VOCABULARY, [M])

    return load


def tokens(B=3, T=11, seed=0):
    return torch.randint(4, len(VOCABULARY), (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_fairseqs_decoder(load, variant):
    stock, backbone = load(**VARIANTS[variant])
    x = tokens()
    with torch.no_grad():
        logits, extra = stock(x)
    encoded = backbone(x)
    assert len(encoded.hidden) == len(extra["inner_states"])
    for actual, expected in zip(encoded.hidden, extra["inner_states"]):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    features = encoded.hidden[-1].transpose(0, 1)
    if stock.decoder.layer_norm is not None:
        features = stock.decoder.layer_norm(features)
    torch.testing.assert_close(backbone.output(features), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["alibi_lm", "llama_lm"])
def test_equals_a_model_of_this_package(load, model):
    stock, backbone = load(model)
    x = tokens()
    with torch.no_grad():
        states = stock(x)[1]["inner_states"]
    for actual, expected in zip(backbone(x).hidden, states):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # fairseq's own masks
def test_padding_behind_a_row_changes_nothing(load):
    stock, backbone = load()
    x = tokens()
    x[1, 6:] = VOCABULARY.pad()
    with torch.no_grad():
        expected = stock(x)[1]["inner_states"]
    encoded, short = backbone(x), backbone(x[:, :6])
    for actual, stocks, cut in zip(encoded.hidden, expected, short.hidden):
        torch.testing.assert_close(actual[:6], stocks[:6], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual[:6], cut, rtol=1e-4, atol=1e-4)
        assert actual.isfinite().all()


def test_keys_and_values_are_the_memory_layers_projections(load):
    _, backbone = load()
    encoded = backbone(tokens())
    layer = backbone.decoder.layers[M]
    x = layer.self_attn_layer_norm(encoded.hidden[M])  # (T, B, D)
    for actual, projection in ((encoded.keys, layer.self_attn.k_proj), (encoded.values, layer.self_attn.v_proj)):
        y = projection(x)
        for head in range(backbone.num_heads):
            columns = y[..., head * backbone.head_dim : (head + 1) * backbone.head_dim]
            torch.testing.assert_close(actual[:, head], columns.transpose(0, 1))


@pytest.mark.parametrize("model", ["transformer_lm", "alibi_lm", "llama_lm"])
def test_remembering_computes_the_same_bits(load, model):
    _, backbone = load(model)
    encoded, remembered = backbone(tokens()), backbone.encode_for_memory(tokens())
    assert torch.equal(encoded.keys, remembered.keys) and torch.equal(encoded.values, remembered.values)
    assert len(remembered.hidden) == M + 1
    assert all(torch.equal(a, b) for a, b in zip(encoded.hidden, remembered.hidden))


blocks = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@pytest.mark.parametrize(
    "model, changes",
    [("transformer_lm", {}), ("transformer_lm", {"decoder_learned_pos": False}), ("alibi_lm", {}), ("llama_lm", {})],
)
def test_a_window_in_blocks_equals_the_whole(load, model, changes):
    _, backbone = load(model, **changes)

    @settings(max_examples=15)
    @given(blocks=blocks)
    def check(blocks):
        x = tokens(T=sum(blocks))
        whole, state, start, pieces = backbone(x), {}, 0, []
        for block in x.split(blocks, dim=1):
            pieces.append(backbone.encode(block, state, start))
            start += block.size(1)
        for layer in range(LAYERS + 1):
            actual = torch.cat([piece.hidden[layer] for piece in pieces])
            torch.testing.assert_close(actual, whole.hidden[layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat([p.keys for p in pieces], 2), whole.keys, rtol=1e-4, atol=1e-4)

    check()


def test_positions_end_where_the_backbones_do(load):
    _, backbone = load()
    assert backbone.max_positions == POSITIONS
    backbone(tokens(T=POSITIONS))
    backbone(tokens(T=1), start=POSITIONS - 1)
    for T, start in ((POSITIONS + 1, 0), (1, POSITIONS)):
        with pytest.raises(
            BackboneError, match=f"of {POSITIONS + 1} tokens .* backbone's {POSITIONS} positions: .*--tokens-per-sample"
        ):
            backbone(tokens(T=T), start=start)


@pytest.mark.parametrize("changes", [{"decoder_learned_pos": False}, {"no_token_positional_embeddings": True}])
def test_without_learned_positions_there_is_no_end(load, changes):
    stock, backbone = load(**changes)
    assert backbone.max_positions is None
    x = tokens(T=3 * POSITIONS)
    with torch.no_grad():
        expected = stock(x)[1]["inner_states"][-1]
    torch.testing.assert_close(backbone(x).hidden[-1], expected, rtol=1e-3, atol=1e-3)


def test_sinusoidal_positions_follow_the_model_to_another_device(load):
    """fairseq keeps their table out of the buffers, so that no .to() moves it."""
    _, backbone = load(decoder_learned_pos=False)
    backbone.decoder.embed_tokens.to("meta")  # a device that every machine has
    assert backbone.embed(tokens().to("meta")).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "model, changes",
    [("transformer_lm", {}), ("transformer_lm", {"decoder_learned_pos": False}), ("alibi_lm", {}), ("llama_lm", {})],
)
def test_half_precision_agrees_coarsely(load, model, changes, dtype):
    _, backbone = load(model, **changes)
    full, half = backbone(tokens()), copy.deepcopy(backbone).to(dtype)(tokens())
    for a, b in zip([*full.hidden, full.keys, full.values], [*half.hidden, half.keys, half.values]):
        assert b.dtype == dtype
        torch.testing.assert_close(b.float(), a, rtol=0.1, atol=0.1 * float(a.std()))


# --- frozen


def test_never_trains_and_never_has_gradients(load):
    _, backbone = load()
    holder = torch.nn.Sequential(backbone).train()
    assert holder.training and not any(module.training for module in backbone.modules())
    backbone.train(True)
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    encoded = backbone(tokens())
    assert not any(x.requires_grad for x in (*encoded.hidden, encoded.keys, encoded.values))
    assert not any(x.requires_grad for x in backbone.encode_for_memory(tokens()).hidden)


def test_dropout_of_the_backbones_training_is_off(load):
    _, backbone = load(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5)
    assert torch.equal(backbone.train()(tokens()).hidden[-1], backbone(tokens()).hidden[-1])


# --- fingerprint


def test_fingerprint_is_of_the_function_not_of_the_training(load):
    _, backbone = load()
    assert load()[1].fingerprint == backbone.fingerprint == backbone_fingerprint(backbone)
    assert load(dropout=0.3, checkpoint_activations=True, tokens_per_sample=9)[1].fingerprint == backbone.fingerprint


@pytest.mark.parametrize("changes", [{"seed": 1}, {"activation_fn": "relu"}, {"no_scale_embedding": True}])
def test_fingerprint_tells_other_backbones_apart(load, changes):
    _, backbone = load()
    assert load(**changes)[1].fingerprint != backbone.fingerprint


def test_fingerprint_sees_one_changed_number(load):
    _, backbone = load()
    backbone.decoder.layers[0].fc1.bias.data[0] += 1e-6
    assert backbone_fingerprint(backbone) != backbone.fingerprint


def test_fingerprint_of_half_precision_is_that_of_its_values(load):
    _, backbone = load()
    half = copy.deepcopy(backbone).half()
    assert backbone_fingerprint(half) == backbone_fingerprint(copy.deepcopy(half).float())
