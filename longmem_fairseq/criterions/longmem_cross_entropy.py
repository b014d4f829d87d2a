"""Cross-entropy of the model's predictions, and figures that show whether the memory is of use."""

import math
from dataclasses import dataclass, field
from typing import Optional

import torch
import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.logging import metrics

# Sums that describe the use of the memory, in the order in which they are logged.
_FIGURES = (
    "memory_batches",
    "gate",
    "memory_fill",
    "memory_reads",
    "memory_distance",
    "memory_hits",
    "memory_compared",
)
_GATE_OF_LAYER = "gate_"  # followed by the number of the memory layer, where there are several


@dataclass
class LongMemCrossEntropyConfig(CrossEntropyCriterionConfig):
    """Options of ``longmem_cross_entropy``; see each option's help."""

    without_memory_interval: int = field(
        default=50,
        metadata={
            "help": "number of updates between two measurements of the loss without reading the memory (0: never); "
            "validation always measures it"
        },
    )


@register_criterion("longmem_cross_entropy", dataclass=LongMemCrossEntropyConfig)
class LongMemCrossEntropyCriterion(CrossEntropyCriterion):
    """fairseq's cross-entropy with figures of the memory beside it.

    Logged besides ``loss`` and ``ppl`` (base 2): ``gate``, the mean of sigmoid(g) over heads, and with several memory
    layers also ``gate_13``, that over the heads that read layer 13, and so on; ``mem_fill``, the share of the memory
    in use; ``mem_dist``, the mean number of tokens between a query and the chunks it reads; on sampled updates
    ``ppl_no_mem``, the perplexity of the same side network when it reads nothing, and ``mem_gain``, the percentage by
    which reading lowers it; with a token memory ``token_memory_weight``, the mean weight that it has in the output; and
    with an approximate index (``--memory-index``), on sampled updates, ``mem_recall``, the percentage of the chunks
    found by exact search that the index finds too.

    Args:
        task: The fairseq task.
        sentence_avg: If true, gradients are averaged over rows instead of tokens.
        without_memory_interval: Number of updates between two measurements of the loss without memory; 0 for never.
    """

    def __init__(self, task, sentence_avg, without_memory_interval=50):
        super().__init__(task, sentence_avg)
        self.without_memory_interval = without_memory_interval

    def forward(self, model, sample, reduce=True):
        """Compute the loss of a batch.

        Args:
            model: A model with a memory, in training or evaluation mode.
            sample: Collated batch.
            reduce: If true, sum the loss over tokens; otherwise return that of each token.

        Returns:
            The loss, its denominator and sums to log, as fairseq's criteria return them.

        Raises:
            ValueError: The model has no memory.
        """
        if not hasattr(model, "memorize"):
            raise ValueError(
                "--criterion longmem_cross_entropy measures a memory, and this model has none: use --criterion "
                "cross_entropy"
            )
        interval = self.without_memory_interval
        # By the number of the update, so that a resumed training measures at the same updates.
        compare = not model.training or (interval > 0 and model.num_updates % interval == 0)
        logits, extra = model(**sample["net_input"], without_memory=compare)
        target = sample["target"]
        loss = self._loss(logits, target, reduce)
        sample_size = target.size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": target.size(0),
            "sample_size": sample_size,
        }
        # Every rank logs every key at every step: fairseq sums them by position.
        zero = torch.zeros((), device=target.device)
        compared = compare and extra["memory"] is not None
        logging_output["loss_compared"] = loss.data.sum() if compared else zero
        logging_output["loss_without_memory"] = (
            self._loss(extra["logits_without_memory"], target, True) if compared else zero
        )
        logging_output["tokens_compared"] = sample["ntokens"] if compared else 0
        logging_output.update(memory_figures(model, extra["memory"], zero))
        if "token_memory_weight" in extra:
            logging_output["token_memory_tokens"] = sample["ntokens"]
            logging_output["token_memory_weight"] = (
                extra["token_memory_weight"].masked_fill(target == self.padding_idx, 0.0).sum()
            )
        return loss, sample_size, logging_output

    def _loss(self, logits, target, reduce):
        return F.cross_entropy(
            logits.float().view(-1, logits.size(-1)),
            target.view(-1),
            ignore_index=self.padding_idx,
            reduction="sum" if reduce else "none",
        )

    @staticmethod
    def reduce_metrics(logging_outputs) -> None:
        """Aggregate the logged sums of all ranks and batches.

        Args:
            logging_outputs: Sums that :meth:`forward` returned, one dictionary per rank and batch.
        """
        CrossEntropyCriterion.reduce_metrics(logging_outputs)

        def total(key):
            return sum(log.get(key, 0) for log in logging_outputs)

        batches = total("memory_batches")
        if batches:
            for name in ["gate", *(key for key in logging_outputs[0] if key.startswith(_GATE_OF_LAYER))]:
                metrics.log_scalar(name, total(name) / batches, batches, round=3)
            metrics.log_scalar("mem_fill", total("memory_fill") / batches, batches, round=3)
        reads = total("memory_reads")
        if reads:
            metrics.log_scalar("mem_dist", total("memory_distance") / reads, reads, round=0)
        compared = total("memory_compared")
        if compared:
            metrics.log_scalar("mem_recall", 100 * total("memory_hits") / compared, compared, round=1)
        tokens = total("token_memory_tokens")
        if tokens:
            metrics.log_scalar("token_memory_weight", total("token_memory_weight") / tokens, tokens, round=3)
        tokens = total("tokens_compared")
        if tokens:
            with_memory = total("loss_compared") / tokens / math.log(2)
            without = total("loss_without_memory") / tokens / math.log(2)
            metrics.log_scalar("_loss_compared", with_memory, tokens, round=3)
            metrics.log_scalar("_loss_no_mem", without, tokens, round=3)
            metrics.log_derived("ppl_no_mem", lambda meters: _perplexity(meters["_loss_no_mem"].avg))
            metrics.log_derived("mem_gain", lambda m: _gain(m["_loss_compared"].avg, m["_loss_no_mem"].avg))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Return True: all figures are sums."""
        return True


def _perplexity(loss) -> Optional[float]:
    """Return 2^loss; None while nothing was measured since the last line of the log."""
    return None if loss is None else utils.get_perplexity(loss)


def _gain(with_memory, without) -> Optional[float]:
    """Return the percentage by which reading lowers the perplexity, from two losses in base 2."""
    return None if without is None else round(100 * (1 - 2 ** (float(with_memory) - float(without))), 2)


def memory_figures(model, reader, zero) -> dict:
    """Describe one batch's use of the memory.

    Args:
        model: The model.
        reader: Reader of the batch's memory; None where there is none.
        zero: The number 0, scalar float32 on the model's device.

    Returns:
        Sums by name, scalars; all zero where there is no memory.
    """
    if reader is None:
        return dict.fromkeys(_FIGURES, zero)
    distance, reads = reader.distance()
    hits, compared = reader.recall or (0.0, 0.0)
    layers, gates = model.decoder.backbone.memory_layers, model.decoder.gates
    of_layers = gates.view(len(layers), -1).mean(dim=1) if len(layers) > 1 else ()
    return {
        "memory_batches": zero + 1,
        "gate": zero + gates.mean(),
        **{f"{_GATE_OF_LAYER}{layer}": zero + gate for layer, gate in zip(layers, of_layers)},
        "memory_fill": zero + reader.fill,
        "memory_reads": zero + reads,
        "memory_distance": zero + distance,
        "memory_hits": zero + hits,
        "memory_compared": zero + compared,
    }
