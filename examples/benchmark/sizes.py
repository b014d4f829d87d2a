"""Size of LongMem on GPT-2 and on models of the Llama family: parameters, bytes of memory, and peak memory of training
and evaluation.

    python -m examples.benchmark.sizes                                    # computed, for all sizes
    python -m examples.benchmark.sizes --backbone-dtype bfloat16          # with backbones of two bytes a parameter
    python -m examples.benchmark.sizes --sizes SmolLM2-135M --measure SmolLM2-135M    # also measured, random weights

Computed, in bytes, for B lanes of T tokens, with a side network of half the layers in float32:

    evaluation = backbone + 4 side network + bank + hidden states + logits
    training   = evaluation + 12 side network (gradients, Adam's two moments) + activations

The backbone has 4 bytes a parameter, or with --backbone-dtype bfloat16 2 bytes (norms and position embeddings always
4). The bank holds each memory layer (--retrieval-layer-index 13,17). Hidden states are 4 B T D (N + 1 + N/2 + 1), and
logits 16 B T V (with and without memory, and a softmax of each). The side layers keep for the backward pass

    GPT-2    N/2 * 4 B T (9 D + 5 F), where F = 4 D
    Llama    N/2 * 4 B T (6 D + 3 H d + 2 H_kv d + 4 F), with norms of queries and keys 2 (H + H_kv) d more

of a Llama layer: per norm its input, the normalized input and the output, 6 D; rotated queries, the attention's output
and what its projection takes, 3 H d; rotated keys and values, 2 H_kv d; and of SwiGLU both inner products, the
activation and their product, 4 F.

The measured value is the growth of a process's peak resident memory, from before the model is built, in two updates
with Adam or two segments of evaluation, with a full memory; it includes freed memory that the allocator keeps. (A
backbone in bfloat16 is drawn in float32 first.)

``pretrained`` counts the parameters of the published model. ``backbone`` also counts the symbols that the dictionary
has in addition (fairseq's four special ones, and those that fill it up to a multiple of eight), and for GPT-2 the two
position embeddings that fairseq does not use.

Legend: B lanes, T tokens of a segment, D width, F width of the MLP, N backbone layers, V symbols, H query heads, H_kv
key/value heads, d width of a head.
"""

import argparse
import json
import subprocess
import sys
from functools import lru_cache
from typing import Dict, List

import torch
from fairseq.data import Dictionary
from tqdm import tqdm

from examples.benchmark.command import require_at_least, stop
from examples.benchmark.machine import describe_machine, peak_resident
from examples.benchmark.model_shapes import SHAPES
from examples.benchmark.tables import bullet_list, table
from examples.benchmark.variants import fill_with_noise
from longmem_fairseq.backbones.base import Backbone
from longmem_fairseq.criterions.longmem_cross_entropy import LongMemCrossEntropyCriterion
from longmem_fairseq.data.segments import Segments
from longmem_fairseq.files import write_json
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.models.longmem_lm import LongMemModel
from longmem_fairseq.modules.mixed_precision import compute_products_in

CHUNK = 4


@lru_cache(maxsize=1)
def dictionary_of(symbols: int) -> Dictionary:
    """Return a dictionary of ``symbols`` symbols, special ones included."""
    dictionary = Dictionary()
    for i in range(symbols - len(dictionary)):
        dictionary.add_symbol(str(i))
    return dictionary


def build(name: str, options: argparse.Namespace, device: str) -> LongMemModel:
    """Build LongMem on a backbone with random weights.

    Args:
        name: Name of the backbone, a key of ``SHAPES``.
        options: Options of this command.
        device: Device of the weights; on ``meta`` they have shapes but no values.
    """
    shape = SHAPES[name]
    backbone = {**shape.settings, "vocabulary": shape.symbols}
    backbone["max_target_positions"] = max(backbone["max_target_positions"], options.segment)
    cfg = argparse.Namespace(
        save_backbone=True,
        backbone_config=json.dumps(backbone),
        chunk_size=CHUNK,
        memory_size=options.memory_size,
        retrieval_layer_index=options.retrieval_layer_index,
        tokens_per_sample=options.segment,
        memory_scope="document",
    )
    dictionary = dictionary_of(shape.symbols)
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with torch.device(device):
        model = LongMemModel.build_model(cfg, task)
    if options.backbone_dtype != "float32":
        compute_products_in(model.decoder.backbone, getattr(torch, options.backbone_dtype))
    return model


def parameters(model: torch.nn.Module, trained: bool) -> int:
    """Count the parameters of the side network (``trained``) or of the frozen backbone; shared matrices count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad == trained)


def bank_bytes(backbone: Backbone, tokens: int, dtype: torch.dtype, lanes: int = 1) -> int:
    """Return the number of bytes of a memory of ``tokens`` tokens per lane."""
    heads = len(backbone.memory_layers) * backbone.num_kv_heads
    return MemoryBank(lanes, heads, backbone.head_dim, tokens, CHUNK, dtype, torch.device("meta")).nbytes


def kept_by_side_layer(backbone: Backbone) -> int:
    """Return how many numbers a side layer keeps for the backward pass, for each token."""
    config, D = backbone.config, backbone.width
    F = config["decoder_ffn_embed_dim"]
    if config["model"] != "llama_lm":
        return 9 * D + 5 * F
    queries, keys = backbone.num_heads * backbone.head_dim, backbone.num_kv_heads * backbone.head_dim
    norms = 2 * (queries + keys) if config["qk_norm"] else 0
    return 6 * D + 3 * queries + 2 * keys + 4 * F + norms


def computed(name: str, options: argparse.Namespace) -> Dict:
    """Compute the figures of one size by the formulas above."""
    model = build(name, options, "meta")
    backbone, shape = model.decoder.backbone, SHAPES[name]
    side, layers = parameters(model, trained=True), backbone.num_layers
    tokens = options.batch * options.segment
    weights = 4 * side + sum(p.numel() * p.element_size() for p in backbone.parameters())
    hidden = 4 * tokens * backbone.width * (layers + 1 + layers // 2 + 1)
    logits = 16 * tokens * shape.symbols
    bank = bank_bytes(backbone, options.memory_size, torch.float32, options.batch) if options.memory_size else 0
    evaluation = weights + bank + hidden + logits
    activations = layers // 2 * 4 * tokens * kept_by_side_layer(backbone)
    half, single = (
        (bank_bytes(backbone, 65 * 1024, dtype) - bank_bytes(backbone, 64 * 1024, dtype)) / 2**20
        for dtype in (torch.float16, torch.float32)
    )
    return {
        "size": name,
        "pretrained": parameters(model, trained=False) - shape.added_parameters,
        "backbone": parameters(model, trained=False),
        "side_network": side,
        "mib_per_1k_half": half,
        "mib_per_1k_single": single,
        "bank_gib": bank / 2**30,
        "evaluation_gib": evaluation / 2**30,
        "training_gib": (evaluation + 12 * side + activations) / 2**30,
    }


def print_measured(name: str, mode: str, options: argparse.Namespace) -> None:
    """Take two steps and print by how many bytes this process's peak memory grew."""
    before = peak_resident()
    model = build(name, options, "cpu").train(mode == "train")
    criterion = LongMemCrossEntropyCriterion(
        argparse.Namespace(target_dictionary=model.decoder.dictionary), sentence_avg=False
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, foreach=False)
    lanes, lengths = torch.arange(options.batch).numpy(), [options.segment] * options.batch

    def segment(number: int) -> Dict:
        tokens = torch.randint(4, SHAPES[name].symbols, (options.batch, options.segment))
        starts = [number * options.segment] * options.batch
        segments = Segments(lanes, lanes, starts, lengths, options.batch)
        net_input = {"src_tokens": tokens, "segments": segments}
        return {"net_input": net_input, "target": tokens, "ntokens": tokens.numel()}

    if options.memory_size:
        model.memorize(**segment(0)["net_input"])
        for memory in model.decoder.lane_state.memories:
            memory.flush()
            fill_with_noise(memory.bank)  # the peak does not depend on what the memory holds
    for number in (1, 2):
        with torch.set_grad_enabled(mode == "train"):
            loss, _, _ = criterion(model, segment(number))
        if mode == "train":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(peak_resident() - before)


def measured(name: str, mode: str, arguments: List[str]) -> float:
    """Measure one size in a separate process, in GiB."""
    command = [sys.executable, "-m", "examples.benchmark.sizes", *arguments, "--measure-one", f"{name}:{mode}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        stop(f"measuring {mode} of {name} ended with status {done.returncode}: it may need more memory than is free")
    return int(done.stdout.split()[-1]) / 2**30


COLUMNS = {
    "size": "model",
    "pretrained": "pretrained",
    "backbone": "backbone",
    "side_network": "side network",
    "mib_per_1k_half": "MiB per 1k tokens, half",
    "mib_per_1k_single": "float32",
    "evaluation_gib": "evaluation GiB",
    "evaluation_measured": "measured",
    "training_gib": "training GiB",
    "training_measured": "measured",
}


def main(arguments: List[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.sizes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sizes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="models (default: all)")
    add("--measure", nargs="*", choices=tuple(SHAPES), default=[], help="those whose peak memory is also measured")
    add(
        "--backbone-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the backbone's weights, as in training (default: %(default)s)",
    )
    add(
        "--memory-size",
        type=int,
        default=65536,
        help="number of tokens that a lane's memory holds (default: %(default)s)",
    )
    add("--retrieval-layer-index", help="memory layers, as in training (default: one, about two thirds up)")
    add("--segment", type=int, default=1024, help="number of tokens in a segment (default: %(default)s)")
    add("--batch", type=int, default=1, help="number of lanes (default: %(default)s)")
    add("--json", help="path of a JSON file for the figures")
    add("--measure-one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    require_at_least(options, 1, "segment", "batch")
    if options.memory_size and options.memory_size < options.segment:
        stop(f"--memory-size {options.memory_size} must be 0 or at least a segment of {options.segment} tokens")
    if options.measure_one:
        print_measured(*options.measure_one.split(":"), options)
        return
    rows = [computed(name, options) for name in options.sizes]
    runs = [(row, mode) for row in rows if row["size"] in options.measure for mode in ("evaluation", "training")]
    for row, mode in tqdm(runs, desc="measuring", disable=not runs):
        row[f"{mode}_measured"] = measured(row["size"], "train" if mode == "training" else "eval", arguments)
    print(table(rows, COLUMNS), "", *bullet_list(describe_machine()), sep="\n")
    if options.json:
        write_json(options.json, {"machine": describe_machine(), "options": vars(options), "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
