"""Seconds to save a memory to a file and to load it, in each precision, for the shape of a model.

    python -m examples.benchmark.memory_file_speed         # 65,536 tokens of GPT-2 medium: 16 heads of width 64

The memory holds random numbers, because the time does not depend on the values. Saving and loading both include the
checksum of the whole file. The precisions take turns; times are medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from typing import Dict, List, Sequence

import torch

from examples.benchmark.command import require_at_least, stop
from examples.benchmark.machine import describe_machine
from examples.benchmark.tables import bullet_list, table
from longmem_fairseq.files import write_json
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.document_memory import DocumentMemory, MemorizedDocument
from longmem_fairseq.memory.memory_file import DTYPES, load_memory, save_memory

MODEL = ("0" * 64, 17)  # a fingerprint and a layer


def empty_memory(options: argparse.Namespace) -> DocumentMemory:
    """Build an empty memory of the shape in the options."""
    return DocumentMemory(MemoryBank(1, options.heads, options.head_dim, options.tokens, options.chunk_size))


def measure(options: argparse.Namespace) -> List[Dict[str, object]]:
    """Save and load a full memory in turns; return one row for each precision."""
    saved_memory, loaded_memory = empty_memory(options), empty_memory(options)
    keys, values = torch.randn(2, options.heads, options.tokens, options.head_dim)
    saved_memory.replace(keys, values, [MemorizedDocument("random", 0, options.tokens)])
    saving: Dict[str, List[float]] = {dtype: [] for dtype in DTYPES}
    loading: Dict[str, List[float]] = {dtype: [] for dtype in DTYPES}
    sizes = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for _ in range(options.rounds):
            for dtype in DTYPES:
                path = os.path.join(directory, dtype)
                start = time.perf_counter()
                save_memory(path, saved_memory, *MODEL, dtype=dtype)
                middle = time.perf_counter()
                load_memory(path, loaded_memory, *MODEL)
                loading[dtype].append(time.perf_counter() - middle)
                saving[dtype].append(middle - start)
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
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.memory_file_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=int, default=65536, help="number of tokens in the memory (default: %(default)s)")
    add("--heads", type=int, default=16, help="number of attention heads (default: %(default)s)")
    add("--head-dim", type=int, default=64, help="width of a head (default: %(default)s)")
    add("--chunk-size", type=int, default=4, help="number of tokens in a chunk (default: %(default)s)")
    add("--rounds", type=int, default=5, help="number of measurements of each precision (default: %(default)s)")
    add("--directory", help="directory of the measured files (default: the system's directory for temporary files)")
    add("--json", help="path of a JSON file for the result")
    options = parser.parse_args(arguments)
    require_at_least(options, 1, "tokens", "heads", "head_dim", "chunk_size", "rounds")
    if options.tokens < options.chunk_size:
        stop(f"--tokens {options.tokens} is less than one chunk of {options.chunk_size} (--chunk-size)")
    if options.directory and not os.path.isdir(options.directory):
        stop(f"--directory {options.directory} does not exist")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    result = {"machine": describe_machine(), "options": vars(options), "rows": measure(options)}
    columns = {"dtype": "precision", "mib": "MiB", "save_seconds": "save s", "load_seconds": "load s"}
    print(f"## A memory of {options.tokens:,} tokens, {options.heads} heads of width {options.head_dim}, on disk\n")
    print(table(result["rows"], columns), "", *bullet_list(result["machine"]), sep="\n")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main(sys.argv[1:])
