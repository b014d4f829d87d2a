"""The memory of generation and evaluation by command.

Options: ``--memory-text``, ``--memory-load``, ``--memory-save`` and ``--memorize-turns``.
"""

import logging
import os
import time
from typing import Any, Callable, Dict, List, Sequence

import torch
from torch import Tensor

from ..files import printable, require_writable
from ..memory.document_memory import DocumentMemory
from ..memory.memory_file import load_memory, save_memory
from ..memory.policies import memory_policy
from ..text import read_text
from .generator import LongMemGenerator, backbone_identity

logger = logging.getLogger(__name__)

DEFAULT_DTYPE = "float16"  # of a file of --memory-save
_OPTIONS = ("memory_text", "memory_load", "memory_save", "memorize_turns")


def memory_options(cfg) -> List[str]:
    """Return the options of a given memory that a configuration of the task has, as the user writes them."""
    return ["--" + name.replace("_", "-") for name in _OPTIONS if getattr(cfg, name)]


def refuse_memory_options(cfg) -> None:
    """Refuse the options of a given memory for a model that does not have one.

    Args:
        cfg: Configuration of the task.

    Raises:
        ValueError: There is such an option.
    """
    given = memory_options(cfg)
    if given:
        raise ValueError(f"{given[0]} needs a model with a memory, but that of --path has none: leave it out")


class MemorySession:
    """Load, fill and save the memory before, between and after prompts, as the task's options ask.

    Args:
        generator: Generator whose memories are used.
        cfg: Configuration of the task: ``memory_text``, ``memory_load``, ``memory_save``, ``memory_save_dtype`` and
            ``memorize_turns``.
        encode: Function that encodes a text to token ids, shape (length,), int64.

    Attributes:
        generator: As above.

    Raises:
        ValueError: An option is not supported by the models.
        OSError: No file can be written at --memory-save.
    """

    def __init__(self, generator: LongMemGenerator, cfg, encode: Callable[[str], Tensor]):
        self.generator, self.cfg, self.encode = generator, cfg, encode
        self.turns = 0
        if memory_options(cfg) and None in generator.document_memories:
            raise ValueError(
                "--memory-text, --memory-load, --memory-save and --memorize-turns need a memory, but the model's is "
                "off (--no-use-external-memory, or --memory-size 0)"
            )
        if (cfg.memory_load or cfg.memory_save) and len(generator.document_memories) > 1:
            raise ValueError("--memory-load and --memory-save support one model: name one in --path")
        if cfg.memory_save:
            try:
                require_writable(cfg.memory_save)
            except OSError as error:
                raise OSError(f"--memory-save {error}") from error

    def start(self) -> None:
        """Load the memory and memorize the documents that the options name, and save the memory with --memory-save.

        Raises:
            ValueError: A document or a memory cannot be read.
            OSError: A file cannot be read, or the memory cannot be saved.
        """
        cfg, memory = self.cfg, self.generator.document_memories[0]
        if cfg.memory_load:
            self._load(cfg.memory_load, memory)
        for path in cfg.memory_text or []:
            self._memorize_file(path, memory)
        if cfg.memory_save and memory.tokens:
            self._save()
        elif cfg.memory_save and not cfg.memorize_turns:
            raise ValueError(
                f"--memory-save {cfg.memory_save} has nothing to save: name documents with --memory-text, or keep the "
                "conversation with --memorize-turns"
            )

    def end_turn(self, sample: Dict[str, Any], hypotheses: Sequence[Sequence[Dict[str, Tensor]]]) -> None:
        """Memorize a prompt and its best answer with --memorize-turns, and save the memory with --memory-save.

        Args:
            sample: Collated batch of one prompt.
            hypotheses: Hypotheses of each prompt, best first.

        Raises:
            ValueError: The batch has several prompts.
        """
        if not self.cfg.memorize_turns:
            return
        prompts, lengths = sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"]
        if len(prompts) > 1:
            raise ValueError(
                f"--memorize-turns answers one prompt after the other, not {len(prompts)} at once: set --batch-size 1"
            )
        answer = hypotheses[0][0]["tokens"].to(prompts)
        if len(answer) and answer[-1] == self.generator.eos:
            answer = answer[:-1]
        self.generator.memorize(self._next_turn(), torch.cat([prompts[0, 1 : int(lengths[0])], answer]))
        if self.cfg.memory_save:
            self._save()

    def _next_turn(self) -> str:
        """Return the first name ``turn N`` that no memory has yet."""
        names = set()
        for memory in self.generator.document_memories:
            names.update(document.name for document in memory.documents)
        self.turns += 1
        while f"turn {self.turns}" in names:
            self.turns += 1
        return f"turn {self.turns}"

    def _load(self, path: str, memory: DocumentMemory) -> None:
        start = time.time()
        load_memory(path, memory, *self._identity())
        names = printable(", ".join(document.name for document in memory.documents))
        logger.info("loaded %s tokens (%s) in %.1f s", f"{memory.tokens:,}", names, time.time() - start)

    def _memorize_file(self, path: str, memory: DocumentMemory) -> None:
        start = time.time()
        try:
            tokens = self.encode(read_text(path))
        except ValueError as error:
            raise ValueError(f"--memory-text {path} cannot be memorized: {error}") from error
        self.generator.memorize("standard input" if path == "-" else path, tokens)
        logger.info(
            "memorized %s: %s tokens in %.1f s; the memory has %s of at most %s",
            printable(path),
            f"{len(tokens):,}",
            time.time() - start,
            f"{memory.tokens:,}",
            f"{memory.bank.chunks * memory.bank.chunk_size:,}",
        )

    def _save(self) -> None:
        start, memory, path = time.time(), self.generator.document_memories[0], self.cfg.memory_save
        dtype = str(self.cfg.memory_save_dtype or DEFAULT_DTYPE)
        save_memory(path, memory, *self._identity(), dtype=dtype)
        size = os.path.getsize(path) / 2**20
        seconds = time.time() - start
        logger.info("saved %s tokens in %s (%.1f MiB) in %.1f s", f"{memory.tokens:,}", printable(path), size, seconds)

    def _identity(self):
        return backbone_identity(self.generator.model.single_model.decoder)


def memory_of_evaluation(model, cfg, dictionary, encode: Callable[[str], Tensor], ranks: int) -> DocumentMemory:
    """Make the memory that each document of a split starts with in ``fairseq-eval-lm``.

    Args:
        model: Model that is evaluated.
        cfg: Configuration of the task.
        dictionary: Dictionary of the tokens.
        encode: Function that encodes a text to token ids, shape (length,), int64.
        ranks: Number of ranks or shards of the evaluation.

    Returns:
        The memory, which the model's streams of evaluation now start with.

    Raises:
        ValueError: An option is not supported by the model or the evaluation.
    """
    if not hasattr(model, "memorize"):
        refuse_memory_options(cfg)
    if memory_policy(cfg.memory_scope).shares_memory:
        raise ValueError(
            f"--memory-scope {cfg.memory_scope} has one memory for all lanes, in which no document can start with a "
            "given memory: set --memory-scope document"
        )
    if cfg.memory_save and ranks > 1:
        raise ValueError(
            f"--memory-save {cfg.memory_save} would be written by each of {ranks} ranks: save the memory in a command "
            "of one, and read it with --memory-load"
        )
    session = MemorySession(LongMemGenerator([model], dictionary, cfg.tokens_per_sample), cfg, encode)
    session.start()
    memory = session.generator.document_memories[0]
    model.decoder.lane_state.memories.base = memory.bank
    return memory
