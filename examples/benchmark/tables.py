"""Tables and lists in Markdown for the reports of the benchmarks."""

from typing import Dict, List, Sequence


def table(rows: Sequence[Dict[str, object]], columns: Dict[str, str]) -> str:
    """Format rows as a Markdown table; absent values are left blank.

    Args:
        rows: One dictionary for each row of the table.
        columns: Heading of each column, by the key of its values in ``rows``.
    """
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --: |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |")
    return "\n".join(lines)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def bullet_list(description: Dict[str, str]) -> List[str]:
    """Format each entry of a dictionary as one item of a Markdown list."""
    return [f"* {key}: {value}" for key, value in description.items()]
