"""Seconds to save a memory to a file and to load it, in each precision, for the shape of a model.

    python examples/benchmark/memory_file_speed.py                 # 65,536 tokens of GPT-2 medium: 16 heads of width 64

The memory holds random numbers; saving and loading do not depend on what is remembered. Both include the check sum of
all that is in the file. Precisions take turns; figures are medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Sequence

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch

from examples.benchmark.tables import lines_of, machine, stop, table, write_json
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.document_memory import Document, DocumentMemory
from longmem_fairseq.memory.memory_file import DTYPES, load_memory, save_memory

MODEL = ("0" * 64, 17)  # a fingerprint and a layer


def empty(options: argparse.Namespace) -> DocumentMemory:
    return DocumentMemory(MemoryBank(1, options.heads, options.head_dim, options.tokens, options.chunk_size))


def measure(options: argparse.Namespace) -> List[Dict[str, object]]:
    """One row a precision."""
    document_memory, other = empty(options), empty(options)
    keys, values = torch.randn(2, options.heads, options.tokens, options.head_dim)
    document_memory.replace(keys, values, [Document("random", 0, options.tokens)])
    saving: Dict[str, List[float]] = {dtype: [] for dtype in DTYPES}
    loading: Dict[str, List[float]] = {dtype: [] for dtype in DTYPES}
    sizes = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for _ in range(options.rounds):
            for dtype in DTYPES:
                path = os.path.join(directory, dtype)
                began = time.perf_counter()
                save_memory(path, document_memory, *MODEL, dtype=dtype)
                saved = time.perf_counter()
                load_memory(path, other, *MODEL)
                loading[dtype].append(time.perf_counter() - saved)
                saving[dtype].append(saved - began)
                sizes[dtype] = os.path.getsize(path)
    return [
        {
            "dtype": dtype,
            "mib": sizes[dtype] / 2**20,
            "save_seconds": statistics.median(saving[dtype]),
            "load_seconds": statistics.median(loading[dtype]),
        }
        for dtype in DTYPES
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=65536, help="in the memory (default: %(default)s)")
    add("--heads", type=int, default=16, help="default: %(default)s")
    add("--head-dim", type=int, default=64, help="width of a head (default: %(default)s)")
    add("--chunk-size", type=int, default=4, help="tokens of a chunk (default: %(default)s)")
    add("--rounds", type=int, default=5, help="measurements of each precision (default: %(default)s)")
    add("--directory", help="where the files lie while they are measured (default: the system's for such files)")
    add("--json", help="write the result there")
    options = parser.parse_args(arguments)
    for name in ("tokens", "heads", "head_dim", "chunk_size", "rounds"):
        if getattr(options, name) < 1:
            stop(f"--{name.replace('_', '-')} {getattr(options, name)} is less than 1")
    if options.tokens < options.chunk_size:
        stop(f"--tokens {options.tokens} is less than one chunk of {options.chunk_size} (--chunk-size)")
    if options.directory and not os.path.isdir(options.directory):
        stop(f"--directory {options.directory} does not exist")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    result = {"machine": machine(), "options": vars(options), "rows": measure(options)}
    columns = {"dtype": "precision", "mib": "MiB", "save_seconds": "save s", "load_seconds": "load s"}
    print(f"## A memory of {options.tokens:,} tokens, {options.heads} heads of width {options.head_dim}, on disk\n")
    print(table(result["rows"], columns), "", *lines_of(result["machine"]), sep="\n")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main(sys.argv[1:])
