"""Where the time of one step goes: the share of each kernel on a GPU, or of each operator on the CPU.

    python -m examples.benchmark.profile_step --layers 24 --dim 1024 --heads 16 --vocab 50264 --segment 1024 \
        --retrieval-layer-index 17 --batch 8 --device cuda --dtype bf16 --memory-sizes 65536 --noise

The options are those of throughput.py; the last of --memory-sizes is profiled, with the first value of --cuda-graphs.
The table has the kernels that take most of the time. "Busy" is the time of all kernels beside the time of a step that
is not profiled: what is missing to 100 % is a GPU that waits for the host.
"""

import statistics
import sys
import time
from typing import Dict, List

import torch
from torch.profiler import ProfilerActivity, profile

from examples.benchmark.command import stop, synchronize
from examples.benchmark.machine import describe_machine
from examples.benchmark.tables import bullet_list, table
from examples.benchmark.throughput import names_of, parse, timed
from examples.benchmark.variants import build_decoder, build_variant
from longmem_fairseq.files import write_json

_STEPS = 3  # steps that are profiled
_ROWS = 14  # kernels in the table
_LONGEST = 90  # characters of a name


def kernels_of(profiled: profile, device: torch.device) -> List[Dict]:
    """Return the kernels of a profile, those that take most first.

    Args:
        profiled: The profile of ``_STEPS`` steps.
        device: Device of the model; operators stand for kernels on the CPU.

    Returns:
        Name, calls of a step, milliseconds of a step and share of all kernels of each.
    """
    on_cpu = device.type == "cpu"
    rows = []
    for event in profiled.key_averages():
        microseconds = event.self_cpu_time_total if on_cpu else event.self_device_time_total
        is_kernel = on_cpu or event.device_type != torch.autograd.DeviceType.CPU
        if is_kernel and microseconds > 0:
            name = event.key if len(event.key) <= _LONGEST else event.key[: _LONGEST - 3] + "..."
            rows.append({"kernel": name, "calls": event.count / _STEPS, "milliseconds": microseconds / 1000 / _STEPS})
    total = sum(row["milliseconds"] for row in rows)
    for row in rows:
        row["share"] = row["milliseconds"] / total
    return sorted(rows, key=lambda row: -row["milliseconds"])


def summed(rows: List[Dict]) -> List[Dict]:
    """Return the first rows, and one for the sum of the others."""
    first, others = rows[:_ROWS], rows[_ROWS:]
    if others:
        sums = {name: sum(row[name] for row in others) for name in ("calls", "milliseconds", "share")}
        first = [*first, {"kernel": f"{len(others)} others", **sums}]
    return first


def main(arguments: List[str]) -> None:
    options = parse(arguments)
    if options.full_windows or options.full_contexts:
        stop("--full-windows and --full-contexts are not profiled: leave them out")
    options.memory_sizes, options.cuda_graphs = options.memory_sizes[-1:], options.cuda_graphs[:1]
    variant = build_variant(names_of(options)[0], build_decoder(options), options)
    variant.fill()
    for _ in range(3):
        variant.step()
    seconds = statistics.median(timed(variant.step, 1, options.device, time.perf_counter) for _ in range(options.steps))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device.type == "cuda" else [])
    with profile(activities=activities) as profiled:
        for _ in range(_STEPS):
            variant.step()
        synchronize(options.device)
    rows = kernels_of(profiled, options.device)
    busy = sum(row["milliseconds"] for row in rows) / 1000 / seconds
    replays = variant.decoder.lane_state.graphs.replays
    launches = sum(row["calls"] for row in rows)
    columns = {"kernel": "kernel", "calls": "calls", "milliseconds": "ms", "share": "share"}
    print(
        f"## Profile, {options.mode}: {options.batch} lanes, memory of {variant.memory_size:,} tokens, "
        f"{options.dtype}, {options.positions}, {'with' if replays else 'without'} CUDA graphs",
        "",
        table(summed(rows), columns),
        "",
        f"A step takes {1000 * seconds:.4g} ms; busy {100 * busy:.0f} %, {launches:.0f} kernels.",
        *bullet_list(describe_machine()),
        sep="\n",
    )
    if options.json:
        settings = {name: str(value) if name == "device" else value for name, value in vars(options).items()}
        write_json(options.json, {"options": settings, "seconds": seconds, "busy": busy, "kernels": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
