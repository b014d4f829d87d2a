"""Report of examples/smollm2/run.sh: collect its results into report.json, report.md and report.png, and print them.

python -m examples.smollm2.report --directory smollm2 --seconds 3600
"""

import argparse
import os
import platform
import re
from pathlib import Path
from typing import Dict

import torch

from examples.quickstart.demo_report import perplexity
from longmem_fairseq.evaluation.reporting.plots import load_pyplot
from longmem_fairseq.files import write_json, write_text, write_whole

SYSTEMS = {  # prefix of the logs of each system with a memory, and what the system is
    "memory": "window of 1,024 alone",
    "carried": "1,024 tokens carried",
    "everything": "1,024 tokens carried, and a token memory of the same size",
}


def collect(directory: Path, seconds: int) -> dict:
    """Collect all results, in the form of report.json.

    Args:
        directory: Directory of the run.
        seconds: Duration of this call of run.sh in seconds.
    """
    training = (directory / "logs/train.log").read_text()
    trained = re.search(r"([\d,]+) parameters to train", training)
    peak = re.search(r"peak memory: ([\d,]+ MiB)", training)
    copying = (directory / "copying.txt").read_text().splitlines()
    return {
        "source": (directory / "source").read_text().strip(),
        "copying": copying[0],
        "memory_layer": int(copying[-1].split()[-1]),
        "backbone": _by_size(directory, "backbone"),
        **{system: _by_size(directory, system) for system in SYSTEMS},
        "updates": int(_last(training, "num_updates")),
        "training_seconds": _last(training, "wall"),  # also of earlier calls that were interrupted
        "training_peak": peak[1] if peak else "not measured",
        "gate": _last(training, "gate"),
        "parameters_trained": trained[1] if trained else None,
        "seconds": seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def _last(log: str, figure: str) -> float:
    """Return the last value of a figure in a log of fairseq-train."""
    return float(re.findall(rf"[ ,]{figure}[= ]([0-9.]+)", log)[-1])


def _by_size(directory: Path, system: str) -> Dict[str, float]:
    """Return the perplexities of a system by the size in the names of its logs, smallest first."""
    sizes = {int(log.stem.split("-")[1]): perplexity(log) for log in directory.glob(f"eval/{system}-*.log")}
    return {str(size): sizes[size] for size in sorted(sizes)}


def results_table(report: dict) -> str:
    """Format the results as a table in Markdown; gains are against the same model's smallest context."""
    rows = []
    for system in ("backbone", *SYSTEMS):
        smallest = next(iter(report["backbone" if system == "backbone" else "memory"].values()))
        for size, value in report[system].items():
            reads = f"memory of {int(size):,} tokens" if int(size) else "memory off"
            name = f"LongMem, {SYSTEMS[system]}: {reads}" if system in SYSTEMS else f"backbone, blocks of {int(size):,}"
            gain = "" if value == smallest else f"{100 * (value / smallest - 1):+.1f} %"
            rows.append(f"| {name} | {value:.2f} | {gain} |")
    return "\n".join(["| model | perplexity | against its smallest |", "| --- | ---: | ---: |", *rows])


def plot(report: dict, path: Path) -> None:
    """Draw the perplexity by size of the context and write it as a PNG, whole or not at all.

    Args:
        report: Results, as ``collect`` returns them.
        path: Path of the PNG.
    """
    plt = load_pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    blocks = report["backbone"]
    axes.plot(list(map(int, blocks)), list(blocks.values()), "s--", color="grey", label="backbone, full attention")
    ticks = set(map(int, blocks))
    for (system, label), marker in zip(SYSTEMS.items(), "o^D"):
        sizes = [1024 + int(size) for size in report[system]]
        axes.plot(sizes, list(report[system].values()), f"{marker}-", label=f"LongMem, {label}")
        ticks.update(size for size in sizes if size > 2 * 8192)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), labels=None)
    axes.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_xlabel("tokens that can be read")
    axes.set_ylabel("perplexity of held-out documents")
    axes.set_title(report["source"], fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center right")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.smollm2.report", description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, required=True, help="directory of the run")
    parser.add_argument("--seconds", type=int, default=0, help="duration of the run in seconds")
    args = parser.parse_args()
    directory, report = args.directory, collect(args.directory, args.seconds)
    results = results_table(report)
    plot(report, directory / "report.png")
    lines = [
        f"# {report['source']}",
        results,
        f"{report['copying']}. Memory layer: {report['memory_layer']}.",
        f"Adaptation: {report['updates']} updates, {report['parameters_trained']} parameters trained, "
        f"{report['training_seconds']} s, peak memory {report['training_peak']}.",
        f"Machine: {report['machine']}, {report['device']}.",
    ]
    write_text(directory / "report.md", "\n\n".join(lines) + "\n")
    write_json(directory / "report.json", report)
    print(f"\n{results}\n\n{report['seconds']} s; report: {directory}/report.md, report.json, report.png")


if __name__ == "__main__":
    main()
