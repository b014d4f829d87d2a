"""Perplexity of every document: summed while fairseq-eval-lm runs, over ranks and shards, then written.

Per token it depends on the tokenizer; per word (PG-19's convention) and in bits per byte it does not.

Legend: B rows of a batch, T tokens of a segment, V symbols of the dictionary.
"""

import csv
import io
import json
import math
import os
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..data.text_meter import TextSize, figures_by_text
from ..files import write_text

FILES = ("documents.jsonl", "documents.csv")


def write_result(path: str, text: str) -> None:
    """Write a file below ``--results-path``, whole or not at all.

    Args:
        path: Path of the file to write.
        text: Content of the file.

    Raises:
        OSError: The file cannot be written; the message names the option to change.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise OSError(f"{error}: free the disk or change --results-path") from error


class DocumentScores:
    """Sums of the negative log-likelihood (nats) of each document's tokens.

    Args:
        documents: Number of documents.

    Attributes:
        sums: Number of tokens, their loss, and their loss without memory for each document, shape (3, documents),
            float64.
    """

    def __init__(self, documents: int):
        self.sums = np.zeros((3, documents))

    @torch.no_grad()
    def add(
        self, sample: Dict[str, Any], logits: torch.Tensor, without_memory: torch.Tensor, normalized: bool = False
    ) -> None:
        """Add a batch.

        Args:
            sample: Collated batch with ``target`` (B, T), ``pieces``, and ``start_indices`` where rows begin with
                tokens that are not scored.
            logits: Logits of the model, shape (B, T, V).
            without_memory: Logits of the model that reads no memory, shape (B, T, V); the same tensor if they are the
                same.
            normalized: If true, these are log-probabilities, of which only those of the targets need be right.
        """
        starts = sample.get("start_indices", [0] * len(sample["pieces"]))
        for row, (start, pieces) in enumerate(zip(starts, sample["pieces"])):
            target = sample["target"][row, start : start + sum(map(len, pieces))]
            losses = [_losses(logits[row, start:], target, normalized)]
            if without_memory is logits:
                losses.append(losses[0])
            else:
                losses.append(_losses(without_memory[row, start:], target, normalized))
            at = 0
            for piece in pieces:
                n = len(piece)
                self.sums[:, piece.document] += n, losses[0][at : at + n].sum(), losses[1][at : at + n].sum()
                at += n

    def reduce(self, device: torch.device, group) -> None:
        """Sum over the ranks of a distributed run.

        Args:
            device: Device of the communication.
            group: fairseq's process group.
        """
        sums = torch.from_numpy(self.sums).to(device)
        torch.distributed.all_reduce(sums, group=group)
        self.sums = sums.cpu().numpy()

    def check(self, sizes: np.ndarray) -> None:
        """Make sure that every token was scored once.

        Args:
            sizes: Length of each document in tokens, shape (documents,).

        Raises:
            RuntimeError: Another number of a document's tokens was scored.
        """
        wrong = np.flatnonzero(self.sums[0] != sizes)
        if len(wrong):
            raise RuntimeError(
                f"{int(self.sums[0, wrong[0]])} of the {sizes[wrong[0]]} tokens of document {wrong[0]} were scored "
                f"({len(wrong)} documents are wrong): no results are written"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens that were scored."""
        return int(self.sums[0].sum())

    def loss(self, without_memory: bool = False) -> float:
        """Return the mean loss of all tokens, base 2.

        Args:
            without_memory: If true, the loss of the model that reads no memory.
        """
        return float(self.sums[1 + without_memory].sum() / self.sums[0].sum() / math.log(2))

    def by_text(self, sizes: Sequence[Optional[TextSize]]) -> Dict[str, Optional[float]]:
        """Return the figures of all documents by word and byte; None where the size of a scored one is not known.

        Args:
            sizes: Size of the text of each document, None where it is not known.

        Returns:
            ``perplexity_per_word`` and ``bits_per_byte``.
        """
        scored = [sizes[document] for document in np.flatnonzero(self.sums[0])]
        total = None if None in scored else TextSize(*map(sum, zip(*scored)))
        return figures_by_text(self.sums[1].sum(), total)

    def rows(self, names: Sequence[str], sizes: Sequence[Optional[TextSize]]) -> List[Dict[str, Any]]:
        """Make one row of results for each document that was scored.

        Args:
            names: Name of each document.
            sizes: Size of the text of each document, None where it is not known.

        Returns:
            Rows with ``name``, ``tokens``, ``words``, ``bytes``, and ``perplexity``, ``perplexity_per_word`` and
            ``bits_per_byte``, each also with ``_without_memory``; what needs a size that is not known is None.
        """
        rows = []
        for document in np.flatnonzero(self.sums[0]):
            tokens, *losses = self.sums[:, document]
            size = sizes[document]
            row = {
                "name": names[document],
                "tokens": int(tokens),
                "words": None if size is None else size.words,
                "bytes": None if size is None else size.bytes,
            }
            for loss, suffix in zip(losses, ("", "_without_memory")):
                row[f"perplexity{suffix}"] = _perplexity(loss, tokens)
                row.update({f"{name}{suffix}": value for name, value in figures_by_text(loss, size).items()})
            rows.append(row)
        return rows

    def write(self, directory: str, names: Sequence[str], sizes: Sequence[Optional[TextSize]]) -> None:
        """Write ``documents.jsonl`` and ``documents.csv``.

        Args:
            directory: Path of an existing directory.
            names: Name of each document.
            sizes: Size of the text of each document, None where it is not known.

        Raises:
            OSError: A file cannot be written.
        """
        rows = self.rows(names, sizes)
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for file, text in zip(FILES, (lines, table.getvalue())):
            write_result(os.path.join(directory, file), text)


def _losses(logits: torch.Tensor, target: torch.Tensor, normalized: bool) -> np.ndarray:
    """Compute the loss of each token, shape (n,), float64, from logits (T, V) with T >= n and target (n,)."""
    loss = F.nll_loss if normalized else F.cross_entropy
    return loss(logits[: len(target)].float(), target, reduction="none").double().cpu().numpy()


def _perplexity(loss: float, units: float) -> float:
    return math.exp(min(loss / units, 700.0))  # above it, a float would be infinite
