"""The contract of an evaluation."""

import argparse
from abc import ABC, abstractmethod
from typing import Any, Dict, List

from torch import Tensor

from .reporting.table import Table
from .scoring.scorer import Scorer


class Evaluation(ABC):
    """One evaluation: what is scored, and the tables that are made of the scores.

    :mod:`.command` calls :meth:`prepare`, then :meth:`score` for each of :meth:`items`, then the rest.

    Attributes:
        name: Name of the evaluation and of its folder in ``examples``.
        title: Title of its report.
        script: Module that runs it as a command; by default ``examples.NAME.evaluate``.
    """

    name: str
    title: str
    script = ""

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the evaluation's own options, such as ``--data``."""

    @abstractmethod
    def prepare(self, args: argparse.Namespace, scorer: Scorer) -> None:
        """Check the options and read the data.

        Args:
            args: Parsed command line.
            scorer: Scorer of the systems to evaluate.

        Raises:
            ValueError: An option or the data are not valid.
            OSError: The data cannot be read.
        """

    @abstractmethod
    def describe(self) -> Dict[str, Any]:
        """Describe the data and the settings that decide the results, in plain JSON types and without paths."""

    @abstractmethod
    def tuning_documents(self) -> List[Tensor]:
        """Return token ids of documents to tune the neural cache on, shape (length,), int64, each; may be empty."""

    @abstractmethod
    def items(self) -> List[str]:
        """Return the names of the items to score; they stay the same from run to run."""

    @abstractmethod
    def score(self, item: str) -> Dict[str, Any]:
        """Return the result of one item, plain JSON types."""

    @abstractmethod
    def tables(self, results: Dict[str, Any]) -> List[Table]:
        """Return the tables of a report, the main figures first.

        Args:
            results: Results of :meth:`score` by item.
        """

    @abstractmethod
    def notes(self) -> List[str]:
        """Return sentences that describe how the figures were obtained."""

    def figures(self, results: Dict[str, Any]) -> Dict[str, Any]:
        """Return further entries of the report's JSON file; none by default.

        Args:
            results: Results of :meth:`score` by item.
        """
        return {}

    def further_files(self, results: Dict[str, Any]) -> Dict[str, str]:
        """Return the contents of further files of the report by name; none by default.

        Args:
            results: Results of :meth:`score` by item.
        """
        return {}
