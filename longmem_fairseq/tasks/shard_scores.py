"""Scores of one evaluation that runs as independent processes (``--num-shards N --shard-id I``)."""

import json
import os
from typing import Any, Dict, List

import numpy as np

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
        """
        scored = np.flatnonzero(scores.sums[0])
        sums = {"run": self.run, "documents": scored.tolist(), "sums": scores.sums[:, scored].tolist()}
        write_result(self._path(self.shard), json.dumps(sums))
        merged, missing = np.zeros_like(scores.sums), []
        for shard in range(self.shards):
            try:
                with open(self._path(shard), encoding="utf-8") as file:
                    sums = json.load(file)
            except FileNotFoundError:
                sums = None
            if sums is None or sums["run"] != self.run:
                missing.append(shard)
            else:
                merged[:, sums["documents"]] += np.array(sums["sums"])
        if not missing:
            scores.sums = merged
        return missing
