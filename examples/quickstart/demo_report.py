"""Put the quick start's results together: report.json, report.md, report.png, and a table.

python examples/quickstart/demo_report.py --demo demo --seconds 600
"""

import argparse
import json
import os
import platform
import re
from pathlib import Path

import torch


def perplexity(log: Path) -> float:
    """The perplexity that a log of fairseq-eval-lm ends with."""
    found = re.findall(r"Loss \(base 2\): ([0-9.]+)", log.read_text())
    if not found:
        raise SystemExit(f"{log} reports no loss: remove it and run the demo again")
    return round(2 ** float(found[-1]), 3)


def collect(demo: Path, seconds: int) -> dict:
    """All results, as report.json holds them."""
    memory = {int(log.stem.split("-")[1]): perplexity(log) for log in demo.glob("eval/memory-*.log")}
    training = re.findall(r"train_inner .*? gate=([0-9.]+), .*?ppl=([0-9.]+)", (demo / "logs/train.log").read_text())
    return {
        "backbone": perplexity(demo / "eval/backbone.log"),
        "memory": {str(size): memory[size] for size in sorted(memory)},
        "gain_percent": {str(size): round(100 * (1 - memory[size] / memory[0]), 1) for size in sorted(memory) if size},
        "source": (demo / "source").read_text().strip(),
        "copying": (demo / "copying.txt").read_text().strip(),
        "gate": float(training[-1][0]) if training else None,
        "seconds": seconds,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.platform()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


def table(report: dict) -> str:
    """The results as a table in Markdown."""
    rows = [("backbone alone", report["backbone"], "")]
    for size, value in report["memory"].items():
        gain = f"-{report['gain_percent'][size]} %" if size in report["gain_percent"] else ""
        rows.append((f"LongMem, memory of {int(size):,} tokens" if int(size) else "LongMem, memory off", value, gain))
    lines = ["| model | perplexity | against memory off |", "| --- | ---: | ---: |"]
    return "\n".join(lines + [f"| {name} | {value:.2f} | {gain} |" for name, value, gain in rows])


def plot(report: dict, path: Path) -> None:
    """Perplexity by size of the memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=0, help="what the run took")
    args = parser.parse_args()
    demo, report = args.demo, collect(args.demo, args.seconds)
    text = f"# {report['source']}\n\n{table(report)}\n\nBackbone: {report['copying']}\n\nMachine: {report['machine']}\n"
    plot(report, demo / "report.png.part.png")
    for name, content in (("report.md", text), ("report.json", json.dumps(report, indent=2) + "\n")):
        (demo / f"{name}.part").write_text(content)
        os.replace(demo / f"{name}.part", demo / name)
    os.replace(demo / "report.png.part.png", demo / "report.png")
    print(f"\n{table(report)}\n\n{report['seconds']} s; report: {demo}/report.md, report.json, report.png\n")
    base = f"{demo}/data --user-dir longmem_fairseq --task longmem_language_modeling"
    print(f"""To go on (source .venv/bin/activate):
  # each document's perplexity, with and without memory: in out/documents.csv
  fairseq-eval-lm {base} --path {demo}/checkpoints/checkpoint_last.pt --results-path out
  # train on, to 1,000 updates
  UPDATES=1000 DEMO={demo}-long make demo
  # see the training: loss, gate, memory and its gain
  tensorboard --logdir {demo}/tensorboard""")


if __name__ == "__main__":
    main()
