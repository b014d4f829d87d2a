"""Batches for fairseq-eval-lm; at their end the results of documents and of all ranks together are written.

Hooks into fairseq: fairseq-eval-lm computes the loss of one rank and has no place for other results. So

* a forward hook on the model (``torch.nn.Module.register_forward_hook``) scores each batch as the command runs it. It
  is removed at the end of the iteration;
* a filter on the logger of ``fairseq_cli.eval_lm`` (``logging.Logger.addFilter``) rewrites the command's last two
  lines, which report one rank's figures, so that they report all ranks' figures, or state their rank. It stays to the
  end of the process, and does nothing to other lines.
"""

import logging
import os
import sys
import time
from typing import Any, Callable, Dict, List, Optional

import torch
from fairseq.distributed import utils as distributed_utils
from tqdm import tqdm

from ..data.lane_dataset import LaneDataset
from ..data.text_meter import TextMeter, TextSize
from ..files import printable
from .document_scores import DocumentScores
from .shard_scores import ShardScores

logger = logging.getLogger(__name__)
_READ_TOKENS = 1 << 16
EVAL_LM_LOGGER = "fairseq_cli.eval_lm"


class EvaluationBatches:
    """Iterate over one rank's batches, report tokens/s and score each document.

    Args:
        batches: Iterator over collated batches of a :class:`LaneDataset`.
        dataset: The dataset of these batches.
        model: The model that is evaluated.
        rank: Number of the dataset's rank that the batches belong to.
        results_path: Path of the directory for the documents' results, or None.
        run: Description of the run, for shards that are evaluated by independent processes.
        bar: If true, show a progress bar on a terminal; elsewhere a line is logged every ``log_interval`` batches.
        log_interval: Number of batches between two log lines.
        find_meter: Function that returns the meter of the documents' text, or raises a ValueError with the reason why
            there is none; None to leave out figures by word and byte.

    Raises:
        OSError: The results cannot be written.
        RuntimeError: Not every token was scored once; raised at the end of the iteration.
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
        find_meter: Optional[Callable[[], TextMeter]] = None,
    ):
        self.batches, self.dataset, self.model, self.rank = batches, dataset, model, rank
        self.results_path, self.log_interval, self.find_meter = results_path, log_interval, find_meter
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
        if results_path is not None or self.distributed or (find_meter is not None and dataset.n_ranks == 1):
            self.scores = DocumentScores(len(dataset.documents))
            self._hook = model.register_forward_hook(self._score, with_kwargs=True)
            # Such a model returns what its softmax reads in place of logits.
            self._adaptive = getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None
            self._without_memory = hasattr(model, "score_without_memory") and results_path is not None
            if self._without_memory:
                model.score_without_memory = True

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        start, tokens = time.time(), 0
        with tqdm(total=self.total, unit=" tokens", unit_scale=True, leave=False, disable=not self.bar) as progress:
            for i, batch in enumerate(self.batches, 1):
                self._batch = batch
                yield batch
                n = batch.get("ntokens", 0)
                tokens += n
                progress.update(n)
                if not self.bar and i % self.log_interval == 0:
                    seconds = time.time() - start
                    logger.info(f"{tokens:,} of {self.total:,} tokens, {tokens / seconds:,.0f} tokens/s")
        self._finish(time.time() - start)

    def _score(self, model, args, kwargs, output) -> None:
        """Score the batch that was yielded last; a forward hook."""
        logits, extra = output
        target = self._batch["target"].to(logits.device)
        if self._adaptive:
            logits = model.get_normalized_probs(output, log_probs=True, sample={"target": target})
            self.scores.add({**self._batch, "target": target}, logits, logits, normalized=True)
            return
        without = extra.get("logits_without_memory") if self._without_memory else None
        self.scores.add({**self._batch, "target": target}, logits, logits if without is None else without)

    def _finish(self, seconds: float) -> None:
        """Merge, report and write the results of all ranks or shards."""
        shard = f"shard {self.rank} of {self.dataset.n_ranks}"
        if self._hook is None:
            if self.dataset.n_ranks > 1:
                logger.info(f"{shard} is done: give all shards the same --results-path to have their results merged")
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
        if self.distributed and self.rank > 0:
            return
        sizes = self._text_sizes()
        if self.results_path is not None:
            self.scores.write(self.results_path, self.names, sizes)
            if self._without_memory:
                logger.info(f"Perplexity without memory: {2 ** self.scores.loss(without_memory=True):.2f}")
            logger.info(f"results of {len(self.names):,} documents are in {printable(self.results_path)}")
        by_text = self.scores.by_text(sizes)
        if None not in by_text.values():
            logger.info(
                "Perplexity per word: {perplexity_per_word:.2f}, Bits per byte: {bits_per_byte:.4f}".format(**by_text)
            )

    def _text_sizes(self) -> List[Optional[TextSize]]:
        """Measure the text of each document; None where its tokens do not tell it."""
        documents = self.dataset.documents
        if self.find_meter is None:
            return [None] * len(documents)
        try:
            meter = self.find_meter()
        except ValueError as error:
            logger.info(f"perplexity per word and bits per byte are left out: {error}")
            return [None] * len(documents)
        sizes: List[Optional[TextSize]] = []
        for document, length in enumerate(documents.sizes.tolist()):
            begins = range(0, length, _READ_TOKENS)
            pieces = (documents.read(document, begin, min(length, begin + _READ_TOKENS)) for begin in begins)
            measured = meter.measure(pieces)
            sizes.append(None if measured is None else TextSize(*map(sum, zip(*measured))))
        if None in sizes:
            logger.info(
                f"perplexity per word and bits per byte are left out: {sizes.count(None):,} documents have tokens of "
                "unknown text, such as <unk>"
            )
        return sizes


def _amend_report(source: str, scores: Optional[DocumentScores] = None, seconds: float = 0.0) -> None:
    """Let fairseq-eval-lm's last two lines, which report one rank's figures, report those of all or state their rank.

    Args:
        source: Name of the ranks or the shard that the figures belong to.
        scores: Scores of all ranks or shards, which replace one rank's; None to keep its own.
        seconds: Time that all ranks took, if they ran together.
    """

    def amend(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("Evaluated "):
            if scores is not None and source.startswith("all"):
                speed = scores.tokens / seconds
                message = f"Evaluated {scores.tokens:,} tokens in {seconds:.1f}s ({speed:.2f} tokens/s)"
            message = f"{message} ({source})"
        elif message.startswith("Loss (base 2)"):
            if scores is not None:
                message = f"Loss (base 2): {scores.loss():.4f}, Perplexity: {2 ** scores.loss():.2f}"
            else:
                message = f"{message} ({source})"
        record.msg, record.args = message, ()
        return True

    logging.getLogger(EVAL_LM_LOGGER).addFilter(amend)
