"""From the side network's features to predictions: the backbone's output projection, and the token memory.

Legend: B rows, T tokens of a segment, D width, V symbols.
"""

from typing import Dict, Optional

from torch import Tensor, nn

from ..backbones.base import Backbone, EncodedSegment
from ..memory.settings import MemorySettings
from ..memory.token_bank import TokenStates, stored
from ..modules.token_mixture import TokenMixture, TokenReads


class Predictor(nn.Module):
    """Predict the next token from the side network's features, and from what was read from a token memory.

    Args:
        backbone: Frozen backbone, which stays a part of the decoder alone.
        settings: Settings of the memory; None for no memory.

    Attributes:
        token_mixture: The trained part of the token memory; None without one.
    """

    def __init__(self, backbone: Backbone, settings: Optional[MemorySettings] = None):
        super().__init__()
        self._backbone = (backbone,)  # in a tuple, so that its weights are not registered twice
        self._settings = settings
        self.token_mixture = TokenMixture() if settings is not None and settings.token_memory else None

    def forward(self, features: Tensor, reads: Optional[TokenReads], extra: Optional[Dict] = None) -> Tensor:
        """Return logits (B, T, V); with what was read from a token memory, log-probabilities.

        Args:
            features: Input of the output projection, shape (B, T, D).
            reads: What was read; None for nothing.
            extra: Dictionary that gets ``token_memory_weight``, lambda of each token, shape (B, T).
        """
        logits = self._backbone[0].output(features)
        if reads is None:
            return logits
        log_probs, weights = self.token_mixture(logits, reads, reuse=True)
        if extra is not None:
            extra["token_memory_weight"] = weights
        return log_probs

    @property
    def writes_hidden(self) -> bool:
        """Whether final hidden states are written into a memory, so that all layers of the backbone must run."""
        return self.token_mixture is not None

    def encode_for_memory(self, tokens: Tensor) -> EncodedSegment:
        """Encode segments (B, T) only as far up as the memory needs."""
        backbone = self._backbone[0]
        return backbone.encode(tokens) if self.writes_hidden else backbone.encode_for_memory(tokens)

    def token_states(self, encoded: EncodedSegment, tokens: Tensor) -> Optional[TokenStates]:
        """Return what the token memory takes of encoded segments; None without one.

        Args:
            encoded: Segments, encoded with all layers.
            tokens: Token ids of the segments, shape (B, T), int64.
        """
        if self.token_mixture is None:
            return None
        return TokenStates(stored(self._backbone[0].final_hidden(encoded), self._settings.token_dtype), tokens)
