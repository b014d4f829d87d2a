"""The memory of a generation command: ``--memory-text``, ``--memory-load``, ``--memory-save``, ``--memorize-turns``."""

import logging
import os
import time
from typing import Any, Callable, Dict, Sequence

import torch
from torch import Tensor

from ..memory.document_memory import DocumentMemory
from ..memory.memory_file import load_memory, save_memory
from ..text import read_text
from .generator import LongMemGenerator, backbone_identity

logger = logging.getLogger(__name__)


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
    """

    def __init__(self, generator: LongMemGenerator, cfg, encode: Callable[[str], Tensor]):
        self.generator, self.cfg, self.encode = generator, cfg, encode
        self.turns = 0
        needs_memory = cfg.memory_text or cfg.memory_load or cfg.memory_save or cfg.memorize_turns
        if needs_memory and None in generator.document_memories:
            raise ValueError(
                "--memory-text, --memory-load, --memory-save and --memorize-turns need a memory, but the model's is "
                "off (--no-use-external-memory, or --memory-size 0)"
            )
        if (cfg.memory_load or cfg.memory_save) and len(generator.document_memories) > 1:
            raise ValueError("--memory-load and --memory-save support one model: name one in --path")

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
        names = ", ".join(document.name for document in memory.documents)
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
            path,
            f"{len(tokens):,}",
            time.time() - start,
            f"{memory.tokens:,}",
            f"{memory.bank.chunks * memory.bank.chunk_size:,}",
        )

    def _save(self) -> None:
        start, memory, path = time.time(), self.generator.document_memories[0], self.cfg.memory_save
        save_memory(path, memory, *self._identity(), dtype=str(self.cfg.memory_save_dtype))
        size = os.path.getsize(path) / 2**20
        logger.info("saved %s tokens in %s (%.1f MiB) in %.1f s", f"{memory.tokens:,}", path, size, time.time() - start)

    def _identity(self):
        return backbone_identity(self.generator.model.single_model.decoder)
