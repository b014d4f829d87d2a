"""Attention that keeps the keys and values of earlier tokens for incremental decoding.

Legend: B rows of a batch, T new tokens, S cached tokens, H_kv key/value heads, d width of a head.
"""

from typing import Dict, Optional, Tuple

import torch
from fairseq.incremental_decoding_utils import FairseqIncrementalState
from torch import Tensor

from .sliding_window import SeenWindow, SlidingWindow, first_tokens

# State of incremental decoding: a dictionary that every module of a decoder shares, each under keys of its own.
IncrementalState = Optional[Dict[str, Dict[str, Optional[Tensor]]]]

# Entry of an incremental state with the SlidingWindow of its new tokens: {"window": ...}. Keys are then cached without
# position, so that columns can be dropped from the left.
SLIDING_WINDOW = "longmem.sliding_window"

# Entry of an incremental state with the number of cached positions, from the left, that are padding: {"left": (B,)
# int64}. Rows of unequal length end at the same column, so that all grow by one column a step.
LEFT_PADDING = "longmem.left_padding"

FIRST = ("first_key", "first_value")  # entries of a cache with a sliding window: those of the attention sinks
_CACHE = "attn_state"  # the name of fairseq's own attention, whose reordering of beams then applies


class SegmentState(dict):
    """Incremental state of one segment: modules read what it held at first, and what they append is stored beside it.

    So a segment that is read twice (for the recomputation of activations, or with and without a memory) is read in the
    same way.

    Args:
        before: What the modules find.

    Attributes:
        after: What the modules appended to.
    """

    def __init__(self, before: Dict[str, Dict]):
        super().__init__(before)
        self.after: Dict[str, Dict] = {}

    def __setitem__(self, key: str, value: Dict) -> None:
        self.after[key] = value


class CachedAttention(FairseqIncrementalState):
    """Mixin for attention modules that cache keys and values in an incremental state.

    Unlike fairseq's attention it appends any number of tokens at a time. A cache is a dictionary of ``prev_key`` and
    ``prev_value``, each of shape (B, H_kv, S, d), and with a sliding window also of
    :data:`FIRST`, those of the attention sinks, each of shape (B, H_kv, SINKS, d).
    """

    def cache(self, state: IncrementalState) -> Dict[str, Tensor]:
        """Return this module's cache, an empty dictionary before the first token.

        Args:
            state: Incremental state of the decoder, or None.
        """
        return self.get_incremental_state(state, _CACHE) or {}

    def extended_cache(self, state: IncrementalState) -> Dict[str, Tensor]:
        """Return this module's cache with what was appended last.

        Args:
            state: Incremental state of the decoder.
        """
        return self.cache(state.after if isinstance(state, SegmentState) else state)

    def set_cache(self, state: IncrementalState, cache: Dict[str, Tensor]) -> None:
        """Replace this module's cache.

        Args:
            state: Incremental state of the decoder, changed in place.
            cache: Tensors ``prev_key`` and ``prev_value``, shape (B, H_kv, S, d).
        """
        self.set_incremental_state(state, _CACHE, cache)

    def cached_without_position(self, state: IncrementalState) -> Tuple[Tensor, Tensor]:
        """Return the cached keys without position, and the cached values, each of shape (B, H_kv, S, d).

        A module whose cache holds keys with position overrides this.

        Args:
            state: Incremental state of the decoder, in which this module has a cache.
        """
        cache = self.extended_cache(state)
        return cache["prev_key"], cache["prev_value"]

    def append_to_cache(self, state: IncrementalState, keys: Tensor, values: Tensor) -> Tuple[Tensor, Tensor]:
        """Append new keys and values to the cache and return the whole of it.

        Args:
            state: Incremental state of the decoder, changed in place.
            keys: Keys of the new tokens, shape (B, H_kv, T, d).
            values: Values of the new tokens, shape (B, H_kv, T, d).

        Returns:
            Keys and values of all tokens so far, shape (B, H_kv, S + T, d).
        """
        cached, window = self.cache(state), sliding_window(state)
        first = {}
        if window is not None:
            first = {name: first_tokens(cached.get(name), new, window) for name, new in zip(FIRST, (keys, values))}
        if cached:
            keys = torch.cat([cached["prev_key"], keys], dim=2)
            values = torch.cat([cached["prev_value"], values], dim=2)
        self.set_cache(state, {"prev_key": keys, "prev_value": values, **first})
        return keys, values

    def seen_window(self, state: IncrementalState) -> Optional[SeenWindow]:
        """Return the sliding window of the new tokens, once they are appended; None without one.

        Args:
            state: Incremental state of the decoder, or None.
        """
        window = sliding_window(state)
        if window is None:
            return None
        cache = self.extended_cache(state)
        return SeenWindow(window, *(cache[name] for name in FIRST))

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> IncrementalState:
        """Make row i of the cache a copy of what row ``new_order[i]`` was; rows may be dropped or repeated.

        Args:
            incremental_state: Incremental state of the decoder, changed in place.
            new_order: Numbers of the rows to keep, shape (rows,), int64.
        """
        cached = self.cache(incremental_state)
        if cached:
            self.set_cache(incremental_state, {name: x.index_select(0, new_order) for name, x in cached.items()})
        return incremental_state


def left_padding(state: IncrementalState) -> Optional[Tensor]:
    """Return the number of cached columns that are padding in each row, shape (B,), or None where no row has any."""
    return None if state is None else state.get(LEFT_PADDING, {}).get("left")


def sliding_window(state: IncrementalState) -> Optional[SlidingWindow]:
    """Return the window that new tokens attend to; None for all tokens that are cached."""
    return None if state is None else state.get(SLIDING_WINDOW, {}).get("window")
