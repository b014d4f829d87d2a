"""The caches of windows whose rows differ in length: right-aligned, so that all rows grow by one column a step.

Legend: B rows, S columns of the caches.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from ..memory.reader import BatchReader
from ..modules.cached_attention import FIRST, CachedAttention
from ..modules.staging import staged

Caches = Dict[str, Any]  # an incremental state with nothing but caches


def attention_modules(decoder) -> List[CachedAttention]:
    """Return the attention modules of backbone and side network, always in the same order."""
    return [module for module in decoder.modules() if isinstance(module, CachedAttention)]


def encode_window(
    decoder, pieces: Sequence[Tensor], reader: Optional[BatchReader] = None, for_memory: bool = False
) -> Tuple[Tensor, Caches, Optional[Tensor]]:
    """Encode windows that start with their first inputs, by the backbone and the side network.

    Args:
        decoder: A :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder`.
        pieces: Inputs of each row, shape (length,), int64.
        reader: Reader of the memory, or None.
        for_memory: If true, only the backbone's layers below the memory layer run.

    Returns:
        Inputs, shape (B, S), int64; caches; and hidden states for a token memory, shape (B, S, D), None without one. In
        all of them a row's tokens end at the last column.
    """
    state: Caches = {}
    padded, states = pad(decoder, pieces), None
    if for_memory:
        decoder.backbone.encode_for_memory(padded, state)
    else:
        encoded = decoder.backbone.encode(padded, state)
        decoder.side_network(encoded, reader, state)
        states = decoder.predictor.token_states(encoded, padded)
    padding = np.array([padded.size(1) - len(piece) for piece in pieces], dtype=np.int64)
    hidden = None if states is None else align_right(states.hidden[:, None], padding)[:, 0]
    return align_right(padded, padding), align_caches(decoder, state, padding), hidden


def pad(decoder, pieces: Sequence[Tensor]) -> Tensor:
    """Return inputs of several rows (B, S), padded behind the tokens, where causality hides it."""
    return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True, padding_value=decoder.dictionary.pad()).to(
        decoder.device
    )


def align_right(x: Tensor, padding: np.ndarray) -> Tensor:
    """Rotate the columns of each row so that padding at its end comes to its front.

    Args:
        x: Rows, shape (B, S) or (B, H_kv, S, d).
        padding: Number of columns of each row, from the right, that are padding, shape (B,), int64.
    """
    if not padding.any():
        return x
    dim = min(2, x.dim() - 1)
    columns = (torch.arange(x.size(dim), device=x.device) - staged(padding, x.device)[:, None]) % x.size(dim)  # (B, S)
    if x.dim() == 2:
        return x.gather(1, columns)
    return x.gather(2, columns[:, None, :, None].expand_as(x))


def align_caches(decoder, state: Caches, padding: np.ndarray) -> Caches:
    """Return the caches of an incremental state, with :func:`align_right` applied."""
    aligned: Caches = {}
    for module in attention_modules(decoder):
        cache = module.extended_cache(state)
        if cache:  # encoding for the memory alone does not run all layers
            columns = {name: align_right(x, padding) for name, x in cache.items() if name not in FIRST}
            module.set_cache(aligned, {**cache, **columns})
    return aligned
