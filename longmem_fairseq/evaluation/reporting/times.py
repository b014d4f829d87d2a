"""The wall time of each system, in a report."""

from typing import Dict, Iterable, Mapping, Sequence

from .markdown import markdown_table

Times = Dict[str, Dict[str, float]]


def total_times(times: Iterable[Mapping[str, Sequence[float]]]) -> Times:
    """Sum the times of items.

    Args:
        times: Seconds and tokens by system, for each item.

    Returns:
        ``seconds``, ``tokens`` and ``tokens_per_second`` by system.
    """
    totals: Times = {}
    for by_system in times:
        for system, (seconds, tokens) in by_system.items():
            total = totals.setdefault(system, {"seconds": 0.0, "tokens": 0})
            total["seconds"] = round(total["seconds"] + seconds, 4)
            total["tokens"] += tokens
    for total in totals.values():
        total["tokens_per_second"] = round(total["tokens"] / max(total["seconds"], 1e-9), 1)
    return totals


def times_table(times: Times) -> str:
    """Return a Markdown table of :func:`total_times`."""
    body = [
        [system, f"{total['seconds']:,.1f}", f"{total['tokens']:,}", f"{total['tokens_per_second']:,.0f}"]
        for system, total in times.items()
    ]
    title = (
        "**Wall time**: seconds to read, score and generate. Work that systems share counts for each of them; tokens "
        "are those that were scored or generated."
    )
    return f"{title}\n\n{markdown_table(['system', 'seconds', 'tokens', 'tokens/s'], body)}\n"
