"""Least work of one step, from its shapes: operations and bytes, and the time that a machine needs for them.

The bound of a part is the larger of two times: its operations at the machine's speed, and its bytes at the machine's
bandwidth. The parts run one after the other. A backward pass costs the side network twice its forward pass.

Legend: B lanes, T tokens of a segment, D width, H heads, d width of a head, V symbols, N chunks that a lane holds, S
tokens of local attention.
"""

import argparse
import time
from typing import Callable, Dict

import torch

from examples.benchmark.command import synchronize
from examples.benchmark.variants import DTYPES, products_only
from longmem_fairseq.models.memory_layers import parse_memory_layers


def memory_work(options: argparse.Namespace, memory_size: int, token_memory: int = 0) -> Dict[str, float]:
    """Count the operations and bytes that exact search and reading need in one step.

    Args:
        options: Options of throughput.py.
        memory_size: Number of tokens that a lane's memory holds.
        token_memory: Number of tokens that a lane's token memory holds; of it, only its search is counted.
    """
    queries = options.batch * options.heads * _step(options)
    chunks, width = memory_size // options.chunk_size, options.head_dim
    auto = "float32" if products_only(options) else options.dtype
    element = _bytes(auto if options.memory_dtype == "auto" else options.memory_dtype)
    k, layers = min(options.k, memory_size), len(parse_memory_layers(options.retrieval_layer_index))
    # In generation each token's search reads all chunk means again.
    times = _step(options) if options.mode == "generate" else 1
    work = {
        "search_operations": 2.0 * queries * chunks * width,
        "read_operations": 4.0 * queries * k * width,
        "search_bytes": 4.0 * options.batch * options.kv_heads * chunks * width * times + 4.0 * queries * width,
        "read_bytes": 2.0 * queries * k * width * element,
    }
    work = {part: layers * x for part, x in work.items()}
    work["tokens_operations"] = 2.0 * options.batch * _step(options) * token_memory * options.dim
    work["tokens_bytes"] = 2.0 * options.batch * token_memory * options.dim * times
    return work


def model_work(options: argparse.Namespace) -> Dict[str, float]:
    """Count the operations and bytes that one step needs without a memory: backbone, side network and logits."""
    tokens, D = options.batch * _step(options), options.dim
    side = options.layers // options.reduction
    local = options.segment * (3 / 4 if options.mode == "generate" else 1 / 2)  # keys of a query, on average
    layer = (
        2.0 * options.layer_weights + 4.0 * local * options.heads * options.head_dim
    )  # for a token, scores, values too
    backward = 3 if options.mode == "train" else 1
    head = 2.0 * D * options.vocab * (2 if options.mode == "train" else 1)
    weights = (options.layer_weights * (options.layers + side * backward) + D * options.vocab) * _bytes(options.dtype)
    return {
        "model_operations": tokens * (layer * (options.layers + side * backward) + head),
        "model_bytes": weights * (_step(options) if options.mode == "generate" else 1),
    }


def full_attention_work(options: argparse.Namespace, kind: str, length: int) -> Dict[str, float]:
    """Count the operations and bytes of the backbone alone in one step.

    Args:
        options: Options of throughput.py.
        kind: ``window``, which is read at once, or ``context``, behind which a segment is read.
        length: Number of tokens of the window or context.
    """
    D = options.dim
    context = length if kind == "context" else 0
    tokens = options.segment if context else length
    keys = context + tokens / 2  # of a query, on average
    layer = 2.0 * options.layer_weights + 4.0 * keys * options.heads * options.head_dim
    caches = 2.0 * options.batch * context * options.kv_heads * options.head_dim * options.layers
    weights = options.layer_weights * options.layers + D * options.vocab
    return {
        "model_operations": options.batch * tokens * (layer * options.layers + 2.0 * D * options.vocab),
        "model_bytes": (weights + caches) * _bytes(options.dtype),
    }


def bound(work: Dict[str, float], speed: Dict[str, float]) -> float:
    """Return the least number of seconds that a machine needs for some work.

    Args:
        work: Operations and bytes of each part, as ``memory_work`` and ``model_work`` count them.
        speed: ``operations`` per second, ``search_operations`` per second (the scores of exact search are float32), and
            ``bytes`` per second.
    """
    seconds = 0.0
    for part in ("model", "search", "read", "tokens"):
        if f"{part}_operations" in work:
            rate = speed["search_operations" if part in ("search", "tokens") else "operations"]
            seconds += max(work[f"{part}_operations"] / rate, work[f"{part}_bytes"] / speed["bytes"])
    return seconds


def machine_speed(options: argparse.Namespace) -> Dict[str, float]:
    """Return the machine's speed, from ``--tflops`` and ``--gbps`` or measured here.

    Returns:
        Operations per second of large matrix products in the model's precision (``operations``) and in float32
        (``search_operations``), and bytes per second of reading memory (``bytes``).
    """
    bandwidth = options.gbps * 1e9 if options.gbps else _bandwidth(options.device)
    if options.tflops:
        return {"operations": options.tflops * 1e12, "search_operations": options.tflops * 1e12, "bytes": bandwidth}
    dtype = DTYPES[options.dtype]
    operations = _products(dtype, options.device)
    search = operations if dtype == torch.float32 else _products(torch.float32, options.device)
    return {"operations": operations, "search_operations": search, "bytes": bandwidth}


def _products(dtype: torch.dtype, device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _fastest(lambda: a @ b, device)


def _bandwidth(device: torch.device) -> float:
    x = torch.ones(1 << 26, device=device)  # 256 MiB, more than caches hold
    return x.numel() * 4 / _fastest(lambda: x.sum(), device)


def _fastest(run: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    """Return the seconds of the fastest of several runs."""
    times, began = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _step(options: argparse.Namespace) -> int:
    """Return the number of tokens of a row in one measured step."""
    return max(1, options.segment // 4) if options.mode == "generate" else options.segment


def _bytes(dtype: str) -> int:
    return torch.finfo(DTYPES[dtype]).bits // 8
