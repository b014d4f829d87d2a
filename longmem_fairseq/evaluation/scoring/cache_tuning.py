"""Weight and theta of the neural cache, chosen on validation documents."""

import logging
import math
from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ...memory.cache import CacheSettings, mix
from .document_stream import Stream, with_memory
from .past import Past
from .systems import BACKBONE, ON

logger = logging.getLogger(__name__)

# Values of theta times the mean squared length of a hidden state, so that they fit models of any scale.
SHARPNESS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128)
WEIGHTS = tuple(i / 50 for i in range(50))  # 0 (no cache) to 0.98


class _Grid(Stream):
    """Reads a document with a cache of every theta instead of a chosen one."""

    def __init__(self, scorer, memory_size: int, thetas: Sequence[float]):
        self.thetas = thetas
        super().__init__(scorer, [memory_size])

    def _new_past(self, size: int) -> Past:
        return self.scorer.new_past(size, cached=True)

    def _with_caches(self, found, hidden, targets) -> Dict[str, Tensor]:
        (past,) = self.pasts.values()
        return dict(zip(map(str, self.thetas), self._cache_log_probs(past, hidden, targets, self.thetas)))


def tune(scorer, documents: Sequence[Tensor], budget: int = 50_000) -> List[Dict[str, Any]]:
    """Choose how the cache is mixed into the backbone and into LongMem, and set ``scorer.cache``.

    Args:
        scorer: its memory size is the cache's.
        documents: tokens of validation documents, shape (length,) each. Of each document an equal share of the budget
            is scored: where the memory is full if the document is long enough, else at its end.
        budget: tokens that are scored in all.

    Returns:
        For each system its ``system``, ``weight``, ``theta``, the validation ``perplexity`` and ``perplexity_without``
        cache, and the ``tokens`` scored.

    Raises:
        ValueError: there is no document, or no memory.
    """
    documents = [document for document in documents if len(document)]
    if not documents or not scorer.memory_size:
        raise ValueError(
            "the neural cache needs validation documents to be tuned on, and a --memory-size above 0: name documents "
            "with --valid, or give --cache-lambda and --cache-theta, or leave it out with --no-cache"
        )
    share, scale = max(1, budget // len(documents)), _squared_length(scorer, documents[0])
    thetas = [sharpness / scale for sharpness in SHARPNESS]
    parts: Dict[str, List[Tensor]] = {}
    progress = tqdm(documents, desc="tuning the cache", unit=" documents", leave=False, disable=None, delay=2)
    for document in progress:
        begin = max(0, min(scorer.memory_size, len(document) - share)) // scorer.size * scorer.size
        stream = _Grid(scorer, scorer.memory_size, thetas)
        stream.replay(document[:begin])
        for name, log_probs in stream.read(document[begin : begin + share]).items():
            parts.setdefault(name, []).append(log_probs)
    found = {name: torch.cat(log_probs).double() for name, log_probs in parts.items()}
    bases = {BACKBONE: BACKBONE, **({ON: with_memory(scorer.memory_size)} if scorer.has_memory else {})}
    return [_choose(scorer, name, found[base], found, thetas) for name, base in bases.items()]


def _choose(scorer, name: str, model: Tensor, found: Dict[str, Tensor], thetas: Sequence[float]) -> Dict[str, Any]:
    losses = {
        (theta, weight): -float(mix(model, found[str(theta)], weight).mean()) for theta in thetas for weight in WEIGHTS
    }
    theta, weight = min(losses, key=losses.get)
    if weight and theta in (thetas[0], thetas[-1]):
        logger.warning("%s: the best theta, %.4g, is the last that was tried; a better one may lie beyond", name, theta)
    scorer.cache[name] = CacheSettings(weight, theta)
    return {
        "system": name,
        "weight": weight,
        "theta": theta,
        "perplexity": math.exp(losses[theta, weight]),
        "perplexity_without": math.exp(-float(model.mean())),
        "tokens": len(model),
    }


@torch.no_grad()
def _squared_length(scorer, document: Tensor) -> float:
    """Mean squared length of the hidden states that are cached, over a document's first segment."""
    hidden = scorer.final_hidden(scorer.backbone(document[None, : scorer.size].to(scorer.device)))
    return float(hidden.float().pow(2).sum(-1).mean())
