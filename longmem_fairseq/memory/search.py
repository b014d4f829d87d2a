"""Exact search of the memory bank: the chunks whose mean key has the largest inner product with a query.

Legend: B rows of a batch, H heads, T queries, d width of a head, N slots of the bank, n chunks wanted.
"""

from typing import Callable, Dict, Tuple

import numpy as np
import torch
from torch import Tensor

from .bank import MemoryBank

SearchFunction = Callable[[MemoryBank, np.ndarray, Tensor, int], Tensor]

# Scores of one block of queries held at a time by the torch search, in elements (256 MiB of float32).
_BLOCK = 1 << 26


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
        wanted = min(n, sum(end - begin for begin, end in spans))
        step = max(1, _BLOCK // (len(rows) * H * (high - low)))
        for t in range(0, T, step):
            block = _rows(queries, rows)[:, :, t : t + step].float()
            scores = block @ means.transpose(-1, -2)  # (b, H, t, N)
            if len(spans) == 2:
                scores[..., spans[0][1] - low : spans[1][0] - low] = float("-inf")
            slots[rows, :, t : t + step, :wanted] = scores.topk(wanted, dim=-1).indices + low
    return slots


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
    return x[torch.from_numpy(rows).to(x.device)]


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
        name: ``faiss`` or ``torch``.
        device: of the bank.

    Raises:
        ValueError: for another name, or faiss on a GPU that the installed faiss cannot use.
    """
    if name == "torch":
        return torch_search
    if name != "faiss":
        raise ValueError(f"--memory-search {name} is unknown: it is faiss or torch")
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise ValueError(
            "--memory-search faiss needs faiss: pip install faiss-cpu or faiss-gpu, or choose --memory-search torch"
        ) from None
    if device.type == "cuda" and not has_faiss_gpu():
        raise ValueError(
            "the memory lies on a GPU but the installed faiss has no GPU support: pip uninstall faiss-cpu and "
            "pip install faiss-gpu, or choose --memory-search torch"
        )
    return faiss_search
