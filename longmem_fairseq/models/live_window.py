"""Incremental decoding: the window that is still being written, with its caches, and the memory behind it.

A window has at most T inputs that are not in the memory yet. The next input moves the older half of them into the
memory; the rest is encoded again as a window of its own, from position 0. So a token is always scored as
:meth:`LongMemDecoder.forward` scores it, given the memory of all that was moved and a segment that starts where the
window does. With a carried window all T are moved, and stay in the window as far as they are carried: text is cut as
evaluation cuts it.

Rows of a batch differ in length: their caches end at the same column, and start with padding.

Legend: B rows (hypotheses), S columns of the caches, T inputs of a segment, C tokens of a carried window, H_kv
key/value heads, d width of a head.
"""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.segments import Segments
from ..memory.bank import MemoryBank
from ..memory.branches import MemoryBranches
from ..memory.reader import BatchReader
from ..memory.token_bank import TokenStates
from ..modules.cached_attention import FIRST, LEFT_PADDING, SLIDING_WINDOW
from ..modules.staging import staged
from ..modules.token_mixture import TokenReads
from ..progress import token_bar
from .carried_window import CarriedWindow, new_carried_window, window_behind
from .reading import DocumentReader, encode_side_by_side
from .window_caches import align_caches, align_right, attention_modules, encode_window, pad

WINDOW = "longmem.window"  # entry of an incremental state that holds the LiveWindow


class LiveWindow:
    """The live window of each row of a batch; one object per incremental state.

    Args:
        decoder: A :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder`, or another decoder with a backbone, a
            ``side_network`` and a ``dictionary``.
        size: Number of inputs in a segment, T.
        rows: Number of rows, B.
        branches: Memories of the rows, which are read and written; None for none.
        carried: Number of tokens of a carried window, C; 0 for none.

    Attributes:
        tokens: Inputs in the windows, shape (B, S), int64, right-aligned.
        lengths: Number of inputs of each row, those that are carried included, shape (B,), int64.
        live: Number of inputs of each row that are not in the memory yet, shape (B,), int64.
        positions: Number of inputs of each row that were read, those before the window included, shape (B,), int64.
        branches: Memories of the rows, or None.
        hidden: Hidden states, as a token memory holds them, of the inputs that are not in the memory yet, shape
            (B, columns, D), right-aligned; None without a token memory.

    Raises:
        ValueError: A window cannot have this size.
    """

    def __init__(self, decoder, size: int, rows: int, branches: Optional[MemoryBranches], carried: int = 0):
        longest = decoder.backbone.max_positions
        if size < 2:
            raise ValueError(f"--tokens-per-sample {size} is too small to generate: a window has at least 2 tokens")
        if longest is not None and size > longest:
            raise ValueError(f"--tokens-per-sample {size} is longer than the backbone's {longest} positions: lower it")
        self.decoder, self.size, self.carried = decoder, size, carried
        self._keeps_keys = carried > 0 and decoder.backbone.has_relative_positions
        self.branches = branches
        self.tokens = torch.zeros(rows, 0, dtype=torch.int64, device=decoder.device)
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.live = np.zeros(rows, dtype=np.int64)
        self.positions = np.zeros(rows, dtype=np.int64)
        self.hidden: Optional[Tensor] = None
        if branches is not None and branches.token_reader is not None:
            self.hidden = self.tokens.new_zeros(rows, 0, decoder.backbone.width, dtype=branches.token_dtype)

    def step(self, tokens: Tensor, state: Dict[str, Any]) -> List[Tensor]:
        """Read one more input of each row.

        Args:
            tokens: Token ids, shape (B, 1), int64.
            state: Incremental state of the decoder, changed in place.

        Returns:
            States of the side network (see ``side_network``).
        """
        full = np.flatnonzero(self.live == self.size)
        if len(full):
            self._roll_over(full.tolist(), state)
        S = self.tokens.size(1)
        left = staged(S - self.lengths, tokens.device) if self.lengths.min() < S else None  # (B,)
        state[LEFT_PADDING] = {"left": left}
        if self._keeps_keys:
            state[SLIDING_WINDOW] = {"window": window_behind(self.carried, self.positions, self.decoder.device)}
        encoded = self.decoder.backbone.encode(tokens, state, self.lengths)
        states = self.decoder.side_network(encoded, self.reader(), state)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)  # (B, S + 1)
        self.lengths, self.live, self.positions = self.lengths + 1, self.live + 1, self.positions + 1
        if self.hidden is not None:
            hidden = self.decoder.predictor.token_states(encoded, tokens).hidden
            self.hidden = torch.cat([self.hidden, hidden], dim=1)[:, -int(self.live.max()) :]
        return states

    def read_tokens(self) -> Optional[TokenReads]:
        """Return what the last input of each row reads from the row's token memory; None without one."""
        if self.hidden is None:
            return None
        states = TokenStates(self.hidden, self.tokens[:, -self.hidden.size(1) :])
        return self.branches.read_windows(states, staged(self.live, self.tokens.device))

    def fill(self, pieces: Sequence[Tensor], state: Dict[str, Any], carried: Optional[CarriedWindow] = None) -> None:
        """Read the first inputs of all rows into their empty windows.

        Args:
            pieces: Inputs of each row, shape (length,), int64, length < T.
            state: Incremental state of the decoder, changed in place.
            carried: Carried window of the inputs before, each row a lane; None for none.
        """
        self.live = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self.lengths = self.positions = self.live
        if carried is not None:
            self._fill_behind(pieces, state, carried)
        elif self.live.any():
            self.tokens, caches, hidden = encode_window(self.decoder, pieces, self.reader())
            state.update(caches)
            self.hidden = hidden if self.hidden is not None else None

    def _fill_behind(self, pieces: Sequence[Tensor], state: Dict[str, Any], carried: CarriedWindow) -> None:
        """Read the first inputs of all rows behind a carried window; arguments are those of :meth:`fill`."""
        carried.flush()
        before = carried.caches(np.arange(len(pieces)))
        S = int(before.lengths.max())
        self.lengths, self.positions = self.live + before.lengths, self.live + before.positions
        self.tokens = before.tokens if before.tokens is not None else self.tokens.new_zeros(len(pieces), S)
        if not self.live.any():
            state.update(before)
            return
        padded = pad(self.decoder, pieces)  # (B, P)
        padding = padded.size(1) - self.live
        encoded = self.decoder.backbone.encode(padded, before, before.start)
        self.decoder.side_network(encoded, self.reader(), before)
        if self.hidden is not None:
            states = self.decoder.predictor.token_states(encoded, padded)
            self.hidden = align_right(states.hidden[:, None], padding)[:, 0]
        self.tokens = align_right(torch.cat([self.tokens, padded], dim=1), padding)  # (B, S + P)
        state.update(align_caches(self.decoder, before, padding))

    def reorder(self, order: Tensor) -> None:
        """Make row i what row ``order[i]`` was."""
        self.tokens = self.tokens.index_select(0, order)
        if self.hidden is not None:
            self.hidden = self.hidden.index_select(0, order)
        rows = order.tolist()
        self.lengths, self.live, self.positions = self.lengths[rows], self.live[rows], self.positions[rows]
        if self.branches is not None:
            self.branches.reorder(rows)

    def reader(self, rows: Optional[Sequence[int]] = None) -> Optional[BatchReader]:
        """Return what attention reads from for some rows, by default all; None without a memory."""
        return None if self.branches is None else self.branches.reader(rows)

    def _roll_over(self, rows: List[int], state: Dict[str, Any]) -> None:
        """Move inputs of full windows into their memories, and drop or encode again what is before the next segment."""
        left = 0 if self.carried else self.size // 2
        index = staged(np.array(rows), self.tokens.device)
        if self.branches is not None:
            S = self.tokens.size(1)
            moved = slice(S - self.size, S - left)
            keys, values = (x[index, :, moved] for x in self.decoder.backbone.cached_memory(state))  # (b, H_kv, T, d)
            hidden = None
            if self.hidden is not None:
                columns = self.hidden.size(1)
                hidden = self.hidden[index, columns - self.size : columns - left]
            self.branches.write(rows, self.tokens[index, moved], keys, values, hidden)
        self.live[rows] = left
        if self._keeps_keys:
            self._drop(state)
        else:
            self._encode_again(rows, state)

    def _drop(self, state: Dict[str, Any]) -> None:
        """Drop the columns that no row needs: what is carried no more."""
        S = int(np.minimum(self.lengths, self.carried + self.live).max())
        self.tokens, self.lengths = self.tokens[:, self.tokens.size(1) - S :], np.minimum(self.lengths, S)
        for module in attention_modules(self.decoder):
            cache = module.cache(state)
            kept = {name: x[:, :, x.size(2) - S :].contiguous() for name, x in cache.items() if name not in FIRST}
            module.set_cache(state, {**cache, **kept})

    def _encode_again(self, rows: List[int], state: Dict[str, Any]) -> None:
        """Encode what stays in the windows of some rows again, from position 0."""
        kept = np.minimum(self.lengths[rows], self.carried or self.size // 2)
        columns = self.tokens.size(1)
        pieces = [self.tokens[row, columns - length :] for row, length in zip(rows, kept.tolist())]
        tokens, caches, hidden = encode_window(self.decoder, pieces, None if self.carried else self.reader(rows))
        index = staged(np.array(rows), self.tokens.device)
        self.lengths[rows] = kept
        S = int(self.lengths.max())
        self.tokens = _replace(self.tokens, index, tokens, S)
        if self.hidden is not None and not self.carried:  # what is carried is in the memory
            self.hidden = _replace(self.hidden, index, hidden, S)
        for module in attention_modules(self.decoder):
            new, old = module.cache(caches), module.cache(state)
            cache = {
                name: _replace(old[name].transpose(1, 2), index, x.transpose(1, 2), S).transpose(1, 2).contiguous()
                for name, x in new.items()
            }
            module.set_cache(state, cache)


def _replace(old: Tensor, rows: Tensor, new: Tensor, S: int) -> Tensor:
    """Return the last S columns of old (B, columns, ...), with some rows ending in new (b, fewer columns, ...)."""
    result = old[:, old.size(1) - S :].clone()
    result[rows, S - new.size(1) :] = new
    return result


def new_window(decoder, size: int, rows: int, base: Optional[MemoryBank] = None, use_memory: bool = True) -> LiveWindow:
    """Return empty windows with a memory for each row, as far as the decoder has a memory.

    Args:
        decoder: A :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder`.
        size: Number of inputs in a full window, T.
        rows: Number of rows, B.
        base: Bank of one lane that all rows start with, which is only read; None for an empty memory.
        use_memory: Whether the rows read and write a memory.

    Raises:
        ValueError: A window cannot have this size.
    """
    branches = DocumentReader(decoder, size).branches(rows, base) if use_memory else None
    return LiveWindow(decoder, size, rows, branches, decoder.lane_state.windows.size)


@torch.no_grad()
def prefill(
    decoder, inputs: Sequence[Tensor], size: int, base: Optional[MemoryBank] = None, use_memory: bool = True
) -> Dict[str, Any]:
    """Read what precedes the first input of generation.

    Whole segments are written into the memory, encoded side by side and only as far up as the memory layer; the rest
    becomes the live window. That is how :meth:`LongMemDecoder.forward` reads a document of the same tokens.

    Args:
        decoder: A :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder` in evaluation mode.
        inputs: Inputs of each row, shape (length,), int64, from the document's start (usually end-of-sentence); may be
            empty.
        size: Number of tokens in a segment, T.
        base: Bank of one lane that all rows start with, which is only read; None for an empty memory.
        use_memory: Whether the rows read and write a memory.

    Returns:
        An incremental state with which generation continues.

    Raises:
        ValueError: A window cannot have this size.
    """
    window = new_window(decoder, size, len(inputs), base, use_memory)
    whole = [len(tokens) // size for tokens in inputs]
    carried = None
    if window.carried:
        carried = _read_segments(window, inputs, whole)
    elif window.branches is not None:
        _write_segments(window, inputs, whole)
    state: Dict[str, Any] = {WINDOW: {"window": window}}
    window.fill([tokens[n * size :] for tokens, n in zip(inputs, whole)], state, carried)
    return state


def _read_segments(window: LiveWindow, inputs: Sequence[Tensor], whole: Sequence[int]) -> CarriedWindow:
    """Read the whole segments of all rows behind a carried window, which is returned, each row a lane."""
    decoder, size = window.decoder, window.size
    carried = new_carried_window(decoder, len(inputs), window.carried)
    with token_bar(sum(whole) * size, "reading the prompt") as progress:
        for s in range(max(whole, default=0)):
            rows = [row for row, n in enumerate(whole) if n > s]
            tokens = torch.stack([inputs[row][s * size : (s + 1) * size] for row in rows]).to(decoder.device)
            place = np.full(len(rows), s * size)
            segments = Segments(rows, rows, place, np.full(len(rows), size), len(inputs))
            state = carried.open(segments)
            encoded = decoder.backbone.encode(tokens, state, state.start)
            decoder.side_network(encoded, window.reader(rows), state)
            if window.branches is not None:
                states = decoder.predictor.token_states(encoded, tokens)
                window.branches.write(rows, tokens, encoded.keys, encoded.values, states and states.hidden)
            carried.write(segments, tokens, state)
            progress.update(tokens.numel())
    return carried


def _write_segments(window: LiveWindow, inputs: Sequence[Tensor], whole: Sequence[int]) -> None:
    """Write the whole segments of all rows into their memories."""
    size, decoder = window.size, window.decoder
    all_layers = window.hidden is not None
    places = [(s, row) for s in range(max(whole, default=0)) for row, n in enumerate(whole) if n > s]
    pieces = [inputs[row][s * size : (s + 1) * size] for s, row in places]
    with token_bar(len(places) * size, "reading the prompt") as progress:
        for numbers, tokens, encoded in encode_side_by_side(decoder.backbone, pieces, all_layers):
            states = decoder.predictor.token_states(encoded, tokens)
            batch = [places[number] for number in numbers]
            for s in sorted({s for s, _ in batch}):
                members = [i for i, (segment, _) in enumerate(batch) if segment == s]
                rows = [batch[i][1] for i in members]
                hidden = None if states is None else states.hidden[members]
                window.branches.write(rows, tokens[members], encoded.keys[members], encoded.values[members], hidden)
            progress.update(tokens.numel())


def expand_state(decoder, state: Dict[str, Any], rows: int) -> None:
    """Repeat each row of a state, copies of a row side by side.

    Args:
        decoder: Decoder that the state belongs to.
        state: Incremental state, changed in place.
        rows: Number of rows in all, a multiple of the present number.
    """
    present = len(state[WINDOW]["window"].lengths)
    order = torch.arange(present, device=decoder.device).repeat_interleave(rows // present)
    decoder.reorder_incremental_state_scripting(state, order)
