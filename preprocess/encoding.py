"""Blocks of input to token ids, in one process or several; the result does not depend on how many."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
from tqdm import tqdm

from preprocess.blocks import BLOCK_BYTES, START, Position, read_blocks
from preprocess.documents import Source
from preprocess.errors import InputError
from preprocess.mixture import Selection
from preprocess.survey import SurveyPart
from preprocess.tokenization import EOS, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Settings:
    """What a worker has to know.

    Args:
        tokenizer: arguments of ``load_tokenizer``.
        dtype: of the tokens, by numpy's name.
        bad_documents: ``refuse`` or ``skip``.
        seed: of random choices.
    """

    tokenizer: dict[str, Any]
    dtype: str
    bad_documents: str = "refuse"
    seed: int = 1


@dataclass
class EncodedSegment:
    """The documents of one block: ids one after the other with eos after each, and what is known about each."""

    ids: np.ndarray  # (tokens,) of the settings' dtype
    sizes: np.ndarray  # (documents,) int32
    records: bytes  # JSON lines, one a document
    characters: int = 0
    skipped: int = 0  # bad documents
    left_out: int = 0  # by the selection
    subsets: dict[str, list[int]] = field(default_factory=dict)  # subset: [documents, tokens]


class Encoder:
    """Works on blocks with one tokenizer, alone or as one of many processes."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer | None = None):
        self.settings = settings
        self.tokenizer = tokenizer or load_tokenizer(**settings.tokenizer)

    def encode(self, block, selection: Selection | None = None) -> EncodedSegment:
        """Encode the documents of a block that are in the ``selection``.

        Raises:
            InputError: a bad document that is not to be skipped.
        """
        parsed = block.parse(self.settings.bad_documents)
        arrays, sizes, records = [np.empty(0, np.int32)], [], []
        subsets: dict[str, list[int]] = {}
        characters = left_out = 0
        eos = np.array([EOS], dtype=np.int32)
        for key, document in zip(parsed.keys, parsed.documents):
            if selection is not None and not selection.keeps(key, document.subset):
                left_out += 1
                continue
            ids = self.tokenizer.encode_array(document.text)
            size = len(ids) + 1
            arrays += [ids, eos]
            sizes.append(size)
            record = {"name": document.name, "tokens": size, "subset": document.subset}
            records.append(json.dumps(record, ensure_ascii=False))
            characters += len(document.text)
            count = subsets.setdefault(document.subset, [0, 0])
            count[0] += 1
            count[1] += size
        return EncodedSegment(
            ids=np.concatenate(arrays).astype(self.settings.dtype),  # (tokens,)
            sizes=np.array(sizes, dtype=np.int32),  # (documents,)
            # a file name that is not UTF-8 reaches Python as lone surrogates
            records="".join(f"{record}\n" for record in records).encode("utf-8", "backslashreplace"),
            characters=characters,
            skipped=parsed.skipped,
            left_out=left_out,
            subsets=subsets,
        )

    def survey(self, block, rate: float) -> SurveyPart:
        """Measure the documents of a block, encoding a sample of them at this ``rate``."""
        return SurveyPart.of(block.parse(self.settings.bad_documents), self.tokenizer, self.settings.seed, rate)


_encoder: Encoder  # of a worker process


def _start_worker(settings: Settings) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # the processes are the parallelism; threads beneath them would only get in each other's way
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(settings)


def _end_with_parent() -> None:
    # a worker whose parent is killed would wait for work for ever
    parent_process().join()
    os._exit(1)


def _work(method: str, block, argument):
    return getattr(_encoder, method)(block, argument)


class EncoderPool:
    """``workers`` processes that work on blocks, this one among them.

    Args:
        settings: for all of them.
        workers: how many.
        tokenizer: that of the settings.
    """

    def __init__(self, settings: Settings, workers: int, tokenizer: Tokenizer):
        self.fingerprint = tokenizer.fingerprint()
        self.settings, self.workers = settings, workers
        self._local = Encoder(settings, tokenizer)
        self._pool = None
        if workers > 1:
            # spawned, not forked: this process may run threads (progress bar, torch), and a fork would copy their locks
            self._pool = ProcessPoolExecutor(workers - 1, get_context("spawn"), _start_worker, (settings,))

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def work(
        self,
        method: str,
        sources: Sequence[Source],
        title: str,
        argument: Any = None,
        start: Position = START,
        stripe: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Any, Position]]:
        """Read ``sources`` and apply an ``Encoder`` method to their blocks, in order, with a progress bar.

        Args:
            method: ``encode`` or ``survey``.
            sources, start, stripe: for ``read_blocks``.
            title: of the progress bar.
            argument: passed on with each block.

        Returns:
            The result for each block, and the position after it.

        Raises:
            InputError: from a block, or a worker process was killed.
        """
        total = sum(source.size for source in sources)
        blocks = read_blocks(sources, start, stripe)
        if total <= 2 * BLOCK_BYTES:  # done before another process has started
            results = ((getattr(self._local, method)(block, argument), position) for block, position in blocks)
        else:
            results = self._map(method, blocks, argument)
        with tqdm(total=total, initial=start.consumed, unit="B", unit_scale=True, desc=title, mininterval=0.5) as bar:
            for result, position in results:
                yield result, position
                bar.update(position.consumed - bar.n)

    def _map(self, method: str, blocks: Iterable[tuple[Any, Position]], argument) -> Iterator[tuple[Any, Position]]:
        """The work itself, in order; a bounded number of blocks is under way at any time."""
        waiting: deque[tuple[Future, Position]] = deque()
        try:
            for block, position in blocks:
                busy = sum(not future.done() for future, _ in waiting)
                if busy < 2 * (self.workers - 1):
                    future = self._pool.submit(_work, method, block, argument)
                else:  # the others have enough to do until this process has done a block itself
                    future = _run(getattr(self._local, method), block, argument)
                waiting.append((future, position))
                while waiting and (waiting[0][0].done() or len(waiting) > 4 * self.workers):
                    future, position = waiting.popleft()
                    yield future.result(), position
            for future, position in waiting:
                yield future.result(), position
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed, probably for want of memory: run the command again with fewer --workers"
            ) from None


def _run(function, *arguments) -> Future:
    """Call a function now; what it raises comes up in its turn, as from another process."""
    future = Future()
    try:
        future.set_result(function(*arguments))
    except InputError as error:
        future.set_exception(error)
    return future
