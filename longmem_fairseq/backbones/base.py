"""The frozen backbone: a pre-norm decoder-only language model of fairseq, read for its hidden states.

Legend: B lanes, T tokens of a segment, D width, H heads, d = D / H, N layers, V symbols.
"""

import hashlib
import json
from typing import Any, Dict, List, NamedTuple, Optional, Union

import torch
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor, nn

from ..modules.self_attention import IncrementalState, SelfAttention


class BackboneError(ValueError):
    """A checkpoint that cannot be a backbone; the message says why."""


class EncodedSegment(NamedTuple):
    """What the backbone made of one segment.

    Attributes:
        hidden: h_0 (embedding output) to h_N, each (T, B, D); after :meth:`Backbone.encode_for_memory` only h_0 to h_m.
        keys, values: of the memory layer, after their projections, shape (B, H, T, d).
    """

    hidden: List[Tensor]
    keys: Tensor
    values: Tensor


class Backbone(nn.Module):
    """A frozen decoder: always in evaluation mode, never with a gradient.

    Args:
        decoder: a pre-norm decoder; its self-attention modules are exchanged for :class:`SelfAttention`, which
            computes the same from the same parameters.
        memory_layer: m, the layer whose keys and values are remembered, counted from 0.
        config: what rebuilds the decoder (see :func:`longmem_fairseq.backbones.loading.build_backbone`), plain JSON
            types.

    Attributes:
        fingerprint: of the weights it was loaded with (see :func:`backbone_fingerprint`); None before.
        normalize_last_hidden: give h_N behind the final LayerNorm, as the released LongMem's side network has it.
    """

    def __init__(self, decoder: TransformerDecoderBase, memory_layer: int, config: Dict[str, Any]):
        super().__init__()
        self.decoder = decoder
        self.memory_layer = memory_layer
        self.config = config
        self.fingerprint: Optional[str] = None
        self.normalize_last_hidden = False
        for layer in decoder.layers:
            if not isinstance(layer.self_attn, SelfAttention):
                layer.self_attn = _fused(layer.self_attn)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    @property
    def num_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def num_heads(self) -> int:
        return self.decoder.layers[0].self_attn.num_heads

    @property
    def head_dim(self) -> int:
        return self.decoder.layers[0].self_attn.head_dim

    @property
    def layer_norm_eps(self) -> float:
        return self.decoder.layers[0].self_attn_layer_norm.eps

    @property
    def max_positions(self) -> Optional[int]:
        """The longest window that its position embeddings allow; None where there is no such limit."""
        positions = self.decoder.embed_positions
        return getattr(positions, "max_positions", None) if isinstance(positions, nn.Embedding) else None

    @torch.no_grad()
    def forward(
        self, tokens: Tensor, incremental_state: IncrementalState = None, start: Union[int, Tensor] = 0
    ) -> EncodedSegment:
        """Encode tokens (B, T), of which the first stands at position ``start`` of the window.

        With ``start`` of shape (B,), int64, T is 1.
        """
        layers = self.decoder.layers
        hidden = [self.embed(tokens, start)]
        recorded = []
        attention = layers[self.memory_layer].self_attn
        # The keys and values are taken where the layer computes them, rather than projected a second time.
        hooks = [
            projection.register_forward_hook(lambda module, inputs, output: recorded.append(output))
            for projection in (attention.k_proj, attention.v_proj)
        ]
        try:
            for layer in layers:
                hidden.append(layer(hidden[-1], incremental_state=incremental_state)[0])  # (T, B, D)
        finally:
            for hook in hooks:
                hook.remove()
        keys, values = (attention._heads(x) for x in recorded)
        return EncodedSegment(self.residual_stream(hidden), keys, values)

    @torch.no_grad()
    def encode_for_memory(self, tokens: Tensor) -> EncodedSegment:
        """As forward, but only as far as the memory needs: the layers above the memory layer are not run."""
        layers = self.decoder.layers
        hidden = [self.embed(tokens)]
        for layer in layers[: self.memory_layer]:
            hidden.append(layer(hidden[-1])[0])
        layer = layers[self.memory_layer]
        attention = layer.self_attn
        x = layer.self_attn_layer_norm(hidden[-1].transpose(0, 1) if attention.batch_first else hidden[-1])
        return EncodedSegment(hidden, attention._heads(attention.k_proj(x)), attention._heads(attention.v_proj(x)))

    def embed(self, tokens: Tensor, start: Union[int, Tensor] = 0) -> Tensor:
        """h_0 of tokens (B, T), shape (T, B, D); ``start`` as in forward.

        Raises:
            BackboneError: where the window is longer than the position embeddings.
        """
        decoder = self.decoder
        x = decoder.embed_scale * decoder.embed_tokens(tokens)
        if decoder.project_in_dim is not None:
            x = decoder.project_in_dim(x)
        if decoder.embed_positions is not None:
            if isinstance(start, Tensor):
                positions = self._positions(0, int(start.max()) + 1)
                positions = positions[start.to(positions.device)][:, None]  # (B, 1, D)
            else:
                positions = self._positions(start, start + tokens.size(1))
            x = x + positions.to(x)  # sinusoidal tables are no buffers
        if decoder.layernorm_embedding is not None:
            x = decoder.layernorm_embedding(x)
        return x.transpose(0, 1)  # (T, B, D)

    def _positions(self, begin: int, end: int) -> Tensor:
        """Embeddings of positions begin to end - 1, shape (end - begin, D).

        They are taken by number: fairseq numbers the tokens of its input, which is not the window when decoding
        step by step.
        """
        table = self.decoder.embed_positions
        if self.max_positions is not None and end > self.max_positions:
            raise BackboneError(
                f"a segment of {end} tokens is longer than the backbone's {self.max_positions} positions: lower "
                "--tokens-per-sample"
            )
        first = self.decoder.padding_idx + 1  # fairseq's position embeddings start behind the padding's
        if isinstance(table, nn.Embedding):
            return table.weight[first + begin : first + end]
        if table.weights.size(0) < first + end:
            table.weights = table.get_embedding(first + end, table.embedding_dim, table.padding_idx).to(table.weights)
        return table.weights[first + begin : first + end]

    def residual_stream(self, hidden: List[Tensor]) -> List[Tensor]:
        """The hidden states as the side network's residual connections use them."""
        if self.normalize_last_hidden and self.decoder.layer_norm is not None:
            return hidden[:-1] + [self.decoder.layer_norm(hidden[-1])]
        return hidden

    def output_layer(self, x: Tensor) -> Tensor:
        """Logits (..., V) of normalised features (..., D)."""
        if self.decoder.project_out_dim is not None:
            x = self.decoder.project_out_dim(x)
        return self.decoder.output_projection(x)


def backbone_fingerprint(backbone: Backbone) -> str:
    """SHA-256 of the configuration and of all weights as float32, in hexadecimal; the same in every fairseq."""
    digest = hashlib.sha256(json.dumps(backbone.config, sort_keys=True).encode())
    for name, tensor in sorted(backbone.decoder.state_dict().items()):
        if name.endswith("._float_tensor"):  # of sinusoidal positions in fairseq 0.12.2: never initialised, never read
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def _fused(stock: nn.Module) -> SelfAttention:
    """The same attention with the same parameters, computed by :class:`SelfAttention`."""
    fused = SelfAttention(stock.embed_dim, stock.num_heads, dropout=stock.dropout_module.p)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(fused, name, getattr(stock, name))
    return fused
