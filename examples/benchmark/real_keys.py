"""Real keys and queries for the benchmarks: the memory of a text, and the queries of the text that follows.

    python -m examples.benchmark.real_keys --path CHECKPOINT --data DATA --text books/ --output keys.safetensors

The file holds ``means``, the mean keys of the chunks of the first ``--tokens`` tokens, shape (H, N, d), and
``queries``, the queries of the side network's reading layer for the next ``--queries`` tokens, shape (H, T, d); both
float32.

Legend: B rows of a batch, H heads, N chunks, T queries, d width of a head.
"""

import argparse
import sys
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from examples.benchmark.command import require_at_least, stop
from examples.quickstart.standard_library import standard_library
from longmem_fairseq.files import printable, require_writable
from longmem_fairseq.hub import LongMem
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.factory import MemoryFactory
from longmem_fairseq.memory.search.base import SearchBackend
from longmem_fairseq.tensor_files import read_tensors, write_tensors
from longmem_fairseq.text import read_text

_CHUNKS_AT_ONCE = 1 << 13  # chunks written into a bank at a time


class RealKeys:
    """Chunk means and queries of a real model and text, in place of random ones.

    Args:
        path: Path of a safetensors file with ``means`` (H, N, d) and ``queries`` (H, T, d), float32. A model with more
            heads uses the heads of the file in turn.
    """

    def __init__(self, path: str):
        _, tensors = read_tensors(path)
        self.means, self.queries = tensors["means"], tensors["queries"]

    def fill(self, bank: MemoryBank) -> None:
        """Fill a bank; every token of a chunk gets the mean of the chunk as its key."""
        heads = [head % self.means.size(0) for head in range(bank.heads)]
        for lane in range(bank.lanes):
            for begin in range(0, bank.chunks, _CHUNKS_AT_ONCE):
                means = self.means[heads, begin : min(bank.chunks, begin + _CHUNKS_AT_ONCE)]
                keys = means.repeat_interleave(bank.chunk_size, dim=1)
                bank.append(lane, keys, keys)

    def queries_like(self, queries: Tensor) -> Tensor:
        """Return real queries in the shape (B, H, T, d) and on the device of some queries."""
        B, H, T, _ = queries.shape
        heads = [head % self.queries.size(0) for head in range(H)]
        places = torch.arange(T) % self.queries.size(1)
        real = self.queries[heads][:, places].to(queries.device)
        return real[None].expand(B, -1, -1, -1).contiguous()


class RealQueriesFactory(MemoryFactory):
    """A factory of memories that are searched for real queries, whatever the queries of the model are.

    Args:
        factory: Factory of the same memories, searched for the model's queries.
        real: Real keys and queries.
    """

    def __init__(self, factory: MemoryFactory, real: RealKeys):
        sizes = factory.kv_heads, factory.head_dim, factory.attention, factory.layers, factory.width, factory.symbols
        super().__init__(factory.settings, *sizes)
        self.real = real

    def search(self, device: torch.device) -> SearchBackend:
        """Return the search of banks for a model on a device, with its queries replaced."""
        return SearchForRealQueries(super().search(device), self.real)


class SearchForRealQueries(SearchBackend):
    """A search backend that replaces its queries by real ones.

    Args:
        search: Search backend that finds the chunks.
        real: Real keys and queries.
    """

    def __init__(self, search: SearchBackend, real: RealKeys):
        self.search, self.real = search, real
        self.name = search.name

    def __call__(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
        slots = self.search(bank, lanes, self.real.queries_like(queries), n)
        self.recall = self.search.recall
        return slots


def texts(paths: Sequence[str]) -> Iterator[str]:
    """Yield the texts of files, and of the files in directories in sorted order.

    Args:
        paths: Paths of UTF-8 files and of directories; if empty, the modules of the standard library are read.
    """
    if not paths:
        yield from (text for _, text in standard_library())
    for path in map(Path, paths):
        files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
        for file in files:
            yield read_text(str(file))


def tokens_of(model: LongMem, options: argparse.Namespace) -> Tensor:
    """Return the needed number of token ids, one text after the other, each behind an end-of-sentence."""
    needed, parts, count = options.tokens + options.queries, [], 0
    eos = torch.tensor([model.task.dictionary.eos()])
    for text in texts(options.text):
        parts += [eos, model.encode(text)]
        count += len(parts[-1]) + 1
        if count >= needed:
            return torch.cat(parts)[:needed]
    stop(f"the texts have {count:,} tokens, but {needed:,} are needed: name more with --text, or lower --tokens")


@torch.no_grad()
def keys_and_queries(model: LongMem, tokens: Tensor, options: argparse.Namespace) -> Tuple[Tensor, Tensor]:
    """Memorize the first tokens of a text and read the memory for the rest.

    Args:
        model: Model with an empty memory of ``options.tokens`` tokens.
        tokens: Token ids of the text, behind an end-of-sentence, shape (tokens + queries,), int64.
        options: Options of this command.

    Returns:
        Mean keys (H, N, d) of the chunks in the memory, and queries (H, T, d) of the reading layer.
    """
    model.reader.memorize(model.memory, "texts", tokens[1 : options.tokens])  # it adds the first end-of-sentence
    queries: List[Tensor] = []
    branches = model.reader.branches(1, model.memory.bank)
    branches.on_read = lambda event: queries.append(event.queries[0].clone())
    for segment in model.reader.read(tokens[options.tokens :]):
        model.model.decoder.side_network(segment.encoded, branches.reader())
    return model.memory.bank.contents(0)[2].contiguous(), torch.cat(queries, dim=1).float()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.real_keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--path", required=True, help="checkpoint of a LongMem model, or its directory")
    add("--data", help="directory of dict.txt and the tokenizer (default: the checkpoint's, then that of its training)")
    add("--pretrained-model-path", help="path of the backbone, if it is not where the checkpoint expects it")
    add("--text", nargs="*", default=[], help="files and directories (default: the modules of the standard library)")
    add("--tokens", type=int, default=1 << 20, help="number of tokens in the memory (default: %(default)s)")
    add("--queries", type=int, default=1024, help="number of tokens that follow them (default: %(default)s)")
    add("--chunk-size", type=int, default=4, help="number of tokens in a chunk (default: %(default)s)")
    add("--output", required=True, help="path of the safetensors file to write")
    options = parser.parse_args(arguments)
    require_at_least(options, 1, "tokens", "queries", "chunk_size")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    settings = {"memory_size": options.tokens, "chunk_size": options.chunk_size, "k": 16 * options.chunk_size}
    if options.pretrained_model_path:
        settings["pretrained_model_path"] = options.pretrained_model_path
    try:
        require_writable(options.output)
        model = LongMem.from_pretrained(options.path, options.data, device="cpu", **settings)
        layers = model.model.decoder.backbone.memory_layers
        if len(layers) > 1:
            raise ValueError(
                f"{options.path} remembers layers {', '.join(map(str, layers))}, and a file of keys is of one: name a "
                "model with one memory layer"
            )
        means, queries = keys_and_queries(model, tokens_of(model, options), options)
        tensors = {"means": means, "queries": queries.contiguous()}
        write_tensors(options.output, tensors)
    except (ValueError, OSError) as error:
        stop(str(error))
    print(f"{printable(options.output)}: {means.size(0)} heads, {means.size(1):,} chunks, {queries.size(1):,} queries")


if __name__ == "__main__":
    main(sys.argv[1:])
