"""Measure the speed of the preprocessing beside fairseq's own tools on the same text and cores.

    python -m preprocess.benchmark --documents P... --workers 2 --gpt2-encoder-json F --gpt2-vocab-bpe F --dict F

Without --documents the text is the running Python's standard library; without GPT-2's files a byte-level BPE is trained
on the documents. The same vocabulary is also measured as a Hugging Face tokenizer. fairseq's two steps,
``multiprocessing_bpe_encoder`` (text to tokens) and ``fairseq-preprocess`` (tokens to data), are compared with
binarize_documents, which does both. fairseq's documents are lines, so newlines become spaces for all tools; the data
must then be the same, token by token, or the benchmark fails.
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

from preprocess.destination import check_output
from preprocess.documents import iter_documents
from preprocess.errors import InputError
from preprocess.gpt2_tokenizer import read_gpt2_files
from preprocess.package_modules import files
from preprocess.tokenizer_json import from_vocabulary

PROG = "python -m preprocess.benchmark"
ROOT = Path(__file__).resolve().parent.parent


def train_byte_level_bpe(texts: Sequence[str], vocab_size: int, directory: Path) -> tuple[Path, Path]:
    """Train a byte-level BPE in the format of GPT-2's files.

    Args:
        texts: Texts to train on.
        vocab_size: Largest number of tokens.
        directory: Directory to write the files to.

    Returns:
        The paths of encoder.json and vocab.bpe.
    """
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


class ResourceUsage(NamedTuple):
    """The resources that a tool used; unlike the seconds, the processor time is independent of other processes.

    Args:
        seconds: Seconds from start to end.
        cpu_seconds: Processor time of all its processes, in seconds.
        peak_megabytes: Resident memory of its largest process at the peak, in MB.
    """

    seconds: float
    cpu_seconds: float
    peak_megabytes: float


def measure(command: Sequence[object], name: str) -> ResourceUsage:
    """Run a command and measure the resources that it uses.

    Args:
        command: Program and arguments.
        name: Name of the tool, for the message.

    Returns:
        The resources that it used.

    Raises:
        InputError: The command fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"{name} failed: {errors.strip().splitlines()[-1] if errors.strip() else status}")
    return ResourceUsage(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def same_tokens(one: Path, two: Path) -> int:
    """Compare two fairseq datasets.

    Args:
        one: Path of the first dataset, without the suffix.
        two: Path of the second.

    Returns:
        The number of tokens in each.

    Raises:
        InputError: They differ.
    """
    from fairseq.data import data_utils

    first, second = (data_utils.load_indexed_dataset(str(path), None, "mmap") for path in (one, two))
    if len(first) != len(second):
        raise InputError(f"{one} has {len(first)} documents, {two} has {len(second)}")
    for number in range(len(first)):
        if not first[number].equal(second[number]):
            raise InputError(f"document {number} differs between {one} and {two}")
    return int(first.sizes.sum())


def benchmark(args: argparse.Namespace, directory: Path) -> dict:
    """Run all tools on the same text.

    Args:
        args: Options of the command line.
        directory: Temporary directory to write to.

    Returns:
        The report, as :func:`report` makes it.

    Raises:
        InputError: A tool fails, or the data differs.
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

    data = directory / f"data{args.workers}"
    commands: dict[str, list[object]] = {}
    command = ["-m", "preprocess.binarize_documents", "--overwrite", "--train", directory / "lines.jsonl"]
    for workers in sorted({1, args.workers}):
        destination = ["--workers", workers, "--destdir", directory / f"data{workers}"]
        commands[f"binarize_documents --workers {workers}"] = [*command, *gpt2, *destination]
    # The same tokens by the same vocabulary as a Hugging Face tokenizer.
    (directory / "tokenizer.json").write_bytes(from_vocabulary(*read_gpt2_files(encoder, merges)))
    huggingface = ["--tokenizer", directory / "tokenizer.json", "--dict", data / "dict.txt"]
    destination = ["--workers", args.workers, "--destdir", directory / "huggingface"]
    commands[f"binarize_documents, tokenizer.json --workers {args.workers}"] = [*command, *huggingface, *destination]
    encode = ["-m", "fairseq.examples.roberta.multiprocessing_bpe_encoder", "--keep-empty", "--workers", args.workers]
    encode += ["--inputs", directory / "lines.txt", "--outputs", directory / "lines.bpe"]
    encode += ["--encoder-json", encoder, "--vocab-bpe", merges]
    commands[f"multiprocessing_bpe_encoder --workers {args.workers}"] = encode
    binarize = ["-m", "fairseq_cli.preprocess", "--only-source", "--workers", args.workers]
    binarize += ["--srcdict", data / "dict.txt", "--trainpref", directory / "lines.bpe"]
    commands[f"fairseq-preprocess --workers {args.workers}"] = [*binarize, "--destdir", directory / "stock"]

    # in turn, not one after the other, so that whatever else runs on the machine slows all of them
    runs = []
    for _ in range(args.repeat):
        runs.append({name: measure([sys.executable, *command], name) for name, command in commands.items()})
    fastest = {name: min(run[name] for run in runs) for name in commands}
    same_tokens(directory / "huggingface" / "train", data / "train")
    tokens = same_tokens(directory / "stock" / "train", data / "train")
    return report(fastest, len(texts), tokens, (directory / "lines.txt").stat().st_size, args.workers)


def report(usages: dict[str, ResourceUsage], documents: int, tokens: int, size: int, workers: int) -> dict:
    """Turn the measurements into rates and ratios.

    Args:
        usages: Resources that each tool used, by its name and number of workers.
        documents: Number of documents.
        tokens: Number of tokens.
        size: Size of the text in bytes.
        workers: Number of workers of the tools that are compared.

    Returns:
        Measurements and rates of each tool under ``steps``, ratios of speed under ``times_...``.
    """
    binarize, encode, stock = (
        usages[f"{name} --workers {workers}"]
        for name in ("binarize_documents", "multiprocessing_bpe_encoder", "fairseq-preprocess")
    )
    return {
        "documents": documents,
        "tokens": tokens,
        "megabytes": size / 1e6,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "steps": {
            name: {
                **usage._asdict(),
                "documents_per_second": documents / usage.seconds,
                "tokens_per_second": tokens / usage.seconds,
            }
            for name, usage in usages.items()
        },
        "times_fairseq_preprocess": stock.seconds / binarize.seconds,
        "times_encoder_and_preprocess": (encode.seconds + stock.seconds) / binarize.seconds,
        "times_encoder_and_preprocess_cpu": (encode.cpu_seconds + stock.cpu_seconds) / binarize.cpu_seconds,
        "times_one_worker": usages["binarize_documents --workers 1"].seconds / binarize.seconds,
    }


def print_report(measured: dict) -> None:
    """Print a table of all tools, and the ratios of speed.

    Args:
        measured: Report, as :func:`report` makes it.
    """
    print(f"{measured['documents']:,} documents, {measured['tokens']:,} tokens, {measured['megabytes']:.1f} MB of text")
    print(f"{'':52} {'seconds':>8} {'CPU s':>8} {'documents/s':>12} {'tokens/s':>12} {'peak MB':>8}")
    for name, step in measured["steps"].items():
        rates = f"{step['documents_per_second']:12,.1f} {step['tokens_per_second']:12,.0f}"
        print(f"{name:52} {step['seconds']:8.1f} {step['cpu_seconds']:8.1f} {rates} {step['peak_megabytes']:8,.0f}")
    print(f"{measured['times_fairseq_preprocess']:.1f} times the documents/s of fairseq-preprocess alone,", end=" ")
    print(f"{measured['times_encoder_and_preprocess']:.1f} times with its BPE encoder", end=" ")
    print(f"({measured['times_encoder_and_preprocess_cpu']:.1f} in processor time)", end=", ")
    print(f"{measured['times_one_worker']:.2f} times those of one worker")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and print a table.

    Args:
        arguments: Arguments of the command line; if None, those of the process.
    """
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--documents", nargs="+", metavar="P", help="text files, directories or JSON lines (the standard library)")
    add("--workers", type=int, default=2, metavar="N", help="number of processes of each tool (default: %(default)s)")
    add("--repeat", type=int, default=1, metavar="N", help="number of runs; the fastest counts (default: %(default)s)")
    add("--gpt2-encoder-json", metavar="F", help="GPT-2's encoder.json")
    add("--gpt2-vocab-bpe", metavar="F", help="GPT-2's vocab.bpe")
    add("--dict", metavar="F", help="fairseq dict.txt for these files")
    add("--output", type=Path, metavar="F", help="JSON file to write the report to")
    args = parser.parse_args(arguments)
    if not args.documents:
        args.documents = [str(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    try:
        if args.output:
            check_output(args.output, "--output")
        with tempfile.TemporaryDirectory() as directory:
            measured = benchmark(args, Path(directory))
        print_report(measured)
        if args.output:
            files.write_json(args.output, measured)
    except (InputError, OSError) as error:
        raise SystemExit(f"{PROG}: error: {error}") from None


if __name__ == "__main__":
    main()
