"""The LongMem decoder: frozen backbone, search of the memory, side network, logits (METHOD: "One step").

Legend: B lanes, T tokens of a segment, D width, H heads, d = D / H, V symbols, N backbone layers, R reduction factor.
"""

import logging
from typing import Dict, Optional, Tuple

import numpy as np
import torch
from fairseq.models import FairseqIncrementalDecoder
from fairseq.modules import LayerNorm
from fairseq.utils import safe_getattr
from torch import Tensor, nn

from ..backbones.base import Backbone, EncodedSegment
from ..data.segments import Segments
from ..memory.bank import MemoryBank
from ..memory.branches import MemoryBranches
from ..memory.placement import Placement, choose_placement
from ..memory.search.base import SearchFunction, choose_search
from ..memory.search.index import IndexSearch
from ..memory.search.index_spec import FLAT, index_spec
from ..memory.stream_memory import Memory, MemoryReader
from ..modules.joint_attention import memory_attention, naive_memory_attention
from ..modules.layer_norm import set_layer_norm_eps
from ..modules.self_attention import SelfAttention
from ..modules.side_layer import build_side_layer, side_layer_config
from ..released.shared_memory import SharedMemory
from .live_window import WINDOW, LiveWindow

logger = logging.getLogger(__name__)

MEMORY_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LongMemDecoder(FairseqIncrementalDecoder):
    """Decoder with a frozen backbone, a memory and a trainable side network.

    The memory is state, not a parameter: it is in no state dict, and training and evaluation have one each.

    Args:
        cfg: the model's configuration (see :class:`longmem_fairseq.models.longmem_lm.LongMemConfig`).
        dictionary: of the data and the backbone.
        backbone: frozen.

    Attributes:
        stateful: a call without segments goes on where the call before it ended, row by row (for use without a task).
    """

    def __init__(self, cfg, dictionary, backbone: Backbone):
        super().__init__(dictionary)
        self.cfg = cfg
        self.backbone = backbone
        self.reduction = cfg.layer_reduction_factor
        self.reading_layer = cfg.retrieval_layer_index // self.reduction
        backbone.normalize_last_hidden = cfg.normalize_last_hidden
        layer_cfg = side_layer_config(backbone.decoder.cfg, cfg.dropout, cfg.attention_dropout, cfg.side_activation_fn)
        self.layers = nn.ModuleList(
            build_side_layer(backbone.decoder.layers[0], layer_cfg, j == self.reading_layer, cfg.checkpoint_activations)
            for j in range(backbone.num_layers // self.reduction)
        )
        self.layer_norm = LayerNorm(backbone.decoder.embed_dim) if backbone.decoder.layer_norm is not None else None
        for module in filter(None, (self.layers, self.layer_norm)):
            set_layer_norm_eps(module, cfg.side_layer_norm_eps or backbone.layer_norm_eps)
        fingerprint = bytearray.fromhex(backbone.fingerprint or "00" * 32)
        self.register_buffer("backbone_fingerprint", torch.frombuffer(fingerprint, dtype=torch.uint8).clone())
        self._memories: Dict[bool, Memory] = {}
        self._searches: Dict[Tuple, SearchFunction] = {}
        self._attention = memory_attention
        self.stateful = False

    @property
    def has_memory(self) -> bool:
        """Whether there is a memory at all."""
        return self.cfg.use_external_memory and self.cfg.memory_size > 0

    @property
    def shares_memory(self) -> bool:
        """Whether all lanes read and write one memory, as the released code's do."""
        return str(safe_getattr(self.cfg, "memory_scope", "document")) == "shared"

    def use_released_attention(self) -> None:
        """Compute all attention step by step: slower, and rounded as in the released code."""
        self._attention = naive_memory_attention
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.fused = False

    def start_from_backbone(self) -> None:
        """Side layer j starts as a copy of backbone layer R * j + 1, the final LayerNorm as the backbone's."""
        for j, layer in enumerate(self.layers):
            layer.start_from(self.backbone.decoder.layers[min(self.reduction * j + 1, self.backbone.num_layers - 1)])
        if self.layer_norm is not None:
            self.layer_norm.load_state_dict(self.backbone.decoder.layer_norm.state_dict())

    def forward(
        self,
        prev_output_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        segments: Optional[Segments] = None,
        features_only: bool = False,
        read_only: bool = False,
        without_memory: bool = False,
        encoder_out=None,
        incremental_state=None,
    ) -> Tuple[Tensor, Dict]:
        """Read one segment of each lane, then remember it; or, with ``incremental_state``, one more token of each row.

        Args:
            prev_output_tokens: shape (B, T), int64; padding only behind a row's tokens.
            src_lengths: ignored; ``segments`` has the lengths.
            segments: where each row stands in its lane's stream; with ``stateful``, by default what follows the tokens
                that lanes 0 to B - 1 were given before.
            features_only: return features (B, T, D) in place of logits.
            read_only: do not remember this segment.
            without_memory: also give what the side network says when it reads nothing.
            encoder_out: ignored; there is no encoder.
            incremental_state: of generation, see :func:`longmem_fairseq.models.live_window.prefill`; one that is empty
                starts without a past. Of the tokens only the last column is read, as fairseq's generator expects, and
                ``segments``, ``read_only`` and ``without_memory`` have no meaning.

        Returns:
            Logits (B, T, V), and a dictionary with ``memory`` (the :class:`MemoryReader`, None with the memory off),
            ``inner_states`` (x_0 to x_{N/R}, each (T, B, D)) and, if asked for, ``logits_without_memory`` (B, T, V,
            without gradient).

        Raises:
            ValueError: without ``segments``, since then nobody knows whose past this is.
            MemoryOutOfStep: where a segment does not continue its lane's memory.
        """
        if incremental_state is not None:
            return self._step(prev_output_tokens[:, -1:], incremental_state, features_only)
        if segments is None:
            segments = self._next_segments(prev_output_tokens)
        encoded = self.backbone(prev_output_tokens)
        memory = self.memory(segments, encoded.keys) if self.has_memory else None
        reader = memory.open(segments) if memory is not None else None
        states = self.side_network(encoded, reader)
        if memory is not None and not read_only:
            memory.write(segments, encoded.keys, encoded.values)
        extra = {"memory": reader, "inner_states": states}
        if without_memory:
            with torch.no_grad():
                extra["logits_without_memory"] = self.output_layer(self.features(self.side_network(encoded, None)))
        x = self.features(states)
        return (x if features_only else self.output_layer(x)), extra

    @torch.no_grad()
    def _step(self, tokens: Tensor, state: Dict, features_only: bool) -> Tuple[Tensor, Dict]:
        """Logits (B, 1, V) or features behind one more token of each row, tokens (B, 1)."""
        if WINDOW not in state:
            state[WINDOW] = {"window": LiveWindow(self, self.cfg.tokens_per_sample, tokens.size(0))}
        states = state[WINDOW]["window"].step(tokens, state)
        x = self.features(states)
        return (x if features_only else self.output_layer(x)), {"attn": None, "inner_states": states}

    def reorder_incremental_state(self, incremental_state: Dict, new_order: Tensor) -> None:
        """Row i goes on as row ``new_order[i]``; the attention modules reorder their caches themselves."""
        if WINDOW in incremental_state:
            incremental_state[WINDOW]["window"].reorder(new_order)

    def _next_segments(self, tokens: Tensor) -> Segments:
        """The place of tokens (B, T) that follow those of the call before."""
        if not self.stateful:
            raise ValueError(
                "longmem_lm was called without segments, so it cannot know whose past it should remember: run it with "
                "--task longmem_language_modeling"
            )
        B, T = tokens.shape
        memory = self._memories.get(self.training)
        if memory is not None and memory.lanes is not None and B > memory.lanes:
            raise ValueError(f"{B} rows do not continue the {memory.lanes} that the memory holds: call reset_memory()")
        lanes, zeros = np.arange(B), np.zeros(B, dtype=np.int64)
        real = tokens.cpu().numpy() != self.dictionary.pad()
        lengths = T - np.argmax(real[:, ::-1], axis=1)  # up to the last token that is no padding
        return Segments(lanes, zeros, zeros if memory is None else memory.ends(lanes), lengths, B)

    def side_network(self, encoded: EncodedSegment, reader: Optional[MemoryReader], incremental_state=None) -> list:
        """x_0 to x_{N/R}, each (T, B, D): x_{j+1} = SideLayer_j(x_j) + (h_{R(j+1)} - h_{Rj})."""
        states = [encoded.hidden[0]]
        for j, layer in enumerate(self.layers):
            below, above = encoded.hidden[self.reduction * j], encoded.hidden[self.reduction * (j + 1)]
            states.append(layer(states[-1], above - below, reader, incremental_state))
        return states

    def features(self, states: list) -> Tensor:
        """What the backbone's output layer is given, (B, T, D)."""
        x = states[-1] if self.layer_norm is None else self.layer_norm(states[-1])
        return x.transpose(0, 1)  # (B, T, D)

    def output_layer(self, features: Tensor) -> Tensor:
        """Logits (B, T, V), by the backbone's own output projection."""
        return self.backbone.output_layer(features)

    @torch.no_grad()
    def memorize(self, tokens: Tensor, segments: Segments, join: bool = False) -> None:
        """Remember tokens (B, T) as forward would, by the backbone alone.

        With ``join`` the lanes are emptied first, and their streams may begin anywhere (replay of a stream's end).
        """
        if not self.has_memory:
            return
        encoded = self.backbone.encode_for_memory(tokens)
        memory = self.memory(segments, encoded.keys)
        memory.join(segments) if join else memory.open(segments)
        memory.write(segments, encoded.keys, encoded.values)

    def memory(self, segments: Segments, like: Tensor) -> Memory:
        """The memory of this mode (training or evaluation), allocated when it is first needed.

        Args:
            segments: says how many lanes there are.
            like: keys, for device and dtype.
        """
        memory = self._memories.get(self.training)
        too_small = memory is not None and memory.lanes is not None and memory.lanes < segments.n_lanes
        if memory is None or too_small or memory.bank.placement != self._placement(like.device):
            if memory is not None:
                logger.warning("the memory is allocated anew for %d lanes on %s", segments.n_lanes, like.device)
            memory = self._memories[self.training] = self._allocate(segments.n_lanes, like)
        return memory

    @property
    def training_memory(self) -> Optional[Memory]:
        """The memory of training; None before anything was read."""
        return self._memories.get(True)

    def reset_memory(self) -> None:
        """Forget everything, in training and in evaluation."""
        self._memories.clear()

    def memory_contents(self, lane: int = 0) -> Optional[Tuple[Tensor, Tensor, Tensor]]:
        """A copy of what this mode's memory holds, oldest chunk first; None before anything was remembered.

        Args:
            lane: whose memory; 0 where all lanes share one.

        Returns:
            Keys and values (H, n, C, d) and the mean keys that are searched (H, n, d), of n chunks.
        """
        memory = self._memories.get(self.training)
        if memory is None:
            return None
        memory.flush()
        return memory.bank.contents(lane)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone_fingerprint.device

    def new_bank(self, lanes: int = 1, like: Optional[Tensor] = None) -> MemoryBank:
        """An empty memory bank, by default for keys as the backbone makes them."""
        cfg = self.cfg
        # A LayerNorm's weight has the precision of the activations, also under --inference-dtype.
        like = self.backbone.decoder.layers[0].self_attn_layer_norm.weight if like is None else like
        dtype = like.dtype if cfg.memory_dtype == "auto" else MEMORY_DTYPES[cfg.memory_dtype]
        return MemoryBank(
            lanes,
            self.backbone.num_heads,
            self.backbone.head_dim,
            cfg.memory_size,
            cfg.chunk_size,
            dtype,
            exact_means=self.shares_memory,
            placement=self._placement(like.device),
        )

    def _placement(self, device: torch.device) -> Placement:
        """Where a bank lies of a model that is on a device."""
        cfg = self.cfg
        return choose_placement(str(cfg.memory_device), cfg.memory_map, device, cfg.memory_index != FLAT)

    def _search(self, device: torch.device) -> SearchFunction:
        """What searches the banks of a model that is on a device; always the same, which counts its recall."""
        cfg = self.cfg
        settings = (
            str(cfg.memory_search),
            cfg.memory_index,
            cfg.memory_index_parameters,
            cfg.memory_size // cfg.chunk_size,
            self._placement(device).means,
        )
        if settings not in self._searches:
            search, index, parameters, chunks, lies = settings
            found = choose_search(search, lies)
            if index != FLAT:
                found = IndexSearch(index_spec(index, parameters, self.backbone.head_dim, chunks), found)
            self._searches[settings] = found
        return self._searches[settings]

    def memory_branches(self, rows: int, base: Optional[MemoryBank] = None) -> MemoryBranches:
        """Memories for generation, one for each row whatever the memory's scope."""
        return MemoryBranches(
            rows, self.new_bank, self._search(self.device), self._attention, self.cfg.k // self.cfg.chunk_size, base
        )

    def _allocate(self, lanes: int, like: Tensor) -> Memory:
        cfg = self.cfg
        shared = self.shares_memory
        bank = self.new_bank(1 if shared else lanes, like)
        logger.info(
            "memory for %s: %d lanes x %d tokens (%s) on %s, %.1f MiB, search by %s",
            "training" if self.training else "evaluation",
            bank.lanes,
            cfg.memory_size,
            str(bank.keys.dtype).split(".")[-1],
            bank.placement,
            bank.nbytes / 2**20,
            getattr(self._search(like.device), "__name__", cfg.memory_index).replace("_search", ""),
        )
        parts = bank, self._search(like.device), self._attention, cfg.k // cfg.chunk_size
        # Outside a task several segments may come before one backward pass.
        return SharedMemory(*parts, keep_reads=self.stateful) if shared else Memory(*parts)

    def needs_replay(self, segments: Segments) -> np.ndarray:
        """Rows whose memory is not where their segment starts, shape (B,), bool; none with the memory off."""
        memory = self._memories.get(self.training)
        if not self.has_memory:
            return np.zeros(len(segments), dtype=bool)
        if memory is None or (memory.lanes is not None and memory.lanes < segments.n_lanes):
            return segments.starts > 0
        return memory.needs_replay(segments)

    def max_positions(self) -> Optional[int]:
        """No limit: however long a document, it is read segment by segment."""
        return None
