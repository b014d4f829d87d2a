"""The contract of a search backend, and the registry that ``--memory-search`` chooses from.

A search finds, for each query, the chunks of a memory bank whose mean keys have the largest inner products with it
(docs/method.md, "One step", 3). A backend is a class in a file of its own, registered under the name that selects it::

    @register_search("mine")
    class MySearch(SearchBackend):
        def __call__(self, bank, lanes, queries, n): ...

As soon as that file is imported, ``--memory-search mine`` selects it.

Legend: B rows of a batch, H KV heads, G query heads of a KV head, T tokens, d width of a head, n chunks to find.
"""

import functools
import logging
from abc import ABC, abstractmethod
from typing import Callable, ClassVar, Dict, List, Optional, Sequence, Tuple, Type

import numpy as np
import torch
from torch import Tensor

from ..bank import MemoryBank

logger = logging.getLogger(__name__)

AUTO = "auto"
# The backends that "auto" tries, in this order, by the type of the memory's device.
_PREFERENCE = {"cpu": ("native", "faiss"), "cuda": ("triton", "faiss")}

ListSearch = Callable[[List, np.ndarray, int], np.ndarray]  # see SearchBackend.list_search


class SearchBackend(ABC):
    """A way to find the chunks of a bank with the largest inner products.

    A backend keeps nothing between two calls except ``recall``, so one object serves any number of banks.

    Attributes:
        name: Name that ``--memory-search`` selects the backend by; set by :func:`register_search`.
        recall: Number of chunks that the last search has in common with exact search, and number of chunks searched
            for. None where the search is exact or was not compared.
        static: Whether on a GPU its kernels depend on nothing but sizes, and it learns from ``bank.places`` alone what
            lanes hold, so that a CUDA graph can contain it.
    """

    name: ClassVar[str] = ""
    recall: Optional[Tuple[float, float]] = None
    static: ClassVar[bool] = False

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        """Return the reason why the backend cannot search a bank here, or None if it can.

        Args:
            device: Device of the bank's mean keys.

        Returns:
            A clause without a capital letter and a full stop, which follows "--memory-search NAME is not available: ",
            or None. By default a backend can search everywhere.
        """
        return None

    @abstractmethod
    def __call__(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
        """Search the bank.

        Args:
            bank: Memory bank to search.
            lanes: Lane of the bank for each row of the batch, shape (B,), int64.
            queries: Queries, grouped by KV head (:func:`longmem_fairseq.modules.query_groups.group_queries`), shape
                (B, H, G * T, d), any floating dtype. Scores have the precision of float32 or a higher one;
                ``scaling.scale_queries`` keeps them from overflowing.
            n: Number of chunks to find.

        Returns:
            Slots of the chunks, best first, shape (B, H, G * T, n), int64, on the queries' device; -1 where a lane
            holds fewer chunks.
        """

    def list_search(self, queries: int, width: int) -> Optional[ListSearch]:
        """Return a function that searches inverted lists faster than faiss does, or None if there is none.

        Args:
            queries: Number of queries of each head.
            width: Width of a head.

        Returns:
            A function of a list with one ``faiss.IndexIVFFlat`` of inner products per head, the queries, shape
            (H, G * T, d), float32, contiguous, and the number n of chunks to find. It returns the ids of the chunks in
            the index, best first, shape (H, G * T, n), int64; -1 where fewer are found. By default there is none.
        """
        return None


BACKENDS: Dict[str, Type[SearchBackend]] = {}


def register_search(name: str) -> Callable[[Type[SearchBackend]], Type[SearchBackend]]:
    """Register a search backend, as a decorator of its class.

    Args:
        name: Name that ``--memory-search`` selects the backend by.

    Raises:
        ValueError: The name is registered already, or the class is not a search backend.
    """

    def register(backend: Type[SearchBackend]) -> Type[SearchBackend]:
        if name == AUTO or name in BACKENDS:
            raise ValueError(f"a search backend is registered as {name} already: choose another name")
        if not issubclass(backend, SearchBackend):
            raise ValueError(f"{backend.__name__} is not a subclass of SearchBackend: it cannot be registered")
        backend.name = name
        BACKENDS[name] = backend
        return backend

    return register


def registered_searches() -> Tuple[str, ...]:
    """Return the values of ``--memory-search``: ``auto``, then the name of every registered backend."""
    return (AUTO, *BACKENDS)


def check_search(name: str) -> None:
    """Refuse a value of ``--memory-search`` that is not registered, before anything is built.

    Args:
        name: Name of a registered backend, or ``auto``.

    Raises:
        ValueError: The name is not registered.
    """
    if name not in registered_searches():
        raise ValueError(f"--memory-search {name} is unknown: choose {_listed(registered_searches())}")


def choose_search(name: str, device: torch.device) -> SearchBackend:
    """Make the search backend for ``--memory-search``.

    Args:
        name: Name of a registered backend, or ``auto``: ``native`` in main memory and ``triton`` on a GPU, or ``faiss``
            where they cannot run.
        device: Device of the bank's mean keys.

    Raises:
        ValueError: The name is not registered, or the backend cannot run here.
    """
    check_search(name)
    reasons: Dict[str, str] = {}
    candidates = _PREFERENCE.get(device.type, ("faiss",)) if name == AUTO else (name,)
    for candidate in candidates:
        reason = BACKENDS[candidate].unavailable(device)
        if reason is None:
            for other, why in reasons.items():
                _log_choice(candidate, other, why)
            return BACKENDS[candidate]()
        reasons[candidate] = reason
    others = [other for other, backend in BACKENDS.items() if other not in reasons]
    others = [other for other in others if BACKENDS[other].unavailable(device) is None]
    advice = f"; choose --memory-search {_listed(others)}" if others else ""
    raise ValueError(f"--memory-search {name} is not available: {reason}{advice}")


@functools.lru_cache(maxsize=None)  # once is enough, however many banks are made
def _log_choice(name: str, other: str, reason: str) -> None:
    logger.info("search by %s, as %s is not available: %s", name, other, reason)


def _listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them: ``a, b or c``."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
