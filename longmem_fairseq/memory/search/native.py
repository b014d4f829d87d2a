"""Search on the CPU by a kernel in 8-bit integers (native_search.cpp), compiled when it is first needed.

It finds what faiss finds, in all chunks or in the inverted lists of a faiss index, in a third of the time for 65,536
tokens and a twentieth for a million. It needs a processor with AVX-512 VNNI (Intel since Cascade Lake, AMD since Zen 4)
and a C++ compiler.

Legend: B rows of a batch, H heads, T queries, d width of a head, n chunks wanted.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterable, List, Tuple

import numpy as np
import torch
from torch import Tensor

from ..bank import MemoryBank
from .base import faiss_search

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native_search.cpp")
FLAGS = [
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-mfma",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vnni",
]
# Fewer queries are not worth making integers of a whole memory for.
FEWEST_QUERIES = 16
WIDEST_HEAD = 1024


def suits(queries: int, width: int) -> bool:
    """Whether the kernel is the faster way for so many queries of a width, and can take them."""
    return queries >= FEWEST_QUERIES and width <= WIDEST_HEAD


class Unavailable(ValueError):
    """The kernel cannot be built or run here; the message is the reason."""


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``longmem_fairseq`` in ``$XDG_CACHE_HOME``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longmem_fairseq"


@functools.lru_cache(maxsize=None)
def load_kernel() -> ctypes.CDLL:
    """The compiled kernel; it is built where the cache has none of this source.

    Raises:
        Unavailable: no compiler is found, or it fails; the processor lacks the instructions.
    """
    source = SOURCE.read_bytes()
    command = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "clang++"]
    name = hashlib.sha256(b"\0".join([source, *(part.encode() for part in command + FLAGS)])).hexdigest()[:16]
    if shutil.which(command[0]) is None:
        raise Unavailable(f"there is no C++ compiler {command[0]}")
    try:
        library = cache_directory() / f"native_search-{name}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=library.parent) as directory:
                made = os.path.join(directory, library.name)
                subprocess.run([*command, *FLAGS, str(SOURCE), "-o", made], check=True, capture_output=True, text=True)
                os.replace(made, library)
            logger.info("compiled %s", library)
        kernel = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no reason given"]
        raise Unavailable(f"{' '.join(command)} fails ({lines[0]})") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise Unavailable(f"native_search-{name}.so cannot be made or loaded ({error})") from None
    if not kernel.longmem_supported():
        raise Unavailable("this processor has no AVX-512 VNNI")
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    for function, signature in ((kernel.longmem_search, "pipipiip"), (kernel.longmem_search_lists, "piipppipiip")):
        function.argtypes, function.restype = [types[letter] for letter in signature], None
    return kernel


def native_search(bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
    """Exact search by the compiled kernel, over PyTorch's number of threads; by faiss for a few queries.

    Arguments and result as for :func:`longmem_fairseq.memory.search.base.torch_search`, of a bank in main memory.

    Raises:
        Unavailable: the kernel cannot be built or run here.
    """
    B, H, T, d = queries.shape
    if not suits(T, d):
        return faiss_search(bank, lanes, queries, n)
    kernel = load_kernel()
    queries = queries.detach().float().contiguous()
    slots = torch.full((B, H, T, n), -1, dtype=torch.int64)
    threads = torch.get_num_threads()
    # A head is one piece of work unless there are too few of them; the integers of its chunks are made for each piece.
    step = max(FEWEST_QUERIES, -(-T // -(-threads // max(1, B * H))))

    def search(piece: Tuple[int, int, int]) -> None:
        row, head, begin = piece
        lane = int(lanes[row])
        spans = np.array(bank.spans(lane), dtype=np.int64)  # (S, 2)
        asked, found = (x[row, head, begin : begin + step] for x in (queries, slots))
        kernel.longmem_search(
            asked.data_ptr(),
            asked.size(0),
            bank.means[lane, head].data_ptr(),
            d,
            spans.ctypes.data,
            len(spans),
            n,
            found.data_ptr(),
        )

    _in_threads(search, [(row, head, begin) for row in range(B) for head in range(H) for begin in range(0, T, step)])
    return slots


def native_list_search(indices: List, queries: np.ndarray, n: int) -> np.ndarray:
    """What ``index.search`` of a ``faiss.IndexIVFFlat`` by inner products finds, for each of some heads.

    faiss looks into the lists of one query after the other; here each list is read once, for all that look into it.

    Args:
        indices: of each head.
        queries: shape (H, T, d), float32, contiguous.
        n: chunks wanted.

    Returns:
        Numbers of the chunks, best first, shape (H, T, n), int64; -1 where fewer are found.

    Raises:
        Unavailable: the kernel cannot be built or run here.
    """
    import faiss

    kernel = load_kernel()
    H, T, d = queries.shape
    found = np.empty((H, T, n), dtype=np.int64)

    def probes(index, asked: np.ndarray) -> np.ndarray:
        """The lists that each query looks into, (T, nprobe)."""
        centroids = faiss.downcast_index(index.quantizer)
        if not isinstance(centroids, faiss.IndexFlat):
            return centroids.search(asked, index.nprobe)[1]
        lists, all_lists = np.empty((T, index.nprobe), dtype=np.int64), np.array([0, index.nlist], dtype=np.int64)
        kernel.longmem_search(
            asked.ctypes.data, T, int(centroids.get_xb()), d, all_lists.ctypes.data, 1, index.nprobe, lists.ctypes.data
        )
        return lists

    def search(head: int) -> None:
        index, asked = indices[head], queries[head]
        lists, numbers = index.invlists, range(index.nlist)
        sizes = np.array([lists.list_size(i) for i in numbers], dtype=np.int64)
        tables, names = (np.array([int(get(i) or 0) for i in numbers]) for get in (lists.get_codes, lists.get_ids))
        looked_into = probes(index, asked)
        kernel.longmem_search_lists(
            asked.ctypes.data,
            T,
            d,
            tables.ctypes.data,
            names.ctypes.data,
            sizes.ctypes.data,
            index.nlist,
            looked_into.ctypes.data,
            index.nprobe,
            n,
            found[head].ctypes.data,
        )

    _in_threads(search, range(H))
    return found


def _in_threads(run: Callable, pieces: Iterable) -> None:
    """Run for each piece, over PyTorch's number of threads; the kernel runs without Python's lock."""
    threads = torch.get_num_threads()
    if threads == 1:
        for piece in pieces:
            run(piece)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, pieces))  # raises what a piece raised
