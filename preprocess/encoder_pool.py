"""Blocks of input worked on by one process or several; the results do not depend on how many."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from tqdm import tqdm

from preprocess.blocks import BLOCK_BYTES, START, Position, read_blocks
from preprocess.document_source import DocumentSource
from preprocess.encoder import Encoder, EncoderSettings
from preprocess.errors import InputError
from preprocess.tokenizer import Tokenizer

_encoder: Encoder  # of a worker process


def _start_worker(settings: EncoderSettings) -> None:
    """Prepare a worker process."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(settings)


def _end_with_parent() -> None:
    """End a worker whose parent is killed; it would wait for work for ever."""
    parent_process().join()
    os._exit(1)


def _work(method: str, block, argument):
    """Apply a method of the worker's encoder to a block."""
    return getattr(_encoder, method)(block, argument)


class EncoderPool:
    """Processes that work on blocks, this one among them.

    Args:
        settings: Settings of all encoders.
        workers: Number of processes.
        tokenizer: Tokenizer that the settings describe.
    """

    def __init__(self, settings: EncoderSettings, workers: int, tokenizer: Tokenizer):
        # the processes, which inherit it, are the parallelism; threads beneath them would get in each other's way
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
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
        sources: Sequence[DocumentSource],
        title: str,
        argument: Any = None,
        start: Position = START,
        stripe: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Any, Position]]:
        """Apply a method of ``Encoder`` to the blocks of the input, in order, with a progress bar.

        Args:
            method: Name of the method, ``encode`` or ``survey``.
            sources: Files to read, in order.
            title: Title of the progress bar.
            argument: Second argument of the method.
            start: Position to continue from.
            stripe: Pair ``(i, n)`` that keeps every n-th document, as in ``read_blocks``.

        Yields:
            The result for each block, and the position after it.

        Raises:
            InputError: A document is bad, or a worker process was killed.
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
        """Yield the results in order; a bounded number of blocks is in work at any time."""
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


def _run(function: Callable, *arguments) -> Future:
    """Call a function now; an error that it raises comes up in its turn, as from another process."""
    future = Future()
    try:
        future.set_result(function(*arguments))
    except InputError as error:
        future.set_exception(error)
    return future
