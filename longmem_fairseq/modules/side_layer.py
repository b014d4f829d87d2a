"""Layers of the side network: decoder layers of the backbone's kind and shape, some of which read the memory.

Legend: B lanes, T tokens of a segment, D width.
"""

from dataclasses import dataclass
from typing import Any, Optional, Tuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .joint_attention import MemoryGate


@dataclass(frozen=True)
class SideNetworkOptions:
    """Options that decide what the layers of the side network compute.

    Attributes:
        dropout: Dropout probability in the layers.
        attention_dropout: Dropout probability of the local attention weights.
        activation_fn: Name of the activation function; None for the backbone's.
        layer_norm_eps: Number added to the variance in LayerNorms; None for the backbone's.
        recompute: Whether activations are recomputed in the backward pass instead of kept
            (``--checkpoint-activations``).
        memory_query_distance: Distance, in tokens, by which the queries that read the memory are rotated, where the
            backbone has rotary positions.
    """

    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_fn: Optional[str] = None
    layer_norm_eps: Optional[float] = None
    recompute: bool = False
    memory_query_distance: int = 0

    @classmethod
    def from_config(cls, cfg: Any) -> "SideNetworkOptions":
        """Read the options from a model's configuration."""
        return cls(
            cfg.dropout,
            cfg.attention_dropout,
            cfg.side_activation_fn,
            cfg.side_layer_norm_eps,
            cfg.checkpoint_activations,
            cfg.memory_query_distance,
        )


class SideLayer(nn.Module):
    """Mixin that makes a decoder layer of any kind a layer of the side network.

    The class that follows in the method resolution order is a decoder layer: its ``forward(x, incremental_state=...)``
    returns a tuple that starts with the output, as fairseq's layers do, and its attention is ``self.self_attn``. The
    attention of a layer that reads the memory is a :class:`longmem_fairseq.modules.joint_attention.MemoryGate`.

    Attributes:
        output_projections: Names of the modules whose outputs are added to the residual stream.
    """

    recompute = False
    output_projections: Tuple[str, ...] = ()

    def forward(self, x: Tensor, skip: Tensor, reader=None, incremental_state=None) -> Tensor:
        """Compute this layer's output plus the backbone's residual (LongMem, equation 2).

        Args:
            x: Input, shape (T, B, D).
            skip: Difference of two hidden states of the backbone that is added to the output, shape (T, B, D).
            reader: The :class:`longmem_fairseq.memory.reader.MemoryReader` of this layer, or None.
            incremental_state: Incremental state of decoding, or None.

        Returns:
            Output, shape (T, B, D).
        """
        # The plain form of checkpointing keeps gradients of parameters whose input needs none, as x_0's does not.
        if self.recompute and self.training:
            return checkpoint(self._read, x, skip, reader, incremental_state, use_reentrant=False)
        return self._read(x, skip, reader, incremental_state)

    def _read(self, x: Tensor, skip: Tensor, reader, incremental_state) -> Tensor:
        if not isinstance(self.self_attn, MemoryGate):
            return self.add_skip(x, skip, incremental_state)
        with self.self_attn.reading(reader):
            return self.add_skip(x, skip, incremental_state)

    def add_skip(self, x: Tensor, skip: Tensor, incremental_state) -> Tensor:
        """Return the decoder layer's output for ``x`` plus ``skip``."""
        return super().forward(x, incremental_state=incremental_state)[0] + skip

    def start_from(self, layer: nn.Module) -> None:
        """Take over the weights of a backbone layer; the gates, which a backbone layer does not have, stay as they are.

        Args:
            layer: Layer of the backbone, of this layer's kind and shape.

        Raises:
            ValueError: The layers do not have the same weights.
        """
        missing, unexpected = self.load_state_dict(layer.state_dict(), strict=False)
        if set(missing) - {"self_attn.gate_bias", "self_attn.gate_weight"} or unexpected:
            raise ValueError(f"a side layer does not fit the backbone's layer: {', '.join(missing + unexpected)}")

    def silence(self) -> None:
        """Let the layer add nothing to its input until it is trained: its output projections become zero.

        Raises:
            ValueError: The layer does not name them.
        """
        if not self.output_projections:
            raise ValueError(
                f"{type(self).__name__} does not name its output_projections, which start at zero: name them, or set "
                "--no-zero-init-side-layers"
            )
        for name in self.output_projections:
            for parameter in self.get_submodule(name).parameters():
                nn.init.zeros_(parameter)
