"""The carried window (``--carry-window C``): every layer also attends to the last C tokens before a segment.

Backbones whose positions are relative (RoPE, ALiBi) keep the keys and values of these tokens, as in Transformer-XL (Dai
et al., 2019), and every token attends to the C tokens before it: results depend neither on where a text is cut into
segments nor on how many tokens are read at once. Backbones with a table of positions keep the tokens themselves, which
are encoded again in front of each segment, without the memory.

Legend: B rows of a batch, L lanes, C tokens that are carried, S columns of the caches before a segment, T tokens of a
segment, H_kv key/value heads, d width of a head.
"""

from abc import abstractmethod
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..data.segments import Segments
from ..memory.lane_streams import LaneStreams
from ..modules.cached_attention import FIRST, LEFT_PADDING, SLIDING_WINDOW, SegmentState
from ..modules.sliding_window import SINKS, SlidingWindow
from ..modules.staging import staged
from .window_caches import Caches, attention_modules, encode_window

Tensors = Dict[str, Tensor]

_TOKENS = "tokens"  # name of what is carried in place of keys
_PENDING, _FIRST = "pending.", "first."  # prefixes of the names of what is held back, and of attention sinks


class CarriedSegment(SegmentState):
    """Incremental state of a segment behind a carried window.

    Args:
        before: Caches of the carried tokens, right-aligned.
        lengths: Number of carried tokens of each row, shape (B,), int64.
        positions: Number of tokens of each row's stream that were read, shape (B,), int64.
        device: Device of the model.
        window: Number of tokens before each token that it attends to; None for all in the caches.
        tokens: Carried tokens, shape (B, S), int64, where they were encoded again; otherwise None.

    Attributes:
        lengths: As above.
        positions: As above.
        tokens: As above.
        start: Position of the first token of each row in its window, shape (B,), int64, on the host, or 0 for all.
    """

    def __init__(
        self,
        before: Caches,
        lengths: np.ndarray,
        positions: np.ndarray,
        device: torch.device,
        window: Optional[int] = None,
        tokens: Optional[Tensor] = None,
    ):
        longest = int(lengths.max(initial=0))
        entries = dict(before)
        if window is not None:
            entries[SLIDING_WINDOW] = {"window": window_behind(window, positions, device)}
        if lengths.min(initial=longest) < longest:
            entries[LEFT_PADDING] = {"left": staged(longest - lengths, device)}
        super().__init__(entries)
        self.lengths, self.positions, self.tokens, self._device = lengths, positions, tokens, device
        self.start: Any = lengths if longest else 0

    def again(self) -> "CarriedSegment":
        """Return the same state before anything was appended."""
        return CarriedSegment(self, self.lengths, self.positions, self._device, tokens=self.tokens)


class Carried(NamedTuple):
    """What a batch carries to its next segments.

    Attributes:
        lengths: Number of tokens of each row, shape (B,), int64, at most C.
        tensors: Tensors by name, shape (B, ..., at most C, width), right-aligned; those of attention sinks, whose names
            start with ``first.``, have the width of these.
    """

    lengths: np.ndarray
    tensors: Tensors


def window_behind(size: int, positions: np.ndarray, device: torch.device) -> SlidingWindow:
    """Return the sliding window of new tokens.

    Args:
        size: Number of tokens before each token that it attends to.
        positions: Number of tokens of each row's stream that were read, shape (B,), int64.
        device: Device of the model.
    """
    started = bool(positions.min(initial=SINKS) >= SINKS)
    return SlidingWindow(size, staged(positions, device), started)


class CarriedWindow(LaneStreams):
    """The last tokens of each lane's stream.

    For each batch: ``state = window.open(segments)``, backbone and side network read the segments with this incremental
    state, then ``window.write(segments, tokens, state)``.

    Args:
        decoder: Decoder with a ``backbone`` and a ``side_network``.
        lanes: Number of lanes.
        size: Number of tokens that are carried, C.
        for_memory: Whether the segments are only encoded for the memory, by the backbone's layers below the memory
            layer.

    Attributes:
        lengths: Number of tokens that each lane carries, shape (L,), int64.
        device: Device of what is carried.
    """

    def __init__(self, decoder, lanes: int, size: int, for_memory: bool = False):
        super().__init__(lanes)
        self.decoder, self.size, self.for_memory, self.device = decoder, size, for_memory, decoder.device
        self.lengths = np.zeros(lanes, dtype=np.int64)
        self._skipped = np.zeros(lanes, dtype=np.int64)  # tokens of the stream before the first that was read
        self._tensors: Tensors = {}  # (L, ..., C, width), right-aligned; of sinks (L, ..., SINKS, width)

    @abstractmethod
    def caches(self, lanes: np.ndarray) -> CarriedSegment:
        """Return the state of a segment in each of some lanes.

        Args:
            lanes: Numbers of the lanes, shape (B,), int64.
        """

    @abstractmethod
    def columns(self, tokens: Tensor, state: CarriedSegment) -> Tensors:
        """Return what could be carried on, by name, shape (B, ..., S + T, width).

        Args:
            tokens: Token ids of the segments, shape (B, T), int64.
            state: State with which they were read.
        """

    def open(self, segments: Segments) -> CarriedSegment:
        """Bring each lane to the start of its segment and return the state in which backbone and side network read it.

        Args:
            segments: Places of the batch's rows.

        Raises:
            MemoryOutOfStep: A segment does not start where its lane's stream ends.
        """
        self.enter(segments)
        return self.caches(segments.lanes)

    def write(self, segments: Segments, tokens: Tensor, state: CarriedSegment) -> None:
        """Carry the last tokens of a batch on, as soon as its lanes continue.

        Args:
            segments: Places of the rows.
            tokens: Token ids, shape (B, T), int64; padding follows a row's tokens.
            state: State with which they were read.
        """
        lengths = np.minimum(self.size, state.lengths + segments.lengths)
        behind = int(state.lengths.max(initial=0)) + segments.lengths  # column behind each row's last token, (B,)
        tensors = {
            name: x.detach().clone() if name.startswith(_FIRST) else _last(x, behind, int(lengths.max()))
            for name, x in self.columns(tokens, state).items()
        }
        self.hold_back(segments, Carried(lengths, tensors))

    def start_stream(self, lane: int, stream: int, position: int) -> None:
        super().start_stream(lane, stream, position)
        self.lengths[lane], self._skipped[lane] = 0, position

    def store(self, segments: Segments, written: Carried, rows: List[int]) -> None:
        lanes = segments.lanes[rows]
        to, of = staged(np.stack([lanes, np.array(rows, dtype=np.int64)]), self.device)
        for name, x in written.tensors.items():
            columns = self._columns(name)
            if name not in self._tensors:
                self._tensors[name] = x.new_zeros(self.lanes, *x.shape[1:-2], columns, x.size(-1))
            stored = self._tensors[name][..., columns - x.size(-2) :, :]
            stored.index_copy_(0, to, x.index_select(0, of))
        self.lengths[lanes] = written.lengths[rows]

    def take(self, lanes: Tensor, name: str, columns: int) -> Tensor:
        """Return the last columns of some lanes (B,) of a stored tensor, a copy of shape (B, ..., columns, width)."""
        return self._tensors[name][..., self._columns(name) - columns :, :].index_select(0, lanes)

    def positions(self, lanes: np.ndarray) -> np.ndarray:
        """Return the number of tokens of some lanes' streams that were read and stored, shape (B,), int64."""
        return self.stream_ends[lanes] - self._skipped[lanes]

    def _columns(self, name: str) -> int:
        """Return the number of columns of a stored tensor."""
        return SINKS if name.startswith(_FIRST) else self.size

    @property
    def nbytes(self) -> int:
        """Number of bytes of the stored tensors."""
        return sum(x.numel() * x.element_size() for x in self._tensors.values())

    def state(self) -> Tuple[Tensors, Dict[str, Any]]:
        tensors, places = dict(self._tensors), {"lengths": self.lengths.tolist(), **self.places()}
        places["skipped"] = self._skipped.tolist()
        if self._pending is not None:
            carried = self._pending[1]
            tensors.update((_PENDING + name, x) for name, x in carried.tensors.items())
            places["pending_lengths"] = carried.lengths.tolist()
        return tensors, places

    def restore(self, tensors: Tensors, places: Dict[str, Any]) -> None:
        if "skipped" not in places:
            raise ValueError("it has no attention sinks, so an earlier version wrote it: leave it out and use replay")
        stored = {name: x for name, x in tensors.items() if not name.startswith(_PENDING)}
        pending = {name[len(_PENDING) :]: x for name, x in tensors.items() if name.startswith(_PENDING)}
        for name, x in stored.items():
            if (x.size(0), x.size(-2)) != (self.lanes, self._columns(name)):
                raise ValueError(
                    f"{name} is of {x.size(0)} lanes of {x.size(-2)} tokens, and the carried window has {self.lanes} "
                    f"of {self.size} (--carry-window)"
                )
        if any(x.size(-2) > self._columns(name) for name, x in pending.items()):
            raise ValueError(f"more tokens are held back than the {self.size} of --carry-window")
        device = self.decoder.device
        self._tensors = {name: x.to(device, copy=True) for name, x in stored.items()}
        self.lengths, self._skipped = (np.array(places[name], dtype=np.int64) for name in ("lengths", "skipped"))
        lengths = np.array(places.get("pending_lengths", []), dtype=np.int64)
        held_back = {name: x.to(device, copy=True) for name, x in pending.items()}
        self.restore_places(places, Carried(lengths, held_back))


class CarriedKeys(CarriedWindow):
    """The last tokens of each lane's stream as the keys and values of every layer, for relative positions."""

    def __init__(self, decoder, lanes: int, size: int, for_memory: bool = False):
        super().__init__(decoder, lanes, size, for_memory)
        self._modules = attention_modules(decoder)

    def caches(self, lanes: np.ndarray) -> CarriedSegment:
        before: Caches = {}
        lengths = self.lengths[lanes]
        S = int(lengths.max(initial=0))
        if S:
            numbers = staged(lanes, self.device)
            for i, module in enumerate(self._modules):
                names = _names(i)
                if names["prev_key"] in self._tensors:
                    columns = {entry: SINKS if entry in FIRST else S for entry in names}
                    module.set_cache(before, {x: self.take(numbers, name, columns[x]) for x, name in names.items()})
        return CarriedSegment(before, lengths, self.positions(lanes), self.decoder.device, self.size)

    def columns(self, tokens: Tensor, state: CarriedSegment) -> Tensors:
        columns: Tensors = {}
        for i, module in enumerate(self._modules):
            cache = module.extended_cache(state)
            if cache:
                columns.update((name, cache[entry]) for entry, name in _names(i).items())
        return columns


def _names(module: int) -> Dict[str, str]:
    """Return the names under which the entries of a module's cache are carried."""
    carried = {"prev_key": f"{module}.keys", "prev_value": f"{module}.values"}
    return {**carried, **{entry: f"{_FIRST}{module}.{entry}" for entry in FIRST}}


class CarriedTokens(CarriedWindow):
    """The last tokens of each lane's stream, which are encoded again, for positions from a table."""

    def caches(self, lanes: np.ndarray) -> CarriedSegment:
        lengths = self.lengths[lanes]
        if not lengths.any():
            return CarriedSegment({}, lengths, self.positions(lanes), self.decoder.device)
        carried = self.take(staged(lanes, self.device), _TOKENS, int(lengths.max()))[..., 0]  # (B, S)
        pieces = [row[len(row) - length :] for row, length in zip(carried, lengths.tolist())]
        with torch.no_grad():
            tokens, before, _ = encode_window(self.decoder, pieces, for_memory=self.for_memory)
        return CarriedSegment(before, lengths, self.positions(lanes), self.decoder.device, tokens=tokens)

    def columns(self, tokens: Tensor, state: CarriedSegment) -> Tensors:
        tokens = tokens if state.tokens is None else torch.cat([state.tokens, tokens], dim=1)
        return {_TOKENS: tokens[..., None]}


def _last(x: Tensor, behind: np.ndarray, columns: int) -> Tensor:
    """Return the columns of each row of x (B, ..., width) up to one, a copy without gradient (B, ..., columns, width).

    Args:
        x: Rows whose columns are the last dimension but one.
        behind: Number of the column behind the last one of each row, shape (B,), int64. Where there are fewer before
            it, what comes first means nothing.
        columns: Number of columns.
    """
    x, end = x.detach(), int(behind.max())
    if (behind == end).all():
        return x[..., end - columns : end, :].clone()
    index = staged(np.maximum(behind[:, None] - columns + np.arange(columns), 0), x.device)
    index = index.view(len(index), *[1] * (x.dim() - 3), columns, 1)
    return x.gather(-2, index.expand(*x.shape[:-2], columns, x.size(-1)))


def new_carried_window(decoder, lanes: int, size: int, for_memory: bool = False) -> CarriedWindow:
    """Return an empty carried window of the kind that suits the backbone's positions.

    Args:
        decoder: A :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder`.
        lanes: Number of lanes.
        size: Number of tokens that are carried, C.
        for_memory: Whether the segments are only encoded for the memory.
    """
    kind = CarriedKeys if decoder.backbone.has_relative_positions else CarriedTokens
    return kind(decoder, lanes, size, for_memory)


class SplitWindows:
    """The carried windows of training and of evaluation, each made when it is first needed.

    Args:
        decoder: Decoder that they belong to.
        size: Number of tokens that are carried, C; 0 for none.
    """

    def __init__(self, decoder, size: int):
        self.decoder, self.size = decoder, size
        self._windows: Dict[bool, CarriedWindow] = {}

    def get(self, training: bool) -> Optional[CarriedWindow]:
        """Return the window of training or evaluation; None before anything was read."""
        return self._windows.get(training)

    def allocate(self, training: bool, lanes: int) -> Optional[CarriedWindow]:
        """Return the window of training or evaluation with at least a number of lanes; None where none is carried."""
        if not self.size:
            return None
        window = self._windows.get(training)
        if window is None or window.lanes < lanes or window.device != self.decoder.device:
            window = self._windows[training] = new_carried_window(self.decoder, lanes, self.size)
        return window

    def needs_replay(self, training: bool, segments: Segments) -> np.ndarray:
        """Return which rows' window is not where their segment starts, shape (B,), bool."""
        window = self._windows.get(training)
        if window is None or window.lanes < segments.n_lanes:
            return (segments.starts > 0) & bool(self.size)
        return window.needs_replay(segments)

    def clear(self) -> None:
        """Forget everything and free it."""
        self._windows.clear()
