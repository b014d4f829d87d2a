"""Score the same text with several systems that share one backbone: backbone alone, memory off and on, neural cache.

>>> scorer = Scorer.load("checkpoints", tokenizer="data")
>>> state = scorer.new_state()
>>> scorer.memorize(state, scorer.tokenizer.encode(novel))            # a long text, once
>>> window = scorer.window(state, scorer.tokenizer.encode("The"), room=20)
>>> window.score([scorer.tokenizer.encode(text) for text in texts])   # many continuations; the state stays as it is

Legend: B rows, T tokens of a window and of a segment, D width, V symbols.
"""

import os
from functools import cached_property
from typing import Any, Dict, FrozenSet, List, Optional, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from torch import Tensor

from ...backbones.added_symbols import AddedSymbols, added_symbols
from ...backbones.base import Backbone, EncodedSegment
from ...backbones.loading import load_backbone
from ...hub import LongMem
from ...memory.branches import MemoryBranches
from ...memory.cache import CacheSettings, NeuralCache
from ...memory.reader import BatchReader
from ...memory.token_bank import Past, TokenStates
from ...models.longmem_decoder import LongMemDecoder
from ...models.longmem_lm import LongMemModel
from ...models.model_directory import is_model_directory
from ...models.reading import encode_document
from ...modules.token_mixture import TokenReads
from ...progress import token_bar
from ...tasks.pretrained import choose_device, find_checkpoint, find_data, read_state
from .description import describe
from .system_times import SystemTimes
from .systems import BACKBONE, OFF, ON, WITH_CACHE
from .text_state import TextState
from .text_tokenizer import TextTokenizer
from .window import Window

CACHE_SIZE = 65536  # tokens of the neural cache of a backbone alone


class Scorer:
    """Systems that share one backbone, and so one encoding of every text.

    Args:
        backbone: Frozen backbone of all systems.
        decoder: LongMem decoder with its side network and memory; None for a backbone alone.
        tokenizer: Tokenizer of the backbone's dictionary.
        size: Number T of tokens of a window, and of a segment that is memorized.
        memory_size: Number of tokens that the memory and the cache hold.

    Attributes:
        cache: Settings of the neural cache by system, for "backbone" and "memory on"; empty without a cache.
        skipped: Names of systems that are not scored.
        excluded: Ids of symbols that get no probability, shape (n,), int64; none by default.
        times: Wall time of each system.

    Raises:
        ValueError: The window does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder: Optional[LongMemDecoder],
        tokenizer: TextTokenizer,
        size: int,
        memory_size: int,
    ):
        longest = backbone.max_positions
        if longest is not None and size > longest:
            raise ValueError(f"--tokens-per-sample {size} is longer than the backbone's {longest} positions: lower it")
        if size < 2:
            raise ValueError(f"--tokens-per-sample {size} is smaller than 2, the smallest window: raise it")
        self.backbone, self.decoder, self.tokenizer = backbone, decoder, tokenizer
        self.size, self.memory_size = size, memory_size
        self.cache: Dict[str, CacheSettings] = {}
        self.skipped: FrozenSet[str] = frozenset()
        self.times = SystemTimes(self.device)
        self.excluded = torch.zeros(0, dtype=torch.int64, device=self.device)

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
        """Load a checkpoint: a ``longmem_lm``, a released LongMem, or any language model that can be a backbone.

        Args:
            path: Path of a checkpoint, of a directory that contains ``checkpoint_best.pt``, ``checkpoint_last.pt`` or
                ``model.pt``, or of a model directory (``config.json`` and safetensors files).
            tokenizer: Path of a directory that contains ``dict.txt`` and ``tokenizer.json``, ``sentencepiece.model``,
                or GPT-2's ``encoder.json`` and ``vocab.bpe``; by default the checkpoint's, then the one of its training
                data.
            device: Device of the model; by default a GPU if there is one.
            backbone: Path of the backbone's checkpoint, if it has moved.
            tokens_per_sample: Number T of tokens of a window; by default that of the checkpoint's training.
            settings: Settings of a LongMem in place of the checkpoint's, such as ``memory_size``, ``k`` and
                ``chunk_size``; None keeps the checkpoint's. A backbone alone has only the ``memory_size`` of its cache.

        Raises:
            FileNotFoundError: The checkpoint or the dictionary is missing.
            ValueError: The checkpoint holds another kind of model, or a setting does not fit.
        """
        device = choose_device(device)
        settings = {name: value for name, value in settings.items() if value is not None}
        window = {} if tokens_per_sample is None else {"tokens_per_sample": tokens_per_sample}
        if is_model_directory(path):
            if backbone is not None:
                raise ValueError(f"{path} holds its own backbone: leave out --backbone")
            return cls._of_longmem(LongMem.from_pretrained(path, tokenizer, device=device, **window, **settings))
        checkpoint = find_checkpoint(path)
        cfg = read_state(checkpoint)["cfg"]
        directory = find_data(tokenizer, checkpoint, cfg["task"].get("data"))
        name = cfg["model"]["_name"]
        if issubclass(ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name) or object, LongMemModel):
            moved = {} if backbone is None else {"pretrained_model_path": backbone}
            loaded = LongMem.from_pretrained(checkpoint, directory, device=device, **window, **moved, **settings)
            return cls._of_longmem(loaded)
        if backbone is not None:
            raise ValueError(f"{checkpoint} is a {name} without another backbone: leave out --backbone")
        unknown = sorted(set(settings) - {"memory_size", "k", "chunk_size"})
        if unknown:
            raise ValueError(f"{checkpoint}, a {name}, does not have the setting {unknown[0]}: leave it out")
        dictionary = Dictionary.load(os.path.join(directory, "dict.txt"))
        model = load_backbone(checkpoint, dictionary).to(device)
        size = tokens_per_sample or cfg["task"].get("tokens_per_sample") or model.trained_window
        if size is None:
            raise ValueError(f"{checkpoint} does not tell the window it was trained with: give --tokens-per-sample")
        memory_size = settings.get("memory_size", CACHE_SIZE)
        return cls(model, None, TextTokenizer.load(directory, dictionary), size, memory_size)

    @classmethod
    def _of_longmem(cls, model: LongMem) -> "Scorer":
        decoder, task = model.model.decoder, model.task
        carried = decoder.lane_state.windows.size
        if carried:
            raise ValueError(
                f"the model carries a window (--carry-window {carried}), which these evaluations do not: evaluate it "
                "with fairseq-eval-lm"
            )
        tokenizer = TextTokenizer(task.dictionary, model.bpe)
        return cls(
            decoder.backbone, decoder, tokenizer, task.args.tokens_per_sample, decoder.memory_factory.settings.size
        )

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.backbone.device

    @cached_property
    def added_symbols(self) -> AddedSymbols:
        """Symbols that a conversion from Hugging Face added to the model's own."""
        return added_symbols(self.backbone, self.tokenizer.dictionary)

    @property
    def has_memory(self) -> bool:
        """Whether one of the systems has a memory."""
        return self.decoder is not None and self.decoder.has_memory

    @property
    def systems(self) -> List[str]:
        """Names of the systems, in the order of reports."""
        plain = [BACKBONE] + ([OFF] if self.decoder is not None else []) + ([ON] if self.has_memory else [])
        plain = [name for name in plain if name not in self.skipped]
        return plain + [name + WITH_CACHE for name in plain if name in self.cache]

    def describe(self) -> Dict[str, Any]:
        """Describe the weights, the sizes and the reading of the systems, in plain JSON types."""
        return describe(self)

    def new_state(
        self, memory_size: Optional[int] = None, at_most: Optional[int] = None, cached: Optional[bool] = None
    ) -> TextState:
        """Return the state at the start of a document.

        Args:
            memory_size: Number of tokens that memory and cache hold; by default the scorer's.
            at_most: Maximum number of tokens that will be memorized, if known, so that no more room is allocated.
            cached: If true, the state has a cache; by default if the scorer has settings for one.
        """
        size = self.memory_size if memory_size is None else memory_size
        if at_most is not None:
            size = min(size, at_most + self.size)
        bank = cache = None
        if self.has_memory and size:
            bank = self.decoder.memory_factory.with_size(size).document_bank(self.backbone.dtype, self.device)
        if size and (bool(self.cache) if cached is None else cached):
            cache = NeuralCache(size, self.backbone.width, self.device)
        return TextState(self.tokenizer.eos, bank, cache)

    @torch.no_grad()
    def memorize(self, state: TextState, tokens: Tensor) -> None:
        """Read a text behind a state, segment by segment, and write it into the state's memory and cache.

        Every segment is encoded by itself, as when a document is scored. Tokens that would be evicted before the end of
        the text are not encoded.

        Args:
            state: State to advance.
            tokens: Token ids of the text, shape (length,), int64.
        """
        begin, tokens = state.tokens, tokens.to(self.device)
        inputs = state.advance(tokens)
        if not len(tokens) or (state.bank is None and state.cache is None):
            return
        skipped = self._skip(state, begin, len(tokens))
        inputs, tokens = inputs[skipped:], tokens[skipped:]
        all_layers = state.cache is not None or state.token_bank is not None
        remembering = [ON] if state.bank is not None else [name + WITH_CACHE for name in self.cache]
        with token_bar(len(inputs), "memorizing") as progress, self.times.measure(*remembering):
            for part, encoded in encode_document(self.backbone, inputs, self.size, all_layers):
                self.write(state, encoded, part, tokens[: part.numel()])
                tokens = tokens[part.numel() :]
                progress.update(part.numel())

    def _skip(self, state: TextState, begin: int, length: int) -> int:
        """Skip whole segments of ``length`` tokens from ``begin`` on that would be evicted; return how many tokens."""
        capacity = 0 if state.cache is None else state.cache.size
        if state.bank is not None:
            capacity = max(capacity, (state.bank.chunks + 1) * state.bank.chunk_size)
        if state.token_bank is not None:
            capacity = max(capacity, state.token_bank.size)
        skipped = max(0, length - capacity) // self.size * self.size
        if skipped and state.bank is not None:
            state.bank.reset(0, begin + skipped)
        if skipped and state.token_bank is not None:
            state.token_bank.reset(0, begin + skipped)
        return skipped

    def write(self, state: TextState, encoded: EncodedSegment, inputs: Tensor, followers: Tensor) -> None:
        """Write consecutive encoded segments into a state's memory and cache.

        Args:
            state: State to write into; :meth:`.TextState.advance` is left to the caller.
            encoded: Encoded segments, one a row, in the order of the text.
            inputs: Token ids that were encoded, shape (B, T), int64.
            followers: Token ids that followed the inputs, shape (B T,), int64.
        """
        if state.bank is not None:
            for keys, values in zip(encoded.keys, encoded.values):
                state.bank.append(0, keys, values)
        if state.token_bank is not None:
            states = self.decoder.predictor.token_states(encoded, inputs)
            state.token_bank.append(0, states.hidden.flatten(0, 1), states.tokens.flatten())
        if state.cache is not None:
            state.cache.append(self.backbone.final_hidden(encoded).flatten(0, 1), followers)

    def window(self, state: TextState, prefix: Optional[Tensor] = None, room: int = 0) -> Window:
        """Read the end of the text that continuations share; see :class:`.window.Window`.

        Args:
            state: State of the text before the prefix; only read.
            prefix: Token ids of the end of the text, shape (length,), int64; by default none.
            room: Maximum number of tokens of a continuation with its prompt.
        """
        return Window(self, state, prefix, room)

    def branches(self, state: TextState, rows: int) -> Optional[MemoryBranches]:
        """Return memories for a number of rows that all start from a state's, which is only read; None without one."""
        bank = state.bank
        if bank is None:
            return None
        factory = self.decoder.memory_factory.with_size(bank.chunks * bank.chunk_size)
        return factory.branches(rows, self.backbone.dtype, self.device, bank)

    def reader(self, state: TextState, rows: int) -> Optional[BatchReader]:
        """Return the reader of a state's memory for a number of rows; None without a memory."""
        branches = self.branches(state, rows)
        return None if branches is None else branches.reader()

    def features(
        self,
        tokens: Tensor,
        states: Dict[str, TextState],
        incremental: Optional[Dict[str, dict]] = None,
        start: int = 0,
    ) -> Tuple[Dict[str, Tensor], EncodedSegment]:
        """Run the backbone once, and each plain system's side network on its hidden states.

        Args:
            tokens: Token ids of the inputs, shape (B, T), int64.
            states: State of each system that reads a memory: "memory on", or several by other names.
            incremental: fairseq's incremental state of each system, to continue from and to extend; by default none.
            start: Position of the first input in the window.

        Returns:
            Input of the output layer by system, shape (B, T, D), and the encoded segment.
        """
        incremental = incremental or {}
        side_networks = {} if self.decoder is None else {OFF: None, **states}
        side_networks = {name: state for name, state in side_networks.items() if name not in self.skipped}
        with self.times.measure(BACKBONE, *side_networks):
            encoded = self.backbone.encode(tokens, incremental.get(BACKBONE), start)
            features = {BACKBONE: self.backbone.final_hidden(encoded)}
        for name, state in side_networks.items():
            with self.times.measure(name):
                reader = None if state is None else self.reader(state, len(tokens))
                network = self.decoder.side_network(encoded, reader, incremental.get(name))
                features[name] = self.decoder.features(network)
        return features, encoded

    def token_reads(
        self, state: TextState, states: Optional[TokenStates], prefix: Optional[TokenStates] = None
    ) -> Optional[TokenReads]:
        """Return what rows (B, T) read from the token memory of a state; None without one.

        Args:
            state: State of the text before the rows; only read.
            states: Tokens of the rows, and their hidden states.
            prefix: Tokens (T,) between the state's text and the rows, and their hidden states (T, D); None for none.
        """
        if state.token_bank is None:
            return None
        past = state.token_bank.past(0)
        if prefix is not None:
            past = Past((*past.hidden, prefix.hidden), torch.cat([past.tokens, prefix.tokens]))
        reader = self.decoder.memory_factory.token_reader(self.device)
        return reader.read_segments([past] * len(states.tokens), states)

    def log_probs(self, features: Tensor, reads: Optional[TokenReads] = None) -> Tensor:
        """Return log-probabilities (n, V), float32, of features (n, D): the backbone's output layer is shared.

        Args:
            features: Input of the output layer, shape (n, D).
            reads: What was read from a token memory, with n in place of (B, T); None for nothing.
        """
        if reads is None:
            logits = self.backbone.output(features).float()
        else:
            logits = self.decoder.predictor(features[None], TokenReads(*(x[None] for x in reads)))[0]
            if not len(self.excluded):
                return logits  # log-probabilities already
        if len(self.excluded):
            logits = logits.index_fill(-1, self.excluded, float("-inf"))
        return logits.log_softmax(-1)

    def target_log_probs(
        self,
        features: Dict[str, Tensor],
        targets: Tensor,
        reads: Optional[Dict[str, TokenReads]] = None,
        at_once: int = 1024,
        likeliest: Optional[Dict[str, Tensor]] = None,
    ) -> Dict[str, Tensor]:
        """Return the log-probabilities of targets by system; systems that are skipped are left out.

        Args:
            features: Input of the output layer by system, shape (n, D).
            targets: Token ids to predict, shape (n,), int64.
            reads: What some systems read from their token memories, with n in place of (B, T).
            at_once: Number of targets per block, which limits the memory of the logits.
            likeliest: Dictionary that gets the likeliest symbol in place of each target by system, shape (n,), int64.

        Returns:
            Log-probabilities by system, shape (n,), float32.
        """
        log_probs = {}
        for name, x in features.items():
            if name in self.skipped:
                continue
            parts, symbols = [], []
            for begin in range(0, len(targets), at_once):
                block = slice(begin, begin + at_once)
                read = TokenReads(*(r[block] for r in reads[name])) if reads and name in reads else None
                with self.times.measure(name):
                    scores = self.log_probs(x[block], read)  # (n, V)
                    parts.append(scores.gather(1, targets[block, None])[:, 0])
                if likeliest is not None:
                    symbols.append(scores.argmax(1))
            self.times.count(name, len(targets))
            log_probs[name] = torch.cat(parts)
            if likeliest is not None:
                likeliest[name] = torch.cat(symbols)
        return log_probs
