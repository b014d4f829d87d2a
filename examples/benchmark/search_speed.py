"""Measure milliseconds and recall of every search of the memory bank, by the number of tokens that the bank holds.

    python -m examples.benchmark.search_speed                                       # on the CPU
    python -m examples.benchmark.search_speed --keys keys.safetensors --indices IVF1024,Flat:nprobe=64
    python -m examples.benchmark.search_speed --device cuda --json search.json      # on a GPU

The bank has one full lane, of the published sizes: 16 heads, 1,024 queries, chunks of 4 tokens, width 64, the 16 best
chunks. The native search is measured with each set of instructions that the processor has. Without --keys (made by
real_keys.py) keys are noise. The time of exact search by a product does not depend on the keys, but that of the native
search and the recall of an index do: measure them with real keys. Times are medians. The result of each exact search is
compared with that of plain ``topk``, by scores; the table has the worst difference, and the program fails at its end if
one is above 0.001 (scores are about 30). Each index is compared by its recall: the share of the results of exact search
that it finds. The table also has the seconds to build an index, and the milliseconds to add a segment of as many tokens
as there are queries.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.benchmark.command import require_at_least, require_device, save_plot, stop, synchronize
from examples.benchmark.machine import describe_machine
from examples.benchmark.real_keys import RealKeys
from examples.benchmark.tables import bullet_list, table
from longmem_fairseq.files import write_json, write_text
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search.base import SearchBackend
from longmem_fairseq.memory.search.faiss import FaissSearch, has_faiss_gpu
from longmem_fairseq.memory.search.index import IndexSearch, chunk_scores, count_hits
from longmem_fairseq.memory.search.index_spec import IndexSpec, index_spec, split_index
from longmem_fairseq.memory.search.kernel import available_instructions
from longmem_fairseq.memory.search.lane_index import LaneIndex
from longmem_fairseq.memory.search.native import NativeSearch
from longmem_fairseq.memory.search.torch import TorchSearch

_BLOCK = 1 << 26  # scores that plain topk holds at a time

LANE = np.zeros(1, dtype=np.int64)


def filled_bank(options: argparse.Namespace, tokens: int, real: Optional[RealKeys]) -> MemoryBank:
    """Make a bank of one full lane. Only its chunk means are needed, so chunks are of one token, in half precision."""
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
    """Search by matrix product and topk over all chunks, in blocks of queries."""
    step = max(1, _BLOCK // (bank.heads * bank.chunks))
    slots = [
        (queries[:, :, t : t + step] @ bank.means.transpose(-1, -2)).topk(n, dim=-1).indices
        for t in range(0, queries.size(2), step)
    ]
    return torch.cat(slots, dim=2)


def product_only(bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> None:
    """Compute the matrix product alone, the least that an exact search takes."""
    step = max(1, _BLOCK // (bank.heads * bank.chunks))
    for t in range(0, queries.size(2), step):
        queries[:, :, t : t + step] @ bank.means.transpose(-1, -2)


class FlatIndices:
    """Search by one ``GpuIndexFlatIP`` per head, which holds a copy of the means."""

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


def native_searches() -> Dict[str, NativeSearch]:
    """Return the native search with each set of instructions of this processor; print why there is none."""
    reason = NativeSearch.unavailable(torch.device("cpu"))
    if reason is not None:
        print(f"without the native kernel: {reason}", file=sys.stderr)
        return {}
    return {f"native, {name}": NativeSearch(name) for name in available_instructions()}


def backends(bank: MemoryBank, options: argparse.Namespace) -> Dict[str, Callable]:
    """Return each exact search that can run here, by its name in the table."""
    searches = {"torch product alone": product_only, "torch topk": plain_topk, "torch two-level": TorchSearch()}
    if options.device.type == "cpu":
        searches["faiss knn"] = FaissSearch()
        searches.update(native_searches())
    elif has_faiss_gpu():
        searches["faiss knn_gpu"] = FaissSearch()
        searches["faiss GpuIndexFlatIP"] = FlatIndices(bank, options.device)
    return searches


def times(run: Callable[[], object], options: argparse.Namespace) -> List[float]:
    """Return the milliseconds of each run."""
    milliseconds, began = [], time.perf_counter()
    while len(milliseconds) < options.steps and (
        len(milliseconds) < 3 or time.perf_counter() - began < options.seconds
    ):
        synchronize(options.device)
        start = time.perf_counter()
        run()
        synchronize(options.device)
        milliseconds.append(1000 * (time.perf_counter() - start))
    return milliseconds


def measure(name: str, search: Callable, bank: MemoryBank, queries: Tensor, options: argparse.Namespace) -> Dict:
    """Check and time one exact search; on CUDA, also measure the memory that it takes in addition to the bank."""
    cuda = options.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    slots, worst = search(bank, LANE, queries, options.n), None
    if slots is not None:
        few = slice(0, None, max(1, queries.size(2) // 16))
        scores = queries[:, :, few] @ bank.means.transpose(-1, -2)
        best = scores.topk(options.n, dim=-1).values
        worst = (scores.gather(-1, slots[:, :, few]) - best).abs().max().item()
        del scores, best
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    taken = times(lambda: search(bank, LANE, queries, options.n), options)
    row = {"backend": name, "milliseconds": statistics.median(taken), "fastest": min(taken), "worst": worst}
    row["recall"] = None if worst is None else 1.0
    if cuda:
        row["torch_peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
        row["device_mib"] = (free - torch.cuda.mem_get_info()[0]) / 2**20  # includes what faiss takes outside PyTorch
    return row


def measure_index(option: str, bank: MemoryBank, queries: Tensor, options: argparse.Namespace) -> Iterator[Dict]:
    """Measure one index on the CPU, searched by faiss and, where it can, by the native kernel.

    Nothing is measured where the memory is too small to train the index.
    """
    try:
        spec = spec_of(option, bank.head_dim, bank.chunks)
    except ValueError:
        return
    index = LaneIndex(spec)
    bank.indices = {0: index}
    start = time.perf_counter()
    index.follow(bank, 0)
    seconds = time.perf_counter() - start
    searches: Dict[str, SearchBackend] = {str(spec): TorchSearch()}
    if index.list_search(NativeSearch(), queries.size(2)) is not None:
        searches.update({f"{spec}, {name}": search for name, search in native_searches().items()})
    for name, exact in searches.items():
        search = IndexSearch(spec, exact, every=0)
        yield {"backend": name, "made_s": seconds, **measure_lists(search, bank, queries, options)}
    bank.indices = {}


def measure_lists(search: IndexSearch, bank: MemoryBank, queries: Tensor, options: argparse.Namespace) -> Dict:
    """Measure recall and times of a search by an index that is built already."""
    index = bank.indices[0]
    few = slice(0, None, max(1, queries.size(2) // 64))
    slots = search(bank, LANE, queries, options.n)[0][:, few]
    exact = TorchSearch()(bank, LANE, queries[:, :, few], options.n)[0]
    scores = [chunk_scores(bank.means[0], queries[0][:, few], x) for x in (slots, exact)]
    taken, added = times(lambda: search(bank, LANE, queries, options.n), options), []
    for _ in range(3):  # a segment is written over the oldest; that its keys are the same makes no difference
        bank.written[0] += max(1, queries.size(2) // options.chunk_size)
        start = time.perf_counter()
        index.follow(bank, 0)
        added.append(1000 * (time.perf_counter() - start))
    return {
        "milliseconds": statistics.median(taken),
        "fastest": min(taken),
        "recall": count_hits(*scores) / exact.numel(),
        "add_ms": statistics.median(added),
    }


def spec_of(option: str, width: int, chunks: int) -> IndexSpec:
    """Return the index of a value of --memory-index."""
    return index_spec(*split_index(option), width, chunks)


def draw(axes, result: Dict) -> None:
    """Draw recall over time, for the largest memory."""
    tokens = max(row["tokens"] for row in result["rows"])
    for row in result["rows"]:
        if row["tokens"] == tokens and row["recall"] is not None:
            axes.plot(row["milliseconds"], row["recall"], "o")
            axes.annotate(row["backend"], (row["milliseconds"], row["recall"]), fontsize=8, rotation=15)
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds, {tokens:,} tokens")
    axes.set_ylabel("recall")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m examples.benchmark.search_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--tokens",
        type=int,
        nargs="+",
        default=[4096, 16384, 65536, 262144, 1048576],
        help="sizes of the memory, in tokens",
    )
    add("--heads", type=int, default=16, help="KV heads of the memory (default: %(default)s)")
    add("--width", type=int, default=64, help="width of a head (default: %(default)s)")
    add("--queries", type=int, default=1024, help="queries of each head (default: %(default)s)")
    add("--chunk-size", type=int, default=4, help="tokens of a chunk (default: %(default)s)")
    add("--n", type=int, default=16, help="chunks to find (default: %(default)s)")
    add(
        "--indices",
        nargs="*",
        default=[],
        metavar="INDEX[:PARAMETERS]",
        help="indices to measure as well, such as HNSW32:efSearch=64",
    )
    add("--keys", help="path of a file of real keys and queries, made by real_keys.py, in place of noise")
    add("--threads", type=int, help="number of threads on the CPU (default: PyTorch's)")
    add("--steps", type=int, default=20, help="most runs of each search (default: %(default)s)")
    add(
        "--seconds",
        type=float,
        default=5.0,
        help="time after which a search is not run again, once it has 3 runs (default: %(default)s)",
    )
    add(
        "--device",
        type=torch.device,
        default=torch.device("cpu"),
        help="device of the memory, cpu or cuda (default: %(default)s)",
    )
    add("--json", help="path of a file for the result")
    add("--markdown", help="path of a file for the printed table")
    add("--png", help="path of a PNG of recall over time")
    options = parser.parse_args()
    require_at_least(options, 1, "tokens", "heads", "width", "queries", "chunk_size", "n", "steps")
    require_device(options.device)
    if min(options.tokens) < options.n * options.chunk_size:
        stop(
            f"--tokens {min(options.tokens)} is less than --n {options.n} chunks of --chunk-size "
            f"{options.chunk_size}: raise --tokens or lower --n"
        )
    for option in options.indices:
        try:
            spec_of(option, options.width, max(options.tokens) // options.chunk_size)
        except ValueError as error:
            stop(str(error))
    if options.keys is not None and not Path(options.keys).is_file():
        stop(f"--keys {options.keys} does not exist: make it with real_keys.py")
    return options


def make_queries(options: argparse.Namespace, real: Optional[RealKeys]) -> Tensor:
    """Return the queries, shape (1, H, T, d), float32."""
    shape = (1, options.heads, options.queries, options.width)
    if real is None:
        generator = torch.Generator(options.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=options.device)
    most = max(options.tokens) // options.chunk_size
    if real.means.size(1) < most or real.means.size(2) != options.width or real.queries.size(1) < options.queries:
        stop(
            f"--keys {options.keys} has {real.means.size(1):,} chunks of width {real.means.size(2)} and "
            f"{real.queries.size(1):,} queries, but {most:,} chunks of width {options.width} and {options.queries:,} "
            "queries are needed: lower --tokens or --queries, change --width, or make larger keys by real_keys.py"
        )
    heads = [head % real.queries.size(0) for head in range(options.heads)]
    return real.queries[heads, : options.queries][None].to(options.device)


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    real = None if options.keys is None else RealKeys(options.keys)
    queries = make_queries(options, real)
    rows = []
    for tokens in tqdm(options.tokens, desc="memory sizes", mininterval=2):
        bank = filled_bank(options, tokens, real)
        for name, search in backends(bank, options).items():
            rows.append({"tokens": tokens, **measure(name, search, bank, queries, options)})
        del bank, search
        if options.indices:
            bank = filled_bank(argparse.Namespace(**{**vars(options), "device": torch.device("cpu")}), tokens, real)
            for option in options.indices:
                rows += [{"tokens": tokens, **row} for row in measure_index(option, bank, queries.cpu(), options)]
            del bank
    columns = {
        "tokens": "tokens",
        "backend": "backend",
        "milliseconds": "median ms",
        "fastest": "fastest ms",
        "worst": "worst score off by",
        "recall": "recall",
        "made_s": "built in s",
        "add_ms": "a segment added in ms",
        "torch_peak_mib": "PyTorch peak MiB",
        "device_mib": "device MiB taken",
    }
    headings = {key: name for key, name in columns.items() if any(row.get(key) is not None for row in rows)}
    text = "\n".join(
        [
            f"## Search: {options.heads} heads, {options.queries:,} queries of width {options.width}, "
            f"{options.n} of the chunks of {options.chunk_size} tokens, {options.device.type}"
            + (", real keys" if real is not None else ""),
            "",
            table(rows, headings),
        ]
    )
    result = {"machine": describe_machine(), "options": {**vars(options), "device": str(options.device)}, "rows": rows}
    print(text, *bullet_list(result["machine"]), sep="\n")
    if options.json:
        write_json(options.json, result)
    if options.markdown:
        write_text(options.markdown, text + "\n")
    if options.png:
        save_plot(options.png, lambda axes: draw(axes, result))
    wrong = sorted({row["backend"] for row in rows if (row.get("worst") or 0.0) > 1e-3})
    if wrong:
        stop(f"not exact: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
