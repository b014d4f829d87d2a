"""Incremental decoding: the window that is still being written, with its caches, and the memory behind it.

A window holds at most T inputs. The next input moves the older half of a full one into the memory; what is kept is
encoded again as a window of its own, from position 0. So a token is always scored as :meth:`LongMemDecoder.forward`
scores it, given the memory of all that was moved and a segment that starts where the window does.

Rows of a batch differ in length: their caches end at the same column, and begin with padding.

Legend: B rows (hypotheses), S columns of the caches, T tokens of a full window, H heads, d width of a head.
"""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from ..memory.bank import MemoryBank
from ..memory.branches import MemoryBranches
from ..modules.self_attention import LEFT_PADDING, SelfAttention
from ..progress import token_bar

WINDOW = "longmem.window"  # entry of an incremental state that holds the LiveWindow
_TOKENS_AT_ONCE = 4096  # of whole segments in prefill; a prompt's segments do not see each other


class LiveWindow:
    """The live window of each row of a batch; one object per incremental state.

    Args:
        decoder: a :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder`.
        size: T.
        rows: B.
        base: memory of one lane that all rows begin with; it is only read.

    Attributes:
        tokens: inputs in the windows, shape (B, S), int64, right-aligned.
        lengths: of the rows, shape (B,), int64.
        branches: what the rows remember; None with the memory off.

    Raises:
        ValueError: where a window cannot be of this size.
    """

    def __init__(self, decoder, size: int, rows: int, base: Optional[MemoryBank] = None):
        longest = decoder.backbone.max_positions
        if size < 2:
            raise ValueError(f"--tokens-per-sample {size} is too small to generate: a window has at least 2 tokens")
        if longest is not None and size > longest:
            raise ValueError(f"--tokens-per-sample {size} is longer than the backbone's {longest} positions: lower it")
        self.decoder, self.size = decoder, size
        self.branches: Optional[MemoryBranches] = decoder.memory_branches(rows, base) if decoder.has_memory else None
        self.tokens = torch.zeros(rows, 0, dtype=torch.int64, device=decoder.device)
        self.lengths = np.zeros(rows, dtype=np.int64)

    def step(self, tokens: Tensor, state: Dict[str, Any]) -> List[Tensor]:
        """States of the side network (see ``side_network``) for one more input of each row, tokens (B, 1)."""
        full = np.flatnonzero(self.lengths == self.size)
        if len(full):
            self._roll_over(full.tolist(), state)
        S = self.tokens.size(1)
        left = torch.from_numpy(S - self.lengths).to(tokens.device)  # (B,)
        state[LEFT_PADDING] = {"left": left if self.lengths.min() < S else None}
        starts = torch.from_numpy(self.lengths).to(tokens.device)
        encoded = self.decoder.backbone(tokens, state, starts)
        states = self.decoder.side_network(encoded, self._reader(), state)
        self.tokens = torch.cat([self.tokens, tokens], dim=1)  # (B, S + 1)
        self.lengths = self.lengths + 1
        return states

    def fill(self, pieces: Sequence[Tensor], state: Dict[str, Any]) -> None:
        """Put inputs, shape (length,) each and length < T, into the empty windows of all rows."""
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
            module._set_input_buffer(state, {name: x.gather(2, index) for name, x in cache.items()})

    def reorder(self, order: Tensor) -> None:
        """Row i becomes what row ``order[i]`` was."""
        self.tokens = self.tokens.index_select(0, order)
        rows = order.tolist()
        self.lengths = self.lengths[rows]
        if self.branches is not None:
            self.branches.reorder(rows)

    def _reader(self, rows: Optional[Sequence[int]] = None):
        return None if self.branches is None else self.branches.reader(rows)

    def _encode(self, tokens: Tensor, reader) -> Dict[SelfAttention, Dict[str, Tensor]]:
        """Caches of a window that starts with these tokens (b, S)."""
        state: Dict[str, Any] = {}
        self.decoder.side_network(self.decoder.backbone(tokens, state), reader, state)
        return {module: dict(module._get_input_buffer(state)) for module in self._attention()}

    def _attention(self) -> List[SelfAttention]:
        return [module for module in self.decoder.modules() if isinstance(module, SelfAttention)]

    def _roll_over(self, rows: List[int], state: Dict[str, Any]) -> None:
        """Move the older half of full windows into their memories and encode the rest anew."""
        kept = self.size // 2
        moved = self.size - kept
        index = torch.tensor(rows, device=self.tokens.device)
        tokens = self.tokens[index, -self.size :]  # (b, T)
        if self.branches is not None:
            remembered = self.decoder.backbone.decoder.layers[self.decoder.backbone.memory_layer].self_attn
            cache = remembered._get_input_buffer(state)
            keys, values = (
                cache[name][index, :, -self.size :][:, :, :moved] for name in ("prev_key", "prev_value")
            )  # (b, H, moved, d)
            self.branches.write(rows, tokens[:, :moved], keys, values)
        tokens = tokens[:, moved:]
        fresh = self._encode(tokens, self._reader(rows))
        self.lengths[rows] = kept
        S = int(self.lengths.max())
        self.tokens = _replace(self.tokens, index, tokens, S)
        for module, new in fresh.items():
            old = module._get_input_buffer(state)
            cache = {
                name: _replace(old[name].transpose(1, 2), index, x.transpose(1, 2), S).transpose(1, 2).contiguous()
                for name, x in new.items()
            }
            module._set_input_buffer(state, cache)


def _replace(old: Tensor, rows: Tensor, new: Tensor, S: int) -> Tensor:
    """The last S columns of old (B, columns, ...), some rows ending in new (b, fewer columns, ...) instead."""
    result = old[:, old.size(1) - S :].clone()
    result[rows, S - new.size(1) :] = new
    return result


@torch.no_grad()
def prefill(decoder, inputs: Sequence[Tensor], size: int, base: Optional[MemoryBank] = None) -> Dict[str, Any]:
    """Read what precedes the first input of generation: an incremental state to go on from.

    Whole segments go into the memory, encoded side by side and only as far up as the memory layer; the rest becomes
    the live window. That is how :meth:`LongMemDecoder.forward` reads a document of the same tokens.

    Args:
        decoder: a :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder` in evaluation mode.
        inputs: of each row, shape (length,), int64, from the document's start (usually end-of-sentence); may be empty.
        size: T, tokens of a segment.
        base: memory of one lane that all rows begin with; it is only read.

    Raises:
        ValueError: where a window cannot be of this size.
    """
    window = LiveWindow(decoder, size, len(inputs), base)
    inputs = [tokens.to(decoder.device) for tokens in inputs]
    whole = [len(tokens) // size for tokens in inputs]
    if window.branches is not None:
        _remember(window, inputs, whole)
    state: Dict[str, Any] = {WINDOW: {"window": window}}
    window.fill([tokens[n * size :] for tokens, n in zip(inputs, whole)], state)
    return state


def _remember(window: LiveWindow, inputs: Sequence[Tensor], whole: Sequence[int]) -> None:
    """Write the whole segments of all rows into their memories."""
    size = window.size
    jobs = [(s, row) for s in range(max(whole, default=0)) for row, n in enumerate(whole) if n > s]
    at_once = max(1, _TOKENS_AT_ONCE // size)
    with token_bar(len(jobs) * size, "reading the prompt") as progress:
        for begin in range(0, len(jobs), at_once):
            batch = jobs[begin : begin + at_once]
            tokens = torch.stack([inputs[row][s * size : (s + 1) * size] for s, row in batch])  # (b, T)
            encoded = window.decoder.backbone.encode_for_memory(tokens)
            for s in sorted({s for s, _ in batch}):
                own = [i for i, (segment, _) in enumerate(batch) if segment == s]
                window.branches.write([batch[i][1] for i in own], tokens[own], encoded.keys[own], encoded.values[own])
            progress.update(tokens.numel())


def expand_state(decoder, state: Dict[str, Any], rows: int) -> None:
    """Repeat each row of a state so that there are ``rows`` in all, copies of a row side by side."""
    present = len(state[WINDOW]["window"].lengths)
    order = torch.arange(present, device=decoder.device).repeat_interleave(rows // present)
    decoder.reorder_incremental_state_scripting(state, order)
