"""A table of figures: systems (rows) under several conditions (columns)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..scoring.systems import BACKBONE, OFF, ON, WITH_CACHE
from .bootstrap import Interval
from .statistic import BITS_PER_BYTE, WORD_PERPLEXITY, Statistic
from .system_scores import SystemScores

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
        title: Title of the table.
        columns: Scores by condition and system; a system may be missing under a condition.
        plot: Kind of plot: "lines" over the conditions, "bars", a "heat" map of systems and conditions, or None.
        pairs: Pairs of systems whose difference is shown, if the table has both.
        upright: If true, Markdown has a line per condition and no differences, for tables with many conditions.
        compared: If true, a comparison of checkpoints shows the table although it has no plot.
    """

    title: str
    columns: Dict[str, Dict[str, SystemScores]]
    plot: Optional[str] = None
    pairs: Pairs = PAIRS
    upright: bool = False
    compared: bool = False

    @property
    def rows(self) -> List[str]:
        """Systems, in the order of their first appearance."""
        return list(dict.fromkeys(row for column in self.columns.values() for row in column))

    @property
    def statistics(self) -> List[Statistic]:
        """Statistic of each column."""
        return [next(iter(column.values())).statistic for column in self.columns.values()]

    @cached_property
    def intervals(self) -> Dict[str, Dict[str, Interval]]:
        """Figures with their intervals, by condition and system."""
        intervals = {}
        for column, rows in self.columns.items():
            intervals[column] = {row: scores.interval() for row, scores in rows.items()}
        return intervals

    @cached_property
    def differences(self) -> Dict[Tuple[str, str], Dict[str, Interval]]:
        """Paired differences of each pair (a, b) of systems, by condition: how far a's figure is above b's."""
        differences = {}
        for a, b in self.pairs:
            shared = {column: rows for column, rows in self.columns.items() if a in rows and b in rows}
            if shared:
                differences[a, b] = {column: rows[a].difference(rows[b]) for column, rows in shared.items()}
        return differences


class TextLoss(NamedTuple):
    """What an item contributes to the figures by word and byte.

    Attributes:
        item: Name of the item.
        loss: Negative log-likelihood of the item's tokens by system, nats.
        size: Words and bytes of the text that the tokens stand for; None where they are not known.
    """

    item: str
    loss: Dict[str, float]
    size: Optional[Sequence[int]]


def text_tables(title: str, losses: Sequence[TextLoss], pairs: Pairs = PAIRS) -> List[Table]:
    """Make the table of perplexity per word and bits per byte, which do not depend on the tokenizer.

    Args:
        title: Text that is scored, for the table's title.
        losses: Contributions of the items.
        pairs: Pairs of systems whose difference is shown.

    Returns:
        One table; none where the size of a text is not known.
    """
    if any(part.size is None for part in losses):
        return []
    columns: Dict[str, Dict[str, SystemScores]] = {}
    for statistic, place in ((WORD_PERPLEXITY, 0), (BITS_PER_BYTE, 1)):
        rows: Dict[str, SystemScores] = {}
        for part in losses:
            for system, loss in part.loss.items():
                rows.setdefault(system, SystemScores({}, statistic)).items[part.item] = (loss, part.size[place])
        if sum(part.size[place] for part in losses):
            columns[statistic.name] = rows
    return [Table(f"{title}, by word and byte", columns, pairs=pairs, compared=True)] if columns else []
