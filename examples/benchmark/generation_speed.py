"""Speed of generation: of reading a prompt and of each new token, by memory size and beam, beside stock fairseq.

    python -m examples.benchmark.generation_speed --path CHECKPOINT --data DATA --json speed.json --markdown speed.md

There are two tables. The first continues one prompt with memories of several sizes, each full of text, and with the
stock generator on the backbone alone, with the same prompt, beam and number of new tokens. It times the task's
``inference_step``, as fairseq-interactive does (its lines W-0), but in one process, so that all variants take turns.
The time of the prompt ends when the model computes the first new token, and the rest is the time of the new tokens.

The second compares two commands, in turns, by the seconds that they report: fairseq-interactive on a prompt of
``--long-prompt`` tokens, and fairseq-eval-lm on the same tokens.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Dict, List, Optional, Sequence, Tuple

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

from examples.benchmark.command import require_at_least, require_device, stop, synchronize
from examples.benchmark.machine import describe_machine
from examples.benchmark.tables import bullet_list, table
from examples.quickstart.standard_library import standard_library
from longmem_fairseq.files import write_json, write_text
from longmem_fairseq.hub import LongMem
from longmem_fairseq.memory.document_memory import DocumentMemory
from longmem_fairseq.tasks.pretrained import find_checkpoint
from longmem_fairseq.text import read_text

ROOT = Path(__file__).resolve().parents[2]


class ContinuationVariant:
    """A model that continues the prompt, with or without a memory.

    Args:
        name: Name of the variant in the table.
        beam: Number of hypotheses.
        task: The fairseq task that the model was built for.
        model: The fairseq model.
        prompt: Token ids of the prompt behind an end-of-sentence, shape (length,), int64, on the model's device.
        counts_prompt: If true, lengths of hypotheses include the prompt, as in stock fairseq.
        document_memory: Memory that is read; None for no memory.
    """

    def __init__(
        self,
        name: str,
        beam: int,
        task,
        model,
        prompt: Tensor,
        counts_prompt: bool,
        document_memory: Optional[DocumentMemory] = None,
    ):
        self.name, self.beam, self.task, self.model, self.document_memory = name, beam, task, model, document_memory
        self.device = prompt.device
        lengths = torch.tensor([len(prompt)], device=prompt.device)
        self.sample = {"net_input": {"src_tokens": prompt[None], "src_lengths": lengths}}
        self.forced = len(prompt) - 1 if counts_prompt else 0  # steps that only repeat the prompt

    def run(self, new: int) -> Tuple[float, float]:
        """Generate tokens and measure the time.

        Args:
            new: Number of new tokens, not counting the end-of-sentence.

        Returns:
            Seconds until the prompt is read, and seconds per generated token.
        """
        length = self.forced + new
        options = SimpleNamespace(beam=self.beam, max_len_b=length, min_len=length)
        extra = {"document_memories": [self.document_memory]} if self.document_memory is not None else None
        generator = self.task.build_generator([self.model], options, extra_gen_cls_kwargs=extra)
        forward, calls = generator.model.forward_decoder, []

        def timed_forward(*args, **kwargs):
            synchronize(self.device)
            calls.append(time.perf_counter())
            return forward(*args, **kwargs)

        generator.model.forward_decoder = timed_forward
        synchronize(self.device)
        start = time.perf_counter()
        hypotheses = self.task.inference_step(generator, [self.model], self.sample)
        synchronize(self.device)
        end = time.perf_counter()
        generated = len(hypotheses[0][0]["tokens"]) - 1 - self.forced  # without the end-of-sentence
        if generated != new or len(calls) != self.forced + new + 1:
            stop(f"{self.name} generated {generated} tokens instead of {new}, so its times are not comparable")
        return calls[self.forced] - start, (end - calls[self.forced]) / (new + 1)


def variants_with_memory(
    options: argparse.Namespace, size: int, tokens: Tensor, prompt: Tensor
) -> List[ContinuationVariant]:
    """Load the checkpoint with a memory that is full of text; one variant for each beam.

    Args:
        options: Options of this command.
        size: Number of tokens that the memory holds; 0 for no memory.
        tokens: Token ids of the text, shape (at least size,), int64.
        prompt: Token ids of the prompt, shape (length,), int64.
    """
    model = load(options, memory_size=size)
    if size:
        model.reader.memorize(model.memory, "text", tokens[: size - 1])  # and the end-of-sentence before them
    name = f"memory of {size:,}" if size else "memory off"
    inputs = behind_eos(prompt, model)
    return [
        ContinuationVariant(name, beam, model.task, model.model, inputs, False, model.memory) for beam in options.beams
    ]


def stock_variants(options: argparse.Namespace, model: LongMem, prompt: Tensor) -> List[ContinuationVariant]:
    """Load the backbone alone into stock fairseq's task; one variant of its generator for each beam.

    Args:
        options: Options of this command.
        model: Model that the backbone belongs to.
        prompt: Token ids of the prompt, shape (length,), int64.
    """
    cfg = OmegaConf.merge(OmegaConf.structured(LanguageModelingConfig), {"data": model.task.args.data})
    task = LanguageModelingTask(cfg, model.task.dictionary, targets=["future"])
    path = options.pretrained_model_path or model.model.cfg.pretrained_model_path
    if not path:
        stop("the checkpoint names no file of its backbone: name it with --pretrained-model-path")
    (backbone,), _ = checkpoint_utils.load_model_ensemble([path], task=task)
    backbone.to(model.model.decoder.device).eval()
    longest = backbone.max_decoder_positions() - options.new_tokens - 1
    if len(prompt) > longest:
        stop(
            f"--prompt {len(prompt)} and --new-tokens {options.new_tokens} exceed the backbone's "
            f"{backbone.max_decoder_positions()} positions, which stock fairseq needs: at most --prompt {longest}"
        )
    inputs = behind_eos(prompt, model)
    return [ContinuationVariant("stock, backbone alone", beam, task, backbone, inputs, True) for beam in options.beams]


def load(options: argparse.Namespace, **settings) -> LongMem:
    """Load the checkpoint of the options.

    Args:
        options: Options of this command.
        settings: Settings in place of the checkpoint's.
    """
    if options.pretrained_model_path:
        settings["pretrained_model_path"] = options.pretrained_model_path
    return LongMem.from_pretrained(options.path, options.data, device=options.device, **settings)


def behind_eos(tokens: Tensor, model: LongMem) -> Tensor:
    """Prepend an end-of-sentence to token ids (length,) and move them to the model's device."""
    return torch.cat([tokens.new_tensor([model.task.dictionary.eos()]), tokens]).to(model.model.decoder.device)


def measure(variants: Sequence[ContinuationVariant], options: argparse.Namespace) -> List[Dict]:
    """Measure the variants in turns and return the rows of the first table, in their order."""
    for variant in variants:
        variant.run(1)  # warm up
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
    """Compare fairseq-interactive on a long prompt with fairseq-eval-lm on the same tokens.

    Args:
        options: Options of this command.
        tokens: Token ids of the prompt, shape (length,), int64.
        dictionary: Dictionary of the tokens.

    Returns:
        Seconds of each run of both commands, their medians, and the ratio of the medians.
    """
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
            generate.append(reported_seconds("interactive", interactive, r"^W-0\t([\d.]+)\tseconds"))
            evaluate.append(reported_seconds("eval_lm", evaluation, r"Evaluated [\d,]+ tokens in ([\d.]+)s"))
    generate_median, evaluate_median = statistics.median(generate), statistics.median(evaluate)
    return {
        "tokens": len(tokens),
        "interactive_seconds": generate,
        "eval_lm_seconds": evaluate,
        "interactive_median": generate_median,
        "eval_lm_median": evaluate_median,
        "ratio": generate_median / evaluate_median,
    }


def reported_seconds(program: str, arguments: Sequence[str], pattern: str) -> float:
    """Run a command of fairseq and return the seconds that it reports.

    Args:
        program: Name of the module in ``fairseq_cli``.
        arguments: Arguments of the command.
        pattern: Regular expression whose group is the number of seconds.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"fairseq_cli.{program}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    report = re.search(pattern, done.stdout, re.MULTILINE)
    if done.returncode or not report:
        stop(f"fairseq_cli.{program} ended with {done.returncode}: {done.stdout.strip().splitlines()[-1:]}")
    return float(report[1])


def markdown(result: Dict, options: argparse.Namespace) -> str:
    """Format the result as a report in Markdown."""
    columns = {
        "variant": "",
        "beam": "beam",
        "prompt_ms": "prompt ms",
        "prompt_tokens_per_second": "prompt tokens/s",
        "prompt_ms_of_stock": "of stock",
        "token_ms": "ms per new token",
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
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.generation_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--path", required=True, help="checkpoint of a LongMem model, or its directory")
    add("--data", help="directory of dict.txt and the tokenizer (default: the checkpoint's, then that of its training)")
    add("--pretrained-model-path", help="path of the backbone, if it is not where the checkpoint expects it")
    add("--text", help="UTF-8 file to memorize and continue (default: the modules of the standard library)")
    add("--memory-sizes", type=int, nargs="+", default=[0, 16384, 65536], help="memory sizes in tokens; 0: memory off")
    add("--beams", type=int, nargs="+", default=[1, 4], help="numbers of hypotheses (default: 1 and 4)")
    add("--prompt", type=int, default=200, help="number of tokens of the prompt (default: %(default)s)")
    add("--new-tokens", type=int, default=50, help="number of tokens of the continuation (default: %(default)s)")
    add("--rounds", type=int, default=5, help="number of measurements of each variant (default: %(default)s)")
    add("--long-prompt", type=int, default=65000, help="tokens of the long prompt; 0: skip it (default: %(default)s)")
    add("--command-rounds", type=int, default=3, help="number of measurements of each command (default: %(default)s)")
    add("--threads", type=int, help="number of threads on the CPU (default: PyTorch's)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--json", help="path of a JSON file for the result")
    add("--markdown", help="path of a file for the printed tables")
    options = parser.parse_args(arguments)
    require_at_least(options, 1, "prompt", "new_tokens", "rounds", "command_rounds", "beams")
    require_at_least(options, 0, "long_prompt")
    require_device(torch.device(options.device))
    return options


def tokens_of(options: argparse.Namespace, model: LongMem, needed: int) -> Tensor:
    """Return at least ``needed`` token ids of text, shape (length,), int64."""
    texts = [read_text(options.text)] if options.text else (text for _, text in standard_library())
    parts: List[Tensor] = []
    for text in texts:
        parts.append(model.encode(text))
        if sum(map(len, parts)) >= needed:
            return torch.cat(parts)
    stop(f"the text has {sum(map(len, parts)):,} tokens, but {needed:,} are needed: name a longer one with --text")


def run(options: argparse.Namespace) -> Dict[str, object]:
    """Do all measurements of the options."""
    model = load(options)
    options.checkpoint = find_checkpoint(options.path)
    most = max([*options.memory_sizes, options.long_prompt])
    tokens = tokens_of(options, model, most + options.prompt)
    prompt = tokens[most : most + options.prompt]  # follows the text in the memory
    variants = stock_variants(options, model, prompt)
    for size in options.memory_sizes:
        variants += variants_with_memory(options, size, tokens, prompt)
    long = None
    rows = measure(variants, options)
    if options.long_prompt:
        long = long_prompt(options, tokens[: options.long_prompt], model.task.dictionary)
    return {"machine": describe_machine(), "options": vars(options), "rows": rows, "long_prompt": long}


def main(arguments: List[str]) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        result = run(options)
    except (ValueError, OSError) as error:
        stop(str(error))
    text = "\n".join([markdown(result, options), "", *bullet_list(result["machine"])])
    print(text)
    if options.json:
        write_json(options.json, result)
    if options.markdown:
        write_text(options.markdown, text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
