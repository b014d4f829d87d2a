"""Tables as plots."""

import importlib.util
import logging
import math
import textwrap
from typing import Sequence

from ...files import printable, write_whole
from .table import Table


def require_matplotlib() -> None:
    """Make sure that plots can be drawn, before hours are spent on their figures.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report has plots, which need the Python package matplotlib: pip install matplotlib")


def load_pyplot():
    """Return ``matplotlib.pyplot``, which draws into files here and logs only warnings."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq's import lowers the level of all libraries
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(tables: Sequence[Table], path: str) -> None:
    """Write a PNG file, whole or not at all, with one plot for each table that has a kind of plot.

    Args:
        tables: Tables to draw; error bars are their intervals.
        path: Path of the PNG file.

    Raises:
        OSError: The file cannot be written.
    """
    plt = load_pyplot()
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
    try:
        for table, (axes,) in zip(tables, all_axes):
            _plot(table, axes)
        write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120))
    finally:
        plt.close(figure)


def _plot(table: Table, axes) -> None:
    intervals, rows, columns = table.intervals, table.rows, list(table.columns)
    axes.set_title(printable(table.title), fontsize=10)
    width = max(8, 80 // len(columns))  # characters that fit below a column
    axes.set_xticks(range(len(columns)), [textwrap.fill(printable(column), width) for column in columns], fontsize=9)
    if table.plot == "heat":
        _heat(table, axes)
        return
    for i, row in enumerate(rows):
        places = [x for x, column in enumerate(columns) if row in intervals[column]]
        cells = [intervals[columns[x]][row] for x in places]
        values = [cell.value for cell in cells]
        error = [[max(0.0, c.value - c.low) for c in cells], [max(0.0, c.high - c.value) for c in cells]]
        if table.plot == "lines":
            axes.errorbar(places, values, yerr=error, marker="o", capsize=2, label=printable(row))
        else:
            width = 0.8 / len(rows)
            left = [x + (i + 0.5) * width - 0.4 for x in places]
            axes.bar(left, values, width, yerr=error, capsize=2, label=printable(row))
    axes.set_ylabel(", ".join(dict.fromkeys(f"{x.name}{x.unit and ' (%)'}" for x in table.statistics)))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _heat(table: Table, axes) -> None:
    """Draw one field for each system and condition, with its figure in it."""
    rows, columns = table.rows, table.intervals.values()
    values = [[column[row].value if row in column else math.nan for column in columns] for row in rows]
    top = 100.0 if all(statistic.unit for statistic in table.statistics) else None
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=top)
    axes.set_yticks(range(len(rows)), list(map(printable, rows)), fontsize=9)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            bright = value > 0.6 * image.get_clim()[1]
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="black" if bright else "white")
    axes.figure.colorbar(image, ax=axes)
