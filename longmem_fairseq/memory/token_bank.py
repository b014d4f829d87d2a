"""The token memory's ring: final hidden states of past tokens, and the tokens (docs/method.md, "The token memory").

Entry i is a hidden state and the token that was its input. What it predicts with is its *follower*, the token of entry
i + 1, so an entry can be read as soon as the next one is known.

Legend: L lanes, N tokens that a lane holds, D width of a hidden state, T tokens of a segment, m tokens held.
"""

from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HALF = torch.float16  # holds numbers of unit vectors with 11 bits


def stored(hidden: Tensor, dtype: torch.dtype = HALF) -> Tensor:
    """Return hidden states (..., D) as a bank of a precision holds them: of length 1."""
    return F.normalize(hidden.detach().float(), dim=-1).to(dtype)


class TokenStates(NamedTuple):
    """Tokens with their hidden states, as a token memory takes them.

    Attributes:
        hidden: Final hidden states as :func:`stored` returns them, shape (B, T, D).
        tokens: Token ids that were their inputs, shape (B, T), int64.
    """

    hidden: Tensor
    tokens: Tensor


class Past(NamedTuple):
    """What a lane holds, oldest first.

    Attributes:
        hidden: Hidden states, shape (m, D), in one piece or several.
        tokens: Token ids that were their inputs, shape (m,), int64.
    """

    hidden: Tuple[Tensor, ...]
    tokens: Tensor


class TokenBank:
    """A ring buffer of hidden states and tokens for each lane, allocated once.

    Token i of a stream is always stored in slot i mod N, so what a lane holds depends only on the tokens that it was
    given. The bank takes ``L * N * (bytes(dtype) * D + 8)`` bytes.

    Args:
        lanes: Number of lanes, L.
        width: Width of a hidden state, D.
        size: Number of tokens that a lane holds, N.
        device: Device of the bank.
        dtype: Precision of the hidden states.
        symbols: Number of symbols, which token ids are below; None where it is not known.

    Attributes:
        hidden: Hidden states of length 1, shape (L, N, D).
        tokens: Token ids that were their inputs, shape (L, N), int64.
        first: Number of the first token that each lane was given since its reset, shape (L,), int64.
        position: Number of tokens of each lane's stream so far, shape (L,), int64.
    """

    def __init__(
        self,
        lanes: int,
        width: int,
        size: int,
        device: torch.device = torch.device("cpu"),
        dtype: torch.dtype = HALF,
        symbols: Optional[int] = None,
    ):
        self.lanes, self.width, self.size, self.symbols = lanes, width, size, symbols
        self.hidden = torch.zeros(lanes, size, width, dtype=dtype, device=device)
        self.tokens = torch.zeros(lanes, size, dtype=torch.int64, device=device)
        self.first = np.zeros(lanes, dtype=np.int64)
        self.position = np.zeros(lanes, dtype=np.int64)

    @property
    def held(self) -> np.ndarray:
        """Number of tokens that each lane holds, shape (L,), int64."""
        return np.minimum(self.position - self.first, self.size)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the buffers."""
        return sum(x.numel() * x.element_size() for x in (self.hidden, self.tokens))

    def reset(self, lane: int, position: int = 0) -> None:
        """Empty a lane; ``position`` is the number of the stream's next token."""
        self.first[lane] = self.position[lane] = position

    def append(self, lane: int, hidden: Tensor, tokens: Tensor) -> None:
        """Write tokens into a lane.

        Args:
            lane: Number of the lane.
            hidden: Hidden states as :func:`stored` returns them, shape (T, D).
            tokens: Token ids that were their inputs, shape (T,), int64.
        """
        T = len(tokens)
        kept = min(T, self.size)
        begin = int(self.position[lane]) + T - kept
        slots = torch.arange(begin, begin + kept, device=self.tokens.device) % self.size
        self.hidden[lane, slots] = hidden[T - kept :].to(self.hidden)
        self.tokens[lane, slots] = tokens[T - kept :].to(self.tokens)
        self.position[lane] += T

    def past(self, lane: int) -> Past:
        """Return what a lane holds, without a copy of the hidden states."""
        held, oldest = int(self.held[lane]), int(self.position[lane] - self.held[lane])
        begin = oldest % self.size
        spans = [(begin, min(begin + held, self.size)), (0, begin + held - self.size)]
        hidden, tokens = ([x[lane, a:b] for a, b in spans if a < b] for _, x in self._buffers())
        return Past(tuple(hidden), torch.cat(tokens) if tokens else self.tokens[lane, :0])

    def contents(self, lane: int) -> Tuple[Tensor, Tensor]:
        """Return what a lane holds, oldest first: hidden states (m, D), and the tokens that were their inputs (m,)."""
        hidden, tokens = self.past(lane)
        if len(hidden) == 1:
            return hidden[0], tokens
        return torch.cat(hidden) if hidden else self.hidden[lane, :0], tokens

    def load(self, lane: int, other: "TokenBank") -> None:
        """Replace the content of a lane by that of a bank of one lane and the same size."""
        hidden, tokens = other.contents(0)
        self._place(lane, hidden, tokens, int(other.first[0]), int(other.position[0]))

    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, List[int]]]:
        """Return all that the bank holds, bit by bit: tensors by name, without those of empty lanes, and counters."""
        tensors = {}
        for lane in np.flatnonzero(self.held).tolist():
            tensors[f"hidden.{lane}"], tensors[f"tokens.{lane}"] = self.contents(lane)
        return tensors, {name: getattr(self, name).tolist() for name in ("first", "position")}

    def restore(self, tensors: Dict[str, Tensor], counters: Dict[str, List[int]]) -> None:
        """Replace the content by that of another bank.

        Args:
            tensors: Tensors of its :meth:`state`; it had the same sizes, on any device.
            counters: Counters of its state.

        Raises:
            ValueError: They are not those of a bank of this size.
        """
        if {len(counters[name]) for name in ("first", "position")} != {self.lanes}:
            raise ValueError(f"its token memory does not have {self.lanes} lanes")
        for lane, (first, position) in enumerate(zip(counters["first"], counters["position"])):
            hidden, tokens = (tensors.get(f"{name}.{lane}", x[lane, :0]) for name, x in self._buffers())
            if not 0 <= first <= position or len(tokens) != min(position - first, self.size):
                raise ValueError(f"its token memory has {len(tokens)} tokens, from {first} to {position}")
            self.require_symbols(tokens)
            self._place(lane, hidden, tokens, first, position)

    def require_symbols(self, tokens: Tensor) -> None:
        """Refuse token ids, of any shape, that are not those of symbols.

        Raises:
            ValueError: They are not integers, or there are not as many symbols.
        """
        symbols = float("inf") if self.symbols is None else self.symbols
        if tokens.dtype != torch.int64:
            raise ValueError(f"the ids in its token memory are {tokens.dtype}, not int64")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < symbols:
            raise ValueError("its token memory has ids outside the dictionary")

    def replace(self, lane: int, hidden: Tensor, tokens: Tensor, position: int) -> None:
        """Replace the content of a lane by tokens that end where the stream does.

        Args:
            lane: Number of the lane.
            hidden: Hidden states as the bank holds them, shape (m, D).
            tokens: Token ids that were their inputs, shape (m,), int64.
            position: Number of tokens of the stream.
        """
        self._place(lane, hidden[-self.size :], tokens[-self.size :], position - len(tokens), position)

    def __deepcopy__(self, memo) -> "TokenBank":
        """Return a bank that holds the same; only slots that hold tokens are copied."""
        other = TokenBank(self.lanes, self.width, self.size, self.hidden.device, self.hidden.dtype, self.symbols)
        other.restore(*self.state())
        return other

    def _buffers(self):
        return (("hidden", self.hidden), ("tokens", self.tokens))

    def _place(self, lane: int, hidden: Tensor, tokens: Tensor, first: int, position: int) -> None:
        """Put the last tokens of a stream, oldest first, into their slots."""
        self.first[lane], self.position[lane] = first, position
        slots = torch.arange(position - len(tokens), position, device=self.tokens.device) % self.size
        self.hidden[lane, slots] = hidden.to(self.hidden)
        self.tokens[lane, slots] = tokens.to(self.tokens)
