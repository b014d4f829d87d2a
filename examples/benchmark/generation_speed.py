"""The speed of generation: of reading a prompt and of each new token, by memory and beam, beside stock fairseq.

    python examples/benchmark/generation_speed.py --path CHECKPOINT --data DATA --json speed.json --markdown speed.md

Two tables. The first continues one prompt with memories of several sizes, each full of text, and with the stock
generator on the backbone alone, with the same prompt, beam and number of new tokens. What is timed is what
fairseq-interactive times (its lines W-0): the task's ``inference_step``, called here in one process so that all
variants can take turns; with numpy 2 stock fairseq-interactive stops before it gets there. The prompt's time ends where
the model is first asked for a new token, and what is left is that of the new ones.

The second compares commands: fairseq-interactive on a prompt of ``--long-prompt`` tokens with fairseq-eval-lm on the
same tokens, by the seconds that each command reports, in turns.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict, List, Sequence, Tuple

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)
if "--threads" in sys.argv[:-1]:  # before torch
    os.environ["OMP_NUM_THREADS"] = sys.argv[sys.argv.index("--threads") + 1]

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from examples.benchmark.tables import lines_of, machine, stop, table, write_json
from examples.quickstart.standard_library import standard_library
from longmem_fairseq.hub import LongMem, find_checkpoint
from longmem_fairseq.text import read_text

ROOT = Path(__file__).resolve().parents[2]


class Variant:
    """A model that continues the prompt, with or without a memory.

    Args:
        name: in the table.
        beam: hypotheses.
        task, model: fairseq's.
        prompt: tokens behind an end-of-sentence, shape (length,), int64, on the model's device.
        counts_prompt: whether lengths count the prompt, as stock fairseq's do.
        library: what is in the memory.
    """

    def __init__(self, name: str, beam: int, task, model, prompt: Tensor, counts_prompt: bool, document_memory=None):
        self.name, self.beam, self.task, self.model, self.document_memory = name, beam, task, model, document_memory
        self.sample = {
            "net_input": {"src_tokens": prompt[None], "src_lengths": torch.tensor([len(prompt)], device=prompt.device)}
        }
        self.forced = len(prompt) - 1 if counts_prompt else 0  # steps that only say the prompt again

    def run(self, new: int) -> Tuple[float, float]:
        """Seconds until the prompt is read, and seconds a step of saying ``new`` tokens and an end-of-sentence."""
        length = self.forced + new
        options = SimpleNamespace(beam=self.beam, max_len_b=length, min_len=length)
        extra = {"document_memories": [self.document_memory]} if self.document_memory is not None else None
        generator = self.task.build_generator([self.model], options, extra_gen_cls_kwargs=extra)
        step, calls = generator.model.forward_decoder, []

        def watched(*args, **kwargs):
            synchronize()
            calls.append(time.perf_counter())
            return step(*args, **kwargs)

        generator.model.forward_decoder = watched
        synchronize()
        began = time.perf_counter()
        found = self.task.inference_step(generator, [self.model], self.sample)
        synchronize()
        ended = time.perf_counter()
        said = len(found[0][0]["tokens"]) - 1 - self.forced  # less the end-of-sentence
        if said != new or len(calls) != self.forced + new + 1:
            stop(f"{self.name} said {said} tokens instead of {new}, so its times say nothing")
        return calls[self.forced] - began, (ended - calls[self.forced]) / (new + 1)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def with_memory(options: argparse.Namespace, size: int, tokens: Tensor, prompt: Tensor) -> List[Variant]:
    """The checkpoint with a memory of ``size`` tokens of text, one variant a beam."""
    model = load(options, memory_size=size)
    if size:
        inputs = behind_eos(tokens[: size - 1], model)
        model.document_memory.memorize(
            "text", inputs, model.model.decoder.backbone.encode_for_memory, model.task.args.tokens_per_sample
        )
    return [
        Variant(
            f"memory of {size:,}" if size else "memory off",
            beam,
            model.task,
            model.model,
            behind_eos(prompt, model),
            False,
            model.document_memory,
        )
        for beam in options.beams
    ]


def stock(options: argparse.Namespace, model: LongMem, prompt: Tensor) -> List[Variant]:
    """The backbone alone, in stock fairseq's task and generator, one variant a beam."""
    cfg = OmegaConf.merge(OmegaConf.structured(LanguageModelingConfig), {"data": model.task.args.data})
    task = LanguageModelingTask(cfg, model.task.dictionary, targets=["future"])
    path = options.pretrained_model_path or model.model.cfg.pretrained_model_path
    if not path:
        stop("the checkpoint names no backbone of its own file: give it with --pretrained-model-path")
    (backbone,), _ = checkpoint_utils.load_model_ensemble([path], task=task)
    backbone.to(model.model.decoder.device).eval()
    longest = backbone.max_decoder_positions() - options.new_tokens - 1
    if len(prompt) > longest:
        stop(
            f"--prompt {len(prompt)} and --new-tokens {options.new_tokens} exceed the backbone's "
            f"{backbone.max_decoder_positions()} positions, which stock fairseq needs: at most --prompt {longest}"
        )
    return [
        Variant("stock, backbone alone", beam, task, backbone, behind_eos(prompt, model), True)
        for beam in options.beams
    ]


def load(options: argparse.Namespace, **settings) -> LongMem:
    if options.pretrained_model_path:
        settings["pretrained_model_path"] = options.pretrained_model_path
    return LongMem.from_pretrained(options.path, options.data, device=options.device, **settings)


def behind_eos(tokens: Tensor, model: LongMem) -> Tensor:
    return torch.cat([tokens.new_tensor([model.task.dictionary.eos()]), tokens]).to(model.model.decoder.device)


def measure(variants: Sequence[Variant], options: argparse.Namespace) -> List[Dict]:
    """Rows of the first table, in the order of the variants, which take turns."""
    for variant in variants:
        variant.run(1)  # warm
    times = [[] for _ in variants]
    for _ in tqdm(range(options.rounds), desc="generating", leave=False):
        for variant, taken in zip(variants, times):
            taken.append(variant.run(options.new_tokens))
    rows = []
    for variant, taken in zip(variants, times):
        prompts, steps = ([1000 * seconds for seconds in x] for x in zip(*taken))
        rows.append(
            {
                "variant": variant.name,
                "beam": variant.beam,
                "prompt_ms": statistics.median(prompts),
                "prompt_tokens_per_second": 1000 * options.prompt / statistics.median(prompts),
                "token_ms": statistics.median(steps),
                "token_ms_fastest": min(steps),
                "token_ms_slowest": max(steps),
            }
        )
    for row in rows:
        beside = next((r for r in rows if r["beam"] == row["beam"] and r["variant"].startswith("stock")), None)
        if beside is not None and beside is not row:
            for key in ("prompt_ms", "token_ms"):
                row[f"{key}_of_stock"] = row[key] / beside[key]
    return rows


def long_prompt(options: argparse.Namespace, tokens: Tensor, dictionary) -> Dict[str, object]:
    """fairseq-interactive on a long prompt beside fairseq-eval-lm on the same tokens: the seconds they report."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        dictionary.save(str(directory / "dict.txt"))
        builder = MMapIndexedDatasetBuilder(str(directory / "test.bin"), dtype=np.int32)
        builder.add_item(torch.cat([tokens, tokens.new_tensor([dictionary.eos()])]))
        builder.finalize(str(directory / "test.idx"))
        (directory / "prompt").write_text(" ".join(dictionary[i] for i in tokens.tolist()) + "\n", encoding="utf-8")
        overrides: Dict[str, object] = {"memory_size": max(options.memory_sizes)}
        if options.pretrained_model_path:
            overrides["pretrained_model_path"] = os.path.abspath(options.pretrained_model_path)
        common = [
            str(directory),
            "--user-dir",
            str(ROOT / "longmem_fairseq"),
            "--task",
            "longmem_language_modeling",
            "--path",
            options.checkpoint,
            "--model-overrides",
            repr(overrides),
        ]
        common += ["--cpu"] if options.device == "cpu" else []
        interactive = [*common, "--input", str(directory / "prompt"), "--beam", "1", "--max-len-b", "1"]
        evaluation = [*common, "--gen-subset", "test", "--num-workers", "0"]
        generate, evaluate = [], []
        for _ in tqdm(range(options.command_rounds), desc="commands", leave=False):
            generate.append(reported("interactive", interactive, r"^W-0\t([\d.]+)\tseconds"))
            evaluate.append(reported("eval_lm", evaluation, r"Evaluated [\d,]+ tokens in ([\d.]+)s"))
    generate_median, evaluate_median = statistics.median(generate), statistics.median(evaluate)
    return {
        "tokens": len(tokens),
        "interactive_seconds": generate,
        "eval_lm_seconds": evaluate,
        "interactive_median": generate_median,
        "eval_lm_median": evaluate_median,
        "ratio": generate_median / evaluate_median,
    }


def reported(program: str, arguments: Sequence[str], pattern: str) -> float:
    """The seconds that a command of fairseq says its work took."""
    done = subprocess.run(
        [sys.executable, "-m", f"fairseq_cli.{program}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = re.search(pattern, done.stdout, re.MULTILINE)
    if done.returncode or not found:
        stop(f"fairseq_cli.{program} ended with {done.returncode}: {done.stdout.strip().splitlines()[-1:]}")
    return float(found[1])


def markdown(result: Dict, options: argparse.Namespace) -> str:
    """The result as a report."""
    columns = {
        "variant": "",
        "beam": "beam",
        "prompt_ms": "prompt ms",
        "prompt_tokens_per_second": "prompt tokens/s",
        "prompt_ms_of_stock": "of stock",
        "token_ms": "ms a new token",
        "token_ms_of_stock": "of stock",
    }
    heading = f"## Generation: a prompt of {options.prompt} tokens, {options.new_tokens} new ones"
    text = [f"{heading}, medians of {options.rounds} rounds", "", table(result["rows"], columns)]
    long = result["long_prompt"]
    if long:
        rows = [
            {"command": "fairseq-interactive", "seconds": long["interactive_median"]},
            {"command": "fairseq-eval-lm", "seconds": long["eval_lm_median"]},
        ]
        for row in rows:
            row["tokens_per_second"] = long["tokens"] / row["seconds"]
        text += [
            "",
            f"## A prompt of {long['tokens']:,} tokens, memory of {max(options.memory_sizes):,}",
            "",
            table(rows, {"command": "", "seconds": "seconds", "tokens_per_second": "tokens/s"}),
            "",
            f"The prompt takes {long['ratio']:.2f} times as long as evaluation (medians of {options.command_rounds}).",
        ]
    return "\n".join(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--path", required=True, help="checkpoint of a LongMem model, or its directory")
    add("--data", help="directory of dict.txt and the tokenizer (default: the checkpoint's, then that of its training)")
    add("--pretrained-model-path", help="the backbone, where it is not where the checkpoint says")
    add("--text", help="what is memorised and continued, a UTF-8 file (default: the standard library's modules)")
    add("--memory-sizes", type=int, nargs="+", default=[0, 16384, 65536], help="tokens; 0: memory off")
    add("--beams", type=int, nargs="+", default=[1, 4], help="hypotheses (default: 1 and 4)")
    add("--prompt", type=int, default=200, help="tokens of the prompt (default: %(default)s)")
    add("--new-tokens", type=int, default=50, help="tokens of the continuation (default: %(default)s)")
    add("--rounds", type=int, default=5, help="measurements of each variant (default: %(default)s)")
    add("--long-prompt", type=int, default=65000, help="tokens of the long prompt; 0: none (default: %(default)s)")
    add("--command-rounds", type=int, default=3, help="measurements of each command (default: %(default)s)")
    add("--threads", type=int, help="threads on the CPU (default: PyTorch's)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--json", help="write the result there")
    add("--markdown", help="write the tables there, besides printing them")
    options = parser.parse_args(arguments)
    for name, least in (("prompt", 1), ("new_tokens", 1), ("rounds", 1), ("command_rounds", 1), ("long_prompt", 0)):
        if getattr(options, name) < least:
            stop(f"--{name.replace('_', '-')} {getattr(options, name)} is less than {least}")
    for beam in options.beams:
        if beam < 1:
            stop(f"--beams {beam} is less than 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: PyTorch finds no GPU here")
    return options


def tokens_of(options: argparse.Namespace, model: LongMem, wanted: int) -> Tensor:
    """At least ``wanted`` tokens of text."""
    texts = [read_text(options.text)] if options.text else (text for _, text in standard_library())
    parts: List[Tensor] = []
    for text in texts:
        parts.append(model.encode(text))
        if sum(map(len, parts)) >= wanted:
            return torch.cat(parts)
    stop(f"the text has {sum(map(len, parts)):,} tokens, but {wanted:,} are needed: name a longer one with --text")


def run(options: argparse.Namespace) -> Dict[str, object]:
    """All measurements."""
    model = load(options)
    options.checkpoint = find_checkpoint(options.path)
    most = max([*options.memory_sizes, options.long_prompt])
    tokens = tokens_of(options, model, most + options.prompt)
    prompt = tokens[most : most + options.prompt]  # behind what is memorised
    groups: List[Callable[[], List[Variant]]] = [lambda: stock(options, model, prompt)]
    groups += [lambda size=size: with_memory(options, size, tokens, prompt) for size in options.memory_sizes]
    variants = [variant for group in groups for variant in group()]
    long = None
    rows = measure(variants, options)
    if options.long_prompt:
        long = long_prompt(options, tokens[: options.long_prompt], model.task.dictionary)
    return {"machine": machine(), "options": vars(options), "rows": rows, "long_prompt": long}


def main(arguments: List[str]) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        result = run(options)
    except (ValueError, OSError) as error:
        stop(str(error))
    text = "\n".join([markdown(result, options), "", *lines_of(result["machine"])])
    print(text)
    if options.json:
        write_json(options.json, json.loads(json.dumps(result)))
    if options.markdown:
        Path(options.markdown).write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
