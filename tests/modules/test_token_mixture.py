"""The token memory's mixture equals its definition, written down as loops, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.modules import token_mixture
from longmem_fairseq.modules.token_mixture import TokenMixture, TokenReads

B, V = 2, 7


def randomized(seed: int) -> TokenMixture:
    """A mixture whose weights are all different from their start."""
    torch.manual_seed(seed)
    mixture = TokenMixture()
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return mixture


def random_reads(T: int, n: int, seed: int) -> TokenReads:
    """Reads of which the first token of each row finds nothing, and the others up to n entries."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, n + 1, (B, T, 1), generator=generator)
    counts[:, 0] = 0
    absent = torch.arange(n) >= counts
    scores = torch.rand(B, T, n, generator=generator) * 2 - 1
    followers = torch.randint(0, V, (B, T, n), generator=generator)
    sizes = torch.where(counts[..., 0] == n, counts[..., 0] + 5, counts[..., 0]).float()
    return TokenReads(scores.masked_fill(absent, float("-inf")), followers.masked_fill(absent, 0), sizes)


def entropy(probabilities):
    return -sum(p * p.log() for p in probabilities if p > 0)


def naive(mixture: TokenMixture, logits, scores, followers, size: float):
    """Log-probabilities of one query, in double precision, entry by entry, and lambda."""
    p = logits.double().softmax(0)
    entries = [(float(s), int(f)) for s, f in zip(scores, followers) if s > -math.inf]
    if not entries:
        return p.log(), torch.zeros(())
    theta = (mixture.log_theta.double() * 16).exp()
    weights = [torch.exp(theta * s) for s, _ in entries]
    masses = [w / sum(weights) for w in weights]
    memory = [sum([m for m, (_, f) in zip(masses, entries) if f == x], torch.zeros(())) for x in range(len(logits))]
    memory = torch.stack([m.double() for m in memory])
    with torch.no_grad():
        top = max((f for _, f in entries), key=lambda x: float(memory[x]))
        numbers = torch.stack(
            [
                torch.tensor(max(s for s, _ in entries)).double(),
                max(masses),
                0.2 * entropy(masses),
                memory[top],
                0.2 * p[top].log(),
                p.max(),
                0.2 * entropy(p),
                (p.argmax() == top).double(),
                torch.tensor(0.1 * math.log1p(size)).double(),
            ]
        )
    units = torch.tanh(16 * (mixture.input_weight.double() @ numbers + mixture.input_bias.double()))
    share = torch.sigmoid(16 * (units @ mixture.output_weight.double() + mixture.output_bias.double()))
    return ((1 - share) * p + share * memory).log(), share


@settings(max_examples=15)
@given(T=st.integers(1, 5), n=st.integers(1, 6), seed=st.integers(0, 99), block=st.sampled_from([1, 3 * V, 1 << 20]))
def test_the_mixture_and_its_gradient_are_the_definition(T, n, seed, block):
    kept, token_mixture.BLOCK = token_mixture.BLOCK, block
    try:
        check_the_mixture(T, n, seed)
    finally:
        token_mixture.BLOCK = kept


def check_the_mixture(T, n, seed):
    mixture, reads = randomized(seed), random_reads(T, n, seed)
    logits = (torch.randn(B, T, V) * 2).requires_grad_()
    upstream = torch.randn(B, T, V)
    parameters = [logits, *mixture.parameters()]
    mixed, shares = mixture(logits, reads)
    gradients = torch.autograd.grad((mixed * upstream).sum(), parameters)
    rows = [
        naive(mixture, logits[b, t], reads.scores[b, t], reads.followers[b, t], float(reads.sizes[b, t]))
        for b in range(B)
        for t in range(T)
    ]
    expected = torch.stack([row for row, _ in rows]).view(B, T, V)
    torch.testing.assert_close(mixed.double(), expected, atol=1e-4, rtol=1e-4)
    expected_shares = torch.stack([share.double() for _, share in rows]).detach()
    torch.testing.assert_close(shares.flatten().double(), expected_shares, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(B, T))
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), parameters, allow_unused=True)
    for gradient, x, parameter in zip(gradients, expected_gradients, parameters):
        x = torch.zeros_like(parameter) if x is None else x
        torch.testing.assert_close(gradient, x, atol=2e-3, rtol=2e-3)
    before = logits.detach().clone()
    with torch.no_grad():
        again, _ = mixture(logits, reads)
        assert torch.equal(logits, before)
        reused, _ = mixture(logits, reads, reuse=True)
    assert reused.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(again, mixed.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reused, again)


def test_a_query_with_nothing_to_read_has_the_probabilities_of_the_model():
    reads = random_reads(4, 3, seed=0)
    logits = torch.randn(B, 4, V)
    mixed, shares = TokenMixture()(logits, reads)
    torch.testing.assert_close(mixed[:, 0], logits[:, 0].log_softmax(-1))
    assert not shares[:, 0].any() and bool((shares[:, 1:] > 0).all())


def test_untrained_it_has_a_small_weight():
    _, shares = TokenMixture()(torch.randn(B, 4, V), random_reads(4, 3, seed=1))
    torch.testing.assert_close(shares[:, 1:], torch.full((B, 3), 0.05))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision(dtype):
    mixture, reads = randomized(0), random_reads(3, 4, seed=2)
    logits = torch.randn(B, 3, V)
    half, _ = mixture.to(dtype)(logits.to(dtype), reads)
    exact, _ = mixture.float()(logits.to(dtype).float(), reads)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=1e-5, rtol=1e-5)
