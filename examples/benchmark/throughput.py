"""Tokens per second and peak memory by memory size, with the same weights, beside full attention over longer windows.

    python -m examples.benchmark.throughput                                    # the reference shape, on the CPU
    python -m examples.benchmark.throughput --mode train --batch 8             # or --mode generate
    python -m examples.benchmark.throughput --backbone BACKBONE.pt --segment 1024         # a model's shape and weights
    python -m examples.benchmark.throughput --noise --memory-sizes 0 65536 --token-memory-sizes 16384 65536
    python -m examples.benchmark.throughput --memory-index IVF1024,Flat:nprobe=32 --memory-sizes 0 1048576 --keys KEYS
    python -m examples.benchmark.throughput --device cuda --dtype bf16 --layers 24 --dim 1024 --heads 16 \
        --vocab 50264 --segment 1024 --retrieval-layer-index 17 --batch 8 --cuda-graphs off on \
        --positions learned --full-windows 4096 8192 --full-contexts 16384 65536

The weights are random, because the time of exact search, reading and attention does not depend on the text; --backbone
takes the sizes and weights of a model of any family, and the side network that starts from it. The time of an
approximate index does depend on the text: pass the keys and queries of a real model and text with --keys (real_keys.py
makes the file), and its recall is measured too. Without --keys, each memory is filled before the measurement by
streaming random tokens through the backbone, or with noise (--noise): for the token memory it is the slowest to search,
as no entry is much nearer than the others. The memory is also written during the measurement. The variants take
turns, step by step, so that all of them see the same machine; figures are medians.

Each row also has its ratio to memory off, the cost of a token in multiples of that with the smallest memory, and the
share of the roofline: the least time that the machine needs for the operations and bytes of the shapes, at the speed of
large matrix products (--tflops, otherwise measured) and of reading memory (--gbps, otherwise measured). The roofline
counts exact search in float32. An index needs fewer operations, and the native search needs cheaper ones, so both can
exceed it.

Peak memory: on CUDA the most that PyTorch allocated during a variant's steps, without the memories of the other
variants; on the CPU the resident memory of a separate process that does one step.
"""

import argparse
import gc
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

if "--threads" in sys.argv[:-1]:  # before torch
    os.environ["OMP_NUM_THREADS"] = sys.argv[sys.argv.index("--threads") + 1]

import torch
from tqdm import tqdm

from examples.benchmark.command import require_at_least, require_device, save_plot, stop, synchronize
from examples.benchmark.machine import describe_machine, peak_resident
from examples.benchmark.real_keys import RealKeys
from examples.benchmark.roofline import bound, full_attention_work, machine_speed, memory_work, model_work
from examples.benchmark.tables import bullet_list, table
from examples.benchmark.variants import DTYPES, build_decoder, build_variant, take_sizes
from longmem_fairseq.files import write_json, write_text
from longmem_fairseq.memory.placement import DEVICES, choose_placement
from longmem_fairseq.memory.search.base import registered_searches
from longmem_fairseq.memory.search.index_spec import FLAT, index_spec, split_index
from longmem_fairseq.models.memory_layers import parse_memory_layers
from longmem_fairseq.models.step_graphs import MODES
from longmem_fairseq.modules.self_attention import forget_masks


def timed(run: Callable[[], None], times: int, device: torch.device, clock: Callable[[], float]) -> float:
    """Return the mean number of seconds of a function that is run ``times`` times without waiting in between."""
    synchronize(device)
    start = clock()
    for _ in range(times):
        run()
    synchronize(device)
    return (clock() - start) / times


def measure(variants: List, options: argparse.Namespace) -> List[Dict]:
    """Measure seconds, tokens per second and, on CUDA, peak memory of each variant.

    Args:
        variants: Variants (see variants.py) whose memories are full.
        options: Options of this command.

    Returns:
        One row for each variant, in their order.
    """
    clock = time.process_time if options.processor_time else time.perf_counter
    queued = 4 if options.device.type == "cuda" and options.mode != "generate" else 1
    peaks = []
    banks = sum(variant.bank_bytes for variant in variants)
    for variant in variants:
        for _ in range(2):
            variant.step()
        if options.device.type == "cuda":
            forget_masks()  # ALiBi keeps the masks of the last windows, which count for their variant only
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            variant.step()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - banks + variant.bank_bytes)
    seconds = [[] for _ in variants]
    for _ in tqdm(range(options.steps), desc="measuring", leave=False, mininterval=2):
        for variant, taken in zip(variants, seconds):
            taken.append(timed(variant.step, queued, options.device, clock))
    rows = []
    for i, (variant, taken) in enumerate(zip(variants, seconds)):
        median = statistics.median(taken)
        rows.append(
            {
                "tokens_per_second": variant.tokens / median,
                "seconds_per_step": median,
                "fastest": min(taken),
                "slowest": max(taken),
                "peak_memory_bytes": peaks[i] if peaks else None,
                "recall": variant.recall,
            }
        )
    return rows


def names_of(options: argparse.Namespace) -> List[str]:
    """List the names of the variants in the order of the rows."""
    memories = [f"memory:{size}:0:{graphs}" for size in options.memory_sizes for graphs in options.cuda_graphs]
    largest = max(options.memory_sizes)
    memories += [
        f"memory:{largest}:{size}:{graphs}" for size in options.token_memory_sizes for graphs in options.cuda_graphs
    ]
    full = [f"window:{length}" for length in options.full_windows]
    return memories + full + [f"context:{length}" for length in options.full_contexts]


def peaks_in_processes(options: argparse.Namespace, arguments: List[str]) -> List[int]:
    """Measure the peak resident memory, in bytes, of one step of each variant in a separate process."""
    peaks: Dict[str, int] = {}
    # The CPU has no CUDA graphs.
    names = [re.sub("^(memory:.*):[a-z]+$", r"\1:off", name) for name in names_of(options)]
    for name in tqdm(dict.fromkeys(names), desc="peak memory", leave=False):
        command = [sys.executable, "-m", "examples.benchmark.throughput", *arguments, "--peak-of", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[name] = int(done.stdout.split()[-1])
    return [peaks[name] for name in names]


def print_peak(options: argparse.Namespace) -> None:
    """Do one step of the variant ``--peak-of`` and print this process's peak resident memory."""
    variant = build_variant(options.peak_of, build_decoder(options), options)
    gc.collect()
    if options.peak_of.startswith("memory:") and variant.memory_size:
        variant.fill_with_noise()  # the peak does not depend on what the memory holds
    variant.step()
    print(peak_resident())


def compare(rows: List[Dict], full: List[Dict], options: argparse.Namespace, speed: Dict[str, float]) -> None:
    """Add to each row its ratios to the other rows and to the roofline.

    Args:
        rows: Rows by memory size; changed in place.
        full: Rows of full attention by window or context; changed in place.
        options: Options of this command.
        speed: Speed of the machine (see ``machine_speed``).
    """
    for row in rows:
        same = [other for other in rows if other["cuda_graphs"] == row["cuda_graphs"]]
        off = next((other for other in same if other["memory_size"] == 0), None)
        smallest = min((x for x in same if x["memory_size"]), key=lambda x: x["memory_size"], default=None)
        work = {**model_work(options), **memory_work(options, row["memory_size"], row["token_memory"])}
        row.update(work, roofline_share=bound(work, speed) / row["seconds_per_step"])
        row["roofline_ms"] = 1000 * bound({k: v for k, v in work.items() if not k.startswith("model")}, speed)
        if off is not None:
            row["ratio_to_off"] = row["tokens_per_second"] / off["tokens_per_second"]
            row["extra_ms"] = 1000 * (row["seconds_per_step"] - off["seconds_per_step"])
        if smallest is not None and row["memory_size"]:
            row["cost_of_smallest"] = row["seconds_per_step"] / smallest["seconds_per_step"]
        for other in full:
            ratio = row["tokens_per_second"] / other["tokens_per_second"]
            row.setdefault("ratio_to_full", {})[other["attention"]] = ratio
    for row in full:
        kind, length = row["attention"].split(":")
        work = full_attention_work(options, kind, int(length))
        row["roofline_share"] = bound(work, speed) / row["seconds_per_step"]
        row["speed_of_longmem"] = rows[-1]["tokens_per_second"] / row["tokens_per_second"]
        row["memory_of_longmem"] = rows[-1]["peak_memory_bytes"] / row["peak_memory_bytes"]


def markdown(result: Dict, options: argparse.Namespace) -> str:
    """Format the result as a report in Markdown."""
    for row in [*result["rows"], *result["full_attention"]]:
        row["peak_mib"] = row["peak_memory_bytes"] / 2**20
    columns = {
        "memory_size": "memory",
        "token_memory": "token memory",
        "index": "index",
        "cuda_graphs": "CUDA graphs",
        "tokens_per_second": "tokens/s",
        "ratio_to_off": "of memory off",
        "cost_of_smallest": "cost of a token x",
        "recall": "recall",
        "extra_ms": "extra ms",
        "roofline_ms": "roofline ms",
        "roofline_share": "roofline share",
        "peak_mib": "peak MiB",
    }
    shown = {key: name for key, name in columns.items() if any(row.get(key) is not None for row in result["rows"])}
    if not options.token_memory_sizes:
        del shown["token_memory"]
    text = [
        f"## Throughput, {options.mode}: {options.layers} layers, width {options.dim}, {options.heads} heads, "
        f"side network {options.layers // options.reduction}, segment {options.segment}, batch {options.batch}, "
        f"k {options.k}, chunk {options.chunk_size}, {options.dtype}, "
        f"{'sizes of ' + options.backbone if options.backbone else options.positions}, search by "
        f"{options.memory_search if options.memory_index == FLAT else options.memory_index}",
        "",
        table(result["rows"], shown),
        "",
        "Roofline: {operations:.3g} operations per second, in the search {search_operations:.3g}, and {bytes:.3g} "
        "bytes per second.".format(**result["speed"]),
    ]
    if result["full_attention"]:
        text += [
            "",
            table(
                result["full_attention"],
                {
                    "attention": "full attention",
                    "tokens_per_second": "tokens/s",
                    "roofline_share": "roofline share",
                    "peak_mib": "peak MiB",
                    "speed_of_longmem": "LongMem's speed x",
                    "memory_of_longmem": "LongMem's peak x",
                },
            ),
            "",
            "LongMem has a memory of {memory_size:,} and a token memory of {token_memory:,} tokens there. A window is "
            "read at once; a segment is read behind a context, which is kept in caches of all layers.".format(
                **result["rows"][-1]
            ),
        ]
    return "\n".join(text)


def draw(axes, result: Dict) -> None:
    """Draw tokens per second by memory size, with a line for each window of full attention."""
    rows = result["rows"]
    places = range(len(rows))
    axes.bar(places, [row["tokens_per_second"] for row in rows], color="tab:blue")
    names = [f"{row['memory_size']:,}" if row["memory_size"] else "off" for row in rows]
    names = [name + (f"\n+ {row['token_memory']:,}" if row["token_memory"] else "") for name, row in zip(names, rows)]
    axes.set_xticks(places, [f"{name}\ngraphs {row['cuda_graphs']}" for name, row in zip(names, rows)])
    for row in result["full_attention"]:
        axes.axhline(row["tokens_per_second"], color="tab:red", linestyle="--")
        axes.annotate(f"full attention, {row['attention']}", (0, row["tokens_per_second"]), va="bottom")
    axes.set_xlabel("memory, tokens")
    axes.set_ylabel(f"tokens/s ({result['options']['mode']})")


def parse(arguments: List[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--backbone", help="checkpoint of a backbone, with dict.txt beside it, in place of random weights and sizes")
    add("--layers", type=int, default=12, help="number of backbone layers (default: %(default)s)")
    add("--dim", type=int, default=512, help="width of the model (default: %(default)s)")
    add("--heads", type=int, default=8, help="number of attention heads (default: %(default)s)")
    add("--vocab", type=int, default=8000, help="number of symbols in the dictionary (default: %(default)s)")
    add("--positions", choices=("alibi", "learned"), default="alibi", help="position encoding (default: %(default)s)")
    add("--reduction", type=int, default=2, help="backbone layers per side layer (default: %(default)s)")
    add("--retrieval-layer-index", help="memory layer, counted from 0, or several: 13,17 (default: as in training)")
    add("--segment", type=int, default=512, help="number of tokens in a segment (default: %(default)s)")
    add("--batch", type=int, default=1, help="number of lanes (default: %(default)s)")
    add("--k", type=int, default=64, help="number of tokens read per query and head (default: %(default)s)")
    add("--chunk-size", type=int, default=4, help="number of tokens in a chunk (default: %(default)s)")
    add("--memory-sizes", type=int, nargs="+", default=[0, 4096, 65536], help="memory sizes in tokens; 0: memory off")
    add(
        "--token-memory-sizes",
        type=int,
        nargs="+",
        default=[],
        help="token memories in tokens, each measured beside the largest of --memory-sizes",
    )
    add("--token-memory-k", type=int, default=1024, help="entries that each token reads (default: %(default)s)")
    add("--memory-search", choices=registered_searches(), default="auto", help="as in training (default: %(default)s)")
    add("--memory-dtype", choices=("auto", *DTYPES), default="auto", help="precision of the keys and values in memory")
    add("--memory-index", default=FLAT, help="as in training; a memory too small for the index is searched exactly")
    add("--memory-index-parameters", default="", help=argparse.SUPPRESS)
    add("--memory-device", choices=DEVICES, default="auto", help="as in training")
    add("--memory-map", help="as in training")
    add("--keys", help="file of real keys and queries (see real_keys.py) to fill the memories with and to search for")
    add(
        "--full-windows",
        type=int,
        nargs="*",
        default=[],
        help="windows, in tokens, of the backbone alone to measure too",
    )
    add(
        "--full-contexts",
        type=int,
        nargs="*",
        default=[],
        help="tokens in the caches of the backbone alone, behind which it reads a segment with full attention",
    )
    add(
        "--cuda-graphs",
        choices=MODES,
        nargs="+",
        default=["auto"],
        help="as in training; several values are measured beside each other (default: auto)",
    )
    add(
        "--noise",
        action="store_true",
        help="fill the memories with noise in place of the keys of random tokens, which exact search does not notice",
    )
    add("--threads", type=int, help="number of threads on the CPU (default: PyTorch's)")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="precision of weights and activations; bf16 on the CPU as with --inference-dtype, except in training",
    )
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: %(default)s)")
    add("--steps", type=int, default=10, help="number of measurements of each variant (default: %(default)s)")
    add(
        "--mode",
        choices=("eval", "train", "generate"),
        default="eval",
        help="forward pass; forward and backward pass; or token by token (default: %(default)s)",
    )
    add(
        "--processor-time",
        action="store_true",
        help="measure the time of the processor instead of the clock's, for a busy machine; with --threads 1",
    )
    add("--tflops", type=float, help="speed of the machine in 10^12 operations per second (default: measured)")
    add("--gbps", type=float, help="memory bandwidth of the machine in 10^9 bytes per second (default: measured)")
    add("--json", help="path of a JSON file for the result")
    add("--markdown", help="path of a file for the printed tables")
    add("--png", help="path of a plot of tokens per second")
    add("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        take_sizes(options)
    except (ValueError, OSError) as error:
        stop(str(error))
    require_at_least(options, 1, "layers", "dim", "heads", "reduction", "segment", "batch", "k", "chunk_size", "steps")
    require_at_least(options, 1, "token_memory_sizes", "token_memory_k")
    if options.dim % options.heads or options.layers % options.reduction or options.k % options.chunk_size:
        stop("--dim must be a multiple of --heads, --layers of --reduction, and --k of --chunk-size")
    if options.token_memory_sizes and not max(options.memory_sizes):
        stop("--token-memory-sizes need a memory: add a size to --memory-sizes")
    if options.full_windows and options.mode != "eval":
        stop(f"--full-windows needs --mode eval: leave it out with --mode {options.mode}")
    if options.full_contexts and (options.mode != "eval" or options.positions != "learned" or options.backbone):
        stop("--full-contexts needs --mode eval, --positions learned (ALiBi has no flash kernel) and no --backbone")
    require_device(options.device)
    if options.cuda_graphs != ["auto"] and options.mode == "generate":
        stop(f"--cuda-graphs {options.cuda_graphs[0]} has no effect in --mode generate: leave it out")
    if "on" in options.cuda_graphs and options.device.type != "cuda":
        stop("--cuda-graphs on needs --device cuda")
    if options.noise and (options.keys is not None or options.memory_index != FLAT):
        stop("--noise is for exact search without --keys: leave it out")
    if options.processor_time and (options.threads != 1 or options.device.type != "cpu"):
        stop("--processor-time needs --threads 1 and --device cpu: threads that wait count too")
    for size in options.memory_sizes:
        if 0 < size < options.segment:
            stop(f"--memory-sizes {size} is smaller than one segment of {options.segment} tokens")
    try:
        index, parameters = split_index(options.memory_index, options.memory_index_parameters)
        if index != FLAT:
            chunks = max(options.memory_sizes) // options.chunk_size
            index_spec(index, parameters, options.head_dim, chunks)
        choose_placement(options.memory_device, options.memory_map, options.device, index != FLAT)
    except ValueError as error:
        stop(str(error))
    return options


def load_real_keys(options: argparse.Namespace) -> Optional[RealKeys]:
    """Load the file of ``--keys`` and check that it fits the shapes; None without the option."""
    if options.keys is None:
        return None
    if not Path(options.keys).is_file():
        stop(f"--keys {options.keys} does not exist: make it with real_keys.py")
    if len(parse_memory_layers(options.retrieval_layer_index)) > 1:
        stop(f"--keys are of one layer, not of --retrieval-layer-index {options.retrieval_layer_index}: name one")
    real, width = RealKeys(options.keys), options.head_dim
    chunks = max(options.memory_sizes) // options.chunk_size
    if real.means.size(1) < chunks or real.means.size(2) != width:
        stop(
            f"--keys {options.keys} has {real.means.size(1):,} chunks of width {real.means.size(2)}, but the largest "
            f"of --memory-sizes has {chunks:,} of width {width}"
        )
    return real


def main(arguments: List[str]) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(options)
        return
    real = load_real_keys(options)
    speed = machine_speed(options)
    try:
        decoder = build_decoder(options)
    except ValueError as error:
        stop(str(error))
    variants = [build_variant(name, decoder, options, real) for name in names_of(options)]
    memories = (len(options.memory_sizes) + len(options.token_memory_sizes)) * len(options.cuda_graphs)
    for variant in variants[:memories]:
        variant.fill()
    measured = measure(variants, options)
    if options.device.type != "cuda":
        for row, peak in zip(measured, peaks_in_processes(options, arguments)):
            row["peak_memory_bytes"] = peak
    rows, full = measured[:memories], measured[memories:]
    for row, variant in zip(rows, variants):
        index = variant.decoder.memory_factory.settings.index if variant.memory_size else None
        sizes = dict(memory_size=variant.memory_size, token_memory=variant.token_memory)
        row.update(sizes, index=index, bank_bytes=variant.bank_bytes)
        row["cuda_graphs"] = variant.decoder.lane_state.graphs.mode
    for row, name in zip(full, names_of(options)[memories:]):
        row["attention"] = name
    compare(rows, full, options, speed)
    settings = {name: str(value) if name == "device" else value for name, value in vars(options).items()}
    result = {"machine": describe_machine(), "options": settings, "speed": speed, "rows": rows, "full_attention": full}
    text = markdown(result, options)
    print(text, *bullet_list(result["machine"]), sep="\n")
    if options.json:
        write_json(options.json, result)
    if options.markdown:
        write_text(options.markdown, text + "\n")
    if options.png:
        save_plot(options.png, lambda axes: draw(axes, result))


if __name__ == "__main__":
    main(sys.argv[1:])
