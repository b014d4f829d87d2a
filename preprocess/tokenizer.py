"""The interface of all tokenizers: text to fairseq token ids and back.

This module needs neither torch nor fairseq, so that worker processes start at once.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from preprocess.dictionary import SPECIALS, dictionary_lines


class Tokenizer(ABC):
    """Text to fairseq token ids and back; a subclass sets ``kind`` and defines ``encode_array`` and ``decode``.

    Ids are those of the fairseq dictionary (``tokenizer.dictionary``), its four special symbols first. ``lossless``
    is true if decoding gives every encoded text back exactly.

    Args:
        symbols: Symbols of the dictionary in the order of their ids, without the special ones.
        files: Paths of the files that load the tokenizer again, by their names in a data directory.
        identity: Bytes that decide how text is encoded, for the fingerprint.
    """

    kind: str
    lossless = True

    def __init__(self, symbols: Sequence[str], files: dict[str, Path], identity: bytes):
        self.symbols = list(symbols)
        self.files = files
        self._identity = identity
        self._dictionary = None

    def __len__(self) -> int:
        """Count the symbols of the dictionary, special ones included."""
        return len(SPECIALS) + len(self.symbols)

    def encode(self, text: str) -> list[int]:
        """Encode a text.

        Args:
            text: Text of any length.

        Returns:
            Token ids, without an end-of-sentence symbol.
        """
        return self.encode_array(text).tolist()

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Encode a text as an array.

        Args:
            text: Text of any length.

        Returns:
            Token ids, shape (tokens,), int32, without an end-of-sentence symbol.
        """

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode several texts, which may be faster than one by one.

        Args:
            texts: Texts of any length.

        Returns:
            Token ids of each text, as :meth:`encode_array` returns them.
        """
        return [self.encode_array(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decode token ids.

        Args:
            ids: Token ids.

        Returns:
            The text; bos, pad and eos add nothing to it, an unknown symbol is written ``<unk>``.
        """

    def write_files(self, directory: Path) -> None:
        """Write the tokenizer's files into a data directory.

        Args:
            directory: Path of the directory.
        """
        for name, path in self.files.items():
            if path != directory / name:
                shutil.copyfile(path, directory / name)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the identity: the same for the same files on every machine."""
        return hashlib.sha256(self._identity).hexdigest()

    @property
    def dictionary(self):
        """Return the fairseq ``Dictionary`` of the token ids."""
        if self._dictionary is None:
            from fairseq.data import Dictionary  # takes seconds, and encoding does not need it

            self._dictionary = Dictionary()
            self._dictionary.add_from_file(io.StringIO("".join(dictionary_lines(self.symbols))))
        return self._dictionary
