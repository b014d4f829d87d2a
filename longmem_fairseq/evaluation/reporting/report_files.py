"""The files of a report: JSON, Markdown and plots."""

import math
import os
from typing import Any, Dict, Optional, Sequence

from ...files import write_json, write_text
from .bootstrap import Interval
from .plots import draw
from .table import Table


def write_report(directory: str, report: Dict[str, Any], text: str, tables: Sequence[Table]) -> None:
    """Write ``report.json``, ``report.md`` and ``report.png``, each whole or not at all.

    Args:
        directory: Path of the directory of the files.
        report: Content of the JSON file, plain JSON types.
        text: Content of the Markdown file.
        tables: Tables to plot.

    Raises:
        OSError: A file cannot be written.
    """
    draw(tables, os.path.join(directory, "report.png"))
    write_text(os.path.join(directory, "report.md"), text)
    write_json(os.path.join(directory, "report.json"), report)


def as_json(table: Table) -> Dict[str, Any]:
    """Return a table as plain JSON types."""
    figures: Dict[str, Dict[str, Any]] = {}
    for column, rows in table.intervals.items():
        figures[column] = {}
        for row, interval in rows.items():
            scores = table.columns[column][row]
            figures[column][row] = {
                **_plain(interval),
                "statistic": scores.statistic.name,
                "deviation": scores.deviation(),
                "items": len(scores),
            }
    differences = [
        {"system": a, "against": b, "under": column, **_plain(interval)}
        for (a, b), intervals in table.differences.items()
        for column, interval in intervals.items()
    ]
    return {"title": table.title, "figures": figures, "differences": differences}


def _plain(interval: Interval) -> Dict[str, Optional[float]]:
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}
