"""Exact search of the memory bank: the chunks whose mean key has the largest inner product with a query.

Legend: B rows of a batch, H heads, T queries, d width of a head, N slots of the bank, n chunks wanted.
"""

import itertools
import logging
from typing import Callable, Dict, Tuple

import numpy as np
import torch
from torch import Tensor

from ..bank import MemoryBank

logger = logging.getLogger(__name__)

SEARCHES = ("auto", "native", "faiss", "torch")

SearchFunction = Callable[[MemoryBank, np.ndarray, Tensor, int], Tensor]

# Scores of one block of queries held at a time by the torch search, in elements (256 MiB of float32).
_BLOCK = 1 << 26
# Heads and lanes are scored together only as far as this many queries of each fit into a block: a block of few queries
# spends its time reading the chunks.
_QUERIES = 256
# Columns whose maximum stands for them in the first level of the selection.
_COLUMNS = 64


def torch_search(bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
    """Exact search by matrix product and top-k, on whatever device the bank lies.

    Args:
        bank: the memory bank.
        lanes: row of the bank for each row of the batch, shape (B,).
        queries: shape (B, H, T, d), any floating dtype; scores are float32.
        n: chunks wanted.

    Returns:
        Slots, best first, shape (B, H, T, n), int64; -1 where a lane holds fewer chunks.
    """
    B, H, T, _ = queries.shape
    slots = queries.new_full((B, H, T, n), -1, dtype=torch.int64)
    for spans, rows in _by_spans(bank, lanes).items():
        low, high = spans[0][0], spans[-1][1]
        means = _rows(bank.means, lanes[rows])[:, :, low:high]  # (b, H, N, d)
        asked = _rows(queries, rows)  # (b, H, T, d)
        wanted = min(n, sum(end - begin for begin, end in spans))
        together = max(1, _BLOCK // ((high - low) * min(T, _QUERIES)))  # lanes and heads scored together
        by_head, by_row = min(H, together), max(1, min(len(rows), together // H))
        step = max(1, _BLOCK // (by_row * by_head * (high - low)))
        for i, h, t in itertools.product(range(0, len(rows), by_row), range(0, H, by_head), range(0, T, step)):
            block = asked[i : i + by_row, h : h + by_head, t : t + step].float()
            scores = block @ means[i : i + by_row, h : h + by_head].transpose(-1, -2)  # (., ., t, N)
            if len(spans) == 2:
                scores[..., spans[0][1] - low : spans[1][0] - low] = float("-inf")
            found = top_indices(scores, wanted) + low
            for row, best in zip(rows[i : i + by_row].tolist(), found):  # by number: an index array would stall a GPU
                slots[row, h : h + by_head, t : t + step, :wanted] = best
    return slots


def top_indices(scores: Tensor, n: int) -> Tensor:
    """Where the n largest of scores (..., N) stand, largest first, shape (..., n), int64; equal ones in any order.

    Over many columns it is several times as fast as ``topk``, and as exact: each of the n largest lies in one of the n
    blocks of columns with the largest maxima, so the rest is chosen among the columns of those.
    """
    N = scores.size(-1)
    blocks = N // _COLUMNS
    if blocks < 4 * n:  # the columns of n blocks are no small part of all
        return scores.topk(n, dim=-1).indices
    whole = blocks * _COLUMNS
    maxima = scores[..., :whole].unflatten(-1, (blocks, _COLUMNS)).amax(dim=-1)  # (..., N / 64)
    if whole < N:
        maxima = torch.cat([maxima, scores[..., whole:].amax(dim=-1, keepdim=True)], dim=-1)
    first = maxima.topk(n, dim=-1).indices * _COLUMNS
    columns = (first[..., None] + torch.arange(_COLUMNS, device=scores.device)).flatten(-2)  # (..., 64 n)
    if whole < N:
        candidates = scores.gather(-1, columns.clamp(max=N - 1)).masked_fill(columns >= N, float("-inf"))
    else:
        candidates = scores.gather(-1, columns)
    return columns.gather(-1, candidates.topk(n, dim=-1).indices)


def faiss_search(bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
    """Exact search by faiss on the bank's own tensor: ``knn`` on the CPU, ``knn_gpu`` on a GPU.

    Arguments and result as for :func:`torch_search`.
    """
    import faiss

    B, H, T, _ = queries.shape
    queries = queries.detach().float().contiguous()
    slots = torch.full((B, H, T, n), -1, dtype=torch.int64, device=queries.device)
    for spans, rows in _by_spans(bank, lanes).items():
        if len(spans) == 2:  # faiss searches one run of rows; a stream joined midway fills two until the ring is full
            slots[rows] = torch_search(bank, lanes[rows], queries[rows], n)
            continue
        low, high = spans[0]
        wanted = min(n, high - low)
        for row in rows:
            for head in range(H):
                found = _knn(faiss, queries[row, head], bank.means[lanes[row], head, low:high], wanted)
                # -1 stands for "none", which faiss says for queries that are not numbers.
                slots[row, head, :, :wanted] = torch.where(found < 0, found, found + low)
    return slots


def _knn(faiss, queries: Tensor, means: Tensor, n: int) -> Tensor:
    """Numbers of the n best of means (N, d) for queries (T, d), shape (T, n)."""
    if not queries.is_cuda:
        _, found = faiss.knn(queries.numpy(), means.numpy(), n, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(found)
    import faiss.contrib.torch_utils  # noqa: F401  (lets knn_gpu take torch tensors)

    _, found = faiss.knn_gpu(_gpu_resources(faiss), queries, means, n, metric=faiss.METRIC_INNER_PRODUCT)
    return found


_RESOURCES = {}


def _gpu_resources(faiss):
    """One StandardGpuResources a device: each reserves scratch memory of its own."""
    device = torch.cuda.current_device()
    if device not in _RESOURCES:
        _RESOURCES[device] = faiss.StandardGpuResources()
    return _RESOURCES[device]


def _by_spans(bank: MemoryBank, lanes: np.ndarray) -> Dict[Tuple[Tuple[int, int], ...], np.ndarray]:
    """Rows of the batch whose lanes fill the same slots, together; rows with an empty memory are left out."""
    groups = {}
    for row, lane in enumerate(lanes):
        spans = bank.spans(int(lane))
        if spans:
            groups.setdefault(spans, []).append(row)
    return {spans: np.array(rows) for spans, rows in groups.items()}


def _rows(x: Tensor, rows: np.ndarray) -> Tensor:
    """x[rows], without a copy where rows is a run of consecutive numbers."""
    begin = int(rows[0])
    if np.array_equal(rows, np.arange(begin, begin + len(rows))):
        return x[begin : begin + len(rows)]
    return x[torch.from_numpy(rows).to(x.device, non_blocking=True)]


def has_faiss_gpu() -> bool:
    """Whether the installed faiss was built with GPU support."""
    try:
        import faiss
    except ImportError:
        return False
    return hasattr(faiss, "StandardGpuResources")


def choose_search(name: str, device: torch.device) -> SearchFunction:
    """The search function for ``--memory-search`` on the device where the bank lies.

    Args:
        name: one of ``SEARCHES``. ``auto`` is ``native`` for a bank in main memory where that can be built and run, and
            ``faiss`` otherwise.
        device: of the bank.

    Raises:
        ValueError: for another name, or one that cannot be used here.
    """
    if name not in SEARCHES:
        raise ValueError(f"--memory-search {name} is unknown: it is {', '.join(SEARCHES[:-1])} or {SEARCHES[-1]}")
    if name == "torch":
        return torch_search
    if name == "native" and device.type != "cpu":
        raise ValueError(
            f"--memory-search native searches in main memory, but the memory lies on {device}: choose --memory-search "
            "faiss or torch, or --memory-device cpu"
        )
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise ValueError(
            f"--memory-search {name} needs faiss: pip install faiss-cpu or faiss-gpu, or choose --memory-search torch"
        ) from None
    if name != "faiss" and device.type == "cpu":
        from .native import Unavailable, load_kernel, native_search

        try:
            load_kernel()
            return native_search
        except Unavailable as error:
            if name == "native":
                raise ValueError(f"--memory-search native: {error}: choose --memory-search faiss") from None
            logger.info("search by faiss, as %s", error)
    if device.type == "cuda" and not has_faiss_gpu():
        raise ValueError(
            "the memory lies on a GPU but the installed faiss has no GPU support: pip uninstall faiss-cpu and "
            "pip install faiss-gpu, or choose --memory-search torch"
        )
    return faiss_search
