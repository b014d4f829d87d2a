"""Size of LongMem on GPT-2: parameters to train, bytes of memory, and peak memory of training and evaluation.

    python -m examples.benchmark.sizes                                    # computed, for all sizes
    python -m examples.benchmark.sizes --measure small medium             # also measured on the CPU, random weights

Computed, in bytes, for B lanes of T tokens in float32 and GPT-2's own settings (side network of half the layers):

    evaluation = 4 (backbone + side network) + bank + hidden states + logits
    training   = evaluation + 12 side network (gradients, Adam's two moments) + activations

with hidden states 4 B T D (N + 1 + N/2 + 1), logits 16 B T V (with and without memory, and a softmax of each), and
activations N/2 * 4 B T (9 D + 5 F), which the side layers keep for the backward pass, where F = 4 D. The measured value
is the growth of a process's peak resident memory, from before the model is built, in two updates with Adam or two
segments of evaluation, with a full memory; it includes freed memory that the allocator keeps.

Legend: B lanes, T tokens of a segment, D width, F width of the MLP, N backbone layers, V symbols.
"""

import argparse
import json
import subprocess
import sys
from typing import Dict, List

import torch
from fairseq.data import Dictionary
from tqdm import tqdm

from examples.benchmark.command import require_at_least, stop
from examples.benchmark.machine import describe_machine, peak_resident
from examples.benchmark.tables import bullet_list, table
from examples.benchmark.variants import fill_with_noise
from longmem_fairseq.criterions.longmem_cross_entropy import LongMemCrossEntropyCriterion
from longmem_fairseq.data.segments import Segments
from longmem_fairseq.files import write_json
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.models.longmem_lm import LongMemModel

# Layers, width and heads of GPT-2, and the memory layer of `--arch longmem_gpt2_<name>`.
GPT2 = {"small": (12, 768, 12, 9), "medium": (24, 1024, 16, 17), "large": (36, 1280, 20, 25), "xl": (48, 1600, 25, 33)}
SYMBOLS = 50264  # GPT-2's 50,257 and fairseq's four, filled up to a multiple of eight
CHUNK = 4


def build(name: str, options: argparse.Namespace, device: str) -> LongMemModel:
    """Build LongMem on a GPT-2 with random weights.

    Args:
        name: Size of GPT-2, a key of ``GPT2``.
        options: Options of this command.
        device: Device of the weights; on ``meta`` they have shapes but no values.
    """
    layers, width, heads, memory_layer = GPT2[name]
    dictionary = Dictionary()
    for i in range(SYMBOLS - len(dictionary)):
        dictionary.add_symbol(str(i))
    backbone = {
        "model": "transformer_lm",
        "vocabulary": SYMBOLS,
        "activation_fn": "gelu_accurate",
        "decoder_embed_dim": width,
        "decoder_input_dim": width,
        "decoder_output_dim": width,
        "decoder_ffn_embed_dim": 4 * width,
        "decoder_layers": layers,
        "decoder_attention_heads": heads,
        "decoder_normalize_before": True,
        "decoder_learned_pos": True,
        "share_decoder_input_output_embed": True,
        "no_scale_embedding": True,
        "max_target_positions": max(1024, options.segment),
    }
    cfg = argparse.Namespace(
        save_backbone=True,
        backbone_config=json.dumps(backbone),
        retrieval_layer_index=memory_layer,
        chunk_size=CHUNK,
        memory_size=options.memory_size,
        tokens_per_sample=options.segment,
        memory_scope="document",
    )
    task = argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with torch.device(device):
        return LongMemModel.build_model(cfg, task)


def parameters(model: torch.nn.Module, trained: bool) -> int:
    """Count the parameters of the side network (``trained``) or of the frozen backbone; shared matrices count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad == trained)


def bank_bytes(name: str, tokens: int, dtype: torch.dtype, lanes: int = 1) -> int:
    """Return the number of bytes of a memory of ``tokens`` tokens per lane."""
    _, width, heads, _ = GPT2[name]
    return MemoryBank(lanes, heads, width // heads, tokens, CHUNK, dtype, torch.device("meta")).nbytes


def computed(name: str, options: argparse.Namespace) -> Dict:
    """Compute the figures of one size by the formulas above."""
    layers, width, _, _ = GPT2[name]
    model = build(name, options, "meta")
    backbone, side = parameters(model, trained=False), parameters(model, trained=True)
    tokens = options.batch * options.segment
    hidden = 4 * tokens * width * (layers + 1 + layers // 2 + 1)
    logits = 16 * tokens * SYMBOLS
    bank = bank_bytes(name, options.memory_size, torch.float32, options.batch) if options.memory_size else 0
    evaluation = 4 * (backbone + side) + bank + hidden + logits
    activations = layers // 2 * 4 * tokens * (9 * width + 5 * 4 * width)
    half, single = (
        (bank_bytes(name, 65 * 1024, dtype) - bank_bytes(name, 64 * 1024, dtype)) / 2**20
        for dtype in (torch.float16, torch.float32)
    )
    return {
        "size": name,
        "backbone": backbone,
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
        tokens = torch.randint(4, SYMBOLS, (options.batch, options.segment))
        starts = [number * options.segment] * options.batch
        segments = Segments(lanes, lanes, starts, lengths, options.batch)
        net_input = {"src_tokens": tokens, "segments": segments}
        return {"net_input": net_input, "target": tokens, "ntokens": tokens.numel()}

    if options.memory_size:
        model.memorize(**segment(0)["net_input"])
        for memory in model.decoder.memories:
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
    "size": "GPT-2",
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
    add("--sizes", nargs="+", choices=tuple(GPT2), default=list(GPT2), help="sizes of GPT-2 (default: all)")
    add("--measure", nargs="*", choices=tuple(GPT2), default=[], help="sizes whose peak memory is also measured")
    add(
        "--memory-size",
        type=int,
        default=65536,
        help="number of tokens that a lane's memory holds (default: %(default)s)",
    )
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
