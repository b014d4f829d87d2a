"""Tables as Markdown."""

from typing import Optional, Sequence

from .bootstrap import Interval
from .statistic import Statistic
from .table import Table


def as_markdown(table: Table) -> str:
    """Return a Markdown table of the figures with 95 % intervals, and one of the paired differences."""
    cells = {}
    for column, rows in table.intervals.items():
        cells[column] = {row: _cell(table, column, row, interval) for row, interval in rows.items()}
    if table.upright:
        body = [[column, *(column_cells.get(row, "") for row in table.rows)] for column, column_cells in cells.items()]
        return f"**{table.title}**\n\n" + markdown_table(["", *table.rows], body)
    body = [[row, *(column_cells.get(row, "") for column_cells in cells.values())] for row in table.rows]
    parts = [f"**{table.title}**", markdown_table(["system", *cells], body)]
    statistics = dict(zip(table.columns, table.statistics))
    body = [
        [f"{a} against {b}", *(_signed(intervals.get(column), statistics[column]) for column in table.columns)]
        for (a, b), intervals in table.differences.items()
    ]
    if body:
        parts.append(markdown_table(["difference", *table.columns], body))
    return "\n\n".join(parts)


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with text in the first column and figures in the others.

    Args:
        head: Titles of the columns.
        body: Cells of the lines.
    """
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(table: Table, column: str, row: str, interval: Interval) -> str:
    scores = table.columns[column][row]
    statistic, deviation, digits = scores.statistic, scores.deviation(), scores.statistic.digits
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    bounds = f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return f"{interval.value:.{digits}f}{statistic.unit}{spread} {bounds}"


def _signed(interval: Optional[Interval], statistic: Statistic) -> str:
    if interval is None:
        return ""
    digits, unit = (1, " %") if statistic.relative else (statistic.digits, "")
    return f"{interval.value:+.{digits}f}{unit} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
