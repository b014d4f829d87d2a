"""Milliseconds and recall of every way to search the memory bank, by the number of remembered tokens.

    python examples/benchmark/search_speed.py                                       # on the CPU
    python examples/benchmark/search_speed.py --keys keys.safetensors --indices IVF1024,Flat:nprobe=64
    python examples/benchmark/search_speed.py --device cuda --json search.json      # on a GPU

One lane of a memory that is full, as the published model has it: 16 heads, 1,024 queries, chunks of 4 tokens, width 64,
the 16 best chunks. Without --keys (made by real_keys.py) keys are noise, on which the time of exact search does not
depend; an index finds its way in real keys only, so give it these. Figures are medians. Each exact backend's result is
compared with that of plain ``topk``, by scores; the worst difference is in the table, and one above 0.001 (of scores
that are about 30) makes the program fail at its end. Each index is compared by its recall: the share of what exact
search finds. Beside it stand the seconds of making it, and the milliseconds of adding a segment of as many tokens as
there are queries.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.benchmark.command import save_plot, stop
from examples.benchmark.machine import describe_machine
from examples.benchmark.real_keys import RealKeys
from examples.benchmark.tables import bullet_list, table
from longmem_fairseq.files import write_json
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search.base import faiss_search, has_faiss_gpu, torch_search
from longmem_fairseq.memory.search.index import IndexSearch, LaneIndex, chunk_products, found_too
from longmem_fairseq.memory.search.index_spec import IndexSpec, index_spec
from longmem_fairseq.memory.search.native import Unavailable, load_kernel, native_search

_BLOCK = 1 << 26  # scores held at a time by plain topk

LANE = np.zeros(1, dtype=np.int64)


def filled_bank(options: argparse.Namespace, tokens: int, real: Optional[RealKeys]) -> MemoryBank:
    """A bank of one full lane. Only its chunk means are needed, so chunks are of one token, in half precision."""
    chunks = tokens // options.chunk_size
    bank = MemoryBank(1, options.heads, options.width, chunks, 1, torch.float16, options.device)
    bank.keys = bank.values = torch.zeros(0)
    if real is not None:
        heads = [head % real.means.size(0) for head in range(options.heads)]
        bank.means[0] = real.means[heads, :chunks]
    else:
        bank.means.normal_(generator=torch.Generator(options.device).manual_seed(1))
    bank.written[0] = chunks
    return bank


def plain_topk(bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
    """Matrix product and topk over all chunks, in blocks of queries."""
    step = max(1, _BLOCK // (bank.heads * bank.chunks))
    found = [
        (queries[:, :, t : t + step] @ bank.means.transpose(-1, -2)).topk(n, dim=-1).indices
        for t in range(0, queries.size(2), step)
    ]
    return torch.cat(found, dim=2)


def product_only(bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> None:
    """The matrix product alone: what selection and everything else adds to."""
    step = max(1, _BLOCK // (bank.heads * bank.chunks))
    for t in range(0, queries.size(2), step):
        queries[:, :, t : t + step] @ bank.means.transpose(-1, -2)


class FlatIndices:
    """One ``GpuIndexFlatIP`` a head, which holds its own copy of the means."""

    def __init__(self, bank: MemoryBank, device: torch.device):
        import faiss
        import faiss.contrib.torch_utils  # noqa: F401  (lets indices take torch tensors)

        self.resources = faiss.StandardGpuResources()
        self.indices = []
        for head in range(bank.heads):
            index = faiss.GpuIndexFlatIP(self.resources, bank.head_dim)
            index.add(bank.means[0, head])
            self.indices.append(index)

    def __call__(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
        return torch.stack([index.search(q, n)[1] for index, q in zip(self.indices, queries[0])])[None]


def has_native() -> bool:
    """Whether the native kernel can run here; says why where it cannot."""
    try:
        load_kernel()
    except Unavailable as error:
        print(f"without the native kernel: {error}", file=sys.stderr)
        return False
    return True


def backends(bank: MemoryBank, options: argparse.Namespace) -> Dict[str, Callable]:
    """Name and function of each exact backend that can run here."""
    found = {"torch product alone": product_only, "torch topk": plain_topk, "torch two-level": torch_search}
    if options.device.type == "cpu":
        found["faiss knn"] = faiss_search
        if has_native():
            found["native"] = native_search
    elif has_faiss_gpu():
        found["faiss knn_gpu"] = faiss_search
        found["faiss GpuIndexFlatIP"] = FlatIndices(bank, options.device)
    return found


def times(run: Callable[[], object], options: argparse.Namespace) -> List[float]:
    """Milliseconds of some runs."""
    cuda = options.device.type == "cuda"
    taken, began = [], time.perf_counter()
    while len(taken) < options.steps and (len(taken) < 3 or time.perf_counter() - began < options.seconds):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def measure(name: str, search: Callable, bank: MemoryBank, queries: Tensor, options: argparse.Namespace) -> Dict:
    """Check and time one exact backend: its median in milliseconds, and on CUDA the memory it takes beside the bank."""
    cuda = options.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    found, worst = search(bank, LANE, queries, options.n), None
    if found is not None:
        few = slice(0, None, max(1, queries.size(2) // 16))
        scores = queries[:, :, few] @ bank.means.transpose(-1, -2)
        best = scores.topk(options.n, dim=-1).values
        worst = (scores.gather(-1, found[:, :, few]) - best).abs().max().item()
        del scores, best
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    taken = times(lambda: search(bank, LANE, queries, options.n), options)
    row = {"backend": name, "milliseconds": statistics.median(taken), "fastest": min(taken), "worst": worst}
    row["recall"] = None if worst is None else 1.0
    if cuda:
        row["torch_peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
        row["device_mib"] = (free - torch.cuda.mem_get_info()[0]) / 2**20  # also what faiss takes beside PyTorch
    return row


def measure_index(named: str, bank: MemoryBank, queries: Tensor, options: argparse.Namespace) -> Iterator[Dict]:
    """Recall and times of one index on the CPU, by faiss and by the native kernel where it knows such indices; nothing
    where the memory is too small to train it."""
    try:
        spec = spec_of(named, bank.head_dim, bank.chunks)
    except ValueError:
        return
    index = LaneIndex(spec)
    bank.indices = {0: index}
    began = time.perf_counter()
    index.follow(bank, 0)
    made = time.perf_counter() - began
    search = IndexSearch(spec, torch_search, every=0)
    yield {"backend": str(spec), "made_s": made, **measure_lists(search, bank, queries, options)}
    if index.is_native(queries.size(2)) and has_native():
        search = IndexSearch(spec, native_search, every=0)
        yield {"backend": f"{spec}, native", "made_s": made, **measure_lists(search, bank, queries, options)}
    bank.indices = {}


def measure_lists(search: IndexSearch, bank: MemoryBank, queries: Tensor, options: argparse.Namespace) -> Dict:
    """Recall and times of a search by an index that is made."""
    index = bank.indices[0]
    few = slice(0, None, max(1, queries.size(2) // 64))
    slots = [
        search(bank, LANE, queries, options.n)[0][:, few],
        torch_search(bank, LANE, queries[:, :, few], options.n)[0],
    ]
    scores = [chunk_products(bank.means[0], queries[0][:, few], x).masked_fill(x < 0, float("-inf")) for x in slots]
    taken, added = times(lambda: search(bank, LANE, queries, options.n), options), []
    for _ in range(3):  # a segment is written, over the oldest; that it says the same again makes no difference
        bank.written[0] += max(1, queries.size(2) // options.chunk_size)
        began = time.perf_counter()
        index.follow(bank, 0)
        added.append(1000 * (time.perf_counter() - began))
    return {
        "milliseconds": statistics.median(taken),
        "fastest": min(taken),
        "recall": found_too(*scores) / slots[1].numel(),
        "add_ms": statistics.median(added),
    }


def spec_of(named: str, width: int, chunks: int) -> IndexSpec:
    """The index of FACTORY:PARAMETERS, or FACTORY alone."""
    factory, _, parameters = named.partition(":")
    return index_spec(factory, parameters, width, chunks)


def draw(axes, result: Dict) -> None:
    """Recall over time, for the largest memory."""
    tokens = max(row["tokens"] for row in result["rows"])
    for row in result["rows"]:
        if row["tokens"] == tokens and row["recall"] is not None:
            axes.plot(row["milliseconds"], row["recall"], "o")
            axes.annotate(row["backend"], (row["milliseconds"], row["recall"]), fontsize=8, rotation=15)
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds, {tokens:,} tokens")
    axes.set_ylabel("recall")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[4096, 16384, 65536, 262144, 1048576], help="remembered tokens")
    add("--heads", type=int, default=16)
    add("--width", type=int, default=64, help="of a head (default: %(default)s)")
    add("--queries", type=int, default=1024, help="tokens of a segment (default: %(default)s)")
    add("--chunk-size", type=int, default=4, help="tokens of a chunk (default: %(default)s)")
    add("--n", type=int, default=16, help="chunks wanted (default: %(default)s)")
    add("--indices", nargs="*", default=[], metavar="INDEX[:PARAMETERS]", help="also these, such as HNSW32:efSearch=64")
    add("--keys", help="real keys and queries in place of noise (see real_keys.py)")
    add("--threads", type=int, help="threads on the CPU (default: PyTorch's)")
    add("--steps", type=int, default=20, help="runs of each, at most (default: %(default)s)")
    add("--seconds", type=float, default=5.0, help="after which no further run of one backend begins, but 3 are done")
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: %(default)s)")
    add("--json", help="write the result there")
    add("--markdown", help="write the table there, besides printing it")
    add("--png", help="draw recall over time there")
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: PyTorch finds no GPU here")
    if min(options.tokens) < options.n * options.chunk_size:
        stop(f"--tokens {min(options.tokens)} is less than the --n {options.n} chunks wanted")
    for named in options.indices:
        try:
            spec_of(named, options.width, max(options.tokens) // options.chunk_size)
        except ValueError as error:
            stop(str(error))
    if options.keys is not None and not Path(options.keys).is_file():
        stop(f"--keys {options.keys} does not exist: make it with real_keys.py")
    return options


def asked(options: argparse.Namespace, real: Optional[RealKeys]) -> Tensor:
    """The queries, shape (1, H, T, d)."""
    shape = (1, options.heads, options.queries, options.width)
    if real is None:
        generator = torch.Generator(options.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=options.device)
    most = max(options.tokens) // options.chunk_size
    if real.means.size(1) < most or real.means.size(2) != options.width or real.queries.size(1) < options.queries:
        stop(
            f"--keys {options.keys} has {real.means.size(1):,} chunks of width {real.means.size(2)} and "
            f"{real.queries.size(1):,} queries, not {most:,} of width {options.width} and {options.queries:,}"
        )
    heads = [head % real.queries.size(0) for head in range(options.heads)]
    return real.queries[heads, : options.queries][None].to(options.device)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    real = None if options.keys is None else RealKeys(options.keys)
    queries = asked(options, real)
    rows = []
    for tokens in tqdm(options.tokens, desc="memory sizes", mininterval=2):
        bank = filled_bank(options, tokens, real)
        for name, search in backends(bank, options).items():
            rows.append({"tokens": tokens, **measure(name, search, bank, queries, options)})
        del bank, search
        if options.indices:
            bank = filled_bank(argparse.Namespace(**{**vars(options), "device": torch.device("cpu")}), tokens, real)
            for named in options.indices:
                rows += [{"tokens": tokens, **row} for row in measure_index(named, bank, queries.cpu(), options)]
            del bank
    columns = {
        "tokens": "tokens",
        "backend": "backend",
        "milliseconds": "median ms",
        "fastest": "fastest ms",
        "worst": "worst score off by",
        "recall": "recall",
        "made_s": "made in s",
        "add_ms": "a segment added in ms",
        "torch_peak_mib": "PyTorch peak MiB",
        "device_mib": "device MiB taken",
    }
    shown = {key: name for key, name in columns.items() if any(row.get(key) is not None for row in rows)}
    text = "\n".join(
        [
            f"## Search: {options.heads} heads, {options.queries:,} queries of width {options.width}, "
            f"{options.n} of the chunks of {options.chunk_size} tokens, {options.device.type}"
            + (", real keys" if real is not None else ""),
            "",
            table(rows, shown),
        ]
    )
    result = {"machine": describe_machine(), "options": {**vars(options), "device": str(options.device)}, "rows": rows}
    print(text, *bullet_list(result["machine"]), sep="\n")
    if options.json:
        write_json(options.json, result)
    if options.markdown:
        Path(options.markdown).write_text(text + "\n")
    if options.png:
        save_plot(options.png, lambda axes: draw(axes, result))
    wrong = sorted({row["backend"] for row in rows if (row.get("worst") or 0.0) > 1e-3})
    if wrong:
        stop(f"not exact: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
