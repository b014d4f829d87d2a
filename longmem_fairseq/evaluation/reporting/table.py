"""What an evaluation found, as JSON, Markdown and a plot."""

import importlib.util
import json
import math
import os
import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ...files import write_text
from ..scoring.systems import BACKBONE, OFF, ON, WITH_CACHE
from .statistics import Interval, Sample

Pairs = Sequence[Tuple[str, str]]
PAIRS: Pairs = (
    (ON, OFF),
    (ON, BACKBONE),
    (BACKBONE + WITH_CACHE, BACKBONE),
    (ON, BACKBONE + WITH_CACHE),
    (ON + WITH_CACHE, BACKBONE + WITH_CACHE),
    (ON + WITH_CACHE, ON),
)


@dataclass
class Table:
    """Figures of systems (rows) under several conditions (columns).

    Attributes:
        title: what the figures are.
        columns: condition -> system -> what it achieved; a system may be missing.
        plot: how they are drawn: "lines" over the conditions, "bars", a "heat" map of systems and conditions, or None.
        pairs: systems whose difference is of interest, as far as there are such rows.
        upright: in Markdown a line for each condition, without differences, where these are many.
    """

    title: str
    columns: Dict[str, Dict[str, Sample]]
    plot: Optional[str] = None
    pairs: Pairs = PAIRS
    upright: bool = False

    @property
    def rows(self) -> List[str]:
        """Systems, in the order of their first appearance."""
        return list(dict.fromkeys(row for column in self.columns.values() for row in column))

    @property
    def statistics(self):
        return [next(iter(column.values())).statistic for column in self.columns.values()]

    @cached_property
    def intervals(self) -> Dict[str, Dict[str, Interval]]:
        """Condition -> system -> figure with its interval."""
        return {c: {row: sample.interval() for row, sample in rows.items()} for c, rows in self.columns.items()}

    @cached_property
    def differences(self) -> Dict[Tuple[str, str], Dict[str, Interval]]:
        """(a, b) -> condition -> how much a's figure is above b's, paired."""
        found = {}
        for a, b in self.pairs:
            cells = {c: rows[a].difference(rows[b]) for c, rows in self.columns.items() if a in rows and b in rows}
            if cells:
                found[a, b] = cells
        return found


def as_json(table: Table) -> Dict[str, Any]:
    """A table with plain JSON types."""
    figures, differences = table.intervals, table.differences
    samples = table.columns
    return {
        "title": table.title,
        "figures": {
            column: {
                row: {
                    **_plain(cell),
                    "statistic": samples[column][row].statistic.name,
                    "deviation": samples[column][row].deviation(),
                    "items": len(samples[column][row]),
                }
                for row, cell in cells.items()
            }
            for column, cells in figures.items()
        },
        "differences": [
            {"system": a, "against": b, "under": column, **_plain(cell)}
            for (a, b), cells in differences.items()
            for column, cell in cells.items()
        ],
    }


def _plain(cell: Interval) -> Dict[str, Optional[float]]:
    return {name: value if math.isfinite(value) else None for name, value in cell._asdict().items()}


def as_markdown(table: Table) -> str:
    """A table of the figures with 95 % intervals, and one of paired differences."""
    cells = {
        column: {row: _cell(table, column, row, cell) for row, cell in rows.items()}
        for column, rows in table.intervals.items()
    }
    if table.upright:
        body = [[column, *(of.get(row, "") for row in table.rows)] for column, of in cells.items()]
        return f"**{table.title}**\n\n" + markdown_table(["", *table.rows], body)
    body = [[row, *(of.get(row, "") for of in cells.values())] for row in table.rows]
    parts = [f"**{table.title}**", markdown_table(["system", *cells], body)]
    statistics = dict(zip(table.columns, table.statistics))
    body = [
        [f"{a} against {b}", *(_signed(found.get(column), statistics[column]) for column in table.columns)]
        for (a, b), found in table.differences.items()
    ]
    return "\n\n".join(parts + ([markdown_table(["difference", *table.columns], body)] if body else []))


def _cell(table: Table, column: str, row: str, cell: Interval) -> str:
    sample = table.columns[column][row]
    statistic, deviation, digits = sample.statistic, sample.deviation(), sample.statistic.digits
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{cell.value:.{digits}f}{statistic.unit}{spread} {_range(cell, digits)}"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _range(cell: Interval, digits: int) -> str:
    return f"[{cell.low:.{digits}f}, {cell.high:.{digits}f}]"


def _signed(cell: Optional[Interval], statistic) -> str:
    if cell is None:
        return ""
    digits, unit = (1, " %") if statistic.relative else (statistic.digits, "")
    return f"{cell.value:+.{digits}f}{unit} [{cell.low:+.{digits}f}, {cell.high:+.{digits}f}]"


def need_plots() -> None:
    """Make sure that plots can be drawn, before hours are spent on what they shall show.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report has plots, which need the Python package matplotlib: pip install matplotlib")


def draw(tables: Sequence[Table], path: str) -> None:
    """A PNG with one plot for each table that wants one; error bars are the intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = [table for table in tables if table.plot and table.columns]
    heights = [max(4.2, 1.2 + 0.32 * len(table.rows)) for table in tables]
    figure, all_axes = plt.subplots(
        len(tables),
        1,
        figsize=(10.5, sum(heights)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        constrained_layout=True,
    )
    for table, (axes,) in zip(tables, all_axes):
        _plot(table, axes)
    part = f"{path}.part.png"
    try:
        figure.savefig(part, dpi=120)
        os.replace(part, path)
    finally:
        plt.close(figure)
        if os.path.exists(part):
            os.remove(part)


def _plot(table: Table, axes) -> None:
    figures, rows, columns = table.intervals, table.rows, list(table.columns)
    axes.set_title(table.title, fontsize=10)
    width = max(8, 80 // len(columns))  # characters that find room below a place
    axes.set_xticks(range(len(columns)), [textwrap.fill(column, width) for column in columns], fontsize=9)
    if table.plot == "heat":
        _heat(table, axes)
        return
    for i, row in enumerate(rows):
        places = [x for x, column in enumerate(columns) if row in figures[column]]
        cells = [figures[columns[x]][row] for x in places]
        values = [cell.value for cell in cells]
        error = [[max(0.0, c.value - c.low) for c in cells], [max(0.0, c.high - c.value) for c in cells]]
        if table.plot == "lines":
            axes.errorbar(places, values, yerr=error, marker="o", capsize=2, label=row)
        else:
            width = 0.8 / len(rows)
            axes.bar([x + (i + 0.5) * width - 0.4 for x in places], values, width, yerr=error, capsize=2, label=row)
    axes.set_ylabel(", ".join(dict.fromkeys(f"{x.name}{x.unit and ' (%)'}" for x in table.statistics)))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _heat(table: Table, axes) -> None:
    """One field for each system and condition, its figure written in it."""
    figures, rows = table.intervals, table.rows
    values = [[of[row].value if row in of else math.nan for of in figures.values()] for row in rows]
    top = 100.0 if all(statistic.unit for statistic in table.statistics) else None
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=top)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            bright = value > 0.6 * image.get_clim()[1]
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="black" if bright else "white")
    axes.figure.colorbar(image, ax=axes)


def write(directory: str, report: Dict[str, Any], text: str, tables: Sequence[Table]) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png``, each whole or not at all.

    Raises:
        OSError: one cannot be written.
    """
    draw(tables, os.path.join(directory, "report.png"))
    write_text(os.path.join(directory, "report.md"), text)
    write_text(os.path.join(directory, "report.json"), json.dumps(report, indent=2, ensure_ascii=False) + "\n")
