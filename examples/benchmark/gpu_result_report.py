"""Report of gpu_result.sh: collect its results into report.json, report.md and report.png.

python -m examples.benchmark.gpu_result_report OUT [--tiny]
"""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Dict, List, Optional

import torch

from examples.benchmark.machine import describe_machine
from examples.benchmark.tables import bullet_list, table
from examples.quickstart.demo_report import by_text, perplexity, plot
from longmem_fairseq.files import write_json, write_text
from longmem_fairseq.modules.joint_attention import GATE_PACE
from longmem_fairseq.safe_load import load_safely


def documents(out: Path) -> List[Dict]:
    """Read the perplexity of each test document for the backbone and for each memory size."""
    rows: Dict[str, Dict] = {}
    for name in ("backbone", *sizes(out)):
        folder = out / "results" / (name if name == "backbone" else f"memory-{name}")
        for line in (folder / "documents.jsonl").read_text().splitlines():
            document = json.loads(line)
            row = rows.setdefault(document["name"], {"name": document["name"], "tokens": document["tokens"]})
            row[str(name)] = document["perplexity"]
    return sorted(rows.values(), key=lambda row: row["tokens"])


def sizes(out: Path) -> List[int]:
    """List the memory sizes that were evaluated."""
    return sorted(int(log.stem.split("-")[-1]) for log in out.glob("eval-memory-*.log"))


def last_figure(log: Path, name: str) -> Optional[float]:
    """Read the last value of a figure from a log of fairseq-train; None if the log has no such figure."""
    values = re.findall(rf"\b{name}=([0-9.e+-]+)", log.read_text())
    return float(values[-1]) if values else None


def collect(out: Path, tiny: bool) -> Dict:
    """Collect all results, in the form of report.json."""
    by_size = {str(size): perplexity(out / f"eval-memory-{size}.log") for size in sizes(out)}
    state = load_safely(str(out / "checkpoints" / "checkpoint_last.pt"))
    gates = next(x for name, x in state["model"].items() if name.endswith("gate_bias")) * GATE_PACE
    backbone = load_safely(str(out / "backbone" / "checkpoint_last.pt"))["model"]
    manifest = json.loads((out / "data" / "manifest.json").read_text())
    recall = out / "recall" / "report.json"
    seconds: Dict[str, int] = {}
    for line in (out / "seconds.txt").read_text().splitlines():
        taken, step = line.split()
        seconds[step] = seconds.get(step, 0) + int(taken)
    return {
        "tiny": tiny,
        "machine": describe_machine(),
        "seconds": seconds,
        "data": {name: split["tokens"] for name, split in manifest["splits"].items()},
        "backbone_parameters": sum(x.numel() for x in {x.data_ptr(): x for x in backbone.values()}.values()),
        "copying": (out / "copying.log").read_text().splitlines()[-1],
        "backbone": perplexity(out / "eval-backbone.log"),
        "memory": by_size,
        "by_text": {
            "backbone": by_text(out / "eval-backbone.log"),
            **{size: by_text(out / f"eval-memory-{size}.log") for size in by_size},
        },
        "gates": torch.sigmoid(gates.float()).tolist(),
        "distance": last_figure(out / "adaptation.log", "mem_dist"),
        "documents": documents(out),
        "recall": json.loads(recall.read_text()) if recall.exists() else None,
    }


def markdown(report: Dict) -> str:
    """Format the report in Markdown."""
    off = report["memory"]["0"]
    text_figures = {
        name: {"word": f"{figures['perplexity_per_word']:.2f}", "byte": f"{figures['bits_per_byte']:.4f}"}
        for name, figures in report["by_text"].items()
        if figures
    }
    rows = [{"model": "backbone alone", "perplexity": f"{report['backbone']:.2f}", **text_figures.get("backbone", {})}]
    for size, value in report["memory"].items():
        name = f"LongMem, memory of {int(size):,} tokens" if int(size) else "LongMem, memory off"
        gain = f"{100 * (value / off - 1):+.1f} %"
        rows.append({"model": name, "perplexity": f"{value:.2f}", "gain": gain, **text_figures.get(size, {})})
    heads = {"model": "model", "perplexity": "perplexity", "gain": "against memory off", "word": "per word"}
    heads["byte"] = "bits per byte"
    text = ["# LongMem on a backbone trained from scratch", ""]
    if report["tiny"]:
        text += [
            "**A tiny run: it shows that the commands work and how the report looks. Its figures mean nothing.**",
            "",
        ]
    data = ", ".join(f"{name} {tokens:,}" for name, tokens in report["data"].items())
    gates = ", ".join(f"{gate:.3f}" for gate in report["gates"])
    distance = "not measured" if report["distance"] is None else f"{report['distance']:,.0f}"
    columns = {"name": "document", "tokens": "tokens", "backbone": "backbone"}
    columns.update({size: f"memory {int(size):,}" for size in report["memory"]})
    documents = [
        {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in row.items()}
        for row in report["documents"]
    ]
    text += [
        table(rows, heads),
        "",
        f"Tokens: {data}. Backbone: {report['backbone_parameters']:,} parameters; {report['copying']}",
        f"Gates of the heads: {gates}. Tokens between a query and what it reads: {distance}.",
        "",
        "## Documents",
        "",
        table(documents, columns),
        "",
        "## Time",
        "",
        *(f"* {step}: {taken} s" for step, taken in report["seconds"].items()),
        "",
        "## Machine",
        "",
        *bullet_list(report["machine"]),
    ]
    if report["recall"] is not None:
        text += ["", "## Recall", "", "```", json.dumps(report["recall"], indent=1), "```"]
    return "\n".join(text) + "\n"


def main(out: str, tiny: str = "") -> None:
    """Write the report.

    Args:
        out: Directory of the results and of the report.
        tiny: ``--tiny`` for a run on a tiny model.
    """
    directory = Path(out)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq's import lowers the level for all libraries
    report = collect(directory, tiny == "--tiny")
    text = markdown(report)
    plot({**report, "source": "a backbone trained from scratch"}, directory / "report.png")
    write_text(directory / "report.md", text)
    write_json(directory / "report.json", report)
    print(text, end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
