"""Perplexity of every document: summed while fairseq-eval-lm runs, over ranks and shards, then written."""

import csv
import io
import json
import math
import os
from typing import Any, Dict, List

import numpy as np
import torch
import torch.nn.functional as F

FILES = ("documents.jsonl", "documents.csv")


def write_atomically(path: str, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    temporary = f"{path}.tmp.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): free the disk or change --results-path") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


class DocumentScores:
    """Sums of the negative log-likelihood (nats) of each document's tokens.

    Args:
        documents: how many there are.

    Attributes:
        sums: shape (3, documents), float64: tokens, their loss, their loss without memory.
    """

    def __init__(self, documents: int):
        self.sums = np.zeros((3, documents))

    @torch.no_grad()
    def add(self, sample: Dict[str, Any], logits: torch.Tensor, without_memory: torch.Tensor) -> None:
        """Add a batch: logits (B, T, V), with and without memory (the same tensor where there is none)."""
        for row, pieces in enumerate(sample["pieces"]):
            target = sample["target"][row, : sum(piece.stop - piece.start for piece in pieces)]
            losses = [_losses(logits[row], target)]
            losses.append(losses[0] if without_memory is logits else _losses(without_memory[row], target))
            at = 0
            for piece in pieces:
                n = piece.stop - piece.start
                self.sums[:, piece.document] += n, losses[0][at : at + n].sum(), losses[1][at : at + n].sum()
                at += n

    def reduce(self, device: torch.device, group) -> None:
        """Sum over the ranks of a distributed run."""
        sums = torch.from_numpy(self.sums).to(device)
        torch.distributed.all_reduce(sums, group=group)
        self.sums = sums.cpu().numpy()

    def check(self, sizes: np.ndarray) -> None:
        """Make sure that every token was scored once.

        Raises:
            RuntimeError: a document of another number of tokens than ``sizes`` says, shape (documents,).
        """
        wrong = np.flatnonzero(self.sums[0] != sizes)
        if len(wrong):
            raise RuntimeError(
                f"{int(self.sums[0, wrong[0]])} of the {sizes[wrong[0]]} tokens of document {wrong[0]} were scored "
                f"({len(wrong)} documents are wrong): no results are written"
            )

    @property
    def tokens(self) -> int:
        return int(self.sums[0].sum())

    def loss(self, without_memory: bool = False) -> float:
        """Mean loss of all tokens, base 2."""
        return float(self.sums[1 + without_memory].sum() / self.sums[0].sum() / math.log(2))

    def rows(self, names: List[str]) -> List[Dict[str, Any]]:
        """One row for each document that was read."""
        return [
            {
                "name": names[document],
                "tokens": int(self.sums[0, document]),
                "perplexity": _perplexity(self.sums[1, document], self.sums[0, document]),
                "perplexity_without_memory": _perplexity(self.sums[2, document], self.sums[0, document]),
            }
            for document in np.flatnonzero(self.sums[0])
        ]

    def write(self, directory: str, names: List[str]) -> None:
        """Write ``documents.jsonl`` and ``documents.csv``."""
        rows = self.rows(names)
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        texts = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), table.getvalue()
        for file, text in zip(FILES, texts):
            write_atomically(os.path.join(directory, file), text)


def _losses(logits: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    """Loss of each token, shape (n,), float64; logits (T, V) with T >= n, target (n,)."""
    return F.cross_entropy(logits[: len(target)].float(), target, reduction="none").double().cpu().numpy()


def _perplexity(loss: float, tokens: float) -> float:
    return math.exp(min(loss / tokens, 700.0))  # what exceeds a float is no better known as infinity


class ShardScores:
    """Puts together what independent processes (``--num-shards N --shard-id I``) found, in a shared directory.

    Each writes its own sums; whoever finds those of all shards writes the results. Sums of another run (other data,
    checkpoint or settings) are told apart by its description.

    Args:
        directory: ``--results-path``.
        run: describes the run; JSON.
        shards, shard: how many there are, and which this is.
    """

    def __init__(self, directory: str, run: Dict[str, Any], shards: int, shard: int):
        self.directory, self.run, self.shards, self.shard = directory, run, shards, shard
        if os.path.exists(self._path(shard)):  # of an earlier run: the others must not take it for this one's
            os.remove(self._path(shard))

    def _path(self, shard: int) -> str:
        return os.path.join(self.directory, f"shard-{shard}-of-{self.shards}.json")

    def merge(self, scores: DocumentScores) -> List[int]:
        """Leave this shard's sums for the others, and add theirs; returns the shards that are still missing."""
        read = np.flatnonzero(scores.sums[0])
        own = {"run": self.run, "documents": read.tolist(), "sums": scores.sums[:, read].tolist()}
        write_atomically(self._path(self.shard), json.dumps(own))
        merged, missing = np.zeros_like(scores.sums), []
        for shard in range(self.shards):
            try:
                with open(self._path(shard), encoding="utf-8") as f:
                    found = json.load(f)
            except FileNotFoundError:
                missing.append(shard)
                continue
            if found["run"] != self.run:
                missing.append(shard)
                continue
            merged[:, found["documents"]] += np.array(found["sums"])
        if not missing:
            scores.sums = merged
        return missing
