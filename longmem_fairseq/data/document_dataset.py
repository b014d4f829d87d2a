"""The documents of one split of the data, read by slices of token files."""

import glob
import json
import os
from typing import List

import numpy as np
from fairseq.data import Dictionary, FairseqDataset

from .token_file import TokenFile


class DocumentDataset(FairseqDataset):
    """Whole documents as fairseq wrote them: one item is one document.

    Batches do not come from here but from a :class:`~longmem_fairseq.data.lanes.LaneDataset` over it.

    Args:
        prefixes: data files, each without ``.bin`` and ``.idx``; their documents follow each other.
        dictionary: the dictionary of the data.
        split: name of the split.

    Attributes:
        sizes: tokens of each document, shape (documents,), int64.

    Raises:
        FileNotFoundError, ValueError: see :class:`TokenFile`.
    """

    def __init__(self, prefixes: List[str], dictionary: Dictionary, split: str = "train"):
        super().__init__()
        self.files = [TokenFile(prefix) for prefix in prefixes]
        self.sizes = np.concatenate([np.diff(file.offsets) for file in self.files])
        self._first = np.concatenate([[0], np.cumsum([len(file) for file in self.files])])
        self.vocabulary, self.pad = len(dictionary), dictionary.pad()
        self.split = split

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.sizes.sum())

    def _locate(self, document: int):
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.files[part], document - int(self._first[part])

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop - 1`` of a document, shape (stop - start,), int64.

        Raises:
            ValueError: a token is outside the dictionary, or is its padding symbol.
        """
        file, item = self._locate(document)
        tokens = file.read(item, start, stop)
        bad = np.flatnonzero((tokens < 0) | (tokens >= self.vocabulary) | (tokens == self.pad))
        if len(bad):
            token, place = tokens[bad[0]], start + bad[0]
            what = (
                "is the padding symbol, which no text may hold"
                if token == self.pad
                else f"is outside the dictionary of {self.vocabulary} symbols"
            )
            raise ValueError(
                f"token {token} at position {place} of document {item} in {file.prefix}.bin {what}: "
                "the file is damaged or was made with another dict.txt"
            )
        return tokens

    def names(self) -> List[str]:
        """Name of each document: as noted beside the data when it was written, or its place in the data.

        Raises:
            ValueError: the notes are damaged or of other data.
        """
        names = []
        common = os.path.commonpath([os.path.dirname(os.path.abspath(file.prefix)) for file in self.files])
        for file in self.files:
            notes = file.prefix + ".documents.jsonl"
            if not os.path.isfile(notes):
                place = os.path.relpath(os.path.abspath(file.prefix), common)
                names += [f"{place}:{item}" for item in range(len(file))]
                continue
            try:
                with open(notes, encoding="utf-8") as f:
                    found = [json.loads(line)["name"] for line in f]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{notes} cannot be read ({error!r}): write the data anew") from error
            if len(found) != len(file):
                raise ValueError(
                    f"{notes} names {len(found)} documents, but {file.prefix}.bin holds {len(file)}: write both anew"
                )
            names += found
        return names

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        return int(self.sizes[index])


def find_split(path: str, split: str, combine: bool) -> List[str]:
    """Prefixes of a split's data files: ``split``, and where ``combine`` is asked for ``split1``, ``split2``...

    Raises:
        FileNotFoundError: there is no such split; the message lists those that there are.
    """
    prefix = os.path.join(path, split)
    if not os.path.exists(prefix + ".idx"):
        there = sorted(os.path.basename(x)[: -len(".idx")] for x in glob.glob(os.path.join(glob.escape(path), "*.idx")))
        raise FileNotFoundError(
            f"no data for the split '{split}': {prefix}.idx does not exist "
            f"(splits in {path}: {', '.join(there) or 'none'})"
        )
    prefixes = [prefix]
    while combine and os.path.exists(f"{prefix}{len(prefixes)}.idx"):
        prefixes.append(f"{prefix}{len(prefixes)}")
    return prefixes
