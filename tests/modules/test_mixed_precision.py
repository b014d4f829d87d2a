"""Products in bfloat16, in every kind of model: which are, what stays in float32, and how far the results are."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longmem_fairseq.models.reading import DocumentReader
from longmem_fairseq.modules.mixed_precision import compute_products_in
from tests.models.tiny import VOCABULARY, build_longmem, stock_config, stock_model, write_checkpoint

PRODUCTS = {"linear", "mm", "addmm"}  # with weights; attention and search have a batch of matrices


class Products(TorchDispatchMode):
    """Records the types that products with weights are computed in."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in PRODUCTS:
            self.dtypes.append({x.dtype for x in args if isinstance(x, torch.Tensor)})
        return function(*args, **(kwargs or {}))


def tokens(B=2, T=11):
    return torch.randint(4, len(VOCABULARY), (B, T), generator=torch.Generator().manual_seed(0))


def linear_layers(model):
    return sum(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("shared", [True, False], ids=["shared embedding", "output projection of its own"])
@pytest.mark.parametrize("name", ["transformer_lm", "alibi_lm", "llama_lm", "parallel_lm"])
@torch.no_grad()
def test_stock_models(name, shared):
    model, exact = (stock_model(name, share_decoder_input_output_embed=shared) for _ in range(2))
    compute_products_in(model, torch.bfloat16)
    with Products() as products:
        logits, extra = model(tokens())
    assert products.dtypes == [{torch.bfloat16}] * linear_layers(model)
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float()), "a product of bfloat16"
    states = extra["inner_states"]
    assert all(x.dtype == torch.float32 for x in states)
    assert not torch.equal(states[-1], states[-1].bfloat16().float()), "the residual stream was rounded"
    expected = exact(tokens())[0]
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), atol=0.2, rtol=0)


@pytest.mark.parametrize("name", ["transformer_lm", "alibi_lm", "llama_lm"])
@torch.no_grad()
def test_one_token_at_a_time(name):
    """Decoding goes other ways through stock attention than reading does."""
    model, state = stock_model(name), {}
    compute_products_in(model, torch.bfloat16)
    whole = model(tokens())[0]
    steps = [model(tokens()[:, : t + 1], incremental_state=state)[0][:, -1] for t in range(11)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=0.2, rtol=0)


@torch.no_grad()
def test_all_layers_of_a_longmem(tmp_path):
    path = write_checkpoint(tmp_path / "backbone.pt", stock_model("alibi_lm"), stock_config("alibi_lm"))
    model = build_longmem(path).eval()
    compute_products_in(model, torch.bfloat16)
    model.decoder.stateful = True
    for _ in range(3):
        with Products() as products:
            _, extra = model(tokens(T=7))
    assert extra["memory"].recall is None
    assert products.dtypes == [{torch.bfloat16}] * linear_layers(model)
    keys, values, means = model.memory_contents()
    for x in (keys, values):  # held as the products give them, in the model's precision
        assert x.dtype == torch.float32 and torch.equal(x, x.bfloat16().float())
    torch.testing.assert_close(means, keys.mean(dim=2))
    assert DocumentReader(model.decoder, 1).new_memory().bank.keys.dtype == torch.float32, (
        "generation holds another precision"
    )


@torch.no_grad()
def test_weights_are_rounded_when_they_are_loaded():
    before, after = stock_model(seed=1), stock_model(seed=2)
    weights = stock_model(seed=1).state_dict()
    compute_products_in(before, torch.bfloat16)
    compute_products_in(after, torch.bfloat16)
    after.load_state_dict(weights)
    assert torch.equal(before(tokens())[0], after(tokens())[0])
