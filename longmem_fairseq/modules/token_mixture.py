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
BLOCK = 1 << 20  # logits that are mixed at a time on a CPU, in elements, so that they stay in a cache


class TokenReads(NamedTuple):
    """What was found in a token memory.

    Attributes:
        scores: Cosines of each query and the entries found, in any order, shape (B, T, n), float32; -inf for none.
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

    def forward(self, logits: Tensor, reads: TokenReads, reuse: bool = False) -> Tuple[Tensor, Tensor]:
        """Mix what was found into the model's predictions.

        Args:
            logits: Logits of the model, shape (B, T, V), any floating dtype.
            reads: What was found.
            reuse: Whether the result may take the memory of the logits, where no gradient is computed.

        Returns:
            Log-probabilities, shape (B, T, V), float32, which are the model's where nothing was found; and lambda,
            shape (B, T), float32, without gradient, 0 there.
        """
        with torch.autocast(logits.device.type, enabled=False):
            B, T, V = logits.shape
            rows = logits.float().view(B * T, V)
            of_queries = TokenReads(*(x.reshape(B * T, *x.shape[2:]) for x in reads))
            if torch.is_grad_enabled():
                mixed, log_odds = self._mix(rows, of_queries, in_place=False)
            else:
                mixed = rows.clone() if rows.data_ptr() == logits.data_ptr() and not reuse else rows
                blocks = _blocks(mixed)
                parts = zip(mixed.split(blocks), *(x.split(blocks) for x in of_queries))
                log_odds = torch.cat([self._mix(block, TokenReads(*part), in_place=True)[1] for block, *part in parts])
            return mixed.view(B, T, V), log_odds.detach().sigmoid().view(B, T)

    def _mix(self, logits: Tensor, reads: TokenReads, in_place: bool) -> Tuple[Tensor, Tensor]:
        """Mix what was found by queries into their logits (Q, V), in place or not.

        Returns:
            Log-probabilities, shape (Q, V), and log(lambda / (1 - lambda)), shape (Q,).
        """
        present = reads.sizes > 0
        absent = reads.scores.isneginf()
        scores = reads.scores.masked_fill(absent, 0.0)  # infinite numbers would have no gradient
        sharp = scores * (self.log_theta.float() * _PACE).exp()
        log_masses = F.log_softmax(sharp.masked_fill(absent & present[:, None], float("-inf")), dim=-1)
        of_model = _of_model(logits.detach())
        of_tokens = _of_tokens(log_masses.detach().exp(), reads.followers, logits.size(1))
        numbers = _statistics(logits.detach(), of_model, reads, log_masses.detach(), of_tokens)
        log_odds = self._log_odds(numbers).masked_fill(~present, float("-inf"))
        inputs = logits, of_model.log_sum, log_odds, log_masses, reads.followers, of_tokens
        return _Mix.apply(*inputs, in_place), log_odds

    def _log_odds(self, numbers: Tensor) -> Tensor:
        """Return log(lambda / (1 - lambda)) of each query, shape (Q,), from its nine numbers (Q, 9)."""
        units = torch.tanh((numbers @ self.input_weight.float().T + self.input_bias.float()) * _PACE)
        return (units @ self.output_weight.float() + self.output_bias.float()) * _PACE


class _OfModel(NamedTuple):
    """What the model predicts for queries.

    Attributes:
        top: Largest logit, shape (Q,).
        log_sum: Logarithm of the sum of exponentiated logits, shape (Q,).
        entropy: Entropy of the probabilities, shape (Q,).
    """

    top: Tensor
    log_sum: Tensor
    entropy: Tensor


def _blocks(logits: Tensor) -> int:
    """Return the number of rows of logits (Q, V) to compute with at a time."""
    return max(1, BLOCK // logits.size(1) if logits.device.type == "cpu" else len(logits))


@torch.no_grad()
def _of_model(logits: Tensor) -> _OfModel:
    parts = []
    for block in logits.split(_blocks(logits)):
        top = block.amax(dim=1)  # not max, which takes as long as all the rest for the number of the column
        below = (block - top[:, None]).clamp_(min=-100.0)  # so that infinite logits give no NaN
        masses = below.exp()
        total = masses.sum(dim=1)
        entropy = total.log() - masses.mul_(below).sum(dim=1) / total
        parts.append((top, top + total.log(), entropy))
    return _OfModel(*(torch.cat(x) for x in zip(*parts)))


@torch.no_grad()
def _of_tokens(masses: Tensor, followers: Tensor, V: int) -> Tensor:
    """Return for each entry the mass of all entries that have its follower, shape (Q, n)."""
    rows = max(1, min(len(masses), BLOCK // V)) if masses.device.type == "cpu" else len(masses)
    sums, results = masses.new_zeros(rows, V), []
    for part, tokens in zip(masses.split(rows), followers.split(rows)):
        block = sums[: len(part)]
        results.append(block.scatter_add_(1, tokens, part).gather(1, tokens))
        block.scatter_(1, tokens, 0.0)
    return torch.cat(results)


@torch.no_grad()
def _statistics(logits: Tensor, of_model: _OfModel, reads: TokenReads, log_masses: Tensor, of_tokens: Tensor) -> Tensor:
    """Return the nine numbers that lambda is computed from, each about 1, shape (Q, 9).

    Args:
        logits: Logits of the model, shape (Q, V).
        of_model: What the model predicts.
        reads: What was found, with Q in place of (B, T).
        log_masses: Logarithms of the entries' masses, shape (Q, n).
        of_tokens: Mass of the token that follows each entry, shape (Q, n).
    """
    masses = log_masses.exp()
    top_mass, best = of_tokens.max(dim=1)
    of_top_token = logits.gather(1, reads.followers.gather(1, best[:, None]))[:, 0]
    best_score = reads.scores.amax(dim=1)
    numbers = [
        best_score.masked_fill(best_score.isneginf(), 0.0),
        masses.amax(dim=1),
        0.2 * torch.special.entr(masses).sum(dim=1),
        top_mass,
        0.2 * (of_top_token - of_model.log_sum).clamp(min=-50.0),
        (of_model.top - of_model.log_sum).exp(),
        0.2 * of_model.entropy,
        (of_top_token == of_model.top).float(),
        0.1 * reads.sizes.log1p(),
    ]
    return torch.stack(numbers, dim=1)


class _Mix(torch.autograd.Function):
    """log((1 - lambda) p + lambda p_memory), which keeps one tensor of the size of the logits.

    Only the probabilities of tokens that follow entries differ from (1 - lambda) p.
    """

    @staticmethod
    def forward(ctx, logits, log_sum, log_odds, log_masses, followers, of_tokens, in_place: bool) -> Tensor:
        """Mix; log odds of -inf leave a row the model's.

        Args:
            logits: Logits, shape (Q, V).
            log_sum: Logarithm of the sum of the exponentiated logits, shape (Q,), whose gradient is that of the logits.
            log_odds: Logarithm of lambda / (1 - lambda), shape (Q,).
            log_masses: Logarithms of the entries' masses, shape (Q, n).
            followers: Tokens that follow the entries, shape (Q, n).
            of_tokens: Mass of each of these tokens, shape (Q, n), whose gradient is that of the entries' masses.
            in_place: Whether the result takes the memory of the logits, without gradient.
        """
        shift = (F.logsigmoid(-log_odds) - log_sum)[:, None]
        mixed = logits.add_(shift) if in_place else logits + shift
        of_model = mixed.gather(1, followers)
        sums = torch.logaddexp(of_model, of_tokens.log() + F.logsigmoid(log_odds)[:, None])
        mixed.scatter_(1, followers, sums)  # entries of one token all give its sum
        ctx.save_for_backward(log_odds, log_masses, followers, of_model, mixed)
        return mixed

    @staticmethod
    def backward(ctx, gradient: Tensor):
        log_odds, log_masses, followers, of_model, mixed = ctx.saved_tensors
        at_followers, mixed_at = gradient.gather(1, followers), mixed.gather(1, followers)
        # The model's share in each probability is 1 but for the followers.
        to_log_probs = gradient.scatter(1, followers, at_followers * (of_model - mixed_at).exp())
        sums = to_log_probs.sum(dim=1)
        to_log_odds = gradient.sum(dim=1) * (-log_odds).sigmoid() - sums
        to_log_masses = at_followers * (log_masses + F.logsigmoid(log_odds)[:, None] - mixed_at).exp()
        shift, blocks = F.logsigmoid(-log_odds)[:, None], _blocks(mixed)
        parts = (x.split(blocks) for x in (to_log_probs, mixed, of_model, followers, shift, sums[:, None]))
        for to_logits, block, alone, tokens, of_block, total in zip(*parts):
            probabilities = (block - of_block).scatter_(1, tokens, alone - of_block).exp_()
            to_logits.addcmul_(probabilities, total, value=-1.0)
        return to_log_probs, None, to_log_odds, to_log_masses, None, None, None
