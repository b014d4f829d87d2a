"""A neural cache (Grave et al., 2017), that is a kNN-LM over the tokens of the memory: the baseline of every report.

It holds final hidden states of the frozen backbone, h_i, and the tokens that followed them, x_{i+1}:

    p_cache(x | h) = sum_i exp(theta h.h_i) [x_{i+1} = x] / sum_i exp(theta h.h_i)
    p = (1 - weight) p_model + weight p_cache

``weight`` is lambda in the literature. Legend: Q queries, M cached tokens, D width, V symbols, n values of theta.
"""

import math
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 24  # elements (64 MiB of float32)
_QUERIES_AT_ONCE = 1024

Part = Tuple[Tensor, Tensor]  # hidden states (M, D) or (Q, M, D), and the tokens (M,) or (Q, M) that followed them


class CacheSettings(NamedTuple):
    """How a cache is mixed into a model's probabilities.

    Attributes:
        weight: Weight of the cache, from 0 to below 1.
        theta: Sharpness of its softmax, above 0.
    """

    weight: float
    theta: float


class NeuralCache:
    """The last tokens of a text with the hidden states that they followed.

    Args:
        size: Maximum number of tokens; the oldest are evicted.
        width: Width D of a hidden state.
        device: Device of the stored tensors.

    Attributes:
        size: Maximum number of tokens.
        written: Number of tokens ever written.
    """

    def __init__(self, size: int, width: int, device: torch.device = torch.device("cpu")):
        self._hidden = torch.zeros(size, width, device=device)
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.size, self.written = size, 0

    def __len__(self) -> int:
        return min(self.written, self.size)

    @property
    def hidden(self) -> Tensor:
        """Cached hidden states in no particular order, shape (M, D), float32."""
        return self._hidden[: len(self)]

    @property
    def tokens(self) -> Tensor:
        """Token ids that followed the hidden states, in the same order, shape (M,), int64."""
        return self._tokens[: len(self)]

    def append(self, hidden: Tensor, tokens: Tensor) -> None:
        """Write tokens, in the order of the text.

        Args:
            hidden: Final hidden states, shape (length, D).
            tokens: Token ids that followed them, shape (length,), int64.
        """
        skipped = max(0, len(tokens) - self.size)
        slots = torch.arange(self.written + skipped, self.written + len(tokens), device=tokens.device) % self.size
        self._hidden[slots] = hidden[skipped:].float()
        self._tokens[slots] = tokens[skipped:]
        self.written += len(tokens)


def log_sums(
    queries: Tensor,
    targets: Tensor,
    hidden: Tensor,
    tokens: Tensor,
    thetas: Sequence[float],
    visible: Optional[Tensor] = None,
) -> Tensor:
    """Return logarithms of sums of exp(theta h.h_i) over all cached tokens, and over those that equal the target.

    Sums over parts of a cache are added by ``logaddexp``; the difference of the two is log p_cache(target).

    Args:
        queries: Hidden states h, shape (Q, D).
        targets: Token ids to predict, shape (Q,), int64.
        hidden: Cached hidden states, shape (M, D).
        tokens: Cached token ids, shape (M,), int64.
        thetas: The n values of theta.
        visible: Mask of the cached tokens that each query may see, shape (Q, M), bool; all by default.

    Returns:
        Sums over all tokens and sums over the target, shape (2, n, Q), float32; -inf for a sum over nothing.
    """
    Q, M = len(queries), len(tokens)
    sums = queries.new_full((2, len(thetas), Q), float("-inf"), dtype=torch.float32)
    rows = min(Q, _QUERIES_AT_ONCE)
    columns = max(1, SCORES_AT_ONCE // max(1, rows))
    for i in range(0, Q, rows):
        for j in range(0, M, columns):
            scores = queries[i : i + rows].float() @ hidden[j : j + columns].float().T  # (q, m)
            if visible is not None:
                scores = scores.masked_fill(~visible[i : i + rows, j : j + columns], float("-inf"))
            largest = scores.amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)  # (q, 1)
            equal = (tokens[None, j : j + columns] == targets[i : i + rows, None]).float()
            for t, theta in enumerate(thetas):
                weights = torch.exp(theta * (scores - largest))  # (q, m)
                block = torch.stack([weights.sum(dim=1), (weights * equal).sum(dim=1)]).log() + theta * largest[:, 0]
                sums[:, t, i : i + rows] = torch.logaddexp(sums[:, t, i : i + rows], block)
    return sums


def causal_log_sums(queries: Tensor, targets: Tensor, thetas: Sequence[float]) -> Tensor:
    """Return :func:`log_sums` of a text over itself: each token sees the tokens before it.

    Args:
        queries: Hidden states of consecutive inputs, shape (Q, D).
        targets: Token ids that follow them, shape (Q,), int64.
        thetas: The n values of theta.

    Returns:
        Sums over all tokens and sums over the target, shape (2, n, Q), float32.
    """
    before = torch.ones(len(queries), len(queries), dtype=torch.bool, device=queries.device).tril(-1)
    return log_sums(queries, targets, queries, targets, thetas, visible=before)


def distribution(queries: Tensor, parts: Sequence[Part], theta: float, symbols: int) -> Tensor:
    """Return p_cache of every symbol.

    Args:
        queries: Hidden states h, shape (Q, D).
        parts: Hidden states and token ids of the parts of the cache: shapes (M, D) and (M,) for a part that all queries
            share, (Q, M, D) and (Q, M) for one with a row per query. Entries with a token id below 0 are left out.
        theta: Sharpness of the softmax.
        symbols: Number of symbols V.

    Returns:
        Probabilities, shape (Q, V), float32; zeros for a query with nothing cached.
    """
    Q = len(queries)
    probabilities = queries.new_zeros(Q, symbols, dtype=torch.float32)
    scores, followers = [], []
    for hidden, tokens in parts:
        if hidden.dim() == 2:
            products = queries.float() @ hidden.float().T  # (Q, M)
        else:
            products = (hidden.float() @ queries.float()[:, :, None]).squeeze(-1)  # (Q, M)
        tokens = tokens.expand(Q, -1)
        followers.append(tokens)
        scores.append(products.masked_fill(tokens < 0, float("-inf")))
    if not any(part.size(1) for part in scores):
        return probabilities
    weights = torch.softmax(theta * torch.cat(scores, dim=1), dim=1).nan_to_num(0.0)
    return probabilities.scatter_add_(1, torch.cat(followers, dim=1).clamp(min=0), weights)


def log_distribution(queries: Tensor, parts: Sequence[Part], theta: float, symbols: int) -> Tensor:
    """Return the logarithm of :func:`distribution`; NaN, as :func:`mix` expects, for a query with nothing cached."""
    probabilities = distribution(queries, parts, theta, symbols)
    empty = ~probabilities.any(dim=1, keepdim=True)
    return probabilities.log().masked_fill(empty, float("nan"))


def mix(model: Tensor, cache: Tensor, weight: float) -> Tensor:
    """Mix the probabilities of a model and a cache: log((1 - weight) exp(model) + weight exp(cache)).

    Args:
        model: Log-probabilities of the model, any shape.
        cache: Log-probabilities of the cache, same shape; NaN (-inf minus -inf) where it holds nothing.
        weight: Weight of the cache, from 0 to below 1.

    Returns:
        Log-probabilities, same shape; those of the model where ``cache`` is NaN.
    """
    if weight == 0:
        return model
    mixed = torch.logaddexp(model + math.log1p(-weight), cache + math.log(weight))
    return torch.where(cache.isnan(), model, mixed)
