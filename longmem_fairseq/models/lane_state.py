"""What a decoder keeps of the streams in its lanes: their memories and carried windows, in training and evaluation."""

import logging
from typing import List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..data.segments import Segments
from ..memory.factory import MemoryFactory
from ..memory.lane_streams import LaneStreams, next_segments
from ..memory.split_memories import SplitMemories
from ..memory.stream_memory import StreamMemory
from .carried_window import CarriedWindow, SplitWindows
from .step_graphs import StepGraphs

logger = logging.getLogger(__name__)


class LaneState:
    """Memories and carried windows of a decoder.

    Args:
        decoder: The decoder.
        memory_factory: Factory of its memories.
        carry_window: Number of tokens that are carried; 0 for none.

    Attributes:
        memories: Memories of training and evaluation.
        windows: Carried windows of training and evaluation.
        graphs: CUDA graphs of the steps on these memories.
    """

    def __init__(self, decoder, memory_factory: MemoryFactory, carry_window: int):
        self.decoder = decoder
        self.memories = SplitMemories(memory_factory)
        self.windows = SplitWindows(decoder, carry_window)
        self.graphs = StepGraphs(decoder)

    def streams(self) -> List[LaneStreams]:
        """Return what the decoder's present mode, training or evaluation, has kept so far."""
        parts = (split.get(self.decoder.training) for split in (self.memories, self.windows))
        return [part for part in parts if part is not None]

    def needs_replay(self, segments: Segments) -> np.ndarray:
        """Return which rows' memory or carried window is not where their segment starts, shape (B,), bool."""
        training, decoder = self.decoder.training, self.decoder
        behind = self.windows.needs_replay(training, segments)
        return behind | self.memories.needs_replay(training, segments) if decoder.has_memory else behind

    def next_segments(self, tokens: Tensor) -> Segments:
        """Return the place of tokens (B, T) that follow those of the previous call.

        Raises:
            ValueError: The decoder is not stateful, or has fewer lanes.
        """
        if not self.decoder.stateful:
            raise ValueError(
                "longmem_lm was called without segments, so it cannot know which document each row continues: run it "
                "with --task longmem_language_modeling"
            )
        return next_segments(next(iter(self.streams()), None), tokens, self.decoder.dictionary.pad())

    @torch.no_grad()
    def allocate(self, tokens: Tensor, lanes: int) -> Tuple[Optional[StreamMemory], Optional[CarriedWindow]]:
        """Return memory and carried window of the decoder's present mode, made where there are none that fit.

        Args:
            tokens: Token ids of any batch, shape (B, T), int64; the keys of one token show the memory's precision.
            lanes: Number of lanes that a batch may have.

        Returns:
            The two, each None where the decoder has none.
        """
        return self.memory(tokens, lanes), self.windows.allocate(self.decoder.training, lanes)

    def memory(self, tokens: Tensor, lanes: int) -> Optional[StreamMemory]:
        """Return the memory alone (see :meth:`allocate`)."""
        decoder = self.decoder
        if not decoder.has_memory:
            return None
        memory = self.memories.fitting(decoder.training, lanes, tokens.device)
        if memory is None:
            like = decoder.backbone.encode_for_memory(tokens[:, :1]).keys
            # Outside a task several segments may come before one backward pass.
            memory = self.memories.allocate(decoder.training, lanes, like, keep_reads=decoder.stateful)
        return memory

    @torch.no_grad()
    def read_again(self, tokens: Tensor, segments: Segments, restart: bool) -> None:
        """Read and write segments as the decoder does in evaluation, for a carried window.

        Args:
            tokens: Token ids, shape (B, T), int64.
            segments: Place of each row in its lane's stream.
            restart: If true, the lanes are emptied first.
        """
        decoder = self.decoder
        if restart:
            for streams in self.allocate(tokens, segments.n_lanes):
                if streams is not None:
                    streams.restart(segments)
            if decoder.training:
                logger.warning(
                    "the carried window is rebuilt by the side network as it is now, not as it was when the tokens "
                    "were read; a snapshot (--memory-snapshot) is exact"
                )
        training = [layer for layer in decoder.layers if layer.training]
        try:
            decoder.layers.eval()  # without dropout, and not the decoder, whose mode selects the memory
            decoder(tokens, segments=segments, features_only=True)
        finally:
            for layer in training:
                layer.train()

    def clear(self) -> None:
        """Forget everything and free it."""
        self.memories.clear()
        self.graphs.clear()
        self.windows.clear()
