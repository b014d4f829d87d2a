"""Report of the demo: collect its results into report.json, report.md and report.png, and print the table.

python -m examples.quickstart.demo_report --demo demo --seconds 600
"""

import argparse
import os
import platform
import re
from pathlib import Path

import torch

from longmem_fairseq.evaluation.reporting.plots import load_pyplot
from longmem_fairseq.files import write_json, write_text, write_whole


def perplexity(log: Path) -> float:
    """Read the perplexity at the end of a log of fairseq-eval-lm.

    Args:
        log: Path of the log.

    Raises:
        SystemExit: The log reports no loss.
    """
    losses = re.findall(r"Loss \(base 2\): ([0-9.]+)", log.read_text())
    if not losses:
        raise SystemExit(f"{log} reports no loss: remove it and run the demo again")
    return round(2 ** float(losses[-1]), 3)


def by_text(log: Path) -> dict:
    """Read the perplexity per word and the bits per byte at the end of a log of fairseq-eval-lm.

    Args:
        log: Path of the log.

    Returns:
        ``perplexity_per_word`` and ``bits_per_byte``; empty if the log does not have them.
    """
    match = re.search(r"Perplexity per word: ([0-9.]+), Bits per byte: ([0-9.]+)", log.read_text())
    return {"perplexity_per_word": float(match[1]), "bits_per_byte": float(match[2])} if match else {}


def collect(demo: Path, seconds: int) -> dict:
    """Collect all results, in the form of report.json.

    Args:
        demo: Directory of the demo.
        seconds: Duration of the run in seconds.
    """
    memory = {int(log.stem.split("-")[1]): perplexity(log) for log in demo.glob("eval/memory-*.log")}
    training = re.findall(r"train_inner .*? gate=([0-9.]+), .*?ppl=([0-9.]+)", (demo / "logs/train.log").read_text())
    return {
        "backbone": perplexity(demo / "eval/backbone.log"),
        "memory": {str(size): memory[size] for size in sorted(memory)},
        "by_text": {log.stem: by_text(log) for log in sorted(demo.glob("eval/*.log"))},
        "gain_percent": {str(size): round(100 * (1 - memory[size] / memory[0]), 1) for size in sorted(memory) if size},
        "source": (demo / "source").read_text().strip(),
        "copying": (demo / "copying.txt").read_text().strip(),
        "gate": float(training[-1][0]) if training else None,
        "seconds": seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.platform()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def results_table(report: dict) -> str:
    """Format the results as a table in Markdown."""
    rows = [("backbone alone", report["backbone"], "", report["by_text"]["backbone"])]
    for size, value in report["memory"].items():
        gain = f"-{report['gain_percent'][size]} %" if size in report["gain_percent"] else ""
        name = f"LongMem, memory of {int(size):,} tokens" if int(size) else "LongMem, memory off"
        rows.append((name, value, gain, report["by_text"][f"memory-{size}"]))
    lines = ["| model | perplexity | against memory off | per word | bits per byte |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, value, gain, text in rows:
        figures = f"{text['perplexity_per_word']:.1f} | {text['bits_per_byte']:.3f}" if text else "| "
        lines.append(f"| {name} | {value:.2f} | {gain} | {figures} |")
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Draw the perplexity by memory size and write it as a PNG, whole or not at all.

    Args:
        report: Results, as ``collect`` returns them.
        path: Path of the PNG.
    """
    plt = load_pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    sizes = list(report["memory"])
    axes.plot(range(len(sizes)), list(report["memory"].values()), "o-", label="LongMem")
    axes.axhline(report["backbone"], color="grey", linestyle="--", label="backbone alone")
    axes.set_xticks(range(len(sizes)), [f"{int(s):,}" if int(s) else "off" for s in sizes])
    axes.set_xlabel("memory (tokens)")
    axes.set_ylabel("perplexity of held-out documents")
    axes.set_title(report["source"], fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.demo_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--demo", type=Path, required=True, help="directory of the demo")
    parser.add_argument("--seconds", type=int, default=0, help="duration of the run in seconds")
    args = parser.parse_args()
    demo, report = args.demo, collect(args.demo, args.seconds)
    results = results_table(report)
    plot(report, demo / "report.png")
    write_text(
        demo / "report.md",
        f"# {report['source']}\n\n{results}\n\nBackbone: {report['copying']}\n\nMachine: {report['machine']}\n",
    )
    write_json(demo / "report.json", report)
    print(f"\n{results}\n\n{report['seconds']} s; report: {demo}/report.md, report.json, report.png\n")
    base = f"{demo}/data --user-dir longmem_fairseq --task longmem_language_modeling"
    print(f"""To continue (source .venv/bin/activate):
  # each document's perplexity, with and without memory: in out/documents.csv
  fairseq-eval-lm {base} --path {demo}/checkpoints/checkpoint_last.pt --results-path out
  # train on, to 1,000 updates
  UPDATES=1000 DEMO={demo}-long make demo
  # see the training: loss, gate, memory and its gain
  tensorboard --logdir {demo}/tensorboard""")


if __name__ == "__main__":
    main()
