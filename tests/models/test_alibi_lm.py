"""alibi_lm: a stock transformer_lm in all but its attention, built, trained and decoded as fairseq does."""

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY

from longmem_fairseq.backbones.alibi_lm import AlibiLanguageModel
from longmem_fairseq.modules.self_attention import SelfAttention
from tests.models.tiny import VOCABULARY, stock_model

ARCHITECTURES = {
    "alibi_lm_tiny": (4, 128, 4),
    "alibi_lm_mini": (6, 256, 8),
    "alibi_lm_small": (12, 768, 12),
    "alibi_lm_medium": (24, 1024, 16),
}  # name: layers, width, heads


def tokens(B=2, T=11):
    return torch.randint(4, len(VOCABULARY), (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures(parse, arch):
    assert ARCH_MODEL_REGISTRY[arch] is AlibiLanguageModel
    cfg = parse(arch=arch).model
    assert (cfg.decoder_layers, cfg.decoder_embed_dim, cfg.decoder_attention_heads) == ARCHITECTURES[arch]
    assert cfg.decoder_ffn_embed_dim == 4 * cfg.decoder_embed_dim
    assert cfg.decoder_input_dim == cfg.decoder_output_dim == cfg.decoder_embed_dim, "stock architectures keep 512"
    assert cfg.decoder_normalize_before and cfg.no_token_positional_embeddings and cfg.share_decoder_input_output_embed


def test_sizes_of_an_architecture_can_be_changed(parse):
    cfg = parse(
        "--decoder-layers",
        2,
        "--decoder-embed-dim",
        32,
        "--decoder-attention-heads",
        8,
        "--activation-fn",
        "relu",
        arch="alibi_lm_mini",
    ).model
    assert (cfg.decoder_layers, cfg.decoder_embed_dim, cfg.decoder_attention_heads) == (2, 32, 8)
    assert cfg.decoder_ffn_embed_dim == 128 and cfg.decoder_input_dim == 32 and cfg.activation_fn == "relu"


def test_every_layer_has_alibi_and_no_position_embeddings_remain():
    model = stock_model("alibi_lm", decoder_learned_pos=True, decoder_normalize_before=False)
    assert model.decoder.embed_positions is None
    for layer in model.decoder.layers:
        assert isinstance(layer.self_attn, SelfAttention) and layer.self_attn.alibi
        assert layer.normalize_before


def test_its_weights_are_those_of_a_transformer_lm_without_positions():
    stock = stock_model("transformer_lm", no_token_positional_embeddings=True)
    assert stock_model("alibi_lm").state_dict().keys() == stock.state_dict().keys()


def test_one_token_at_a_time_gives_the_same_logits():
    """As fairseq's generator decodes, with beams that change places on the way."""
    model, x = stock_model("alibi_lm"), tokens()
    with torch.no_grad():
        whole = model(x)[0]
        state = {}
        for t in range(x.size(1)):
            if t == 5:
                model.decoder.reorder_incremental_state_scripting(state, torch.tensor([1, 0]))
                x, whole = x[[1, 0]], whole[[1, 0]]
            actual = model.decoder(x[:, : t + 1], incremental_state=state)[0]
            torch.testing.assert_close(actual[:, -1], whole[:, t], rtol=1e-4, atol=1e-4)


def test_every_parameter_learns():
    model = stock_model("alibi_lm").train()
    model(tokens())[0].logsumexp(dim=-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad.any() or name.endswith("k_proj.bias")), name


def test_activation_checkpointing_changes_no_gradient():
    plain, checkpointed = (
        stock_model("alibi_lm", dropout=0.0, checkpoint_activations=on).train() for on in (False, True)
    )
    for model in (plain, checkpointed):
        model(tokens())[0].logsumexp(dim=-1).sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    "option, value", [("adaptive_input", True), ("adaptive_softmax_cutoff", "10,20"), ("character_embeddings", True)]
)
def test_what_alibi_rules_out_is_refused(option, value):
    with pytest.raises(
        ValueError, match=f"alibi_lm does not support --{option.replace('_', '-')}: use --arch transformer_lm"
    ):
        stock_model("alibi_lm", **{option: value})


def test_it_does_not_see_the_future():
    model, x = stock_model("alibi_lm"), tokens()
    changed = x.clone()
    changed[:, 7:] = 4
    with torch.no_grad():
        assert torch.equal(model(x)[0][:, :7], model(changed)[0][:, :7])
