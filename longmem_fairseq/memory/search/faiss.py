"""Exact search by faiss on the bank's own tensor: ``knn`` on the CPU, ``knn_gpu`` on a GPU.

Legend: B rows of a batch, H KV heads, T queries of a KV head, d width of a head, N slots of the bank, n chunks to find.
"""

import functools
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from ..bank import MemoryBank
from .base import SearchBackend, register_search
from .scaling import scale_queries
from .torch import TorchSearch, rows_by_spans


@register_search("faiss")
class FaissSearch(SearchBackend):
    """Exact search by faiss; see :class:`SearchBackend`."""

    def __init__(self):
        # faiss searches one range of slots. A stream that was joined midway fills two until its ring is full.
        self.two_spans = TorchSearch()

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        try:
            import faiss  # noqa: F401
        except ImportError:
            return "it needs faiss (pip install faiss-cpu or faiss-gpu)"
        if device.type == "cuda" and not has_faiss_gpu():
            return (
                "the memory is on a GPU but the installed faiss has no GPU support (pip uninstall faiss-cpu, then "
                "pip install faiss-gpu)"
            )
        return None

    def __call__(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
        B, H, T, _ = queries.shape
        queries = scale_queries(queries.detach().float()).contiguous()
        slots = torch.full((B, H, T, n), -1, dtype=torch.int64, device=queries.device)
        for spans, rows in rows_by_spans(bank, lanes).items():
            if len(spans) == 2:
                slots[rows] = self.two_spans(bank, lanes[rows], queries[rows], n)
                continue
            low, high = spans[0]
            held = min(n, high - low)
            for row in rows:
                for head in range(H):
                    best = _knn(queries[row, head], bank.means[lanes[row], head, low:high], held)
                    # faiss returns -1 for queries that are not numbers.
                    slots[row, head, :, :held] = torch.where(best < 0, best, best + low)
        return slots


def has_faiss_gpu() -> bool:
    """Return whether the installed faiss was built with GPU support."""
    try:
        import faiss
    except ImportError:
        return False
    return hasattr(faiss, "StandardGpuResources")


def _knn(queries: Tensor, means: Tensor, n: int) -> Tensor:
    """Return the rows of the n best of means (N, d) for queries (T, d), shape (T, n), int64."""
    import faiss

    if not queries.is_cuda:
        _, best = faiss.knn(queries.numpy(), means.numpy(), n, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(best)
    import faiss.contrib.torch_utils  # noqa: F401  (lets knn_gpu take torch tensors)

    resources = _gpu_resources(torch.cuda.current_device())
    _, best = faiss.knn_gpu(resources, queries, means, n, metric=faiss.METRIC_INNER_PRODUCT)
    return best


@functools.lru_cache(maxsize=None)  # each object reserves scratch memory on its device
def _gpu_resources(device: int):
    """Return faiss's resources of a GPU, given its number."""
    import faiss

    return faiss.StandardGpuResources()
