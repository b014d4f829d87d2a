"""The faiss index that ``--memory-index`` names: whether a memory can keep it in step, and how it is searched.

Legend: N chunks that a lane holds, d width of a head.
"""

import re
import sys
from dataclasses import dataclass
from typing import List, Tuple

FLAT = "flat"
# faiss needs 39 points per cluster, and uses at most 256: more training points cost time and change little.
_POINTS_LEAST, _POINTS_MOST = 39, 64
_CODEWORDS = 256  # of a product quantizer of 8 bits
# Candidates that are compared exactly for each chunk to find, where an index holds keys in codes.
_CANDIDATES = 4


@dataclass(frozen=True)
class IndexSpec:
    """An index that faiss can make, of a kind that a memory can keep in step with what it holds.

    Attributes:
        factory: Factory string of faiss, such as ``IVF1024,Flat``.
        parameters: Search parameters in the form of faiss's ``ParameterSpace``, such as ``nprobe=32``.
        removes: Whether single chunks can be removed (inverted lists); otherwise evicted chunks are hidden until the
            index is rebuilt.
        coded: Whether keys are held in codes, so that the chunks found must be compared exactly.
        needed: Number of chunks that a lane must hold before the index is built.
        width: Width of a head, d.
    """

    factory: str
    parameters: str
    removes: bool
    coded: bool
    needed: int
    width: int

    def candidates(self, n: int) -> int:
        """Return the number of chunks that the index is searched for, to find n."""
        return _CANDIDATES * n if self.coded else n

    def build(self):
        """Return a faiss index without chunks, not trained yet."""
        faiss, index = _make(self.factory, self.width)
        inner = innermost(faiss, index)
        if self.removes:
            inner.cp.max_points_per_centroid = _POINTS_MOST
            inner.set_direct_map_type(faiss.DirectMap.Hashtable)
        faiss.ParameterSpace().set_index_parameters(index, self.parameters)
        return index

    def __str__(self) -> str:
        return f"{self.factory}:{self.parameters}"


def split_index(option: str, parameters: str = "") -> Tuple[str, str]:
    """Split ``--memory-index`` into faiss's factory string and its search parameters.

    Args:
        option: Value of ``--memory-index``: ``flat``, ``IVF1024,Flat`` or ``IVF1024,Flat:nprobe=32``.
        parameters: Value of ``--memory-index-parameters``, the search parameters as an option of their own.

    Returns:
        Factory string (or ``flat``), and search parameters; empty for a choice by the index's size.

    Raises:
        ValueError: Both values name search parameters, and they differ; or exact search has parameters.
    """
    factory, _, in_option = option.partition(":")
    if in_option and parameters and in_option != parameters:
        raise ValueError(
            f"--memory-index {option} and --memory-index-parameters {parameters} name different search parameters: "
            "leave out --memory-index-parameters"
        )
    in_option = in_option or parameters
    if factory == FLAT and in_option:
        raise ValueError(
            f"--memory-index {FLAT} is exact search, which has no search parameters such as {in_option}: leave them "
            "out, or choose an index such as IVF1024,Flat:nprobe=32"
        )
    return factory, in_option


def index_spec(factory: str, parameters: str, width: int, chunks: int) -> IndexSpec:
    """Check an index and describe it.

    Args:
        factory: Factory string of faiss, not ``flat`` (see :func:`split_index`).
        parameters: Search parameters in the form of faiss's ``ParameterSpace``; empty for a choice by the index's size.
        width: Width of a head, d.
        chunks: Number of chunks that a lane holds, N.

    Raises:
        ValueError: faiss cannot make the index, or the memory cannot use it; the message is the reason.
    """
    try:
        faiss, index = _make(factory, width)
    except ImportError:
        raise ValueError(
            f"--memory-index {factory} needs faiss: pip install faiss-cpu, or search exactly with --memory-index {FLAT}"
        ) from None
    except RuntimeError as error:
        raise ValueError(
            f"--memory-index {factory} is not an index that faiss makes for keys of width {width} ({_reason(error)}): "
            f"choose {FLAT}, or a factory string such as IVF1024,Flat or IVF4096,PQ32 or HNSW32"
        ) from None
    inner = innermost(faiss, index)
    kind = type(inner).__name__
    lists = isinstance(inner, faiss.IndexIVF) and "FastScan" not in kind
    if not lists and not isinstance(inner, faiss.IndexHNSW):
        raise ValueError(
            f"--memory-index {factory} makes an {kind}, from which a memory cannot remove evicted chunks: choose "
            f"{FLAT}, IVFn,... or HNSWn, or one of these behind OPQ, PCA or RR"
        )
    coded = kind not in ("IndexIVFFlat", "IndexHNSWFlat") or inner is not index
    least = max([1, *_clusters(factory, inner, index.is_trained)])
    if chunks < least:
        raise ValueError(
            f"--memory-index {factory} is trained on {least:,} chunks or more, and a memory of --memory-size tokens in "
            f"chunks of --chunk-size holds {chunks:,}: raise --memory-size, or choose a smaller index"
        )
    needed = min(chunks, _POINTS_LEAST * least) if not index.is_trained else 1
    parameters = parameters or _default_parameters(inner, lists)
    example = f"{factory}:{'nprobe=32' if lists else 'efSearch=64'}"
    try:
        faiss.ParameterSpace().set_index_parameters(index, parameters)
    except RuntimeError:
        raise ValueError(
            f"--memory-index {factory}:{parameters} has search parameters that cannot be set for {factory}: write, for "
            f"example, {example}"
        ) from None
    number = re.search(r"(?:^|,)((?:nprobe|efSearch)=(-?\d+))", parameters)
    most = inner.nlist if lists else sys.maxsize
    if number and not 1 <= int(number[2]) <= most:
        limits = f"between 1 and the {most:,} lists of {factory}" if lists else "1 or more"
        raise ValueError(f"--memory-index {factory}:{parameters}: {number[1]} must be {limits}")
    return IndexSpec(factory, parameters, lists, coded, needed, width)


def innermost(faiss, index):
    """Return the index behind the transformations of vectors (OPQ, PCA...).

    Args:
        faiss: The module faiss.
        index: A faiss index.
    """
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _make(factory: str, width: int):
    """Return the module faiss, and the index that it makes."""
    import faiss

    return faiss, faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)


def _clusters(factory: str, inner, is_trained: bool) -> List[int]:
    """Return the number of centroids of each trained part of an index; there must be as many chunks."""
    if is_trained:
        return []
    lists = getattr(inner, "nlist", 1)
    if hasattr(inner, "pq"):
        codewords = inner.pq.ksub
    elif hasattr(inner, "nlist") and "PQ" not in factory and "PCA" not in factory:
        codewords = 1
    else:
        codewords = _CODEWORDS
    return [lists, codewords, _CODEWORDS if "OPQ" in factory else 1]


def _default_parameters(inner, lists: bool) -> str:
    return f"nprobe={max(1, inner.nlist // 16)}" if lists else "efSearch=128"


def _reason(error: RuntimeError) -> str:
    """Return the last part of faiss's message, which starts with names of its source files."""
    return str(error).rsplit(": ", 1)[-1].strip()
