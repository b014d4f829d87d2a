"""What fairseq-eval-lm iterates over: batches, and at their end the results of documents and of all ranks together."""

import logging
import os
import sys
import time
from typing import Any, Dict, Optional

import torch
from fairseq.distributed import utils as distributed_utils
from tqdm import tqdm

from ..data.lane_dataset import LaneDataset
from .document_scores import DocumentScores, ShardScores

logger = logging.getLogger(__name__)
STOCK_LOGGER = "fairseq_cli.eval_lm"


class Evaluation:
    """Yields the batches of one rank; shows tokens per second; scores documents.

    fairseq-eval-lm keeps its scores to itself and reports only its own rank's. So where documents or several ranks are
    asked for, a hook on the model scores each batch as it passes, and the end of the iteration is the end of the run.

    Args:
        batches: iterator over collated batches of a :class:`LaneDataset`.
        dataset: that dataset.
        model: what is evaluated.
        rank: which of the dataset's ranks this is.
        results_path: directory for the documents' results, or ``None``.
        run: description of the run, for shards that run apart.
        bar: show a progress bar, if there is a terminal (otherwise a log line every ``log_interval`` batches).
        log_interval: batches between two log lines.

    Raises:
        OSError: the results cannot be written.
        RuntimeError: not every token was scored once.
    """

    def __init__(
        self,
        batches,
        dataset: LaneDataset,
        model: torch.nn.Module,
        rank: int = 0,
        results_path: Optional[str] = None,
        run: Optional[Dict[str, Any]] = None,
        bar: bool = True,
        log_interval: int = 100,
    ):
        self.batches, self.dataset, self.model, self.rank = batches, dataset, model, rank
        self.results_path, self.log_interval = results_path, log_interval
        self.bar = bar and sys.stderr.isatty()
        self.distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        self.total = dataset.rank_tokens(rank)
        self.scores = self.shards = self.names = None
        self._batch: Dict[str, Any] = {}
        self._hook = None
        if results_path is not None:
            try:
                os.makedirs(results_path, exist_ok=True)
            except OSError as error:
                raise OSError(f"--results-path {results_path} cannot be made a directory: {error.strerror}") from error
            self.names = dataset.documents.names()
            if dataset.n_ranks > 1 and not self.distributed:
                self.shards = ShardScores(results_path, run, dataset.n_ranks, rank)
        if results_path is not None or self.distributed:
            self.scores = DocumentScores(len(dataset.documents))
            self._hook = model.register_forward_hook(self._score, with_kwargs=True)
            self._without_memory = hasattr(model, "score_without_memory") and results_path is not None
            if self._without_memory:
                model.score_without_memory = True

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        began, tokens = time.time(), 0
        with tqdm(total=self.total, unit=" tokens", unit_scale=True, leave=False, disable=not self.bar) as progress:
            for i, batch in enumerate(self.batches, 1):
                self._batch = batch
                yield batch
                n = batch.get("ntokens", 0)
                tokens += n
                progress.update(n)
                if not self.bar and i % self.log_interval == 0:
                    seconds = time.time() - began
                    logger.info(f"{tokens:,} of {self.total:,} tokens, {tokens / seconds:,.0f} tokens/s")
        self._finish(time.time() - began)

    def _score(self, model, args, kwargs, output) -> None:
        """Forward hook: score the batch that was last given out."""
        logits, extra = output
        target = self._batch["target"].to(logits.device)
        without = extra.get("logits_without_memory") if self._without_memory else None
        self.scores.add({**self._batch, "target": target}, logits, logits if without is None else without)

    def _finish(self, seconds: float) -> None:
        """Put the results of all ranks or shards together, report and write them."""
        shard = f"shard {self.rank} of {self.dataset.n_ranks}"
        if self._hook is None:
            if self.dataset.n_ranks > 1:
                logger.info(
                    f"{shard} is done: with the same --results-path for all shards, the last would put them together"
                )
                _amend_report(shard)
            return
        self._hook.remove()
        if self.distributed:
            device = next(self.model.parameters()).device
            self.scores.reduce(device, distributed_utils.get_global_group())
        elif self.shards is not None:
            missing = self.shards.merge(self.scores)
            if missing:
                logger.info(f"{shard} is done; missing for the results of all: {', '.join(map(str, missing))}")
                _amend_report(shard)
                return
        self.scores.check(self.dataset.documents.sizes)
        if self.dataset.n_ranks > 1:
            _amend_report(f"all {self.dataset.n_ranks} ranks" if self.distributed else shard, self.scores, seconds)
        if self.results_path is not None and not (self.distributed and self.rank > 0):
            self.scores.write(self.results_path, self.names)
            if self._without_memory:
                logger.info(f"Perplexity without memory: {2 ** self.scores.loss(without_memory=True):.2f}")
            logger.info(f"results of {len(self.names):,} documents are in {self.results_path}")


def _amend_report(who: str, scores: Optional[DocumentScores] = None, seconds: float = 0.0) -> None:
    """Make fairseq-eval-lm's last two lines, which know only their own rank's figures, say whose they are.

    Args:
        who: whose the figures are.
        scores: of all; they take the place of one rank's.
        seconds: what all of them took, if they ran together.
    """

    def amend(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("Evaluated "):
            if scores is not None and who.startswith("all"):
                speed = scores.tokens / seconds
                message = f"Evaluated {scores.tokens:,} tokens in {seconds:.1f}s ({speed:.2f} tokens/s)"
            message = f"{message} ({who})"
        elif message.startswith("Loss (base 2)"):
            if scores is not None:
                message = f"Loss (base 2): {scores.loss():.4f}, Perplexity: {2 ** scores.loss():.2f}"
            else:
                message = f"{message} ({who})"
        record.msg, record.args = message, ()
        return True

    logging.getLogger(STOCK_LOGGER).addFilter(amend)
