"""Which layers of a backbone copy, on one that is built to copy."""

import torch

from examples.quickstart.copying import copying_heads, copying_losses, heads_table, random_copies
from longmem_fairseq.backbones.loading import load_backbone
from tests.models.tiny import VOCABULARY, stock_config, stock_model, write_checkpoint

D, H = 32, 4  # width and heads; a head sees eight numbers


def copying_backbone(directory):
    """A transformer_lm whose layer 0 writes the previous token beside a token, and whose head 2 of layer 1 matches it.

    The embedding of a token is a random sign vector in the first half of the width. In layer 0 all heads attend to the
    previous position and copy its first half into the second half. In layer 1, head 2 compares a token with the token
    before each key.
    """
    changes = {
        "decoder_layers": 2,
        "decoder_embed_dim": D,
        "decoder_input_dim": D,
        "decoder_output_dim": D,
        "decoder_ffn_embed_dim": 4,
        "decoder_attention_heads": H,
        "max_target_positions": 64,
        "no_scale_embedding": True,
    }
    model = stock_model(**changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            if name.endswith("layer_norm.weight"):
                parameter.fill_(1.0)
        signs = torch.randn(len(VOCABULARY), D // 2, generator=generator).sign()
        model.decoder.embed_tokens.weight[:, : D // 2] = signs
        half = torch.eye(D // 2)
        first, second = (layer.self_attn for layer in model.decoder.layers)
        first.v_proj.weight[:] = torch.eye(D)
        first.out_proj.weight[D // 2 :, : D // 2] = half
        rows = slice(2 * D // H, 3 * D // H)  # head 2
        second.q_proj.weight[rows, : D // H] = torch.eye(D // H)
        second.k_proj.weight[rows, D // 2 : D // 2 + D // H] = torch.eye(D // H)
    path = write_checkpoint(directory / "backbone.pt", model, stock_config(**changes))
    backbone = load_backbone(path, VOCABULARY)
    previous = torch.full((64, 64), float("-inf"))
    previous[0, 0] = 0
    previous[torch.arange(1, 64), torch.arange(63)] = 0

    def attend_to_the_previous(q, k, v, *unused):
        T = q.size(2)
        return torch.softmax(previous[:T, :T], dim=-1) @ v

    backbone.layers[0].self_attn.local_attention = attend_to_the_previous
    return backbone


def test_random_copies():
    tokens = random_copies(VOCABULARY, length=5, copies=3, rows=2, seed=0)
    assert tokens.shape == (2, 16) and (tokens[:, 0] == VOCABULARY.eos()).all()
    copies = tokens[:, 1:].view(2, 3, 5)
    assert torch.equal(copies[:, 0], copies[:, 2]) and (copies >= VOCABULARY.nspecial).all()


def test_the_head_that_copies_is_found(tmp_path):
    backbone = copying_backbone(tmp_path)
    shares = copying_heads(backbone, VOCABULARY, window=21, rows=6)
    assert shares.shape == (2, H)
    # Tokens occur twice in a random sequence now and then, so even this head is not always right.
    assert shares[1, 2] > 0.5 and shares[1, 2] == shares.max() and shares[0].max() < 0.3
    table = heads_table(shares).splitlines()
    assert table[2].split()[1] == "2:" and table[-1].endswith("--retrieval-layer-index 1")


def test_all_layers_that_copy_are_named_on_the_line_before():
    """Of those that a side layer starts from; scripts read the last line."""
    shares = torch.zeros(8, H)
    shares[1, 0], shares[3], shares[4, 1], shares[5, 2], shares[7, 3] = 0.5, 0.2, 1.0, 0.9, 0.49
    before, last = heads_table(shares).splitlines()[-2:]
    assert before == "2 side layers start from layers that copy; try --retrieval-layer-index 1,5 too"
    assert last == "the side layer that starts from layer 5 copies best: --retrieval-layer-index 5"
    shares[1, 0] = 0.4
    assert "try" not in heads_table(shares)


def test_losses_are_those_of_the_model(tmp_path):
    model = stock_model()
    backbone = load_backbone(write_checkpoint(tmp_path / "backbone.pt", model, stock_config()), VOCABULARY)
    losses = copying_losses(backbone, VOCABULARY, window=22, rows=3)
    tokens = random_copies(VOCABULARY, 7, 3, 3, seed=0)
    with torch.no_grad():
        log_probabilities = model(tokens[:, :-1])[0].log_softmax(-1)
    expected = -log_probabilities.gather(2, tokens[:, 1:, None]).view(3, 3, 7).mean(dim=(0, 2))
    torch.testing.assert_close(torch.tensor(losses), expected)
