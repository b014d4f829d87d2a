"""The memories of training and of evaluation, which never see each other's tokens."""

import logging
from typing import Dict, Iterator, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..data.segments import Segments
from ..files import printable
from .bank import MemoryBank
from .factory import MemoryFactory
from .stream_memory import StreamMemory

logger = logging.getLogger(__name__)


class SplitMemories:
    """One memory for training and one for evaluation, each allocated when it is first needed.

    Args:
        factory: Factory that makes them.

    Attributes:
        base: Bank of one lane whose content every stream of evaluation starts with; None for empty memories.
    """

    def __init__(self, factory: MemoryFactory):
        self.factory = factory
        self.base: Optional[MemoryBank] = None
        self._memories: Dict[bool, StreamMemory] = {}

    def __iter__(self) -> Iterator[StreamMemory]:
        return iter(self._memories.values())

    def get(self, training: bool) -> Optional[StreamMemory]:
        """Return the memory of training or evaluation; None before anything was written."""
        return self._memories.get(training)

    def fitting(self, training: bool, lanes: int, device: torch.device) -> Optional[StreamMemory]:
        """Return the memory of training or evaluation if it has as many lanes, for a model on a device; else None."""
        memory = self._memories.get(training)
        fits = memory is not None and (memory.lanes is None or memory.lanes >= lanes)
        return memory if fits and memory.bank.placement == self.factory.placement(device) else None

    def allocate(self, training: bool, lanes: int, like: Tensor, keep_reads: bool = False) -> StreamMemory:
        """Return the memory of training or evaluation, allocated if there is none that fits.

        Args:
            training: Whether the memory of training is meant.
            lanes: Number of lanes that a batch may have.
            like: Keys of the model, whose dtype and device a new memory takes.
            keep_reads: Whether a backward pass may come after later batches were written.
        """
        memory = self.fitting(training, lanes, like.device)
        if memory is not None:
            return memory
        if training in self._memories:
            logger.warning("the memory is allocated again for %d lanes on %s", lanes, like.device)
        memory = self._memories[training] = self.factory.memory(lanes, like, keep_reads)
        memory.base = None if training else self.base
        logger.info(
            "memory for %s: %d lanes x %d tokens%s (%s) on %s, %.1f MiB, search by %s",
            "training" if training else "evaluation",
            memory.bank.lanes,
            self.factory.settings.size,
            f" x {memory.bank.layers} layers" if memory.bank.layers > 1 else "",
            str(memory.bank.keys.dtype).split(".")[-1],
            printable(str(memory.bank.placement)),
            memory.bank.nbytes / 2**20,
            memory.chunk_reader.search.name,
        )
        if memory.token_streams is not None:
            tokens = memory.token_streams.bank
            size, search = tokens.nbytes / 2**20, memory.token_streams.reader.search.name
            logger.info("token memory: %d lanes x %d tokens, %.1f MiB, search by %s", lanes, tokens.size, size, search)
        return memory

    def needs_replay(self, training: bool, segments: Segments) -> np.ndarray:
        """Return which rows' memory is not where their segment starts, shape (B,), bool."""
        memory = self._memories.get(training)
        if memory is None or (memory.lanes is not None and memory.lanes < segments.n_lanes):
            return segments.starts > 0
        return memory.needs_replay(segments)

    def contents(self, training: bool, lane: int) -> Optional[Tuple[Tensor, Tensor, Tensor]]:
        """Return keys, values and mean keys that a lane holds, oldest chunk first; None before anything was written."""
        memory = self._memories.get(training)
        if memory is None:
            return None
        memory.flush()
        return memory.bank.contents(lane)

    def clear(self) -> None:
        """Forget everything and free it."""
        self._memories.clear()
