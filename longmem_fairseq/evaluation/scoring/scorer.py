"""Any checkpoint as one or more systems that are asked the same: the backbone, memory off and on, with a neural cache.

>>> scorer = Scorer.load("checkpoints", tokenizer="data")
>>> past = scorer.new_past()
>>> scorer.memorize(past, scorer.tokenizer.encode(novel))           # a long text, once
>>> window = scorer.window(past, scorer.tokenizer.encode("The"), room=20)
>>> window.score([scorer.tokenizer.encode(text) for text in texts])  # many continuations, and the past stays as it is

Legend: B rows, S tokens of a window that all rows share, R tokens of a row, T tokens of a window, D width, V symbols.
"""

import contextlib
import os
import pickle
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from torch import Tensor

from ...backbones.base import Backbone, EncodedSegment
from ...backbones.loading import load_backbone
from ...hub import LongMem, find_checkpoint, find_data
from ...memory.bank import MemoryBank
from ...memory.branches import MemoryBranches
from ...memory.cache import CacheSettings, NeuralCache
from ...models.longmem_decoder import LongMemDecoder
from ...models.longmem_lm import LongMemModel
from ...progress import token_bar
from ...safe_load import why_unreadable
from .description import describe
from .past import Past
from .systems import BACKBONE, OFF, ON, WITH_CACHE
from .text_tokenizer import Tokenizer
from .window import Window

_TOKENS_AT_ONCE = 4096  # of segments that are memorised, which do not see each other


class Scorer:
    """Systems that share one backbone, and so one reading of every text.

    Args:
        backbone: of all systems.
        decoder: of a model with a memory; None for a backbone alone.
        tokenizer: of the tokens.
        size: T, tokens of a window and of a segment that is memorised.
        memory_size: tokens that the memory and the cache hold.

    Attributes:
        cache: how the neural cache is mixed in, for "backbone" and "memory on"; empty without it.

    Raises:
        ValueError: where a size does not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: Optional[LongMemDecoder],
        tokenizer: Tokenizer,
        size: int,
        memory_size: int,
    ):
        longest = backbone.max_positions
        if longest is not None and size > longest:
            raise ValueError(f"--tokens-per-sample {size} is longer than the backbone's {longest} positions: lower it")
        if size < 2:
            raise ValueError(f"--tokens-per-sample {size} is too small: a window has at least 2 tokens")
        self.backbone, self.decoder, self.tokenizer = backbone, decoder, tokenizer
        self.size, self.memory_size = size, memory_size
        self.cache: Dict[str, CacheSettings] = {}

    @classmethod
    def load(
        cls,
        path: str,
        tokenizer: Optional[str] = None,
        device: Optional[str] = None,
        backbone: Optional[str] = None,
        tokens_per_sample: Optional[int] = None,
        **settings,
    ) -> "Scorer":
        """Load a checkpoint: of ``longmem_lm``, of a released LongMem, or of any language model that can be a backbone.

        Args:
            path: of the checkpoint, or of a directory with ``checkpoint_best.pt``, ``checkpoint_last.pt`` or
                ``model.pt``.
            tokenizer: directory of ``dict.txt`` and ``sentencepiece.model``, or GPT-2's ``encoder.json`` and
                ``vocab.bpe``; by default that of the checkpoint, then the one it was trained on.
            device: by default a GPU if there is one.
            backbone: checkpoint of the backbone, where it has moved.
            tokens_per_sample: T, by default that of the checkpoint's training.
            settings: of a LongMem in place of the checkpoint's, such as ``memory_size``, ``k`` and ``chunk_size``; None
                leaves one alone. A backbone alone has but the ``memory_size`` of its neural cache.

        Raises:
            FileNotFoundError: the checkpoint or the dictionary is missing.
            ValueError: the checkpoint can be none of these, or a setting does not fit.
        """
        checkpoint = find_checkpoint(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        settings = {name: value for name, value in settings.items() if value is not None}
        cfg = _configuration(checkpoint)
        directory = find_data(tokenizer, checkpoint, cfg["task"].get("data"))
        name = cfg["model"]["_name"]
        if issubclass(ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name) or object, LongMemModel):
            named = {"pretrained_model_path": backbone, "tokens_per_sample": tokens_per_sample}
            settings.update({name: value for name, value in named.items() if value is not None})
            loaded = LongMem.from_pretrained(checkpoint, data=directory, device=device, **settings)
            decoder, task = loaded.model.decoder, loaded.task
            size = task.args.tokens_per_sample
            memory_size = decoder.cfg.memory_size if decoder.has_memory else 0
            return cls(decoder.backbone, decoder, Tokenizer(task.dictionary, loaded.bpe), size, memory_size)
        if backbone is not None:
            raise ValueError(f"{checkpoint} is a {name} and has no other backbone: leave out --backbone")
        unknown = sorted(set(settings) - {"memory_size", "k", "chunk_size"})
        if unknown:
            raise ValueError(f"{checkpoint} is a {name} without a memory and has no setting {unknown[0]}: leave it out")
        dictionary = Dictionary.load(os.path.join(directory, "dict.txt"))
        model = load_backbone(checkpoint, dictionary, 0).to(device)
        size = tokens_per_sample or cfg["task"].get("tokens_per_sample") or model.config["max_target_positions"]
        memory_size = settings.get("memory_size", 65536)  # of the cache
        return cls(model, None, Tokenizer.load(directory, dictionary), size, memory_size)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def has_memory(self) -> bool:
        """Whether one of the systems has a memory."""
        return self.decoder is not None and self.decoder.has_memory

    @property
    def systems(self) -> List[str]:
        """Names of the systems, in the order of reports."""
        plain = [BACKBONE] + ([OFF] if self.decoder is not None else []) + ([ON] if self.has_memory else [])
        return plain + [name + WITH_CACHE for name in plain if name in self.cache]

    def describe(self) -> Dict[str, Any]:
        """What is evaluated, plain JSON types: which weights, what sizes, how they read."""
        return describe(self)

    def new_past(
        self, memory_size: Optional[int] = None, at_most: Optional[int] = None, cached: Optional[bool] = None
    ) -> Past:
        """The start of a document.

        Args:
            memory_size: tokens that memory and cache hold, by default the scorer's.
            at_most: tokens that it will ever be given, if that is known: no more room is taken then.
            cached: whether it has a cache, by default where the scorer has settings for one.
        """
        size = self.memory_size if memory_size is None else memory_size
        if at_most is not None:
            size = min(size, at_most + self.size)
        bank = cache = None
        if self.has_memory and size:
            with self._memory_of(size):
                bank = self.decoder.new_bank()
        if size and (bool(self.cache) if cached is None else cached):
            cache = NeuralCache(size, self.backbone.width, self.device)
        return Past(self.tokenizer.eos, bank, cache)

    @torch.no_grad()
    def memorize(self, past: Past, tokens: Tensor) -> None:
        """Let a past go on with tokens (length,): segment by segment, each encoded by itself, as a document is read.

        Tokens that memory and cache could not hold to the end are not encoded.
        """
        tokens = tokens.to(self.device)
        if not len(tokens):
            return
        inputs = torch.cat([tokens.new_tensor([past.last]), tokens[:-1]])
        past.last = int(tokens[-1])
        begin = past.tokens
        past.tokens += len(tokens)
        if past.bank is None and past.cache is None:
            return
        skipped = self._skip(past, begin, len(tokens))
        inputs, tokens = inputs[skipped:], tokens[skipped:]
        whole = len(inputs) // self.size * self.size
        parts = list(inputs[:whole].view(-1, self.size).split(max(1, _TOKENS_AT_ONCE // self.size)))
        if whole < len(inputs):
            parts.append(inputs[whole:][None])
        with token_bar(len(inputs), "memorising") as progress:
            for part, followers in zip(parts, tokens.split([part.numel() for part in parts])):
                encoded = self.backbone(part) if past.cache is not None else self.backbone.encode_for_memory(part)
                self.remember(past, encoded, followers)
                progress.update(part.numel())

    def _skip(self, past: Past, begin: int, length: int) -> int:
        """How many of ``length`` tokens from ``begin`` on need not be encoded: whole segments that would give way."""
        held = 0 if past.cache is None else past.cache.size
        if past.bank is not None:
            held = max(held, (past.bank.chunks + 1) * past.bank.chunk_size)
        skipped = max(0, length - held) // self.size * self.size
        if skipped and past.bank is not None:
            past.bank.reset(0, begin + skipped)
        return skipped

    def remember(self, past: Past, encoded: EncodedSegment, followers: Tensor) -> None:
        """Put encoded segments, end to end, with what followed each of their tokens into memory and cache."""
        if past.bank is not None:
            for keys, values in zip(encoded.keys, encoded.values):
                past.bank.append(0, keys, values)
        if past.cache is not None:
            past.cache.append(self.final_hidden(encoded).flatten(0, 1), followers)

    def window(self, past: Past, prefix: Optional[Tensor] = None, room: int = 0) -> Window:
        """The end of a text that continuations share, shape (length,), read behind a past; see :class:`.window.Window`.

        Args:
            past: only read; what of the prefix does not fit into the window goes into a copy of it.
            prefix: by default nothing.
            room: tokens that a continuation may have, with its own prompt.
        """
        return Window(self, past, prefix, room)

    def final_hidden(self, encoded: EncodedSegment) -> Tensor:
        """What the backbone's output layer is given, shape (B, T, D)."""
        x, norm = encoded.hidden[-1], self.backbone.decoder.layer_norm
        if norm is not None and not self.backbone.normalize_last_hidden:  # else it went through already
            x = norm(x)
        return x.transpose(0, 1)

    def reader(self, past: Past, rows: int):
        """What the side network reads a past with, for a number of rows; None where it has none."""
        return None if past.bank is None else self.branches(past.bank, rows).reader()

    def branches(self, bank: MemoryBank, rows: int) -> MemoryBranches:
        """Memories that all begin with a bank, which is only read, for a number of rows."""
        with self._memory_of(bank.chunks * bank.chunk_size):
            return self.decoder.memory_branches(rows, bank)

    @contextlib.contextmanager
    def _memory_of(self, size: int):
        """Within this context the decoder makes and searches memories of so many tokens, and at least one chunk."""
        cfg = self.decoder.cfg
        kept, cfg.memory_size = cfg.memory_size, max(size, cfg.chunk_size)
        try:
            yield
        finally:
            cfg.memory_size = kept

    def features(
        self, tokens: Tensor, pasts: Dict[str, Past], states: Optional[Dict[str, dict]] = None, start: int = 0
    ) -> Tuple[Dict[str, Tensor], EncodedSegment]:
        """What each system gives to the output layer for tokens (B, T), (B, T, D) each, and what the backbone made.

        Args:
            tokens: read from position ``start`` of the window on.
            pasts: systems that read a memory, and which: "memory on" for one, or several by other names.
            states: incremental state of each system, to go on from and to extend.
        """
        states = states or {}
        encoded = self.backbone(tokens, states.get(BACKBONE), start)
        features = {BACKBONE: self.final_hidden(encoded)}
        if self.decoder is not None:
            readers = {OFF: None, **{name: self.reader(past, len(tokens)) for name, past in pasts.items()}}
            for name, reader in readers.items():
                network = self.decoder.side_network(encoded, reader, states.get(name))
                features[name] = self.decoder.features(network)
        return features, encoded

    def log_probs(self, features: Tensor) -> Tensor:
        """Log-probabilities (..., V), float32, of features (..., D): all systems have the backbone's output layer."""
        return self.backbone.output(features).float().log_softmax(-1)

    def target_log_probs(self, features: Dict[str, Tensor], targets: Tensor, at_once: int = 1024) -> Dict[str, Tensor]:
        """Those of targets (n,) by each system, given features (n, D) of each: (n,) float32."""
        return {
            name: torch.cat(
                [
                    self.log_probs(part).gather(1, wanted[:, None])[:, 0]
                    for part, wanted in zip(x.split(at_once), targets.split(at_once))
                ]
            )
            for name, x in features.items()
        }


def _configuration(checkpoint: str):
    """What a checkpoint says of its model and its task.

    Raises:
        ValueError: it cannot be read, or does not say.
    """
    try:
        cfg = checkpoint_utils.load_checkpoint_to_cpu(checkpoint).get("cfg")
    except pickle.UnpicklingError as error:
        raise ValueError(f"{checkpoint} cannot be read: {why_unreadable(error)}") from error
    if not cfg:
        raise ValueError(f"{checkpoint} is no checkpoint of fairseq 0.11 or later: it lacks its configuration")
    return cfg
