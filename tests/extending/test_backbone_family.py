"""A backbone family in one file, registered by a user directory; it is compared with an independent reference.

The family is a small relative of Llama: RMSNorm, rotary positions, query heads that share key/value heads, and SwiGLU.

Legend: B lanes, T new tokens, S cached and new tokens, D width, H query heads, H_kv key/value heads, G = H / H_kv,
d width of a head, V symbols.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fairseq.dataclass import FairseqDataclass
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel, register_model
from omegaconf import II
from torch import nn

from longmem_fairseq.backbones.base import Backbone, register_backbone_family
from longmem_fairseq.modules.cached_attention import CachedAttention, left_padding
from longmem_fairseq.modules.joint_attention import MemoryGate
from longmem_fairseq.modules.side_layer import SideLayer
from tests.extending.commands import ADAPT, Commands, check_answers, check_perplexities
from tests.fairseq_runs import weights
from tests.models.llama_reference import LlamaReference, LlamaSetting

# The model --------------------------------------------------------------------------------------------------------


@dataclass
class GroupedConfig(FairseqDataclass):
    decoder_layers: int = field(default=4, metadata={"help": "number of layers"})
    decoder_embed_dim: int = field(default=24, metadata={"help": "width"})
    decoder_ffn_embed_dim: int = field(default=20, metadata={"help": "width of the feed-forward layers"})
    decoder_attention_heads: int = field(default=4, metadata={"help": "number of query heads"})
    decoder_kv_heads: int = field(default=2, metadata={"help": "number of key/value heads"})
    tokens_per_sample: int = II("task.tokens_per_sample")


DECISIVE = [name for name in GroupedConfig.__dataclass_fields__ if name.startswith("decoder_")]


def rotate(x, positions):
    """Rotate the pairs (i, i + d / 2) of x (B, heads, n, d) by angles that are proportional to positions (n,)."""
    half = x.size(-1) // 2
    angles = positions[:, None] * 100.0 ** (-torch.arange(half, device=x.device) / half)  # (n, d / 2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class GroupedAttention(CachedAttention, nn.Module):
    """Causal attention whose cache holds keys before they are rotated."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.kv_heads = cfg.decoder_attention_heads, cfg.decoder_kv_heads
        width = cfg.decoder_embed_dim
        self.head_dim = width // self.heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, state=None):
        q = self.split(self.q_proj(x), self.heads)
        k, v = self.keys_and_values(x)
        if state is not None:
            k, v = self.append_to_cache(state, k, v)
        out = self.attend(q, k, v, left_padding(state))  # (B, H, T, d)
        return self.out_proj(out.permute(2, 0, 1, 3).flatten(2))

    def keys_and_values(self, x):
        return self.split(self.k_proj(x), self.kv_heads), self.split(self.v_proj(x), self.kv_heads)

    def split(self, x, heads):
        return x.unflatten(2, (heads, self.head_dim)).permute(1, 2, 0, 3)  # (T, B, heads * d) -> (B, heads, T, d)

    def attend(self, q, k, v, left):
        return self.local_attention(q, k, v, left)

    def local_attention(self, q, k, v, left):
        positions = torch.arange(k.size(2), device=k.device)
        query_positions = positions[-q.size(2) :]
        visible = positions <= query_positions[:, None]  # (T, S)
        if left is not None:
            visible = visible & (positions >= left.view(-1, 1, 1, 1))
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (rotate(k, positions), v))
        return F.scaled_dot_product_attention(rotate(q, query_positions), k, v, attn_mask=visible)


class GroupedLayer(nn.Module):
    def __init__(self, cfg, attention=GroupedAttention):
        super().__init__()
        width, inner = cfg.decoder_embed_dim, cfg.decoder_ffn_embed_dim
        self.self_attn_norm, self.feed_forward_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.self_attn = attention(cfg)
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x, incremental_state=None):
        x = x + self.self_attn(self.self_attn_norm(x), incremental_state)
        normed = self.feed_forward_norm(x)
        return (x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed)),)


class GroupedDecoder(FairseqIncrementalDecoder):
    def __init__(self, cfg, dictionary):
        super().__init__(dictionary)
        self.embed_tokens = nn.Embedding(len(dictionary), cfg.decoder_embed_dim, dictionary.pad())
        self.layers = nn.ModuleList(GroupedLayer(cfg) for _ in range(cfg.decoder_layers))
        self.norm = nn.RMSNorm(cfg.decoder_embed_dim, eps=1e-5)
        self.output_projection = nn.Linear(cfg.decoder_embed_dim, len(dictionary), bias=False)

    def forward(self, prev_output_tokens, incremental_state=None, **unused):
        x = self.embed_tokens(prev_output_tokens).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, incremental_state)[0]
        return self.output_projection(self.norm(x).transpose(0, 1)), {}


@register_model("grouped_lm", dataclass=GroupedConfig)
class GroupedLanguageModel(FairseqLanguageModel):
    @classmethod
    def build_model(cls, cfg, task):
        return cls(GroupedDecoder(cfg, task.source_dictionary))


# The family -------------------------------------------------------------------------------------------------------


class GroupedJointAttention(MemoryGate, GroupedAttention):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.add_gate(self.heads)

    def attend(self, q, k, v, left):
        return self.mix(q, self.local_attention(q, k, v, left), self.head_dim**-0.5)


class GroupedSideLayer(SideLayer, GroupedLayer):
    output_projections = ("self_attn.out_proj", "down_proj")


@register_backbone_family(GroupedLanguageModel)
class GroupedBackbone(Backbone):
    max_positions = None

    def __init__(self, config, dictionary):
        super().__init__(config)
        self.cfg = SimpleNamespace(**config)
        self.decoder = GroupedDecoder(self.cfg, dictionary)
        self.freeze()

    @classmethod
    def describe(cls, cfg, vocabulary):
        return {name: getattr(cfg, name) for name in DECISIVE}

    @classmethod
    def build(cls, config, dictionary):
        return cls(config, dictionary)

    @property
    def layers(self):
        return self.decoder.layers

    @property
    def final_norm(self):
        return self.decoder.norm

    @property
    def width(self):
        return self.cfg.decoder_embed_dim

    @property
    def num_heads(self):
        return self.cfg.decoder_attention_heads

    @property
    def num_kv_heads(self):
        return self.cfg.decoder_kv_heads

    @property
    def head_dim(self):
        return self.width // self.num_heads

    def embed(self, tokens, start=0):
        return self.decoder.embed_tokens(tokens).transpose(0, 1)

    def memory_keys_and_values(self, x, number):
        layer = self.layers[number]
        return layer.self_attn.keys_and_values(layer.self_attn_norm(x))

    def output(self, features):
        return self.decoder.output_projection(features)

    def side_layer(self, reads_memory, options):
        layer = GroupedSideLayer(self.cfg, GroupedJointAttention if reads_memory else GroupedAttention)
        layer.recompute = options.recompute
        return layer

    def side_norm(self, options):
        return nn.RMSNorm(self.width, eps=1e-5)


# This module registers the model and the family, so that the user directory only imports it.
REGISTRATION = """
import longmem_fairseq
import tests.extending.test_backbone_family
"""


# The comparison ---------------------------------------------------------------------------------------------------


def reference(checkpoint):
    """The independent reference of the Llama family; the frequencies are those of ``rotate``, the rest as in ADAPT."""
    tensors = {name[len("decoder.") :]: value for name, value in weights(checkpoint).items()}
    return LlamaReference(tensors, LlamaSetting(heads=4, kv_heads=2, frequencies=[100.0 ** (-i / 3) for i in range(3)]))


@pytest.fixture(scope="module")
def commands(tiny_data, tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("family"), tiny_data, "grouped_family", REGISTRATION)


@pytest.fixture(scope="module")
def backbone(commands):
    """A model of the new family, trained by fairseq-train."""
    return commands.train("backbone", "--arch", "grouped_lm")


@pytest.fixture(scope="module")
def checkpoint(commands, backbone):
    """The same with a memory and a side network, adapted by fairseq-train."""
    return commands.train("adapted", *ADAPT, "--pretrained-model-path", backbone, "--save-backbone")


def test_the_side_network_is_of_the_family(checkpoint):
    state = weights(checkpoint)
    assert state["decoder.layers.0.self_attn.gate_bias"].shape == (4,), "a gate for each query head"
    assert state["decoder.layers.1.self_attn.k_proj.weight"].shape == (12, 24)
    assert (state["decoder.layers.0.self_attn.gate_bias"] != 0).any(), "the gates were trained"
    assert "decoder.layer_norm.weight" in state and "decoder.layer_norm.bias" not in state


def test_evaluates_as_the_reference(commands, checkpoint):
    check_perplexities(commands.evaluate(checkpoint, "results"), lambda: reference(checkpoint))


def test_generates_as_the_reference(commands, checkpoint):
    check_answers(commands.generate(checkpoint), lambda: reference(checkpoint))
