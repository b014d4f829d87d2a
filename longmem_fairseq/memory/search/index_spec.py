"""Which faiss index ``--memory-index`` asks for, whether a memory can keep it in step, and how it is searched.

Legend: N chunks that a lane holds, d width of a head.
"""

import re
import sys
from dataclasses import dataclass
from typing import List

FLAT = "flat"
# faiss asks for 39 points a cluster, and uses no more than 256: more training points cost time and change little.
_POINTS_LEAST, _POINTS_MOST = 39, 64
_CODEWORDS = 256  # of a product quantizer of 8 bits
# Candidates that are compared exactly for each chunk wanted, where an index holds keys in codes.
_CANDIDATES = 4


@dataclass(frozen=True)
class IndexSpec:
    """An index that faiss can make, of a kind that a memory can keep in step with what it holds.

    Attributes:
        factory: faiss's factory string.
        parameters: of the search, as faiss's ``ParameterSpace`` reads them: ``nprobe=32``.
        removes: single chunks can be taken out (inverted lists); otherwise those that left are hidden, until a rebuild.
        coded: keys are held in codes, so that what is found must be compared exactly.
        needed: chunks that a lane must hold before the index is made.
        width: d.
    """

    factory: str
    parameters: str
    removes: bool
    coded: bool
    needed: int
    width: int

    def candidates(self, n: int) -> int:
        """How many chunks the index is asked for, for n."""
        return _CANDIDATES * n if self.coded else n

    def build(self):
        """An index without chunks, not trained yet."""
        faiss, index = _made(self.factory, self.width)
        inner = innermost(faiss, index)
        if self.removes:
            inner.cp.max_points_per_centroid = _POINTS_MOST
            inner.set_direct_map_type(faiss.DirectMap.Hashtable)
        faiss.ParameterSpace().set_index_parameters(index, self.parameters)
        return index

    def __str__(self) -> str:
        return f"{self.factory} ({self.parameters})"


def index_spec(factory: str, parameters: str, width: int, chunks: int) -> IndexSpec:
    """The index for ``--memory-index``, which is not ``flat``, and ``--memory-index-parameters``.

    Args:
        factory: as faiss's ``index_factory`` reads it.
        parameters: of the search; empty for a choice by the index's size.
        width: d.
        chunks: N.

    Raises:
        ValueError: there is no such index, or the memory cannot use it; the message says why.
    """
    try:
        faiss, index = _made(factory, width)
    except ImportError:
        raise ValueError(
            f"--memory-index {factory} needs faiss: pip install faiss-cpu, or search exactly with --memory-index {FLAT}"
        ) from None
    except RuntimeError as error:
        raise ValueError(
            f"--memory-index {factory} is no index that faiss makes for keys of width {width} ({_reason(error)}): it "
            f"is {FLAT}, or a factory string such as IVF1024,Flat or IVF4096,PQ32 or HNSW32"
        ) from None
    inner = innermost(faiss, index)
    kind = type(inner).__name__
    lists = isinstance(inner, faiss.IndexIVF) and "FastScan" not in kind
    if not lists and not isinstance(inner, faiss.IndexHNSW):
        raise ValueError(
            f"--memory-index {factory} makes an {kind}, from which a memory cannot take out what it forgets: choose "
            f"{FLAT}, IVFn,... or HNSWn, behind OPQ, PCA or RR if you like"
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
    try:
        faiss.ParameterSpace().set_index_parameters(index, parameters)
    except RuntimeError:
        raise ValueError(
            f"--memory-index-parameters {parameters} cannot be set for {factory}: write, for example, "
            f"{'nprobe=32' if lists else 'efSearch=64'}"
        ) from None
    found = re.search(r"(?:^|,)(nprobe|efSearch)=(-?\d+)", parameters)
    most = inner.nlist if lists else sys.maxsize
    if found and not 1 <= int(found[2]) <= most:
        limits = f"between 1 and the {most:,} lists of {factory}" if lists else "1 or more"
        raise ValueError(f"--memory-index-parameters {found[0]} must be {limits}: change it")
    return IndexSpec(factory, parameters, lists, coded, needed, width)


def innermost(faiss, index):
    """The index behind the transformations of vectors (OPQ, PCA...)."""
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _made(factory: str, width: int):
    import faiss

    return faiss, faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)


def _clusters(factory: str, inner, is_trained: bool) -> List[int]:
    """How many centroids each part of an index is trained to have; there must be as many chunks."""
    if is_trained:
        return []
    codes = hasattr(inner, "nlist") and "PQ" not in factory and "PCA" not in factory
    codewords = inner.pq.ksub if hasattr(inner, "pq") else 1 if codes else _CODEWORDS
    return [getattr(inner, "nlist", 1), codewords, _CODEWORDS if "OPQ" in factory else 1]


def _default_parameters(inner, lists: bool) -> str:
    return f"nprobe={max(1, inner.nlist // 16)}" if lists else "efSearch=128"


def _reason(error: RuntimeError) -> str:
    """The last part of faiss's message, which otherwise names its own source files."""
    return str(error).rsplit(": ", 1)[-1].strip()
