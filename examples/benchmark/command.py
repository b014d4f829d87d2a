"""What the commands of this folder share: refusals of options, synchronization with the GPU, and plots."""

import argparse
import sys
from pathlib import Path
from typing import Callable, NoReturn

import torch

from longmem_fairseq.evaluation.reporting.plots import load_pyplot
from longmem_fairseq.files import write_whole


def stop(message: str) -> NoReturn:
    """End the program with one sentence behind the program's name.

    Args:
        message: Sentence that names the value, its limit and the option to change.
    """
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def require_at_least(options: argparse.Namespace, least: int, *names: str) -> None:
    """End the program if an option is below its limit.

    Args:
        options: Parsed options; a list is checked element by element.
        least: Smallest allowed value.
        names: Names of the options as attributes of ``options``.
    """
    for name in names:
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < least:
                stop(f"--{name.replace('_', '-')} {value} is less than {least}")


def require_device(device: torch.device) -> None:
    """End the program if the device of ``--device`` is not available."""
    if device.type == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: PyTorch finds no GPU here")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def save_plot(path: str, draw: Callable) -> None:
    """Draw into a pair of axes and write them as a PNG, whole or not at all.

    Args:
        path: Path of the PNG.
        draw: Function that draws into the axes it is called with.
    """
    plt = load_pyplot()
    figure, axes = plt.subplots(figsize=(8, 5))
    draw(axes)
    figure.tight_layout()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)
