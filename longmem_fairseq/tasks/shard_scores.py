"""Scores of one evaluation that runs as independent processes (``--num-shards N --shard-id I``)."""

import json
import os
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from ..files import read_json, require_file_place
from .document_scores import DocumentScores, write_result


class ShardScores:
    """Merge the scores of independent processes in a shared directory.

    Each process writes its own sums; the last one finds those of all shards and writes the results. Sums of another run
    (other data, checkpoint or settings) are told apart by its description.

    Args:
        directory: Path of the shared directory, ``--results-path``.
        run: Description of the run, plain JSON types.
        shards: Number of shards.
        shard: Number of this shard, from 0.
    """

    def __init__(self, directory: str, run: Dict[str, Any], shards: int, shard: int):
        self.directory, self.run, self.shards, self.shard = directory, run, shards, shard
        require_file_place(self._path(shard))
        if os.path.exists(self._path(shard)):  # of an earlier run: the others must not take it for this one's
            os.remove(self._path(shard))

    def _path(self, shard: int) -> str:
        return os.path.join(self.directory, f"shard-{shard}-of-{self.shards}.json")

    def merge(self, scores: DocumentScores) -> List[int]:
        """Write this shard's sums for the others, and replace them by the sums of all shards if these are complete.

        Args:
            scores: Scores of this shard; changed if no shard is missing.

        Returns:
            Numbers of the shards that are still missing.

        Raises:
            OSError: The sums cannot be written.
            ValueError: The file of another shard is damaged.
        """
        scored = np.flatnonzero(scores.sums[0])
        sums = {"run": self.run, "documents": scored.tolist(), "sums": scores.sums[:, scored].tolist()}
        write_result(self._path(self.shard), json.dumps(sums))
        merged, missing = np.zeros_like(scores.sums), []
        for shard in range(self.shards):
            sums = self._read(shard)
            if sums is None or sums.get("run") != self.run:
                missing.append(shard)
            else:
                merged += self._sums(shard, sums, merged.shape)
        if not missing:
            scores.sums = merged
        return missing

    def _read(self, shard: int) -> Optional[Dict[str, Any]]:
        """Return what a shard has written, None where it has written nothing."""
        try:
            sums = read_json(self._path(shard))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise self._damaged(shard, str(error)) from error
        if not isinstance(sums, dict):
            raise self._damaged(shard, "it is not an object")
        return sums

    def _sums(self, shard: int, sums: Dict[str, Any], shape: Tuple[int, int]) -> np.ndarray:
        """Return the sums of a shard, 0 for the documents that it did not score."""
        merged = np.zeros(shape)
        try:
            documents = sums["documents"]
            if set(map(type, documents)) - {int} or len(set(documents)) < len(documents) or min(documents) < 0:
                raise ValueError("its documents are not distinct numbers")
            merged[:, documents] = np.array(sums["sums"], dtype=np.float64).reshape(shape[0], len(documents))
        except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise self._damaged(shard, str(error)) from error
        return merged

    def _damaged(self, shard: int, reason: str) -> ValueError:
        return ValueError(f"{self._path(shard)} is damaged ({reason}): remove it and evaluate shard {shard} again")
