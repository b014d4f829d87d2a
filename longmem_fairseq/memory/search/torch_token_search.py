"""Exact search of token memories by matrix product and top-k in PyTorch, on any device and in any precision.

Legend: B rows of a batch, T queries of a row, D width of a hidden state, m entries of a row, n entries to find.
"""

from typing import Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_search import Table, TokenSearch

SCORES_AT_ONCE = 1 << 24  # elements (64 MiB of float32)


class TorchTokenSearch(TokenSearch):
    """Exact search by matrix product and top-k; see :class:`.TokenSearch`."""

    name = "torch"

    def prepare(self, hidden: Tensor) -> Tensor:
        # On a CPU, converting the hidden states takes longer than searching them.
        return hidden.float() if hidden.device.type == "cpu" else hidden

    def __call__(self, tables: Sequence[Table], queries: Tensor, n: int, causal: bool) -> Tuple[Tensor, Tensor]:
        rows = [_search(table, of_row, n, causal) for table, of_row in zip(tables, queries)]
        scores, numbers = zip(*rows)
        return torch.stack(scores), torch.stack(numbers)


def _search(table: Table, queries: Tensor, n: int, causal: bool) -> Tuple[Tensor, Tensor]:
    """Search one table (m, D) for queries (T, D); return what :class:`.TokenSearch` does, of one row."""
    entries = table[0].float() if len(table) == 1 else torch.cat([piece.float() for piece in table])
    m, T = len(entries), len(queries)
    places = torch.arange(T, device=queries.device)
    results = []
    for part in places.split(max(1, SCORES_AT_ONCE // max(1, m))):
        scores = queries[part] @ entries.T  # (t, m)
        if causal:
            scores[:, m - T :].masked_fill_(places >= part[:, None], float("-inf"))
        best, numbers = scores.topk(min(n, m), dim=1)
        numbers.masked_fill_(best == float("-inf"), -1)
        missing = n - best.size(1)
        results.append((F.pad(best, (0, missing), value=float("-inf")), F.pad(numbers, (0, missing), value=-1)))
    scores, numbers = zip(*results)
    return torch.cat(scores), torch.cat(numbers)
