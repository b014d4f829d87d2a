"""The backbone alone with full attention, which throughput.py measures beside memories: over long windows, and over all
tokens that a memory would hold, kept in caches.

Legend: B lanes, T tokens of a segment, S tokens before it, H heads, d width of a head, D width.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from longmem_fairseq.backbones.base import Backbone


def random_tokens(options: argparse.Namespace, length: int) -> Tensor:
    """Draw random token ids, shape (batch, length), int64, on the device of the model."""
    return torch.randint(4, options.vocab, (options.batch, length), device=options.device)


class FullAttentionVariant:
    """The backbone alone over a longer window.

    Args:
        backbone: Backbone of the other variants.
        window: Number of tokens in the window.
        options: Options of throughput.py.
    """

    bank_bytes = 0
    recall = None

    def __init__(self, backbone: Backbone, window: int, options: argparse.Namespace):
        self.backbone, self.window, self.options = backbone, window, options

    @property
    def tokens(self) -> int:
        """Number of tokens in one step."""
        return self.options.batch * self.window

    @torch.no_grad()
    def step(self) -> None:
        """Compute the logits of one window of each row; hidden states are dropped as soon as they are used."""
        x = self.backbone.embed(random_tokens(self.options, self.window))
        for layer in self.backbone.layers:
            x = layer(x)[0]
        self.backbone.output(self.backbone.final_norm(x).transpose(0, 1))


class FullContextVariant:
    """The backbone alone that reads segment by segment, with full attention to as many tokens as a memory would hold.

    The keys and values of all layers are in caches of a fixed size, full of noise, and a segment's are written behind
    them. PyTorch's flash kernel reads them in place.

    Args:
        backbone: Backbone of the other variants, with learned positions.
        context: Number of tokens before a segment, S.
        options: Options of throughput.py.
    """

    recall = None

    def __init__(self, backbone: Backbone, context: int, options: argparse.Namespace):
        self.backbone, self.context, self.options = backbone, context, options
        shape = (options.batch, backbone.num_heads, context + options.segment, backbone.head_dim)
        new = {"dtype": backbone.dtype, "device": backbone.device}
        self.caches = [tuple(torch.randn(shape, **new) for _ in range(2)) for _ in backbone.layers]

    @property
    def bank_bytes(self) -> int:
        """Number of bytes of the caches."""
        return sum(x.numel() * x.element_size() for cache in self.caches for x in cache)

    @property
    def tokens(self) -> int:
        """Number of tokens in one step."""
        return self.options.batch * self.options.segment

    def step(self) -> None:
        """Compute the logits of one segment of each row."""
        self.read(random_tokens(self.options, self.options.segment))

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of one segment of each row, tokens (B, T)."""
        x = self.backbone.embed(tokens, self.context)  # (T, B, D)
        for layer, (keys, values) in zip(self.backbone.layers, self.caches):
            x = self._layer(layer, x, keys, values)
        return self.backbone.output(self.backbone.final_norm(x).transpose(0, 1))

    def _layer(self, layer: nn.Module, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Run a layer of fairseq's pre-norm decoder behind the caches of its keys and values, (B, H, S + T, d)."""
        attention, normalized = layer.self_attn, layer.self_attn_layer_norm(x)
        q = attention.split_heads(attention.q_proj(normalized))
        for cache, new in zip((keys, values), attention.keys_and_values(normalized)):
            cache[:, :, self.context :] = new
        mask = causal_lower_right(q.size(2), keys.size(2))
        read = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)  # (B, H, T, d)
        x = x + attention.out_proj(read.permute(2, 0, 1, 3).flatten(2))
        return x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
