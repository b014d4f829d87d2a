"""Tiny data, and fairseq's commands run on it as a user runs them."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

from tests.repository import ROOT

SYMBOLS = 60  # besides fairseq's four
TASK = ["--user-dir", str(ROOT / "longmem_fairseq"), "--task", "longmem_language_modeling"]


def make_dictionary(symbols: int = SYMBOLS) -> Dictionary:
    dictionary = Dictionary()
    for i in range(symbols):
        dictionary.add_symbol(f"w{i}")
    return dictionary


def random_documents(lengths: Sequence[int], seed: int = 0) -> List[np.ndarray]:
    """Documents of random symbols, each ended by end-of-sentence; spans repeat, so that a memory is of use."""
    rng = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        pattern = rng.integers(4, SYMBOLS + 4, 24)
        document = np.resize(pattern, length)
        document[-1] = 2
        documents.append(document)
    return documents


def write_split(prefix: Path, documents: Sequence[np.ndarray], dtype=np.uint16) -> None:
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_item(torch.from_numpy(np.asarray(document, dtype=np.int64)))
    builder.finalize(f"{prefix}.idx")


def write_data(directory: Path, **splits: Sequence[np.ndarray]) -> Path:
    """A data directory with a dictionary and the documents of each split."""
    directory.mkdir(parents=True, exist_ok=True)
    make_dictionary().save(str(directory / "dict.txt"))
    for split, documents in splits.items():
        write_split(directory / split, documents)
    return directory


def command(program: str, *arguments) -> List[str]:
    """The command line of ``train`` or ``eval_lm``."""
    return [sys.executable, "-m", f"fairseq_cli.{program}", *map(str, arguments)]


def start(program: str, *arguments, cwd: Path, environment: Dict[str, str] = None, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **(environment or {})}
    return subprocess.Popen(
        command(program, *arguments),
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def finish(process: subprocess.Popen, succeeds: bool = True) -> str:
    """Wait for a command and return what it printed."""
    output = process.communicate(timeout=300)[0]
    assert (process.returncode == 0) == succeeds, output[-5000:]
    return output


def run(program: str, *arguments, cwd: Path, succeeds: bool = True) -> str:
    """Run a command to its end and return what it printed."""
    return finish(start(program, *arguments, cwd=cwd), succeeds)


def run_ranks(program: str, *arguments, cwd: Path, ranks: int = 2) -> List[str]:
    """Run a command on several ranks of this machine, without GPUs; returns what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        start(
            program,
            *arguments,
            "--distributed-world-size",
            ranks,
            "--distributed-rank",
            rank,
            "--distributed-backend",
            "gloo",
            "--distributed-init-method",
            f"tcp://localhost:{port}",
            *"--distributed-no-spawn --ddp-backend legacy_ddp".split(),
            cwd=cwd,
        )
        for rank in range(ranks)
    ]
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:  # where one failed, the others may wait for it
            process.kill()


def figures(output: str, tag: str, name: str) -> List[float]:
    """All values of a figure that fairseq-train logged (as JSON) for ``train_inner``, ``train`` or a split."""
    lines = [json.loads(line) for line in re.findall(rf"\| {tag} \| (\{{.*\}})$", output, re.MULTILINE)]
    return [float(line[name] if name in line else line[f"{tag}_{name}"]) for line in lines]


def weights(checkpoint: Path) -> Dict[str, torch.Tensor]:
    return torch.load(checkpoint, map_location="cpu", weights_only=False)["model"]
