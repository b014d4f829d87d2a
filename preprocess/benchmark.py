"""How fast the preprocessing is, side by side with fairseq's own tools on the same text and cores.

    python preprocess/benchmark.py --documents P... --workers 2 --gpt2-encoder-json F --gpt2-vocab-bpe F --dict F

Without --documents it takes the running Python's standard library, without GPT-2's files a byte-level BPE trained on
the documents. Compared are fairseq's two steps, ``multiprocessing_bpe_encoder`` (text to tokens) and
``fairseq-preprocess`` (tokens to data), with binarize_documents.py, which does both. fairseq's documents are lines, so
newlines become spaces for all of them; the data must then be the same, token by token, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: find the packages beside this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from preprocess.documents import iter_documents
from preprocess.errors import InputError

SCRIPT = Path(__file__).resolve().parent / "binarize_documents.py"


def train_byte_level_bpe(texts: Sequence[str], vocab_size: int, directory: Path) -> tuple[Path, Path]:
    """A BPE of ``texts`` in the format of GPT-2's files; returns the paths of encoder.json and vocab.bpe."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    encoder, merges = directory / "encoder.json", directory / "vocab.bpe"
    encoder.write_text(json.dumps(model["vocab"]), encoding="utf-8")
    # older versions of the library write a merge as one string
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    merges.write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in pairs), encoding="utf-8")
    return encoder, merges


class Step(NamedTuple):
    """What a tool took. The clock depends on what else the machine does, the processor time does not."""

    seconds: float
    cpu_seconds: float  # of all its processes
    peak_megabytes: float  # of the largest


def timed(command: Sequence[object], description: str) -> Step:
    """Run a command; raises InputError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=SCRIPT.parent.parent
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"{description} failed: {errors.strip().splitlines()[-1] if errors.strip() else status}")
    return Step(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def same_tokens(one: Path, two: Path) -> int:
    """Compare two fairseq datasets; returns their tokens, raises InputError if they differ."""
    from fairseq.data import data_utils

    first, second = (data_utils.load_indexed_dataset(str(path), None, "mmap") for path in (one, two))
    if len(first) != len(second):
        raise InputError(f"{one} has {len(first)} documents, {two} has {len(second)}")
    for number in range(len(first)):
        if not first[number].equal(second[number]):
            raise InputError(f"document {number} differs between {one} and {two}")
    return int(first.sizes.sum())


def benchmark(args: argparse.Namespace, directory: Path) -> dict:
    """Run everything in a scratch ``directory``; returns the report.

    Raises:
        InputError: a tool failed, or the data differs.
    """
    texts = [re.sub(r"[\r\n]+", " ", document.text).strip() for document in iter_documents(args.documents, "skip")]
    texts = [text for text in texts if text]
    (directory / "lines.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    records = (json.dumps({"text": text}) for text in texts)
    (directory / "lines.jsonl").write_text("".join(f"{record}\n" for record in records), encoding="utf-8")
    if args.gpt2_encoder_json and args.gpt2_vocab_bpe:
        encoder, merges = Path(args.gpt2_encoder_json).resolve(), Path(args.gpt2_vocab_bpe).resolve()
    else:
        encoder, merges = train_byte_level_bpe(texts, 10_000, directory)
    gpt2 = ["--tokenizer", "gpt2", "--gpt2-encoder-json", encoder, "--gpt2-vocab-bpe", merges]
    gpt2 += ["--dict", Path(args.dict).resolve()] if args.dict else []

    made = directory / f"ours{args.workers}"
    commands: dict[str, list[object]] = {}
    for workers in sorted({1, args.workers}):
        ours = [SCRIPT, "--train", directory / "lines.jsonl", *gpt2, "--workers", workers, "--overwrite"]
        commands[f"binarize_documents.py --workers {workers}"] = [*ours, "--destdir", directory / f"ours{workers}"]
    encode = ["-m", "fairseq.examples.roberta.multiprocessing_bpe_encoder", "--keep-empty", "--workers", args.workers]
    encode += ["--inputs", directory / "lines.txt", "--outputs", directory / "lines.bpe"]
    encode += ["--encoder-json", encoder, "--vocab-bpe", merges]
    commands[f"multiprocessing_bpe_encoder --workers {args.workers}"] = encode
    binarize = ["-m", "fairseq_cli.preprocess", "--only-source", "--workers", args.workers]
    binarize += ["--srcdict", made / "dict.txt", "--trainpref", directory / "lines.bpe"]
    commands[f"fairseq-preprocess --workers {args.workers}"] = [*binarize, "--destdir", directory / "stock"]

    # in turn, not one after the other, so that whatever else runs on the machine slows all of them
    runs = [
        {name: timed([sys.executable, *command], name) for name, command in commands.items()}
        for _ in range(args.repeat)
    ]
    steps = {name: min(run[name] for run in runs) for name in commands}
    tokens = same_tokens(directory / "stock" / "train", made / "train")
    return report(steps, len(texts), tokens, (directory / "lines.txt").stat().st_size, args.workers)


def report(steps: dict[str, Step], documents: int, tokens: int, size: int, workers: int) -> dict:
    """The measurements as rates, and the two ratios that matter."""
    ours, encode, binarize = (
        steps[f"{name} --workers {workers}"]
        for name in ("binarize_documents.py", "multiprocessing_bpe_encoder", "fairseq-preprocess")
    )
    return {
        "documents": documents,
        "tokens": tokens,
        "megabytes": size / 1e6,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "steps": {
            name: {
                **step._asdict(),
                "documents_per_second": documents / step.seconds,
                "tokens_per_second": tokens / step.seconds,
            }
            for name, step in steps.items()
        },
        "times_fairseq_preprocess": binarize.seconds / ours.seconds,
        "times_encoder_and_preprocess": (encode.seconds + binarize.seconds) / ours.seconds,
        "times_encoder_and_preprocess_cpu": (encode.cpu_seconds + binarize.cpu_seconds) / ours.cpu_seconds,
        "times_one_worker": steps["binarize_documents.py --workers 1"].seconds / ours.seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and print a table."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--documents", nargs="+", metavar="P", help="files, directories, JSON lines (the standard library)")
    add("--workers", type=int, default=2, metavar="N", help="processes of each tool (2)")
    add("--repeat", type=int, default=1, metavar="N", help="run everything so often and take the fastest of each (1)")
    add("--gpt2-encoder-json", metavar="F", help="GPT-2's encoder.json")
    add("--gpt2-vocab-bpe", metavar="F", help="GPT-2's vocab.bpe")
    add("--dict", metavar="F", help="a fairseq dict.txt for these files")
    add("--output", type=Path, metavar="F", help="write the report as JSON")
    args = parser.parse_args(arguments)
    if not args.documents:
        args.documents = [str(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    try:
        with tempfile.TemporaryDirectory() as directory:
            found = benchmark(args, Path(directory))
    except (InputError, OSError) as error:
        raise SystemExit(f"benchmark.py: error: {error}") from None
    print(f"{found['documents']:,} documents, {found['tokens']:,} tokens, {found['megabytes']:.1f} MB of text")
    print(f"{'':42} {'seconds':>8} {'CPU s':>8} {'documents/s':>12} {'tokens/s':>12} {'peak MB':>8}")
    for name, step in found["steps"].items():
        rates = f"{step['documents_per_second']:12,.1f} {step['tokens_per_second']:12,.0f}"
        print(f"{name:42} {step['seconds']:8.1f} {step['cpu_seconds']:8.1f} {rates} {step['peak_megabytes']:8,.0f}")
    print(f"{found['times_fairseq_preprocess']:.1f} times the documents/s of fairseq-preprocess alone,", end=" ")
    print(f"{found['times_encoder_and_preprocess']:.1f} times with its BPE encoder", end=" ")
    print(f"({found['times_encoder_and_preprocess_cpu']:.1f} in processor time)", end=", ")
    print(f"{found['times_one_worker']:.2f} times those of one worker")
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
