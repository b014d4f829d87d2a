"""Incremental decoding: the window that is still being written, with its caches, and the memory behind it.

A window holds at most T inputs. The next input moves the older half of a full one into the memory; the rest is encoded
again as a window of its own, from position 0. So a token is always scored as :meth:`LongMemDecoder.forward` scores it,
given the memory of all that was moved and a segment that starts where the window does.

Rows of a batch differ in length: their caches end at the same column, and start with padding.

Legend: B rows (hypotheses), S columns of the caches, T tokens of a full window, H_kv key/value heads, d width of a
head.
"""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from ..memory.bank import MemoryBank
from ..memory.branches import MemoryBranches
from ..memory.reader import MemoryReader
from ..modules.cached_attention import LEFT_PADDING, CachedAttention
from ..progress import token_bar
from .reading import DocumentReader, encode_side_by_side

WINDOW = "longmem.window"  # entry of an incremental state that holds the LiveWindow


class LiveWindow:
    """The live window of each row of a batch; one object per incremental state.

    Args:
        decoder: A :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder`, or another decoder with a backbone, a
            ``side_network`` and a ``dictionary``.
        size: Number of inputs in a full window, T.
        rows: Number of rows, B.
        branches: Memories of the rows, which are read and written; None for none.

    Attributes:
        tokens: Inputs in the windows, shape (B, S), int64, right-aligned.
        lengths: Number of inputs of each row, shape (B,), int64.
        branches: Memories of the rows, or None.

    Raises:
        ValueError: A window cannot have this size.
    """

    def __init__(self, decoder, size: int, rows: int, branches: Optional[MemoryBranches]):
        longest = decoder.backbone.max_positions
        if size < 2:
            raise ValueError(f"--tokens-per-sample {size} is too small to generate: a window has at least 2 tokens")
        if longest is not None and size > longest:
            raise ValueError(f"--tokens-per-sample {size} is longer than the backbone's {longest} positions: lower it")
        self.decoder, self.size = decoder, size
        self.branches = branches
        self.tokens = torch.zeros(rows, 0, dtype=torch.int64, device=decoder.device)
        self.lengths = np.zeros(rows, dtype=np.int64)

    def step(self, tokens: Tensor, state: Dict[str, Any]) -> List[Tensor]:
        """Read one more input of each row.

        Args:
            tokens: Token ids, shape (B, 1), int64.
            state: Incremental state of the decoder, changed in place.

        Returns:
            States of the side network (see ``side_network``).
        """
        full = np.flatnonzero(self.lengths == self.size)
        if len(full):
            self._roll_over(full.tolist(), state)
        S = self.tokens.size(1)
        left = torch.from_numpy(S - self.lengths).to(tokens.device)  # (B,)
        state[LEFT_PADDING] = {"left": left if self.lengths.min() < S else None}
        starts = torch.from_numpy(self.lengths).to(tokens.device)
        encoded = self.decoder.backbone.encode(tokens, state, starts)
        states = self.decoder.side_network(encoded, self._reader(), state)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)  # (B, S + 1)
        self.lengths = self.lengths + 1
        return states

    def fill(self, pieces: Sequence[Tensor], state: Dict[str, Any]) -> None:
        """Read the first inputs of all rows into their empty windows.

        Args:
            pieces: Inputs of each row, shape (length,), int64, length < T.
            state: Incremental state of the decoder, changed in place.
        """
        self.lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        if not self.lengths.any():
            return
        padded = torch.nn.utils.rnn.pad_sequence(
            list(pieces), batch_first=True, padding_value=self.decoder.dictionary.pad()
        ).to(self.tokens.device)  # (B, S), padding behind the tokens, where causality hides it
        caches = self._encode(padded, self._reader())
        S = padded.size(1)
        shift = torch.from_numpy(S - self.lengths).to(padded.device)[:, None]
        columns = (torch.arange(S, device=padded.device) - shift) % S  # (B, S): to the right end
        self.tokens = padded.gather(1, columns)
        for module, cache in caches.items():
            index = columns[:, None, :, None].expand_as(cache["prev_key"])
            module.set_cache(state, {name: x.gather(2, index) for name, x in cache.items()})

    def reorder(self, order: Tensor) -> None:
        """Make row i what row ``order[i]`` was."""
        self.tokens = self.tokens.index_select(0, order)
        rows = order.tolist()
        self.lengths = self.lengths[rows]
        if self.branches is not None:
            self.branches.reorder(rows)

    def _reader(self, rows: Optional[Sequence[int]] = None) -> Optional[MemoryReader]:
        return None if self.branches is None else self.branches.reader(rows)

    def _encode(self, tokens: Tensor, reader: Optional[MemoryReader]) -> Dict[CachedAttention, Dict[str, Tensor]]:
        """Return the caches of a window that starts with these tokens (b, S)."""
        state: Dict[str, Any] = {}
        self.decoder.side_network(self.decoder.backbone.encode(tokens, state), reader, state)
        modules = [module for module in self.decoder.modules() if isinstance(module, CachedAttention)]
        return {module: dict(module.cache(state)) for module in modules}

    def _roll_over(self, rows: List[int], state: Dict[str, Any]) -> None:
        """Move the older half of full windows into their memories and encode the rest again."""
        kept = self.size // 2
        moved = self.size - kept
        index = torch.tensor(rows, device=self.tokens.device)
        tokens = self.tokens[index, -self.size :]  # (b, T)
        if self.branches is not None:
            cached = self.decoder.backbone.cached_memory(state)  # each (B, H_kv, S, d)
            keys, values = (x[index, :, -self.size :][:, :, :moved] for x in cached)
            self.branches.write(rows, tokens[:, :moved], keys, values)
        tokens = tokens[:, moved:]
        caches = self._encode(tokens, self._reader(rows))
        self.lengths[rows] = kept
        S = int(self.lengths.max())
        self.tokens = _replace(self.tokens, index, tokens, S)
        for module, new in caches.items():
            old = module.cache(state)
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
    return LiveWindow(decoder, size, rows, DocumentReader(decoder, size).branches(rows, base) if use_memory else None)


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
    if window.branches is not None:
        _write_segments(window, inputs, whole)
    state: Dict[str, Any] = {WINDOW: {"window": window}}
    window.fill([tokens[n * size :] for tokens, n in zip(inputs, whole)], state)
    return state


def _write_segments(window: LiveWindow, inputs: Sequence[Tensor], whole: Sequence[int]) -> None:
    """Write the whole segments of all rows into their memories."""
    size = window.size
    places = [(s, row) for s in range(max(whole, default=0)) for row, n in enumerate(whole) if n > s]
    pieces = [inputs[row][s * size : (s + 1) * size] for s, row in places]
    with token_bar(len(places) * size, "reading the prompt") as progress:
        for numbers, tokens, encoded in encode_side_by_side(window.decoder.backbone, pieces):
            batch = [places[number] for number in numbers]
            for s in sorted({s for s, _ in batch}):
                members = [i for i, (segment, _) in enumerate(batch) if segment == s]
                rows = [batch[i][1] for i in members]
                window.branches.write(rows, tokens[members], encoded.keys[members], encoded.values[members])
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
