"""What throughput.py measures: one decoder with memories of several sizes, reading, training or generating, and the
backbone alone over longer windows.

Legend: B lanes, T tokens of a segment, H heads, d width of a head, N chunks that a lane holds, C tokens of a chunk.
"""

import argparse
import copy
from contextlib import nullcontext
from typing import Dict, Optional

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from longmem_fairseq.backbones.loading import Backbone, build_backbone
from longmem_fairseq.data.segments import Segments
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search.index_spec import FLAT, index_spec
from longmem_fairseq.models.live_window import WINDOW, LiveWindow
from longmem_fairseq.models.longmem_decoder import MEMORY_DTYPES, LongMemDecoder
from longmem_fairseq.models.longmem_lm import LongMemConfig
from longmem_fairseq.modules.mixed_precision import compute_products_in

DTYPES = {**MEMORY_DTYPES, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FILLED = 1 << 13  # chunks of real keys written at a time


def build_decoder(options: argparse.Namespace) -> LongMemDecoder:
    """A decoder with random weights in the shape that the options ask for."""
    dictionary = Dictionary()
    for i in range(options.vocab - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
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
        "max_target_positions": max([options.segment, *options.full_windows]),
    }
    torch.manual_seed(0)
    backbone = build_backbone(config, dictionary, options.retrieval_layer_index)
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
        },
    )
    decoder = LongMemDecoder(cfg, dictionary, backbone)
    decoder.start_from_backbone()
    if products_only(options):
        compute_products_in(decoder, DTYPES[options.dtype])
    else:
        decoder.to(options.device, DTYPES[options.dtype])
    return decoder.train(options.mode == "train")


def products_only(options: argparse.Namespace) -> bool:
    """Whether ``--dtype`` is that of the weights' products alone, as with --inference-dtype: bfloat16 on the CPU."""
    return DTYPES[options.dtype] == torch.bfloat16 and options.mode != "train" and options.device.type == "cpu"


def with_memory_size(decoder: LongMemDecoder, memory_size: int) -> LongMemDecoder:
    """The same modules, and so the same weights, with memories of another size; exact if too small for the index."""
    other = copy.copy(decoder)
    other._memories = {}
    other.cfg = OmegaConf.merge(decoder.cfg, {"memory_size": memory_size})
    if other.cfg.memory_index != FLAT and not can_index(other.cfg, decoder.backbone.head_dim):
        other.cfg.memory_index, other.cfg.memory_index_parameters = FLAT, ""
    return other


def can_index(cfg, width: int) -> bool:
    """Whether a memory of this size can train the index."""
    try:
        index_spec(cfg.memory_index, cfg.memory_index_parameters, width, cfg.memory_size // cfg.chunk_size)
    except ValueError:
        return False
    return True


class RealKeys:
    """Chunk means and queries of a real model and text (see ``real_keys.py``), in place of random ones.

    Args:
        path: a safetensors file with ``means`` (H', N', d) and ``queries`` (H', T', d), float32, each of at least as
            many heads as there are; d is the same.
    """

    def __init__(self, path: str):
        tensors = load_file(path)
        self.means, self.queries = tensors["means"], tensors["queries"]

    def fill(self, bank: MemoryBank) -> None:
        """Fill a bank: the tokens of a chunk all have its mean as their key. Heads of the file serve in turn."""
        heads = [head % self.means.size(0) for head in range(bank.heads)]
        for lane in range(bank.lanes):
            for begin in range(0, bank.chunks, _FILLED):
                means = self.means[heads, begin : min(bank.chunks, begin + _FILLED)]
                keys = means.repeat_interleave(bank.chunk_size, dim=1)
                bank.append(lane, keys, keys)

    def searched_by(self, search):
        """The search, asked the real queries, whatever it is asked."""

        def asked(bank, lanes, queries, n):
            B, H, T, _ = queries.shape
            heads = [head % self.queries.size(0) for head in range(H)]
            places = torch.arange(T) % self.queries.size(1)
            real = self.queries[heads][:, places].to(queries.device)
            found = search(bank, lanes, real[None].expand(B, -1, -1, -1).contiguous(), n)
            asked.recall = getattr(search, "recall", None)
            return found

        return asked


class Stream:
    """A decoder with one memory size, and a stream of random tokens for each of its lanes."""

    def __init__(
        self, decoder: LongMemDecoder, memory_size: int, options: argparse.Namespace, real: Optional[RealKeys] = None
    ):
        self.decoder = with_memory_size(decoder, memory_size)
        self.memory_size, self.options, self.real, self.start = memory_size, options, real, 0
        self.lanes = torch.arange(options.batch).numpy()
        self.hits = self.wanted = 0.0

    def fill(self) -> None:
        """Read until the memory is full, by the layers of the backbone that the memory needs; or take real keys."""
        if self.real is not None and self.memory_size:
            self.decoder.memorize(*self._next())
            memory = next(iter(self.decoder._memories.values()))
            memory.flush()
            self.real.fill(memory.bank)
            memory.search = self.real.searched_by(memory.search)
            return
        segments = -(-self.memory_size // self.options.segment) + 1 if self.memory_size else 0
        for _ in tqdm(range(segments), desc=f"filling {self.memory_size:,}", leave=False, mininterval=2):
            self.decoder.memorize(*self._next())

    def fill_with_noise(self) -> None:
        """As if it had read much: what a memory holds has no part in what it costs."""
        self.decoder.memorize(*self._next())
        memory = next(iter(self.decoder._memories.values()))
        memory.flush()
        fill_with_noise(memory.bank)

    @property
    def bank_bytes(self) -> int:
        """Bytes that the memory takes."""
        return sum(memory.bank.nbytes for memory in self.decoder._memories.values())

    @property
    def recall(self) -> Optional[float]:
        """Share of what exact search finds, 0 to 1; None where the search is exact."""
        return self.hits / self.wanted if self.wanted else None

    def step(self) -> None:
        """One segment of every lane: logits, and in training the side network's gradients."""
        tokens, segments = self._next()
        with nullcontext() if self.options.mode == "train" else torch.no_grad():
            logits, extra = self.decoder(tokens, segments=segments)
            if self.options.mode == "train":
                F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten()).backward()
                for parameter in self.decoder.parameters():
                    parameter.grad = None
        if extra["memory"] is not None and extra["memory"].recall is not None:
            hits, wanted = extra["memory"].recall
            self.hits, self.wanted = self.hits + hits, self.wanted + wanted

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.options.batch * self.options.segment

    def _next(self):
        tokens = random_tokens(self.options, self.options.segment)
        segments = Segments(
            self.lanes, self.lanes, self.lanes * 0 + self.start, self.lanes * 0 + self.options.segment, len(self.lanes)
        )
        self.start += self.options.segment
        return tokens, segments


class Generation:
    """A decoder that says one token after the other in every row, each row with a memory of its own.

    When a window is full its older half moves into the memory, as in generation; a step is a quarter of a window, so
    that every other step has such a move.
    """

    recall = None

    def __init__(
        self, decoder: LongMemDecoder, memory_size: int, options: argparse.Namespace, real: Optional[RealKeys] = None
    ):
        self.decoder = with_memory_size(decoder, memory_size)
        self.memory_size, self.options, self.real = memory_size, options, real
        self.state: Dict = {WINDOW: {"window": LiveWindow(self.decoder, options.segment, options.batch)}}

    @property
    def _window(self) -> LiveWindow:
        return self.state[WINDOW]["window"]

    @torch.no_grad()
    def fill(self) -> None:
        """Fill the memories with what the backbone makes of random tokens, and half the windows."""
        branches, T = self._window.branches, self.options.segment
        if branches is not None:
            branches.banks = [self.decoder.new_bank() for _ in range(self.options.batch)]
            if self.real is not None:
                for bank in branches.banks:
                    self.real.fill(bank)
                branches.search = self.real.searched_by(branches.search)
            else:
                for _ in tqdm(range(-(-self.memory_size // T)), desc=f"filling {self.memory_size:,}", leave=False):
                    encoded = self.decoder.backbone.encode_for_memory(random_tokens(self.options, T))
                    for bank, keys, values in zip(branches.banks, encoded.keys, encoded.values):
                        bank.append(0, keys, values)
        pieces = random_tokens(self.options, T // 2)
        self._window.fill(list(pieces), self.state)

    def fill_with_noise(self) -> None:
        branches = self._window.branches
        branches.banks = [self.decoder.new_bank() for _ in range(self.options.batch)]
        for bank in branches.banks:
            fill_with_noise(bank)
        self._window.fill(list(random_tokens(self.options, self.options.segment // 2)), self.state)

    @property
    def bank_bytes(self) -> int:
        branches = self._window.branches
        return 0 if branches is None else sum(bank.nbytes for bank in branches.banks)

    @property
    def tokens(self) -> int:
        return self.options.batch * self.steps

    @property
    def steps(self) -> int:
        """Tokens of a row in one step."""
        return max(1, self.options.segment // 4)

    @torch.no_grad()
    def step(self) -> None:
        """The logits behind some more tokens, one after the other."""
        for _ in range(self.steps):
            self.decoder(random_tokens(self.options, 1), incremental_state=self.state)


class FullAttention:
    """The backbone alone over a longer window."""

    bank_bytes = 0
    recall = None

    def __init__(self, backbone: Backbone, window: int, options: argparse.Namespace):
        self.backbone, self.window, self.options = backbone, window, options

    @property
    def tokens(self) -> int:
        return self.options.batch * self.window

    @torch.no_grad()
    def step(self) -> None:
        """The logits of one window for each row; hidden states are dropped as soon as they are used."""
        x = self.backbone.embed(random_tokens(self.options, self.window))
        for layer in self.backbone.decoder.layers:
            x = layer(x)[0]
        self.backbone.output_layer(self.backbone.decoder.layer_norm(x).transpose(0, 1))


def fill_with_noise(bank: MemoryBank) -> None:
    for buffer in (bank.keys, bank.values, bank.means):
        buffer.normal_()
    bank.written[:] = bank.chunks + bank.written
    bank.position[:] = bank.written * bank.chunk_size
    bank.resets += 1


def random_tokens(options: argparse.Namespace, length: int) -> Tensor:
    """Random symbols, shape (batch, length), made where they are used."""
    return torch.randint(4, options.vocab, (options.batch, length), device=options.device)


def variant_of(name: str, decoder: LongMemDecoder, options: argparse.Namespace, real: Optional[RealKeys] = None):
    """The variant that ``memory:SIZE`` or ``window:LENGTH`` names."""
    kind, size = name.split(":")
    if kind == "window":
        return FullAttention(decoder.backbone, int(size), options)
    return (Generation if options.mode == "generate" else Stream)(decoder, int(size), options, real)
