"""llama_lm: built and decoded as fairseq does, and with a memory as the slow reference computes it."""

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY

from longmem_fairseq.backbones.llama_lm import LlamaLanguageModel
from tests.models.llama_reference import LlamaReference, LlamaSetting
from tests.models.tiny import HEADS, LONGMEM, VOCABULARY, documents, longmem, read, stock_model

T = LONGMEM["tokens_per_sample"]
EOS, PAD = VOCABULARY.eos(), VOCABULARY.pad()
ARCHITECTURES = {
    "llama_lm_tiny": (4, 128, 352, 4, 2),
    "llama_lm_small": (12, 768, 2048, 12, 4),
    "llama_lm_medium": (24, 1024, 2816, 16, 4),
}  # name: layers, width, inner width, query heads, KV heads
PLAIN = {"rope_scaling": None, "qkv_bias": False, "out_bias": False, "qk_norm": False, "start_symbol": None}
# name: (changes of the backbone, changes of LongMem)
VARIANTS = {
    "all parts": ({}, {}),
    "Llama": (PLAIN, {}),
    "Qwen2": ({**PLAIN, "qkv_bias": True, "decoder_kv_heads": 3, "decoder_head_dim": None}, {}),
    "Qwen3": ({**PLAIN, "qk_norm": True, "share_decoder_input_output_embed": False}, {}),
    "both layers read": ({}, {"retrieval_layer_index": "1,3", "memory_query_distance": 5}),
    "R = 4": ({}, {"layer_reduction_factor": 4, "retrieval_layer_index": 1}),
    "queries at a distance": ({}, {"memory_query_distance": 13}),
}


def tokens(B=2, T=11, seed=0):
    return torch.randint(4, len(VOCABULARY), (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures(parse, arch):
    assert ARCH_MODEL_REGISTRY[arch] is LlamaLanguageModel
    cfg = parse(arch=arch).model
    assert ARCHITECTURES[arch] == (
        cfg.decoder_layers,
        cfg.decoder_embed_dim,
        cfg.decoder_ffn_embed_dim,
        cfg.decoder_attention_heads,
        cfg.decoder_kv_heads,
    )


def test_sizes_of_an_architecture_can_be_changed(parse):
    scaling = '{"rope_type": "linear", "factor": 2.0}'
    line = f"--decoder-layers 2 --decoder-kv-heads 1 --decoder-head-dim 16 --qk-norm --rope-scaling {scaling!r}"
    cfg = parse(*line.split(" --rope-scaling ")[0].split(), "--rope-scaling", scaling, arch="llama_lm_tiny").model
    assert (cfg.decoder_layers, cfg.decoder_kv_heads, cfg.decoder_head_dim) == (2, 1, 16)
    assert cfg.qk_norm and cfg.rope_scaling == scaling and not cfg.qkv_bias


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_reference(tmp_path, variant):
    """Two lanes of unlike length: the memory is empty, then part-full, then evicts."""
    backbone, changes = VARIANTS[variant]
    model = longmem(tmp_path, model="llama_lm", backbone=backbone, **changes).double()
    decoder, cfg = model.decoder.backbone.decoder, model.cfg
    setting = LlamaSetting(
        heads=HEADS,
        kv_heads=decoder.shape.kv_heads,
        frequencies=decoder.rotary.frequencies.tolist(),
        magnitude=decoder.rotary.magnitude,
        reduction=cfg.layer_reduction_factor,
        memory_layers=model.decoder.backbone.memory_layers,
        chunk=cfg.chunk_size,
        k=cfg.k,
        memory=cfg.memory_size,
        distance=cfg.memory_query_distance,
        start=decoder.start_symbol,
    )
    weights = {name[len("decoder.") :]: value for name, value in torch.nn.Module.state_dict(model).items()}
    docs = [torch.cat([torch.tensor([EOS]), doc]) for doc in documents([4 * T + 2, 2 * T])]
    for doc, logits in zip(docs, read(model, docs, T)):
        reference = LlamaReference(weights, setting)
        expected = torch.cat([reference.read(piece.tolist()) for piece in doc.split(T)])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_distance_of_queries_matters(tmp_path):
    docs = documents([3 * T])
    near, far = (read(longmem(tmp_path, model="llama_lm", memory_query_distance=x), docs, T)[0] for x in (0, 13))
    assert torch.equal(near[:T], far[:T]) and not torch.allclose(near[T:], far[T:], atol=1e-3)


def test_a_memory_holds_keys_without_position(tmp_path):
    """The same tokens as another segment of a document have the same keys in the first layer."""
    model = longmem(tmp_path, model="llama_lm", retrieval_layer_index=0, memory_size=16, chunk_size=1, k=1)
    (doc,) = documents([T])
    read(model, [torch.cat([doc, doc])], T)
    keys = model.memory_contents()[0].flatten(1, 2)  # (H_kv, tokens, d)
    torch.testing.assert_close(keys[:, :T], keys[:, T : 2 * T])


@pytest.mark.parametrize("changes", [{}, PLAIN])
def test_one_token_at_a_time_gives_the_same_logits(changes):
    """As fairseq's generator decodes, with beams that change places on the way."""
    model, x = stock_model("llama_lm", **changes), tokens()
    x[0, 0] = EOS
    with torch.no_grad():
        whole = model(x)[0]
        state = {}
        for t in range(x.size(1)):
            if t == 5:
                model.decoder.reorder_incremental_state_scripting(state, torch.tensor([1, 0]))
                x, whole = x[[1, 0]], whole[[1, 0]]
            actual = model.decoder(x[:, : t + 1], incremental_state=state)[0]
            torch.testing.assert_close(actual[:, -1], whole[:, t], rtol=1e-4, atol=1e-4)


def test_padding_at_either_end_changes_nothing():
    model, x = stock_model("llama_lm"), tokens(B=3)
    with torch.no_grad():
        expected = [model(row[None, :6])[0][0] for row in x]
        for n, left in ((6, 0), (6, 2), (6, 5)):
            padded = torch.full((3, 11), PAD)
            padded[:, left : left + n] = x[:, :n]
            padded[2] = x[2]
            logits = model(padded)[0]
            assert logits.isfinite().all()
            for row in range(2):
                torch.testing.assert_close(logits[row, left : left + n], expected[row], rtol=1e-4, atol=1e-4)


def test_a_window_starts_with_the_models_own_symbol():
    """An end-of-sentence is read as that symbol at the start of a window, and as itself elsewhere."""
    model, x = stock_model("llama_lm", start_symbol=9), tokens()
    x[:, 4] = EOS
    started, itself = x.clone(), x.clone()
    started[:, 0], itself[:, 0] = EOS, 9
    with torch.no_grad():
        torch.testing.assert_close(model(started)[0], model(itself)[0])
        itself[:, 4] = 9
        assert not torch.allclose(model(started)[0], model(itself)[0], atol=1e-3)


def test_every_parameter_learns():
    model = stock_model("llama_lm").train()
    model(tokens())[0].logsumexp(dim=-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_it_does_not_see_the_future():
    model, x = stock_model("llama_lm"), tokens()
    changed = x.clone()
    changed[:, 7:] = 4
    with torch.no_grad():
        assert torch.equal(model(x)[0][:, :7], model(changed)[0][:, :7])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder_kv_heads": 2}, "--decoder-attention-heads 3 is not a multiple of --decoder-kv-heads 2"),
        ({"decoder_head_dim": None, "decoder_embed_dim": 13}, "--decoder-embed-dim 13 is not a multiple"),
        ({"decoder_head_dim": 5}, "a head of odd width 5"),
        ({"rope_scaling": "linear"}, "--rope-scaling linear is not a JSON object"),
        ({"rope_scaling": '{"rope_type": "longrope"}'}, "scaling 'longrope' are not supported: default, linear"),
        ({"rope_scaling": '{"rope_type": "linear"}'}, "the linear scaling of the rotary positions lacks 'factor'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stock_model("llama_lm", **changes)


def test_a_window_longer_than_the_sliding_window_is_refused(tmp_path):
    model = stock_model("llama_lm", sliding_window=8)
    model(tokens(T=8))
    assert model.decoder.max_positions() == 8
    with pytest.raises(ValueError, match="a window of 9 tokens is longer than the sliding window of 8.*lower"):
        model(tokens(T=9))
    with pytest.raises(ValueError, match="--tokens-per-sample 7 is longer than the backbone's 6 positions"):
        longmem(tmp_path, model="llama_lm", backbone={"sliding_window": 6})


def test_a_distance_of_queries_needs_rotary_positions(tmp_path):
    with pytest.raises(ValueError, match="--memory-query-distance 5 rotates queries, and a transformer_lm has no"):
        longmem(tmp_path, memory_query_distance=5)
    with pytest.raises(ValueError, match="--memory-query-distance -1 is negative"):
        longmem(tmp_path, model="llama_lm", memory_query_distance=-1)
