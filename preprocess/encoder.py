"""The work on one block of input: encoding its documents, or surveying them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.blocks import Block
from preprocess.dictionary import EOS
from preprocess.selection import Selection
from preprocess.survey import SurveyPart
from preprocess.tokenization import load_tokenizer
from preprocess.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncoderSettings:
    """The settings that every process needs.

    Args:
        tokenizer: Arguments of ``load_tokenizer``.
        dtype: Name in numpy of the dtype of the tokens on disk.
        bad_documents: ``refuse`` to raise at a bad document, ``skip`` to leave it out.
        seed: Seed of all random choices.
    """

    tokenizer: dict[str, Any]
    dtype: str
    bad_documents: str = "refuse"
    seed: int = 1


@dataclass
class EncodedBlock:
    """The encoded documents of one block.

    Args:
        ids: Token ids of the documents one after the other, each with an eos, shape (tokens,), of the settings' dtype.
        sizes: Number of tokens of each document, eos included, shape (documents,), int32.
        records: JSON lines that describe the documents, one each.
        characters: Number of characters of the documents.
        skipped: Number of bad documents that were left out.
        left_out: Number of documents that the selection left out.
        subsets: Number of documents and of tokens by name of the subset.
    """

    ids: np.ndarray
    sizes: np.ndarray
    records: bytes
    characters: int = 0
    skipped: int = 0
    left_out: int = 0
    subsets: dict[str, list[int]] = field(default_factory=dict)


class Encoder:
    """Work on blocks with one tokenizer, in one process.

    Args:
        settings: Settings of the encoder.
        tokenizer: Tokenizer that the settings describe; if None, it is loaded.
    """

    def __init__(self, settings: EncoderSettings, tokenizer: Tokenizer | None = None):
        self.settings = settings
        self.tokenizer = tokenizer or load_tokenizer(**settings.tokenizer)

    def encode(self, block: Block, selection: Selection | None = None) -> EncodedBlock:
        """Encode the documents of a block.

        Args:
            block: Block of input.
            selection: Selection of the documents to encode; if None, all of them.

        Returns:
            The encoded documents.

        Raises:
            InputError: A document is bad and not to be left out.
        """
        parsed = block.parse(self.settings.bad_documents)
        arrays, sizes, records = [np.empty(0, np.int32)], [], []
        subsets: dict[str, list[int]] = {}
        characters = 0
        eos = np.array([EOS], dtype=np.int32)
        kept = [
            document
            for key, document in zip(parsed.keys, parsed.documents)
            if selection is None or selection.keeps(key, document.subset)
        ]
        for document, ids in zip(kept, self.tokenizer.encode_arrays([document.text for document in kept])):
            size = len(ids) + 1
            arrays += [ids, eos]
            sizes.append(size)
            record = {"name": document.name, "tokens": size, "subset": document.subset}
            records.append(json.dumps(record, ensure_ascii=False))
            characters += len(document.text)
            count = subsets.setdefault(document.subset, [0, 0])
            count[0] += 1
            count[1] += size
        return EncodedBlock(
            ids=np.concatenate(arrays).astype(self.settings.dtype),
            sizes=np.array(sizes, dtype=np.int32),
            records="".join(f"{record}\n" for record in records).encode("utf-8"),
            characters=characters,
            skipped=parsed.skipped,
            left_out=len(parsed.documents) - len(kept),
            subsets=subsets,
        )

    def survey(self, block: Block, rate: float) -> SurveyPart:
        """Survey the documents of a block.

        Args:
            block: Block of input.
            rate: Fraction of the text to encode, about.

        Returns:
            The survey of the block.

        Raises:
            InputError: A document is bad and not to be left out.
        """
        return SurveyPart.of(block.parse(self.settings.bad_documents), self.tokenizer, self.settings.seed, rate)
