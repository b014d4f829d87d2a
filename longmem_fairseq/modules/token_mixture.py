"""The token memory's part in the output: how much of what was found is mixed into the model's probabilities.

    p_memory(x) = sum_i exp(theta s_i) [f_i = x] / sum_i exp(theta s_i)
    p = (1 - lambda) p_model + lambda p_memory

s_i are the cosines of a query's hidden state and the n best entries of the memory, f_i the tokens that followed these.
lambda is computed for each token by a small network from nine numbers about what was found.

Legend: B rows, T tokens, Q queries (rows times tokens), V symbols, n entries that are read.
"""

import math
from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HIDDEN = 64  # units of the network
_THETA, _LAMBDA = 20.0, 0.05  # before training
# The parameters are a sixteenth of what they stand for, so that the learning rate of a side network, which moves a
# parameter by about its own size in a step, moves them 16 times as far: they are few, and start from nothing.
_PACE = 16.0


class TokenReads(NamedTuple):
    """What was found in a token memory.

    Attributes:
        scores: Cosines of each query and the entries found, best first, shape (B, T, n), float32; -inf for none.
        followers: Token ids that followed the entries, shape (B, T, n), int64; 0 for none.
        sizes: Number of entries that each query could read, shape (B, T), float32.
    """

    scores: Tensor
    followers: Tensor
    sizes: Tensor


class TokenMixture(nn.Module):
    """Mix what a token memory holds into the probabilities of a model.

    Attributes:
        log_theta: Logarithm of theta over :data:`_PACE`, a scalar.
    """

    def __init__(self):
        super().__init__()
        self.log_theta = nn.Parameter(torch.tensor(math.log(_THETA) / _PACE))
        # Not nn.Linear, whose weights half precision would round: the products are tiny.
        self.input_weight = nn.Parameter(torch.empty(_HIDDEN, 9).uniform_(-1 / 3, 1 / 3) / _PACE)
        self.input_bias = nn.Parameter(torch.zeros(_HIDDEN))
        self.output_weight = nn.Parameter(torch.zeros(_HIDDEN))
        self.output_bias = nn.Parameter(torch.tensor(math.log(_LAMBDA / (1 - _LAMBDA)) / _PACE))

    def forward(self, logits: Tensor, reads: TokenReads) -> Tuple[Tensor, Tensor]:
        """Mix what was found into the model's predictions.

        Args:
            logits: Logits of the model, shape (B, T, V), any floating dtype.
            reads: What was found.

        Returns:
            Log-probabilities, shape (B, T, V), float32, which are the model's where nothing was found; and lambda,
            shape (B, T), float32, without gradient, 0 there.
        """
        with torch.autocast(logits.device.type, enabled=False):
            log_probs = F.log_softmax(logits.float(), dim=-1)
            B, T, V = log_probs.shape
            rows = log_probs.view(B * T, V)
            followers = reads.followers.reshape(B * T, -1)
            present = (reads.sizes > 0).view(B * T)
            scores = reads.scores.reshape(B * T, -1)
            absent = scores.isneginf()
            scores = scores.masked_fill(absent, 0.0)  # infinite numbers would have no gradient
            sharp = scores * (self.log_theta.float() * _PACE).exp()
            log_masses = F.log_softmax(sharp.masked_fill(absent & present[:, None], float("-inf")), dim=-1)
            numbers = _statistics(rows.detach(), scores, log_masses.detach(), followers, reads.sizes.view(B * T))
            log_odds = self._log_odds(numbers).masked_fill(~present, float("-inf"))
            mixed = _Mix.apply(rows, log_odds, log_masses, followers)
            return mixed.view(B, T, V), log_odds.detach().sigmoid().view(B, T)

    def _log_odds(self, numbers: Tensor) -> Tensor:
        """Return log(lambda / (1 - lambda)) of each query, shape (Q,), from its nine numbers (Q, 9)."""
        units = torch.tanh((numbers @ self.input_weight.float().T + self.input_bias.float()) * _PACE)
        return (units @ self.output_weight.float() + self.output_bias.float()) * _PACE


@torch.no_grad()
def _statistics(log_probs: Tensor, scores: Tensor, log_masses: Tensor, followers: Tensor, sizes: Tensor) -> Tensor:
    """Return the nine numbers that lambda is computed from, each about 1, shape (Q, 9).

    Args:
        log_probs: Log-probabilities of the model, shape (Q, V).
        scores: Cosines, best first, shape (Q, n).
        log_masses: Logarithms of the entries' masses, shape (Q, n).
        followers: Tokens that followed the entries, shape (Q, n).
        sizes: Number of entries that could be read, shape (Q,).
    """
    masses = log_masses.exp()
    of_tokens = torch.zeros_like(log_probs).scatter_add_(1, followers, masses).gather(1, followers)
    top_mass, best = of_tokens.max(dim=1)
    top_token = followers.gather(1, best[:, None])
    model_top, model_token = log_probs.max(dim=1)
    numbers = [
        scores[:, 0],
        masses[:, 0],
        0.2 * torch.special.entr(masses).sum(dim=1),
        top_mass,
        0.2 * log_probs.gather(1, top_token)[:, 0].clamp(min=-50.0),
        model_top.exp(),
        0.2 * torch.special.entr(log_probs.exp()).sum(dim=1),
        (model_token == top_token[:, 0]).float(),
        0.1 * sizes.log1p(),
    ]
    return torch.stack(numbers, dim=1)


class _Mix(torch.autograd.Function):
    """log((1 - lambda) p + lambda p_memory), which keeps two tensors of the size of the logits.

    Written with PyTorch's operators it would keep six.
    """

    @staticmethod
    def forward(ctx, log_probs: Tensor, log_odds: Tensor, log_masses: Tensor, followers: Tensor) -> Tensor:
        """Mix; shapes (Q, V), (Q,), (Q, n) and (Q, n); log odds of -inf leave a row as it is."""
        masses = torch.zeros_like(log_probs).scatter_add_(1, followers, log_masses.exp()).gather(1, followers)
        mixed = log_probs + F.logsigmoid(-log_odds)[:, None]
        sums = torch.logaddexp(mixed.gather(1, followers), masses.log() + F.logsigmoid(log_odds)[:, None])
        mixed.scatter_(1, followers, sums)  # entries of one token all give its sum
        ctx.save_for_backward(log_probs, log_odds, log_masses, followers, mixed)
        return mixed

    @staticmethod
    def backward(ctx, gradient: Tensor):
        log_probs, log_odds, log_masses, followers, mixed = ctx.saved_tensors
        share = (log_probs + F.logsigmoid(-log_odds)[:, None] - mixed).exp()  # of the model in each probability
        to_log_probs = gradient * share
        to_log_odds = gradient.sum(dim=1) * (-log_odds).sigmoid() - to_log_probs.sum(dim=1)
        of_entries = (log_masses + F.logsigmoid(log_odds)[:, None] - mixed.gather(1, followers)).exp()
        return to_log_probs, to_log_odds, gradient.gather(1, followers) * of_entries, None
