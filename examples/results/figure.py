"""Draw the picture of the README from the published results.

python -m examples.results.figure

Left: perplexity of held-out novels by position in the novel (examples/results/compare). Right: facts recalled by
distance (examples/results/needle). Bars are 95 % intervals.
"""

import argparse
import json
from pathlib import Path
from typing import Dict, List, Tuple

from longmem_fairseq.evaluation.reporting.plots import load_pyplot

RESULTS = Path(__file__).resolve().parent
PICTURE = RESULTS.parents[1] / "docs" / "results.png"
# Label, color, marker, line style.
BACKBONE = ("backbone alone", "#7f7f7f", "s", "--")
OFF = ("memory off", "#d95f02", "o", "-")
SMALL = ("memory of 16,384 tokens", "#7570b3", "D", "-")
LARGE = ("memory of 65,536 tokens", "#1b9e77", "^", "-")


def table(report: dict, title: str) -> Dict[str, Dict[str, dict]]:
    """Return the figures of a report's table: column, then system, then value with its interval."""
    return next(table["figures"] for table in report["tables"] if table["title"] == title)


def draw_lines(axes, figures: Dict[str, Dict[str, dict]], systems: List[Tuple[str, tuple]]) -> None:
    """Draw one line for each system over a table's columns, with intervals.

    Args:
        axes: Axes of matplotlib to draw on.
        figures: Figures of one table, by column and system.
        systems: Names of the systems in the table, each with its label, color, marker and line style.
    """
    for number, (system, (label, color, marker, style)) in enumerate(systems):
        cells = [column[system] for column in figures.values()]
        values = [cell["value"] for cell in cells]
        below = [cell["value"] - cell["low"] for cell in cells]
        above = [cell["high"] - cell["value"] for cell in cells]
        places = [place + 0.05 * (number - (len(systems) - 1) / 2) for place in range(len(cells))]
        axes.errorbar(
            places, values, yerr=(below, above), label=label, color=color, marker=marker, linestyle=style, capsize=2
        )
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path) -> None:
    """Draw both panels and save them as a PNG file."""
    plt = load_pyplot()
    compare = json.loads((RESULTS / "compare" / "report.json").read_text(encoding="utf-8"))["evaluations"]["books"]
    needle = json.loads((RESULTS / "needle" / "report.json").read_text(encoding="utf-8"))
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12, "lines.linewidth": 1.8, "lines.markersize": 5.5})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    systems = [("longmem: backbone", BACKBONE), ("longmem: memory off", OFF), ("longmem: memory 65,536", LARGE)]
    positions = table(compare, "Perplexity by position in the document")
    draw_lines(left, positions, systems)
    left.set_xticks(range(len(positions)), ["0–1k", "1–4k", "4–16k", "16–64k", "64–256k"])
    left.set_xlabel("position in the novel (tokens)")
    left.set_ylabel("perplexity")
    left.set_title("Perplexity of held-out novels, window of 256 tokens")
    left.legend(frameon=False, loc="upper right", fontsize=10)
    left.set_ylim(30, 48)
    left.set_yticks(range(30, 49, 3))

    recall = table(needle, "Right answers by tokens back, 470 facts a document")
    recall = dict(list(recall.items())[1:])  # the first column is partly the window
    draw_lines(right, recall, [("memory off", OFF), ("memory 16,384", SMALL), ("memory 65,536", LARGE)])
    right.set_xticks(range(len(recall)), ["1–4k", "4–16k", "16–32k", "32–60k"])
    right.set_xlabel("distance of the fact (tokens back)")
    right.set_ylabel("facts recalled (%)")
    right.set_title("Recall of 470 facts stated in 60,000 tokens")
    right.set_ylim(-3, 105)
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(0.0, 0.4), fontsize=10)

    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.results.figure", description="Draw the picture of the README."
    )
    parser.add_argument("--output", type=Path, default=PICTURE, help="PNG file to write (default: docs/results.png)")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
