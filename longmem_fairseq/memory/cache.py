"""The baseline of every report: a neural cache (Grave et al., 2017), that is a kNN-LM over the tokens of the memory.

What is cached are the final hidden states of the frozen backbone, h_i, and the tokens that followed them, x_{i+1}:

    p_cache(x | h) = sum_i exp(theta h.h_i) [x_{i+1} = x] / sum_i exp(theta h.h_i)
    p = (1 - weight) p_model + weight p_cache

``weight`` is lambda in the literature. Legend: Q queries, M cached tokens, D width, V symbols, n values of theta.
"""

import math
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

_SCORES = 1 << 24  # held at a time, in elements (64 MiB of float32)


class CacheSettings(NamedTuple):
    """How a cache is mixed into a model's probabilities."""

    weight: float
    theta: float


class NeuralCache:
    """The last tokens of a text, by the hidden states that they followed.

    Args:
        size: most tokens that it holds; the oldest give way.
        width: D.
        device: where it lies.
    """

    def __init__(self, size: int, width: int, device: torch.device = torch.device("cpu")):
        self._hidden = torch.zeros(size, width, device=device)
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.size, self.given = size, 0

    def __len__(self) -> int:
        return min(self.given, self.size)

    @property
    def hidden(self) -> Tensor:
        """Hidden states, in any order, shape (M, D), float32."""
        return self._hidden[: len(self)]

    @property
    def tokens(self) -> Tensor:
        """What followed them, shape (M,), int64."""
        return self._tokens[: len(self)]

    def append(self, hidden: Tensor, tokens: Tensor) -> None:
        """Add hidden states (length, D) and the tokens (length,) that followed them."""
        skipped = max(0, len(tokens) - self.size)
        slots = torch.arange(self.given + skipped, self.given + len(tokens), device=tokens.device) % self.size
        self._hidden[slots] = hidden[skipped:].float()
        self._tokens[slots] = tokens[skipped:]
        self.given += len(tokens)


def log_sums(
    queries: Tensor,
    targets: Tensor,
    hidden: Tensor,
    tokens: Tensor,
    thetas: Sequence[float],
    seen: Optional[Tensor] = None,
) -> Tensor:
    """Logarithms of the sums over cached tokens of exp(theta h.h_i): over all, and over those that equal the target.

    Sums of parts of a cache are put together by ``logaddexp``; the difference of the two is log p_cache(target).

    Args:
        queries: shape (Q, D).
        targets: shape (Q,), int64.
        hidden, tokens: what is cached, shape (M, D) and (M,).
        thetas: n values.
        seen: which cached tokens each query may look at, shape (Q, M), bool; by default all.

    Returns:
        Shape (2, n, Q), float32: all, target. -inf for a sum over nothing.
    """
    Q, M = len(queries), len(tokens)
    sums = queries.new_full((2, len(thetas), Q), float("-inf"), dtype=torch.float32)
    rows = min(Q, 1024)
    columns = max(1, _SCORES // max(1, rows))
    for i in range(0, Q, rows):
        for j in range(0, M, columns):
            scores = queries[i : i + rows].float() @ hidden[j : j + columns].float().T  # (q, m)
            if seen is not None:
                scores = scores.masked_fill(~seen[i : i + rows, j : j + columns], float("-inf"))
            largest = scores.amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)  # (q, 1)
            equal = (tokens[None, j : j + columns] == targets[i : i + rows, None]).float()
            for t, theta in enumerate(thetas):
                weights = torch.exp(theta * (scores - largest))  # (q, m)
                found = torch.stack([weights.sum(dim=1), (weights * equal).sum(dim=1)]).log() + theta * largest[:, 0]
                sums[:, t, i : i + rows] = torch.logaddexp(sums[:, t, i : i + rows], found)
    return sums


def causal_log_sums(queries: Tensor, targets: Tensor, thetas: Sequence[float]) -> Tensor:
    """The same for the tokens of a row of text by themselves: each looks at those before it, (2, n, Q).

    Args:
        queries: hidden states of consecutive inputs, shape (Q, D).
        targets: what follows each of them, shape (Q,), int64.
        thetas: n values.
    """
    before = torch.ones(len(queries), len(queries), dtype=torch.bool, device=queries.device).tril(-1)
    return log_sums(queries, targets, queries, targets, thetas, seen=before)


def distribution(queries: Tensor, parts: Sequence[Tuple[Tensor, Tensor]], theta: float, symbols: int) -> Tensor:
    """p_cache of every symbol, shape (Q, V), float32; zero where nothing is cached.

    Args:
        queries: shape (Q, D).
        parts: hidden states and tokens of the cache: (M, D) and (M,) for all queries, or each query's own, (Q, M, D)
            and (Q, M). Tokens below 0 are not there.
        theta: one value.
        symbols: V.
    """
    Q, scores, followers = len(queries), [queries.new_zeros(len(queries), 0)], []
    for hidden, tokens in parts:
        products = (
            queries.float() @ hidden.float().T
            if hidden.dim() == 2
            else (hidden.float() @ queries.float()[:, :, None]).squeeze(-1)
        )  # (Q, M)
        followers.append(tokens.expand(Q, -1))
        scores.append(products.masked_fill(followers[-1] < 0, float("-inf")))
    found = queries.new_zeros(Q, symbols, dtype=torch.float32)
    weights = torch.softmax(theta * torch.cat(scores, dim=1).float(), dim=1).nan_to_num(0.0)
    return found.scatter_add_(1, torch.cat(followers, dim=1).clamp(min=0), weights) if weights.size(1) else found


def mix(model: Tensor, cache: Tensor, weight: float) -> Tensor:
    """log((1 - weight) exp(model) + weight exp(cache)) of log-probabilities of any shape.

    Where ``cache`` is NaN, as the log-probability that an empty cache gives (-inf minus -inf), it is the model's.
    """
    if weight == 0:
        return model
    mixed = torch.logaddexp(model + math.log1p(-weight), cache + math.log(weight))
    return torch.where(cache.isnan(), model, mixed)
