"""The token memory of one split: a ring of hidden states and tokens for the stream of each lane."""

from typing import Any, Dict, List, Tuple

from torch import Tensor

from ..data.segments import Segments
from ..modules.token_mixture import TokenReads
from .lane_streams import LaneStreams
from .token_bank import TokenBank, TokenStates
from .token_reader import TokenReader


class TokenStreams(LaneStreams):
    """Streams of tokens with their final hidden states, one lane each, in step with the memory of keys and values.

    Args:
        bank: Bank that stores them.
        reader: What reads them.
    """

    def __init__(self, bank: TokenBank, reader: TokenReader):
        super().__init__(bank.lanes)
        self.bank, self.reader = bank, reader

    def start_stream(self, lane: int, stream: int, position: int) -> None:
        super().start_stream(lane, stream, position)
        self.bank.reset(lane, position)

    def store(self, segments: Segments, written: TokenStates, rows: List[int]) -> None:
        for row in rows:
            lane, length = int(segments.lanes[row]), int(segments.lengths[row])
            self.bank.append(lane, written.hidden[row, :length], written.tokens[row, :length])

    def read(self, segments: Segments, states: TokenStates) -> TokenReads:
        """Return what the tokens of a batch find in their lanes, and before them in the batch.

        Args:
            segments: Places of the batch's rows, at which the lanes are.
            states: Tokens of the batch.
        """
        return self.reader.read_segments([self.bank.past(lane) for lane in segments.lanes.tolist()], states)

    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
        """Return what is stored and what is held back, bit by bit: tensors by name, and the rest as JSON types."""
        tensors, counters = self.bank.state()
        if self._pending is not None:
            written = self._pending[1]
            tensors.update({"pending.hidden": written.hidden, "pending.tokens": written.tokens})
        return tensors, {"bank": counters, **self.places()}

    def restore(self, tensors: Dict[str, Tensor], places: Dict[str, Any]) -> None:
        """Replace the content by that of another token memory.

        Args:
            tensors: Tensors of its :meth:`state`; its bank had this one's sizes.
            places: The rest of its state.

        Raises:
            ValueError: They are not those of such a token memory.
        """
        self.bank.restore(tensors, places["bank"])
        written = None
        if places["pending"] is not None:
            device = self.bank.hidden.device
            written = TokenStates(*(tensors[f"pending.{name}"].to(device, copy=True) for name in TokenStates._fields))
            self.bank.require_symbols(written.tokens)
        self.restore_places(places, written)
