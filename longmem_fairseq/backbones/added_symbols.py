"""The symbols that a conversion from Hugging Face added to a model's dictionary, recognized by their embeddings."""

from typing import NamedTuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from .base import Backbone

_SYMBOLS_AT_ONCE = 8192


class AddedSymbols(NamedTuple):
    """Symbols that the model was trained without.

    Attributes:
        symbols: Token ids of the added symbols, shape (n,), int64; empty for a model that was not converted.
        ends: Token ids of the model's own symbols that end-of-sentence is a copy of, shape (m,), int64.
    """

    symbols: Tensor
    ends: Tensor


@torch.no_grad()
def added_symbols(backbone: Backbone, dictionary: Dictionary) -> AddedSymbols:
    """Find the symbols that ``preprocess.convert_huggingface`` added.

    It gives all of them the mean embedding, except end-of-sentence, which gets that of the token that ends texts. In a
    model that was trained with the special symbols, each has an embedding of its own.

    Args:
        backbone: Backbone with its weights.
        dictionary: Dictionary of the model.

    Returns:
        The added symbols; none where the special symbols have embeddings of their own.
    """
    bos, eos, unk = dictionary.bos(), dictionary.eos(), dictionary.unk()
    references = _embeddings(backbone, torch.tensor([bos, eos, unk]))
    nothing = torch.zeros(0, dtype=torch.int64)
    if not torch.equal(references[0], references[2]):
        return AddedSymbols(nothing, nothing)
    mean, ends = [], []
    for ids in torch.arange(len(dictionary)).split(_SYMBOLS_AT_ONCE):
        rows = _embeddings(backbone, ids)
        mean.append((rows == references[0]).all(1).cpu())
        ends.append((rows == references[1]).all(1).cpu())
    mean, ends = torch.cat(mean), torch.cat(ends)
    mean[dictionary.pad()], ends[eos] = True, False
    mean[eos] = bool(ends.any())
    return AddedSymbols(*(flags.nonzero()[:, 0] for flags in (mean, ends)))


def _embeddings(backbone: Backbone, ids: Tensor) -> Tensor:
    """Return the embeddings of symbols, shape (n, D), all at the same position, which is not a window's first."""
    return backbone.embed(ids[:, None].to(backbone.device), start=1)[0]
