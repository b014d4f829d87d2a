"""Variants that throughput.py measures: one decoder with memories of several sizes that reads, trains or generates, and
the backbone alone (full_attention.py).

Every variant has ``step()``, the ``tokens`` of a step, ``bank_bytes`` and ``recall``; one with a memory also has
``memory_size``, ``banks``, ``fill()`` and ``fill_with_noise()``.

Legend: B lanes, T tokens of a segment, H heads, d width of a head, N chunks that a lane holds, C tokens of a chunk.
"""

import argparse
import copy
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from examples.benchmark.full_attention import FullAttentionVariant, FullContextVariant, random_tokens
from examples.benchmark.real_keys import RealKeys, RealQueriesFactory
from longmem_fairseq.backbones.base import Backbone
from longmem_fairseq.backbones.loading import build_backbone, load_backbone, read_backbone
from longmem_fairseq.data.segments import Segments
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.factory import MemoryFactory
from longmem_fairseq.memory.search.index_spec import FLAT
from longmem_fairseq.memory.settings import MEMORY_DTYPES, MemorySettings
from longmem_fairseq.memory.stream_memory import StreamMemory
from longmem_fairseq.memory.token_bank import TokenBank, stored
from longmem_fairseq.models.lane_state import LaneState
from longmem_fairseq.models.live_window import WINDOW, new_window
from longmem_fairseq.models.longmem_config import LongMemConfig
from longmem_fairseq.models.longmem_decoder import LongMemDecoder
from longmem_fairseq.models.memory_layers import (
    default_memory_layer,
    memory_layers_setting,
    parse_memory_layers,
    select_memory_layers,
)
from longmem_fairseq.models.predictor import Predictor
from longmem_fairseq.modules.mixed_precision import compute_products_in

DTYPES = {**MEMORY_DTYPES, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def take_sizes(options: argparse.Namespace) -> None:
    """Set the sizes among the options to those of ``--backbone``, and add what follows from them.

    Args:
        options: Options of throughput.py; ``kv_heads``, ``head_dim`` and ``layer_weights`` are added, the number of
            weights in the matrices of a layer.

    Raises:
        ValueError: The checkpoint cannot be a backbone, or the memory layers are not numbers.
        OSError: There is no dict.txt beside it.
    """
    options.kv_heads, options.head_dim = options.heads, options.dim // max(1, options.heads)
    options.layer_weights = 12 * options.dim**2
    if options.backbone is not None:
        description, _ = read_backbone(options.backbone)
        with torch.device("meta"):
            backbone = build_backbone(description, dictionary_beside(options.backbone))
        options.layers, options.dim, options.heads = backbone.num_layers, backbone.width, backbone.num_heads
        options.kv_heads, options.head_dim = backbone.num_kv_heads, backbone.head_dim
        options.vocab = backbone.vocabulary
        options.layer_weights = sum(p.numel() for p in backbone.layers[0].parameters() if p.dim() > 1)
    if options.retrieval_layer_index is None:
        options.retrieval_layer_index = default_memory_layer(options.layers, options.reduction)
    options.retrieval_layer_index = memory_layers_setting(parse_memory_layers(options.retrieval_layer_index))


def dictionary_beside(checkpoint: str) -> Dictionary:
    """Load the dictionary in the directory of a checkpoint.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(checkpoint).with_name("dict.txt")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: put the backbone's dict.txt beside its checkpoint")
    return Dictionary.load(str(path))


def random_backbone(options: argparse.Namespace, dictionary: Dictionary) -> Backbone:
    """Build a backbone with random weights in the shape of the options."""
    alibi = options.positions == "alibi"
    config = {
        "model": "alibi_lm" if alibi else "transformer_lm",
        "vocabulary": len(dictionary),
        "activation_fn": "gelu",
        "decoder_embed_dim": options.dim,
        "decoder_input_dim": options.dim,
        "decoder_output_dim": options.dim,
        "decoder_ffn_embed_dim": 4 * options.dim,
        "decoder_layers": options.layers,
        "decoder_attention_heads": options.heads,
        "decoder_normalize_before": True,
        "decoder_learned_pos": not alibi,
        "no_token_positional_embeddings": alibi,
        "share_decoder_input_output_embed": True,
        "no_scale_embedding": True,
        "max_target_positions": max([*options.full_windows, options.segment + max(options.full_contexts, default=0)]),
    }
    torch.manual_seed(0)
    return build_backbone(config, dictionary)


def build_decoder(options: argparse.Namespace) -> LongMemDecoder:
    """Build a decoder on the backbone of the options, or on one with random weights in their shape.

    Raises:
        ValueError: The memory layers are not layers of the backbone that can be read together.
    """
    if options.backbone is None:
        dictionary = Dictionary()
        for i in range(options.vocab - len(dictionary)):
            dictionary.add_symbol(f"w{i}")
        backbone = random_backbone(options, dictionary)
    else:
        dictionary = dictionary_beside(options.backbone)
        backbone = load_backbone(options.backbone, dictionary)
    cfg = OmegaConf.merge(
        OmegaConf.structured(LongMemConfig),
        {
            "k": options.k,
            "chunk_size": options.chunk_size,
            "retrieval_layer_index": options.retrieval_layer_index,
            "layer_reduction_factor": options.reduction,
            "memory_search": options.memory_search,
            "memory_dtype": options.memory_dtype,
            "memory_index": options.memory_index,
            "memory_index_parameters": options.memory_index_parameters,
            "memory_device": options.memory_device,
            "memory_map": options.memory_map,
            "tokens_per_sample": options.segment,
            "memory_scope": "document",
            "token_memory": max(options.token_memory_sizes, default=0),
            "token_memory_k": options.token_memory_k,
        },
    )
    select_memory_layers(cfg, backbone)
    layers = len(backbone.memory_layers)
    sizes = dict(layers=layers, width=backbone.width, symbols=backbone.vocabulary)
    factory = MemoryFactory(MemorySettings.from_config(cfg), backbone.num_kv_heads, backbone.head_dim, **sizes)
    decoder = LongMemDecoder(cfg, dictionary, backbone, factory)
    decoder.start_from_backbone()
    if products_only(options):
        compute_products_in(decoder, DTYPES[options.dtype])
    else:
        decoder.to(options.device, DTYPES[options.dtype])
    return decoder.train(options.mode == "train")


def products_only(options: argparse.Namespace) -> bool:
    """Return whether only matrix products have ``--dtype``, as with --inference-dtype: for bfloat16 on the CPU."""
    return DTYPES[options.dtype] == torch.bfloat16 and options.mode != "train" and options.device.type == "cpu"


def with_memory_size(
    decoder: LongMemDecoder, memory_size: int, token_memory: int = 0, real: Optional[RealKeys] = None
) -> LongMemDecoder:
    """Return a decoder that shares all weights with another and has memories of other sizes.

    A memory that is too small for the index is searched exactly.

    Args:
        decoder: Decoder whose modules and weights are shared.
        memory_size: Number of tokens that a lane's memory holds; 0 for no memory.
        token_memory: Number of tokens that a lane's token memory holds; 0 for none.
        real: Real keys and queries; the memories are searched for these queries.
    """
    factory = decoder.memory_factory
    settings = replace(factory.settings, size=memory_size, token_memory=token_memory)
    if settings.indexed and not can_index(settings, factory.head_dim):
        settings = replace(settings, index=FLAT, index_parameters="")
    factory = factory.with_settings(settings)
    other = copy.copy(decoder)
    vars(other)["_modules"] = dict(decoder.named_children())
    if not token_memory:
        other.predictor = Predictor(decoder.backbone)
    other.memory_factory = factory if real is None else RealQueriesFactory(factory, real)
    other.lane_state = LaneState(other, other.memory_factory, decoder.lane_state.windows.size)
    return other


def can_index(settings: MemorySettings, head_dim: int) -> bool:
    """Return whether a memory of these settings has enough chunks to train its index."""
    try:
        settings.index_spec(head_dim)
    except ValueError:
        return False
    return True


class LongMemVariant(ABC):
    """A decoder with memories of certain sizes.

    Args:
        decoder: Decoder whose weights are used.
        memory_size: Number of tokens that a lane's memory holds; 0 for no memory.
        token_memory: Number of tokens that a lane's token memory holds; 0 for none.
        options: Options of throughput.py.
        real: Real keys and queries in place of those of the random tokens.
    """

    def __init__(
        self,
        decoder: LongMemDecoder,
        memory_size: int,
        token_memory: int,
        options: argparse.Namespace,
        real: Optional[RealKeys] = None,
    ):
        self.decoder = with_memory_size(decoder, memory_size, token_memory, real)
        self.memory_size, self.token_memory, self.options, self.real = memory_size, token_memory, options, real

    def fill(self) -> None:
        """Fill the memories with encoded random tokens, with real keys (``--keys``), or with noise (``--noise``)."""
        if self.options.noise and self.memory_size:
            self.fill_with_noise()
        else:
            self.fill_with_tokens()

    @abstractmethod
    def fill_with_tokens(self) -> None:
        """Fill the memories with encoded random tokens; with ``--keys``, that of keys with real ones."""

    @abstractmethod
    def fill_with_noise(self) -> None:
        """Fill the memories with noise."""


class StreamVariant(LongMemVariant):
    """A decoder that reads a stream of random tokens in each lane, segment by segment."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.start, self.lanes = 0, torch.arange(self.options.batch).numpy()
        self.hits = self.total = 0.0

    def fill_with_tokens(self) -> None:
        if self.real is not None and self.memory_size:
            memory = self._allocated()
            self.real.fill(memory.bank)
            if memory.token_streams is not None:
                fill_tokens_with_noise(memory.token_streams.bank)
            return
        segments = -(-self.memory_size // self.options.segment) + 1 if self.memory_size else 0
        for _ in tqdm(range(segments), desc=f"filling {self.memory_size:,}", leave=False, mininterval=2):
            self.decoder.memorize(*self._next())

    def fill_with_noise(self) -> None:
        memory = self._allocated()
        fill_with_noise(memory.bank)
        if memory.token_streams is not None:
            fill_tokens_with_noise(memory.token_streams.bank)

    def _allocated(self) -> StreamMemory:
        """Return the memory after the first segment was written."""
        self.decoder.memorize(*self._next())
        (memory,) = self.decoder.lane_state.memories
        memory.flush()
        return memory

    @property
    def banks(self) -> List[MemoryBank]:
        """Memory banks of all lanes."""
        return [memory.bank for memory in self.decoder.lane_state.memories]

    @property
    def bank_bytes(self) -> int:
        """Number of bytes of the memory."""
        return sum(memory.nbytes for memory in self.decoder.lane_state.memories)

    @property
    def recall(self) -> Optional[float]:
        """Share of the chunks of exact search that the index finds, 0 to 1; None where the search is exact."""
        return self.hits / self.total if self.total else None

    def step(self) -> None:
        """Read one segment of every lane; in training also compute the gradients of the side network."""
        tokens, segments = self._next()
        with nullcontext() if self.options.mode == "train" else torch.no_grad():
            logits, extra = self.decoder(tokens, segments=segments)
            if self.options.mode == "train":
                F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
                for parameter in self.decoder.parameters():
                    parameter.grad = None
        if extra["memory"] is not None and extra["memory"].recall is not None:
            hits, total = extra["memory"].recall
            self.hits, self.total = self.hits + hits, self.total + total

    @property
    def tokens(self) -> int:
        """Number of tokens in one step."""
        return self.options.batch * self.options.segment

    def _next(self) -> Tuple[Tensor, Segments]:
        """Return the next segment of every lane: token ids (B, T) and their places."""
        tokens = random_tokens(self.options, self.options.segment)
        segments = Segments(
            self.lanes, self.lanes, self.lanes * 0 + self.start, self.lanes * 0 + self.options.segment, len(self.lanes)
        )
        self.start += self.options.segment
        return tokens, segments


class GenerationVariant(LongMemVariant):
    """A decoder that generates token by token in every row; each row has its own memory.

    The older half of a full window moves into the memory, as in generation. A step is a quarter of a window, so every
    other step includes such a move. Half of each window is filled with random tokens beside the memories.
    """

    recall = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.window = new_window(self.decoder, self.options.segment, self.options.batch)
        self.state: Dict = {WINDOW: {"window": self.window}}

    @torch.no_grad()
    def fill_with_tokens(self) -> None:
        branches, T = self.window.branches, self.options.segment
        if branches is not None:
            branches.banks = [branches.new_bank() for _ in range(self.options.batch)]
            if self.real is not None:
                for bank in branches.banks:
                    self.real.fill(bank)
                    if self.token_memory:
                        fill_tokens_with_noise(bank.token_bank)
            else:
                for _ in tqdm(range(-(-self.memory_size // T)), desc=f"filling {self.memory_size:,}", leave=False):
                    self._write(random_tokens(self.options, T))
        self._fill_half_window()

    def _write(self, tokens: Tensor) -> None:
        """Encode tokens (B, T) and write them into the banks."""
        predictor = self.decoder.predictor
        encoded = predictor.encode_for_memory(tokens)
        states = predictor.token_states(encoded, tokens)
        for row, bank in enumerate(self.window.branches.banks):
            bank.append(0, encoded.keys[row], encoded.values[row])
            if states is not None:
                bank.token_bank.append(0, states.hidden[row], states.tokens[row])

    @torch.no_grad()
    def fill_with_noise(self) -> None:
        branches = self.window.branches
        branches.banks = [branches.new_bank() for _ in range(self.options.batch)]
        for bank in branches.banks:
            fill_with_noise(bank)
            if self.token_memory:
                fill_tokens_with_noise(bank.token_bank)
        self._fill_half_window()

    def _fill_half_window(self) -> None:
        self.window.fill(list(random_tokens(self.options, self.options.segment // 2)), self.state)

    @property
    def banks(self) -> List[MemoryBank]:
        """Memory bank of each row."""
        return [] if self.window.branches is None else list(self.window.branches.banks)

    @property
    def bank_bytes(self) -> int:
        """Number of bytes of the memories of all rows."""
        token_banks = [bank.token_bank for bank in self.banks if bank.token_bank is not None]
        return sum(bank.nbytes for bank in [*self.banks, *token_banks])

    @property
    def tokens(self) -> int:
        """Number of tokens in one step."""
        return self.options.batch * self.steps

    @property
    def steps(self) -> int:
        """Number of tokens of a row in one step."""
        return max(1, self.options.segment // 4)

    @torch.no_grad()
    def step(self) -> None:
        """Compute the logits of a quarter of a window, one token after the other."""
        for _ in range(self.steps):
            self.decoder(random_tokens(self.options, 1), incremental_state=self.state)


def fill_with_noise(bank: MemoryBank) -> None:
    """Make a bank full of random keys, values and means."""
    for buffer in (bank.keys, bank.values, bank.means):
        buffer.normal_()
    bank.written[:] = bank.chunks + bank.written
    bank.position[:] = bank.written * bank.chunk_size
    bank.resets += 1


def fill_tokens_with_noise(bank: TokenBank) -> None:
    """Make the bank of a token memory full of random hidden states and tokens."""
    for lane in range(bank.lanes):
        for begin in range(0, bank.size, 1024):
            hidden = torch.randn(min(1024, bank.size - begin), bank.width, device=bank.hidden.device)
            tokens = torch.randint(4, bank.symbols, (len(hidden),), device=bank.tokens.device)
            bank.append(lane, stored(hidden, bank.hidden.dtype), tokens)


def build_variant(name: str, decoder: LongMemDecoder, options: argparse.Namespace, real: Optional[RealKeys] = None):
    """Build the variant of a name.

    Args:
        name: ``memory:SIZE:TOKEN_MEMORY:GRAPHS``, ``window:LENGTH`` or ``context:LENGTH``, sizes in tokens; GRAPHS is a
            value of ``--cuda-graphs``.
        decoder: Decoder whose weights are used.
        options: Options of throughput.py.
        real: Real keys and queries in place of those of random tokens.
    """
    kind, size, *rest = name.split(":")
    if kind != "memory":
        full = {"window": FullAttentionVariant, "context": FullContextVariant}[kind]
        return full(decoder.backbone, int(size), options)
    token_memory, graphs = rest
    variant = GenerationVariant if options.mode == "generate" else StreamVariant
    built = variant(decoder, int(size), int(token_memory), options, real)
    built.decoder.lane_state.graphs.mode = graphs
    return built
