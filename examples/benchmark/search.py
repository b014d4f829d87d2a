"""The time and memory of exact search by each backend, by how many tokens are remembered.

    python examples/benchmark/search.py                                   # on the CPU
    python examples/benchmark/search.py --device cuda --json search.json  # on a GPU, faiss' indices there too

One lane is searched as a step of the published model does: 16 heads, 1,024 queries, chunks of 4 tokens, width 64, the
16 best chunks. Keys are noise, on which the time of exact search does not depend. Figures are medians; each backend's
result is first compared with that of plain ``topk``, by scores; the worst difference is in the table, and one above
0.001 (of scores that are about 30) makes the program fail at its end.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.benchmark.report import lines_of, machine, stop, table, write_json
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search import faiss_search, has_faiss_gpu, torch_search

_BLOCK = 1 << 26  # scores held at a time by plain topk

LANE = np.zeros(1, dtype=np.int64)


def filled_bank(options: argparse.Namespace, tokens: int) -> MemoryBank:
    """A bank of one full lane. Only its chunk means are needed, so keys and values are not given their size."""
    chunks = tokens // options.chunk_size
    bank = MemoryBank(1, options.heads, options.width, chunks, 1, torch.float16, options.device)
    bank.keys = bank.values = torch.zeros(0)
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


def backends(bank: MemoryBank, options: argparse.Namespace) -> Dict[str, Callable]:
    """Name and function of each backend that can run here."""
    found = {"torch product alone": product_only, "torch topk": plain_topk, "torch two-level": torch_search}
    if options.device.type == "cpu":
        found["faiss knn"] = faiss_search
    elif has_faiss_gpu():
        found["faiss knn_gpu"] = faiss_search
        found["faiss GpuIndexFlatIP"] = FlatIndices(bank, options.device)
    return found


def measure(name: str, search: Callable, bank: MemoryBank, queries: Tensor, options: argparse.Namespace) -> Dict:
    """Check and time one backend: its median in milliseconds, and on CUDA the memory it takes besides the bank."""
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
    taken, began = [], time.perf_counter()
    while len(taken) < options.steps and (len(taken) < 3 or time.perf_counter() - began < options.seconds):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        search(bank, LANE, queries, options.n)
        if cuda:
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - start))
    row = {"backend": name, "milliseconds": statistics.median(taken), "fastest": min(taken), "worst": worst}
    if cuda:
        row["torch_peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
        row["device_mib"] = (free - torch.cuda.mem_get_info()[0]) / 2**20  # also what faiss takes beside PyTorch
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[4096, 16384, 65536, 262144, 1048576], help="remembered tokens")
    add("--heads", type=int, default=16)
    add("--width", type=int, default=64, help="of a head (default: %(default)s)")
    add("--queries", type=int, default=1024, help="tokens of a segment (default: %(default)s)")
    add("--chunk-size", type=int, default=4, help="tokens of a chunk (default: %(default)s)")
    add("--n", type=int, default=16, help="chunks wanted (default: %(default)s)")
    add("--steps", type=int, default=20, help="runs of each, at most (default: %(default)s)")
    add("--seconds", type=float, default=5.0, help="after which no further run of one backend begins, but 3 are done")
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: %(default)s)")
    add("--json", help="write the result there")
    add("--markdown", help="write the table there, besides printing it")
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: PyTorch finds no GPU here")
    if min(options.tokens) < options.n * options.chunk_size:
        stop(f"--tokens {min(options.tokens)} is less than the --n {options.n} chunks wanted")
    generator = torch.Generator(options.device).manual_seed(0)
    queries = torch.randn(
        1, options.heads, options.queries, options.width, generator=generator, device=options.device
    )
    rows = []
    for tokens in tqdm(options.tokens, desc="memory sizes", mininterval=2):
        bank = filled_bank(options, tokens)
        for name, search in backends(bank, options).items():
            rows.append({"tokens": tokens, **measure(name, search, bank, queries, options)})
        del bank, search
    columns = {"tokens": "tokens", "backend": "backend", "milliseconds": "median ms", "fastest": "fastest ms"}
    columns["worst"] = "worst score off by"
    if options.device.type == "cuda":
        columns.update(torch_peak_mib="PyTorch peak MiB", device_mib="device MiB taken")
    text = "\n".join(
        [
            f"## Exact search: {options.heads} heads, {options.queries:,} queries of width {options.width}, "
            f"{options.n} of the chunks of {options.chunk_size} tokens, {options.device.type}",
            "",
            table(rows, columns),
        ]
    )
    print(text, *lines_of(machine()), sep="\n")
    if options.json:
        settings = {**vars(options), "device": str(options.device)}
        write_json(options.json, {"machine": machine(), "options": settings, "rows": rows})
    if options.markdown:
        Path(options.markdown).write_text(text + "\n")
    wrong = sorted({row["backend"] for row in rows if (row["worst"] or 0.0) > 1e-3})
    if wrong:
        stop(f"not exact: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
