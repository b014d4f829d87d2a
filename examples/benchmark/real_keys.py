"""Real keys and queries for the benchmarks: what a model remembers of a text, and what it asks behind it.

    python examples/benchmark/real_keys.py --path CHECKPOINT --data DATA --text books/ --output keys.safetensors

The file holds ``means``, the mean keys of the chunks of the first ``--tokens`` tokens, shape (H, N, d), and
``queries``, those of the side network's reading layer for the ``--queries`` tokens behind them, shape (H, T, d); both
float32.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Iterator, List

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.benchmark.tables import stop
from examples.quickstart.standard_library import standard_library
from longmem_fairseq.hub import LongMem
from longmem_fairseq.text import read_text


def texts(paths: List[str]) -> Iterator[str]:
    """The texts of files, and of the files of directories in sorted order; without any, the standard library's."""
    if not paths:
        yield from (text for _, text in standard_library())
    for path in map(Path, paths):
        files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]
        for file in files:
            yield read_text(str(file))


def tokens_of(model: LongMem, options: argparse.Namespace) -> Tensor:
    """As many tokens as are asked for, one text behind the other, each behind an end-of-sentence."""
    wanted, parts, count = options.tokens + options.queries, [], 0
    eos = torch.tensor([model.task.dictionary.eos()])
    for text in texts(options.text):
        parts += [eos, model.encode(text)]
        count += len(parts[-1]) + 1
        if count >= wanted:
            return torch.cat(parts)[:wanted]
    stop(f"the texts have {count:,} tokens, but {wanted:,} are needed: name more with --text, or lower --tokens")


@torch.no_grad()
def keys_and_queries(model: LongMem, tokens: Tensor, options: argparse.Namespace):
    """Means (H, N, d) and queries (H, T, d)."""
    decoder, size = model.model.decoder, model.task.args.tokens_per_sample
    model.document_memory.memorize("texts", tokens[: options.tokens], decoder.backbone.encode_for_memory, size)
    found: List[Tensor] = []
    branches = decoder.memory_branches(1, model.document_memory.bank)
    branches.watch = lambda rows, bank, queries, slots, scaling: found.append(queries[0].clone())
    for piece in tokens[options.tokens :][None].split(size, dim=1):
        decoder.side_network(decoder.backbone(piece), branches.reader())
    return model.document_memory.bank.contents(0)[2].contiguous(), torch.cat(found, dim=1).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--path", required=True, help="checkpoint of a LongMem model, or its directory")
    add("--data", help="directory of dict.txt and the tokenizer (default: the checkpoint's, then that of its training)")
    add("--pretrained-model-path", help="the backbone, where it is not where the checkpoint says")
    add("--text", nargs="*", default=[], help="files and directories (default: the standard library's modules)")
    add("--tokens", type=int, default=1 << 20, help="that are remembered (default: %(default)s)")
    add("--queries", type=int, default=1024, help="tokens behind them (default: %(default)s)")
    add("--chunk-size", type=int, default=4, help="tokens of a chunk (default: %(default)s)")
    add("--output", required=True, help="the file")
    options = parser.parse_args()
    if min(options.tokens, options.queries, options.chunk_size) < 1:
        stop("--tokens, --queries and --chunk-size must be 1 or more")
    settings = {"memory_size": options.tokens, "chunk_size": options.chunk_size, "k": 16 * options.chunk_size}
    if options.pretrained_model_path:
        settings["pretrained_model_path"] = options.pretrained_model_path
    try:
        model = LongMem.from_pretrained(options.path, options.data, device="cpu", **settings)
        means, queries = keys_and_queries(model, tokens_of(model, options), options)
    except (ValueError, OSError) as error:
        stop(str(error))
    part = f"{options.output}.part"
    save_file({"means": means, "queries": queries.contiguous()}, part)
    os.replace(part, options.output)
    print(f"{options.output}: {means.size(0)} heads, {means.size(1):,} chunks, {queries.size(1):,} queries")


if __name__ == "__main__":
    main()
