"""Blocks of input to token ids, in one process or several; the result does not depend on how many."""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np

from preprocess.errors import InputError
from preprocess.tokenization import EOS, load_tokenizer


@dataclass(frozen=True)
class Settings:
    """What a worker has to know: how to load the tokenizer, the dtype of the tokens, what to do with bad documents."""

    tokenizer: dict[str, Any]  # arguments of load_tokenizer
    dtype: str
    bad_documents: str = "refuse"


@dataclass
class Encoded:
    """The documents of one block: ids one after the other with eos after each, and what is known about each."""

    ids: np.ndarray  # (tokens,) of the settings' dtype
    sizes: np.ndarray  # (documents,) int32
    records: bytes  # JSON lines, one a document
    characters: int = 0
    skipped: int = 0
    subsets: dict[str, list[int]] = field(default_factory=dict)  # subset: [documents, tokens]


class Encoder:
    """Encodes blocks with one tokenizer."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.tokenizer = load_tokenizer(**settings.tokenizer)

    def __call__(self, block) -> Encoded:
        """Encode a block.

        Raises:
            InputError: a bad document that is not to be skipped.
        """
        parsed = block.parse(self.settings.bad_documents)
        arrays, sizes, records = [], [], []
        encoded = Encoded(np.empty(0), np.empty(0), b"", skipped=parsed.skipped)
        eos = np.array([EOS], dtype=np.int32)
        for document in parsed.documents:
            ids = self.tokenizer.encode_array(document.text)
            arrays += [ids, eos]
            size = len(ids) + 1
            sizes.append(size)
            record = {"name": document.name, "tokens": size, "subset": document.subset}
            records.append(json.dumps(record, ensure_ascii=False))
            encoded.characters += len(document.text)
            count = encoded.subsets.setdefault(document.subset, [0, 0])
            count[0] += 1
            count[1] += size
        encoded.ids = np.concatenate(arrays).astype(self.settings.dtype) if arrays else np.empty(0, self.settings.dtype)
        encoded.sizes = np.array(sizes, dtype=np.int32)
        encoded.records = "".join(f"{record}\n" for record in records).encode("utf-8", "surrogatepass")
        return encoded


_encoder: Encoder  # of a worker process


def _start_worker(settings: Settings) -> None:
    global _encoder
    # the processes are the parallelism; threads beneath them would only get in each other's way
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(settings)


def _encode(block) -> Encoded:
    return _encoder(block)


def encode_blocks(blocks: Iterable[tuple[Any, Any]], settings: Settings, workers: int) -> Iterator[tuple[Encoded, Any]]:
    """Encode (block, tag) pairs in order, giving (encoded, tag); a bounded number is under way at any time.

    Raises:
        InputError: from a block, or a worker process was killed.
    """
    if workers == 1:
        encoder = Encoder(settings)
        for block, tag in blocks:
            yield encoder(block), tag
        return
    # spawned, not forked: this process may run threads (progress bar, torch), and a fork would copy their locks
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (settings,))
    try:
        waiting = deque()
        for block, tag in blocks:
            waiting.append((pool.submit(_encode, block), tag))
            if len(waiting) > 3 * workers:
                future, tag = waiting.popleft()
                yield future.result(), tag
        for future, tag in waiting:
            yield future.result(), tag
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, probably for want of memory: run the command again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
