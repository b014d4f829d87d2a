"""The LongMem decoder: frozen backbone, search of the memory, side network, logits (docs/method.md, "One step").

Legend: B lanes, T tokens of a segment, D width, V symbols, N backbone layers, R reduction factor.
"""

from typing import Dict, List, Optional, Tuple, Union

import numpy as np
import torch
from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor, nn

from ..backbones.base import Backbone, EncodedSegment
from ..data.segments import Segments
from ..memory.factory import MemoryFactory
from ..memory.memory_dropout import KeptRows, MemoryDropout
from ..memory.reader import BatchReader
from ..modules.side_layer import SideNetworkOptions
from .lane_state import LaneState
from .live_window import WINDOW, new_window
from .longmem_config import plain
from .predictor import Predictor


class LongMemDecoder(FairseqIncrementalDecoder):
    """Decoder with a frozen backbone, a memory and a trainable side network.

    The memory is state, not a parameter: it is in no state dict, and training and evaluation have one each.

    Args:
        cfg: Configuration of the model (:class:`longmem_fairseq.models.longmem_config.LongMemConfig`).
        dictionary: fairseq dictionary of the data and the backbone.
        backbone: Frozen backbone with its memory layers selected.
        memory_factory: Factory of the memories; its settings are checked.

    Attributes:
        reading_layers: Number s of the side layer that reads each memory layer, counted from 0, ascending.
        lane_state: Memories and carried windows of training and evaluation.
        stateful: If true, a call without segments continues the previous call's streams, row by row (for use without
            the task).
    """

    def __init__(self, cfg, dictionary, backbone: Backbone, memory_factory: MemoryFactory):
        super().__init__(dictionary)
        self.cfg, self.backbone, self.memory_factory = cfg, backbone, memory_factory
        self.reduction = cfg.layer_reduction_factor
        self.reading_layers = tuple(m // self.reduction for m in backbone.memory_layers)
        backbone.normalize_last_hidden = cfg.normalize_last_hidden
        options = SideNetworkOptions.from_config(cfg)
        self.layers = nn.ModuleList(
            backbone.side_layer(j in self.reading_layers, options) for j in range(backbone.num_layers // self.reduction)
        )
        for s in self.reading_layers if cfg.gate == "token" else ():
            self.layers[s].self_attn.add_gate_weight(backbone.head_dim)
        self.layer_norm = backbone.side_norm(options)
        self.memory_dropout = MemoryDropout(cfg.memory_dropout)
        self.predictor = Predictor(backbone, memory_factory.settings)
        self.lane_state = LaneState(self, memory_factory, cfg.carry_window)
        self.stateful = False

    def __getstate__(self):
        return {**self.__dict__, "cfg": plain(self.cfg)}

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
        """Read one segment of each lane, then write it; or, with ``incremental_state``, one more token of each row.

        Args:
            prev_output_tokens: Token ids, shape (B, T), int64; padding only follows a row's tokens.
            src_lengths: Ignored; ``segments`` has the lengths.
            segments: Place of each row in its lane's stream. If the decoder is stateful, the default is what follows
                the tokens of the previous call.
            features_only: If true, return features (B, T, D) in place of logits, without the token memory.
            read_only: If true, do not write this segment into the memory, nor carry it on.
            without_memory: If true, also compute logits of the side network without reading the memory.
            encoder_out: Ignored; there is no encoder.
            incremental_state: State of generation, see :func:`longmem_fairseq.models.live_window.prefill`; an empty
                one starts without a past. Only the last column of the tokens is read, as fairseq's generator expects,
                and ``segments``, ``read_only`` and ``without_memory`` have no meaning.

        Returns:
            Logits (B, T, V), with a token memory log-probabilities; and a dictionary with ``memory`` (the
            :class:`BatchReader`, None with the memory off), ``inner_states`` (x_0 to x_{N/R}, each (T, B, D)),
            with a token memory its ``token_memory_weight`` (B, T) and, if requested, ``logits_without_memory``
            (B, T, V, without gradient).

        Raises:
            ValueError: There are no ``segments``, so the memory's document is not known.
            MemoryOutOfStep: A segment does not continue its lane's memory.
        """
        if incremental_state is not None:
            return self._decode(prev_output_tokens[:, -1:], incremental_state, features_only)
        segments = self.lane_state.next_segments(prev_output_tokens) if segments is None else segments
        window = self.lane_state.windows.allocate(self.training, segments.n_lanes)
        carried = None if window is None else window.open(segments)
        memory = self.lane_state.memory(prev_output_tokens, segments.n_lanes)
        reader = None if memory is None else memory.open(segments)
        read = None if memory is None else self.memory_dropout(reader, len(segments), self.device)
        encoded, states = self.lane_state.graphs.run(prev_output_tokens, read, carried)
        token_states = self.predictor.token_states(encoded, prev_output_tokens)
        reads = None if memory is None else read.of_tokens(memory.read_tokens(segments, token_states))
        if memory is not None and not read_only:  # after the search: nothing retrieves itself
            memory.write(segments, encoded.keys, encoded.values, token_states)
        if window is not None and not read_only:
            window.write(segments, prev_output_tokens, carried)
        extra = {"memory": reader, "inner_states": states}
        if without_memory:
            with torch.no_grad():
                alone = self.side_network(encoded, None, None if carried is None else carried.again())
                extra["logits_without_memory"] = self.output_layer(self.features(alone))
        x = self.features(states)
        return (x if features_only else self.predictor(x, reads, extra)), extra

    def read_segment(self, tokens: Tensor, reader, carried=None) -> Tuple[EncodedSegment, List[Tensor]]:
        """Encode one segment of each lane, tokens (B, T); return that and the states of the side network."""
        encoded = self.backbone(tokens, carried, 0 if carried is None else carried.start)
        return encoded, self.side_network(encoded, reader, carried)

    def side_network(
        self, encoded: EncodedSegment, reader: Union[BatchReader, KeptRows, None], incremental_state=None
    ) -> List[Tensor]:
        """Return x_0 to x_{N/R}, each (T, B, D): x_{j+1} = SideLayer_j(x_j) + (h_{R(j+1)} - h_{Rj})."""
        states = [encoded.hidden[0]]
        readers = {} if reader is None else {s: reader.of_layer(i) for i, s in enumerate(self.reading_layers)}
        for j, layer in enumerate(self.layers):
            below, above = encoded.hidden[self.reduction * j], encoded.hidden[self.reduction * (j + 1)]
            states.append(layer(states[-1], above - below, readers.get(j), incremental_state))
        return states

    def features(self, states: List[Tensor]) -> Tensor:
        """Return the input of the output layer, shape (B, T, D), from the states of the side network."""
        x = states[-1] if self.layer_norm is None else self.layer_norm(states[-1])
        return x.transpose(0, 1)  # (B, T, D)

    def output_layer(self, features: Tensor) -> Tensor:
        """Return logits (B, T, V), by the backbone's own output projection."""
        return self.backbone.output(features)

    @torch.no_grad()
    def memorize(self, tokens: Tensor, segments: Segments, restart: bool = False) -> None:
        """Encode and write segments as :meth:`forward` would, by the backbone alone unless a window is carried.

        Args:
            tokens: Token ids, shape (B, T), int64.
            segments: Place of each row in its lane's stream.
            restart: If true, the lanes are emptied first and their streams may start anywhere, for replay.
        """
        if self.lane_state.windows.size:  # a carried window holds the side network's keys too
            self.lane_state.read_again(tokens, segments, restart)
            return
        if not self.has_memory:
            return
        encoded = self.predictor.encode_for_memory(tokens)
        memory = self.lane_state.memory(tokens, segments.n_lanes)
        if restart:
            memory.restart(segments)
        else:
            memory.open(segments)
        memory.write(segments, encoded.keys, encoded.values, self.predictor.token_states(encoded, tokens))

    def start_from_backbone(self) -> None:
        """Copy backbone layer R * j + 1 into side layer j, and the backbone's final norm into the side network's."""
        for j, layer in enumerate(self.layers):
            layer.start_from(self.backbone.layers[min(self.reduction * j + 1, self.backbone.num_layers - 1)])
        if self.layer_norm is not None:
            self.layer_norm.load_state_dict(self.backbone.final_norm.state_dict())

    @property
    def has_memory(self) -> bool:
        """Whether there is a memory at all."""
        return self.memory_factory.settings.enabled

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.backbone.device

    @property
    def gates(self) -> Tensor:
        """The (mean) gates sigmoid(g) of the n reading layers, shape (n * H,), lowest layer first, float32."""
        return torch.cat([self.layers[s].self_attn.mean_gates for s in self.reading_layers])

    def reset_memory(self) -> None:
        """Forget everything, in training and in evaluation."""
        self.lane_state.clear()

    def memory_contents(self, lane: int = 0) -> Optional[Tuple[Tensor, Tensor, Tensor]]:
        """Return a copy of what this mode's memory holds, oldest chunk first; None before anything was written.

        Args:
            lane: Number of the lane; 0 where all lanes share a memory.

        Returns:
            Keys and values (H_kv, n, C, d), and the mean keys that are searched (H_kv, n, d), of n chunks; H_kv counts
            the heads of all memory layers, those of the lowest layer first.
        """
        return self.lane_state.memories.contents(self.training, lane)

    def needs_replay(self, segments: Segments) -> np.ndarray:
        """Return which rows' memory or carried window is not where their segment starts, shape (B,), bool."""
        return self.lane_state.needs_replay(segments)

    @torch.no_grad()
    def _decode(self, tokens: Tensor, state: Dict, features_only: bool) -> Tuple[Tensor, Dict]:
        """Return logits (B, 1, V) or features behind one more token of each row, tokens (B, 1)."""
        if WINDOW not in state:
            state[WINDOW] = {"window": new_window(self, self.cfg.tokens_per_sample, tokens.size(0))}
        window = state[WINDOW]["window"]
        states = window.step(tokens, state)
        x = self.features(states)
        return (x if features_only else self.predictor(x, window.read_tokens())), {"attn": None, "inner_states": states}

    def reorder_incremental_state(self, incremental_state: Dict, new_order: Tensor) -> None:
        """Let row i continue as row ``new_order[i]``; the attention modules reorder their caches themselves."""
        if WINDOW in incremental_state:
            incremental_state[WINDOW]["window"].reorder(new_order)

    def max_positions(self) -> Optional[int]:
        """Return None: there is no limit, since a document is read segment by segment."""
        return None
