"""Weight and theta of the neural cache, chosen on validation documents."""

import logging
import math
from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ...memory.cache import CacheSettings, mix
from .document_stream import DocumentStream, Scores
from .systems import BACKBONE, ON, with_memory
from .text_state import TextState

logger = logging.getLogger(__name__)

# Values of theta times the mean squared length of a hidden state, so that they fit models of any scale.
SHARPNESS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128)
WEIGHTS = tuple(i / 50 for i in range(50))  # 0 (no cache) to 0.98


class _CacheGrid(DocumentStream):
    """Read a document with one cache for every theta of a grid instead of the scorer's."""

    def __init__(self, scorer, memory_size: int, thetas: Sequence[float]):
        self.thetas = thetas
        super().__init__(scorer, [memory_size])

    def new_state(self, size: int) -> TextState:
        return self.scorer.new_state(size, cached=True)

    def mixed_with_caches(self, scores: Scores, hidden: Tensor, targets: Tensor) -> Scores:
        """Return the log-probabilities of the cache itself, by theta."""
        (state,) = self.states.values()
        return dict(zip(map(str, self.thetas), self.cache_log_probs(state, hidden, targets, self.thetas)))


def tune(scorer, documents: Sequence[Tensor], budget: int = 50_000) -> List[Dict[str, Any]]:
    """Choose how the cache is mixed into the backbone and into LongMem, and set ``scorer.cache``.

    Args:
        scorer: Scorer to tune; the cache has the size of its memory.
        documents: Token ids of validation documents, shape (length,) each. An equal share of the budget is scored in
            each: behind a full memory if the document is long enough, else at its end.
        budget: Number of tokens to score.

    Returns:
        One dictionary per system: ``system``, ``weight``, ``theta``, validation ``perplexity`` and
        ``perplexity_without`` the cache, and number of ``tokens`` scored.

    Raises:
        ValueError: There is no document, or no memory.
    """
    documents = [document for document in documents if len(document)]
    if not documents or not scorer.memory_size:
        raise ValueError(
            "the neural cache is tuned on validation documents with a --memory-size above 0: name documents with "
            "--valid, or give --cache-lambda and --cache-theta, or leave the cache out with --no-cache"
        )
    share, scale = max(1, budget // len(documents)), _squared_length(scorer, documents[0])
    thetas = [sharpness / scale for sharpness in SHARPNESS]
    parts: Dict[str, List[Tensor]] = {}
    progress = tqdm(documents, desc="tuning the cache", unit=" documents", leave=False, disable=None, delay=2)
    for document in progress:
        begin = max(0, min(scorer.memory_size, len(document) - share)) // scorer.size * scorer.size
        stream = _CacheGrid(scorer, scorer.memory_size, thetas)
        stream.replay(document[:begin])
        for name, log_probs in stream.read(document[begin : begin + share]).items():
            parts.setdefault(name, []).append(log_probs)
    scores = {name: torch.cat(log_probs).double() for name, log_probs in parts.items()}
    bases = {BACKBONE: BACKBONE}
    if scorer.has_memory:
        bases[ON] = with_memory(scorer.memory_size)
    return [_choose(scorer, name, scores[base], scores, thetas) for name, base in bases.items()]


def _choose(scorer, system: str, model: Tensor, scores: Scores, thetas: Sequence[float]) -> Dict[str, Any]:
    losses = {
        (theta, weight): -float(mix(model, scores[str(theta)], weight).mean()) for theta in thetas for weight in WEIGHTS
    }
    theta, weight = min(losses, key=losses.get)
    if weight and theta in (thetas[0], thetas[-1]):
        logger.warning("%s: the best theta, %.4g, is at the end of the grid; a better one may be beyond", system, theta)
    scorer.cache[system] = CacheSettings(weight, theta)
    return {
        "system": system,
        "weight": weight,
        "theta": theta,
        "perplexity": math.exp(losses[theta, weight]),
        "perplexity_without": math.exp(-float(model.mean())),
        "tokens": len(model),
    }


@torch.no_grad()
def _squared_length(scorer, document: Tensor) -> float:
    """Return the mean squared length of the backbone's final hidden states over a document's first segment."""
    encoded = scorer.backbone.encode(document[None, : scorer.size].to(scorer.device))
    hidden = scorer.backbone.final_hidden(encoded)
    return float(hidden.float().pow(2).sum(-1).mean())
