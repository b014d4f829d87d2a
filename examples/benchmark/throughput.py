"""Tokens per second and peak memory by memory size, with the same weights, beside full attention over longer windows.

    python examples/benchmark/throughput.py                                    # the reference shape, on the CPU
    python examples/benchmark/throughput.py --device cuda --dtype bfloat16 --layers 24 --dim 1024 --heads 16 \
        --vocab 50264 --segment 1024 --retrieval-layer-index 17 --batch 8 --full-windows 4096 8192

The weights are random: the time of exact search, reading and attention does not depend on what is remembered. Each
memory is filled before the measurement by streaming random tokens through the backbone, and goes on being written
during it. Variants take turns, step by step, so that all see the same machine; figures are medians.

Peak memory: on CUDA what PyTorch allocated at most during a variant's steps, less the memories of the other variants;
on the CPU the resident memory (ru_maxrss) of a process of its own that does one step.
"""

import argparse
import copy
import gc
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Callable, Dict, List

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)
if "--threads" in sys.argv[:-1]:  # before torch
    os.environ["OMP_NUM_THREADS"] = sys.argv[sys.argv.index("--threads") + 1]

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from examples.benchmark.report import lines_of, machine, stop, table, write_json
from longmem_fairseq.data.segments import Segments
from longmem_fairseq.models.backbone import Backbone, build_backbone
from longmem_fairseq.models.longmem_decoder import MEMORY_DTYPES, LongMemDecoder
from longmem_fairseq.models.longmem_lm import LongMemConfig


def build_decoder(options: argparse.Namespace) -> LongMemDecoder:
    """A decoder with random weights in the shape that the options ask for."""
    dictionary = Dictionary()
    for i in range(options.vocab - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    alibi = options.positions == "alibi"
    config = {
        "model": "alibi_lm" if alibi else "transformer_lm", "vocabulary": len(dictionary), "activation_fn": "gelu",
        "decoder_embed_dim": options.dim, "decoder_input_dim": options.dim, "decoder_output_dim": options.dim,
        "decoder_ffn_embed_dim": 4 * options.dim, "decoder_layers": options.layers,
        "decoder_attention_heads": options.heads, "decoder_normalize_before": True, "decoder_learned_pos": not alibi,
        "no_token_positional_embeddings": alibi, "share_decoder_input_output_embed": True, "no_scale_embedding": True,
        "max_target_positions": max([options.segment, *options.full_windows]),
    }  # fmt: skip
    torch.manual_seed(0)
    backbone = build_backbone(config, dictionary, options.retrieval_layer_index)
    cfg = OmegaConf.merge(
        OmegaConf.structured(LongMemConfig),
        {
            "k": options.k, "chunk_size": options.chunk_size, "retrieval_layer_index": options.retrieval_layer_index,
            "layer_reduction_factor": options.reduction, "memory_search": options.memory_search,
            "memory_dtype": options.memory_dtype, "tokens_per_sample": options.segment, "memory_scope": "document",
        },
    )  # fmt: skip
    decoder = LongMemDecoder(cfg, dictionary, backbone)
    decoder.start_from_backbone()
    decoder.to(options.device, MEMORY_DTYPES[options.dtype])
    return decoder.train(options.mode == "train")


class Stream:
    """A decoder with one memory size, and a stream of random tokens for each of its lanes."""

    def __init__(self, decoder: LongMemDecoder, memory_size: int, options: argparse.Namespace):
        self.decoder = copy.copy(decoder)  # the modules, and so the weights, are the same
        self.decoder._memories = {}
        self.decoder.cfg = OmegaConf.merge(decoder.cfg, {"memory_size": memory_size})
        self.memory_size, self.options, self.start = memory_size, options, 0
        self.lanes = torch.arange(options.batch).numpy()

    def fill(self) -> None:
        """Read until the memory is full, by the layers of the backbone that the memory needs."""
        segments = -(-self.memory_size // self.options.segment) + 1 if self.memory_size else 0
        for _ in tqdm(range(segments), desc=f"filling {self.memory_size:,}", leave=False, mininterval=2):
            self.decoder.memorize(*self._next())

    @property
    def bank_bytes(self) -> int:
        """Bytes that the memory takes."""
        return sum(memory.bank.nbytes for memory in self.decoder._memories.values())

    def step(self) -> None:
        """One segment of every lane: logits, and in training the side network's gradients."""
        tokens, segments = self._next()
        with nullcontext() if self.options.mode == "train" else torch.no_grad():
            logits, _ = self.decoder(tokens, segments=segments)
            if self.options.mode == "train":
                F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
                for parameter in self.decoder.parameters():
                    parameter.grad = None

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.options.batch * self.options.segment

    def _next(self):
        tokens = random_tokens(self.options, self.options.segment)
        segments = Segments(
            self.lanes, self.lanes, self.lanes * 0 + self.start, self.lanes * 0 + self.options.segment, len(self.lanes)
        )
        self.start += self.options.segment
        return tokens, segments


class FullAttention:
    """The backbone alone over a longer window."""

    bank_bytes = 0

    def __init__(self, backbone: Backbone, window: int, options: argparse.Namespace):
        self.backbone, self.window, self.options = backbone, window, options

    @property
    def tokens(self) -> int:
        return self.options.batch * self.window

    @torch.no_grad()
    def step(self) -> None:
        """The logits of one window for each row; hidden states are dropped as soon as they are used."""
        x = self.backbone.embed(random_tokens(self.options, self.window))
        for layer in self.backbone.decoder.layers:
            x = layer(x)[0]
        self.backbone.output_layer(self.backbone.decoder.layer_norm(x).transpose(0, 1))


def random_tokens(options: argparse.Namespace, length: int) -> Tensor:
    """Random symbols, shape (batch, length), made where they are used."""
    return torch.randint(4, options.vocab, (options.batch, length), device=options.device)


def timed(run: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of one run, of ``times`` that are queued together."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(variants: List, options: argparse.Namespace) -> List[Dict]:
    """Seconds and tokens per second of each variant, and on CUDA peak memory; rows in the order of the variants."""
    queued = 4 if options.device.type == "cuda" else 1
    peaks = []
    banks = sum(variant.bank_bytes for variant in variants)
    for variant in variants:
        for _ in range(2):
            variant.step()
        if options.device.type == "cuda":
            drop_attention_bias(variant)  # each window's own, not that of the longest
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            variant.step()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - banks + variant.bank_bytes)
    seconds = [[] for _ in variants]
    for _ in tqdm(range(options.steps), desc="measuring", leave=False, mininterval=2):
        for variant, taken in zip(variants, seconds):
            taken.append(timed(variant.step, queued, options.device))
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
            }
        )
    return rows


def drop_attention_bias(variant) -> None:
    """Forget ALiBi's bias, which attention keeps for the longest window it has seen."""
    root = variant.backbone if isinstance(variant, FullAttention) else variant.decoder
    for module in root.modules():
        if getattr(module, "_bias", None) is not None:
            module._bias = None


def memory_work(options: argparse.Namespace, memory_size: int) -> Dict[str, float]:
    """Operations and bytes that a step's search and reading need at least, from the shapes."""
    queries = options.batch * options.heads * options.segment
    chunks, width = memory_size // options.chunk_size, options.dim // options.heads
    dtype = options.dtype if options.memory_dtype == "auto" else options.memory_dtype
    element = torch.finfo(MEMORY_DTYPES[dtype]).bits // 8
    return {
        "search_operations": 2.0 * queries * chunks * width,
        "read_operations": 4.0 * queries * options.k * width,
        "search_bytes": 4.0 * options.batch * options.heads * chunks * width + 4.0 * queries * width,
        "read_bytes": 2.0 * queries * options.k * width * element,
    }


def peaks_in_processes(options: argparse.Namespace, arguments: List[str]) -> List[int]:
    """Peak resident memory in bytes of one step with each memory size and window, each in a process of its own."""
    names = [f"memory:{size}" for size in options.memory_sizes] + [f"window:{w}" for w in options.full_windows]
    found = []
    for name in tqdm(names, desc="peak memory", leave=False):
        run = subprocess.run(
            [sys.executable, __file__, *arguments, "--peak-of", name], stdout=subprocess.PIPE, text=True, check=True
        )
        found.append(int(run.stdout.split()[-1]))
    return found


def print_peak(options: argparse.Namespace) -> None:
    """Do one step of one variant and print this process's peak resident memory."""
    kind, size = options.peak_of.split(":")
    decoder = build_decoder(options)
    gc.collect()
    if kind == "window":
        variant = FullAttention(decoder.backbone, int(size), options)
    else:
        variant = Stream(decoder, int(size), options)
        if variant.memory_size:  # what it holds has no part in the peak, so noise will do
            variant.decoder.memorize(*variant._next())
            variant.decoder._memories[options.mode == "train"].flush()
            bank = next(iter(variant.decoder._memories.values())).bank
            for buffer in (bank.keys, bank.values, bank.means):
                buffer.normal_()
            bank.written[:] = bank.chunks + bank.written
    variant.step()
    scale = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)


def markdown(result: Dict, options: argparse.Namespace) -> str:
    """The result as a report."""
    for row in [*result["rows"], *result["full_attention"]]:
        row["peak_mib"] = row["peak_memory_bytes"] / 2**20
    text = [
        f"## Throughput, {options.mode}: {options.layers} layers, width {options.dim}, {options.heads} heads, "
        f"side network {options.layers // options.reduction}, segment {options.segment}, batch {options.batch}, "
        f"k {options.k}, chunk {options.chunk_size}, {options.dtype}, {options.positions}, search by "
        f"{options.memory_search}",
        "",
        table(
            result["rows"],
            {
                "memory_size": "memory", "tokens_per_second": "tokens/s", "ratio_to_off": "of memory off",
                "extra_ms": "extra ms", "roofline_ms": "roofline ms", "peak_mib": "peak MiB",
            },
        ),
    ]  # fmt: skip
    if result["full_attention"]:
        text += [
            "",
            table(
                result["full_attention"],
                {
                    "window": "full attention", "tokens_per_second": "tokens/s", "peak_mib": "peak MiB",
                    "speed_of_longmem": "LongMem's speed x", "memory_of_longmem": "LongMem's peak x",
                },
            ),
            "",
            f"LongMem there: with a memory of {result['rows'][-1]['memory_size']:,} tokens.",
        ]  # fmt: skip
    return "\n".join(text)


def parse(arguments: List[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=12, help="layers of the backbone (default: %(default)s)")
    add("--dim", type=int, default=512, help="width (default: %(default)s)")
    add("--heads", type=int, default=8, help="attention heads (default: %(default)s)")
    add("--vocab", type=int, default=8000, help="symbols of the dictionary (default: %(default)s)")
    add("--positions", choices=("alibi", "learned"), default="alibi", help="kind of the backbone")
    add("--reduction", type=int, default=2, help="backbone layers per side layer (default: %(default)s)")
    add("--retrieval-layer-index", type=int, default=9, help="remembered layer, from 0 (default: %(default)s)")
    add("--segment", type=int, default=512, help="tokens of a segment (default: %(default)s)")
    add("--batch", type=int, default=1, help="lanes (default: %(default)s)")
    add("--k", type=int, default=64, help="tokens read per query and head (default: %(default)s)")
    add("--chunk-size", type=int, default=4, help="tokens of a chunk (default: %(default)s)")
    add("--memory-sizes", type=int, nargs="+", default=[0, 4096, 65536], help="tokens; 0: memory off")
    add("--memory-search", default="faiss", help="as in training (default: %(default)s)")
    add("--memory-dtype", choices=("auto", *MEMORY_DTYPES), default="auto", help="of remembered keys and values")
    add("--full-windows", type=int, nargs="*", default=[], help="also the backbone alone over windows of these lengths")
    add("--threads", type=int, help="threads on the CPU (default: PyTorch's)")
    add("--dtype", choices=tuple(MEMORY_DTYPES), default="float32", help="of weights and activations")
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: %(default)s)")
    add("--steps", type=int, default=10, help="measurements of each variant (default: %(default)s)")
    add("--mode", choices=("eval", "train"), default="eval", help="forward, or forward and backward")
    add("--tflops", type=float, help="float32 operations per second of the machine, in 10^12, for the roofline")
    add("--gbps", type=float, help="memory bandwidth of the machine in 10^9 bytes per second, for the roofline")
    add("--json", help="write the result there")
    add("--markdown", help="write the tables there, besides printing them")
    add("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("layers", "dim", "heads", "reduction", "segment", "batch", "k", "chunk_size", "steps"):
        if getattr(options, name) < 1:
            stop(f"--{name.replace('_', '-')} {getattr(options, name)} is less than 1")
    if options.dim % options.heads or options.layers % options.reduction or options.k % options.chunk_size:
        stop("--dim must be a multiple of --heads, --layers of --reduction, and --k of --chunk-size")
    if options.full_windows and options.mode == "train":
        stop("--full-windows compares reading: leave it out with --mode train, where the backbone is frozen")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: PyTorch finds no GPU here")
    for size in options.memory_sizes:
        if 0 < size < options.segment:
            stop(f"--memory-sizes {size} is smaller than one segment of {options.segment} tokens")
    return options


def main(arguments: List[str]) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(options)
        return
    decoder = build_decoder(options)
    streams = [Stream(decoder, size, options) for size in options.memory_sizes]
    for stream in streams:
        stream.fill()
    variants = [*streams, *(FullAttention(decoder.backbone, window, options) for window in options.full_windows)]
    measured = measure(variants, options)
    if options.device.type != "cuda":
        for row, peak in zip(measured, peaks_in_processes(options, arguments)):
            row["peak_memory_bytes"] = peak
    rows, full = measured[: len(streams)], measured[len(streams) :]
    off = next((row for row, size in zip(rows, options.memory_sizes) if size == 0), None)
    for row, stream in zip(rows, streams):
        row.update(memory_size=stream.memory_size, bank_bytes=stream.bank_bytes)
        row.update(memory_work(options, stream.memory_size))
        if off is not None:
            row["ratio_to_off"] = row["tokens_per_second"] / off["tokens_per_second"]
            row["extra_ms"] = 1000 * (row["seconds_per_step"] - off["seconds_per_step"])
        if options.tflops and options.gbps:
            row["roofline_ms"] = 1000 * sum(
                max(row[f"{part}_operations"] / options.tflops / 1e12, row[f"{part}_bytes"] / options.gbps / 1e9)
                for part in ("search", "read")
            )
    for row, window in zip(full, options.full_windows):
        row.update(
            window=window,
            speed_of_longmem=rows[-1]["tokens_per_second"] / row["tokens_per_second"],
            memory_of_longmem=rows[-1]["peak_memory_bytes"] / row["peak_memory_bytes"],
        )
    settings = {name: str(value) if name == "device" else value for name, value in vars(options).items()}
    result = {"machine": machine(), "options": settings, "rows": rows, "full_attention": full}
    text = markdown(result, options)
    print(text, *lines_of(result["machine"]), sep="\n")
    if options.json:
        write_json(options.json, result)
    if options.markdown:
        Path(options.markdown).write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
