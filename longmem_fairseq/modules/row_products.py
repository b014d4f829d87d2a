"""Sums and products of rows of a table, without gathering the rows.

Every query reads other rows. A plain implementation gathers them into one large tensor; an embedding bag sums rows of
a table in place, and the gradient of its weights are inner products with rows in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_row_sums(weights: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Return the weighted sum of each query's rows: sum over k of weights[q, k] * table[rows[q, k]].

    Args:
        weights: Weights, shape (Q, K), in the table's dtype.
        table: Table, shape (R, d).
        rows: Numbers of rows, shape (Q, K), int64.

    Returns:
        Sums, shape (Q, d).
    """
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


def row_products(q: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Return the inner products of each query with its rows of a table.

    Args:
        q: Queries, shape (Q, d), any floating dtype.
        table: Table, shape (R, d).
        rows: Numbers of rows, shape (Q, K), int64.

    Returns:
        Products, shape (Q, K), float32.
    """
    Q, K = rows.shape
    if table.is_cuda and table.dtype == torch.bfloat16:  # the operator below lacks this type on CUDA
        blocks = zip(q.to(table.dtype).split(4096), rows.split(4096))
        return torch.cat([(table[block] @ x[:, :, None]).squeeze(-1) for x, block in blocks]).float()
    bags = torch.arange(Q, device=rows.device)
    # The operator has no public name.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(  # noqa: SLF001
        q.to(table.dtype).contiguous(), table, rows.reshape(-1), bags * K, bags.repeat_interleave(K), 0
    )
    return products.view(Q, K).float()
