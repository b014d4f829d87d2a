"""The documents of one split of the data, read by slices of token files."""

import os
from typing import Any, List

import numpy as np
from fairseq.data import Dictionary, FairseqDataset

from ..files import parse_json
from .token_file import TokenFile


class DocumentDataset(FairseqDataset):
    """Whole documents as fairseq wrote them: one item is one document.

    Batches come from a :class:`~longmem_fairseq.data.lane_dataset.LaneDataset` over this dataset.

    Args:
        prefixes: Paths of the data files, each without ``.bin`` and ``.idx``; their documents follow each other.
        dictionary: Dictionary of the data.
        split: Name of the split.

    Attributes:
        sizes: Length of each document in tokens, shape (documents,), int64.
        split: As above.
        vocabulary: Number of symbols of the dictionary.
        pad: Id of the padding symbol.

    Raises:
        FileNotFoundError: A data file is missing.
        ValueError: A data file is damaged, see :class:`TokenFile`.
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
        """Number of tokens of all documents."""
        return int(self.sizes.sum())

    def _locate(self, document: int):
        """Return the file of a document, and the document's number in that file."""
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.files[part], document - int(self._first[part])

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Read a slice of a document.

        Args:
            document: Number of the document, from 0.
            start: Position of the first token in the document.
            stop: Position behind the last token.

        Returns:
            Token ids, shape (stop - start,), int64.

        Raises:
            ValueError: A token is outside the dictionary, or is its padding symbol.
        """
        file, item = self._locate(document)
        tokens = file.read(item, start, stop)
        invalid = np.flatnonzero((tokens < 0) | (tokens >= self.vocabulary) | (tokens == self.pad))
        if len(invalid):
            token, position = tokens[invalid[0]], start + invalid[0]
            reason = f"is outside the dictionary of {self.vocabulary} symbols"
            if token == self.pad:
                reason = "is the padding symbol, which a text must not contain"
            raise ValueError(
                f"token {token} at position {position} of document {item} in {file.prefix}.bin {reason}: "
                "the file is damaged or was made with another dict.txt"
            )
        return tokens

    def names(self) -> List[str]:
        """Name each document as in ``PREFIX.documents.jsonl``, or by its place in the data where there is no such file.

        Returns:
            One name per document.

        Raises:
            ValueError: A ``documents.jsonl`` is damaged or belongs to other data.
        """
        names = []
        common = os.path.commonpath([os.path.dirname(os.path.abspath(file.prefix)) for file in self.files])
        for file in self.files:
            names += _names_of_file(file, common)
        return names

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        return int(self.sizes[index])


def _names_of_file(file: TokenFile, common: str) -> List[str]:
    """Name the documents of one file; without a ``documents.jsonl`` by number, below the directory ``common``."""
    path = file.prefix + ".documents.jsonl"
    if not os.path.isfile(path):
        place = os.path.relpath(os.path.abspath(file.prefix), common)
        return [f"{place}:{item}" for item in range(len(file))]
    try:
        with open(path, encoding="utf-8") as stream:
            names = [_name_in(parse_json(line)) for line in stream]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): write the data again") from error
    if len(names) != len(file):
        raise ValueError(
            f"{path} names {len(names)} documents, but {file.prefix}.bin holds {len(file)}: write both again"
        )
    return names


def _name_in(record: Any) -> str:
    """Return the name in a line of ``documents.jsonl``."""
    if not isinstance(record["name"], str):
        raise TypeError(f"the name {record['name']!r:.40} is not text")
    return record["name"]
