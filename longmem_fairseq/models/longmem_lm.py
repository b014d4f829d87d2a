"""The registered model ``longmem_lm`` and its architectures."""

import argparse
import json
import logging
from typing import Any

import numpy as np
import torch
from fairseq.models import FairseqLanguageModel, register_model, register_model_architecture
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf
from torch import Tensor

from ..backbones.loading import NAME_IT, Backbone, BackboneError, backbone_config, build_backbone, load_backbone
from ..data.segments import Segments
from ..released import released_checkpoint
from .longmem_config import OTHER_TASK, LongMemConfig, check_options, check_task, with_defaults
from .longmem_decoder import LongMemDecoder

logger = logging.getLogger(__name__)

_BACKBONE = "decoder.backbone."
_FINGERPRINT = "decoder.backbone_fingerprint"


@register_model("longmem_lm", dataclass=LongMemConfig)
class LongMemModel(FairseqLanguageModel):
    """A language model with a long-term memory (Wang et al., 2023).

    Attributes:
        score_without_memory: also give, in ``extra["logits_without_memory"]``, what it says when it reads nothing.
    """

    def __init__(self, cfg, decoder: LongMemDecoder):
        super().__init__(decoder)
        self.cfg = cfg
        self.score_without_memory = False
        self.num_updates = 0

    @classmethod
    def add_args(cls, parser):
        """Add the options; those that are on unless turned off get a ``--no-`` form."""
        for name in ("use_external_memory", "reload_ptm_layer"):
            parser.add_argument(
                "--" + name.replace("_", "-"),
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=LongMemConfig.__dataclass_fields__[name].metadata["help"],
            )
        super().add_args(parser)  # leaves out what the parser has already

    @classmethod
    def build_model(cls, cfg, task) -> "LongMemModel":
        """Build the model around its backbone, from ``--pretrained-model-path`` or out of its own checkpoint.

        Raises:
            ValueError: for options that contradict each other or the backbone.
        """
        check_task(cfg)
        cfg = with_defaults(_own_settings(cfg, task))
        backbone = _find_backbone(cfg, task.source_dictionary)
        check_options(cfg, backbone)
        for option in ("gpt_encoder_path", "no_token_positional_embeddings"):
            if safe_getattr(cfg, option, None):
                logger.info(
                    "--%s has no meaning here: the backbone's checkpoint and the data decide it",
                    option.replace("_", "-"),
                )
        decoder = LongMemDecoder(cfg, task.source_dictionary, backbone)
        if cfg.reload_ptm_layer:
            decoder.start_from_backbone()
        _describe_backbone(cfg, json.dumps(backbone.config, sort_keys=True))
        model = cls(cfg, decoder)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(
            "side network: %d layers, layer %d reads the memory of backbone layer %d; %s parameters to train",
            len(decoder.layers),
            decoder.reading_layer,
            cfg.retrieval_layer_index,
            f"{trained:,}",
        )
        return model

    def forward(self, src_tokens: Tensor, without_memory: bool = False, **kwargs):
        """See :meth:`LongMemDecoder.forward`."""
        return self.decoder(src_tokens, without_memory=without_memory or self.score_without_memory, **kwargs)

    def reset_memory(self) -> None:
        """Forget everything that was read."""
        self.decoder.reset_memory()

    def memory_contents(self, lane: int = 0):
        """What the memory holds (see :meth:`LongMemDecoder.memory_contents`)."""
        return self.decoder.memory_contents(lane)

    def needs_replay(self, segments: Segments) -> np.ndarray:
        """Rows whose memory is not where their segment starts, shape (B,), bool."""
        return self.decoder.needs_replay(segments)

    def memorize(self, src_tokens: Tensor, segments: Segments, join: bool = False) -> None:
        """Remember tokens without reading them (see :meth:`LongMemDecoder.memorize`)."""
        self.decoder.memorize(src_tokens, segments, join=join)

    @property
    def memory_tokens(self) -> int:
        """Tokens of a stream's past that decide its memory: what it holds, and the start of a chunk."""
        return self.cfg.memory_size + self.cfg.chunk_size if self.decoder.has_memory else 0

    def state_dict(self, *args, **kwargs):
        """The side network's weights and the backbone's fingerprint; the backbone itself with --save-backbone."""
        state = super().state_dict(*args, **kwargs)
        if not self.cfg.save_backbone:
            for key in [key for key in state if _BACKBONE in key]:
                del state[key]
        return state

    def upgrade_state_dict_named(self, state_dict, name):
        """Check the checkpoint's backbone against ours, and put ours where the checkpoint has none.

        Raises:
            BackboneError: where the checkpoint was made with another backbone.
            ValueError: where it is of the released format, and this model has other settings.
        """
        if released_checkpoint.is_released_side_network(state_dict):
            self._take_released(state_dict)
        theirs, ours = state_dict.get(_FINGERPRINT), self.decoder.backbone_fingerprint.cpu()
        if theirs is not None and ours.any() and not torch.equal(theirs.cpu(), ours):
            raise BackboneError(
                f"the checkpoint was trained on a backbone with fingerprint {_hex(theirs)}, but "
                f"{self.cfg.pretrained_model_path} has {_hex(ours)}: name the right one {NAME_IT}"
            )
        if not any(key.startswith(_BACKBONE) for key in state_dict):
            backbone = self.decoder.backbone
            if backbone.fingerprint is None:  # built from its description alone, for a file that does not hold it
                backbone = _load_named(self.cfg, self.decoder.dictionary)
            weights = backbone.state_dict()
            state_dict.update({f"{_BACKBONE}{key}": value for key, value in weights.items()})
        super().upgrade_state_dict_named(state_dict, name)

    def _take_released(self, state_dict) -> None:
        """Bring weights of the released format under the names here."""
        settings = released_checkpoint.SIDE_NETWORK
        if any(getattr(self.cfg, name) != settings[name] for name in ("side_layer_norm_eps", "normalize_last_hidden")):
            raise ValueError(
                "the checkpoint is of the released LongMem, whose side network differs in its LayerNorms and its last "
                "residual: train on from it with --arch longmem_released"
            )
        released_checkpoint.rename_side_network(state_dict, f"{_BACKBONE}decoder.")
        gate = f"decoder.layers.{self.decoder.reading_layer}.self_attn.memory_gate"
        state_dict.setdefault(gate, torch.zeros(self.decoder.backbone.num_heads))  # one trained without a memory
        state_dict[_FINGERPRINT] = self.decoder.backbone_fingerprint.cpu()
        if not any(key.startswith(_BACKBONE) for key in state_dict):
            return
        if self.decoder.backbone.fingerprint is None:
            self.cfg.pretrained_model_path = None  # where its authors had it
        else:  # the backbone was loaded, and the checkpoint has its own
            for key, ours in self.decoder.backbone.state_dict(prefix=_BACKBONE).items():
                if key in state_dict and not torch.equal(ours.cpu(), state_dict[key].to(ours.dtype)):
                    raise BackboneError(
                        f"the checkpoint's copy of its backbone differs from {self.cfg.pretrained_model_path}, first "
                        f"in {key[len(_BACKBONE) :]}: name the backbone that it was trained on, or none"
                    )

    def set_num_updates(self, num_updates):
        """Told by fairseq before every update."""
        self.num_updates = num_updates
        super().set_num_updates(num_updates)

    def max_positions(self):
        """No limit: documents are read segment by segment."""
        return None


def _hex(fingerprint: Tensor) -> str:
    return bytes(fingerprint.cpu().tolist()).hex()[:12]


def _find_backbone(cfg, dictionary) -> Backbone:
    """The backbone that a self-contained checkpoint describes, else that of --pretrained-model-path."""
    if cfg.save_backbone and cfg.backbone_config:
        return build_backbone(json.loads(cfg.backbone_config), dictionary, cfg.retrieval_layer_index)
    return _load_named(cfg, dictionary)


def _load_named(cfg, dictionary) -> Backbone:
    if not cfg.pretrained_model_path:
        raise BackboneError("longmem_lm needs a backbone: name its checkpoint with --pretrained-model-path")
    return load_backbone(cfg.pretrained_model_path, dictionary, cfg.retrieval_layer_index)


def _own_settings(cfg: Any, task):
    """The configuration, that of a released checkpoint as this model has it.

    The released checkpoint's segment length is left out: with ALiBi any will do. The memory's scope is the task's; a
    shared memory is held as in the released code.
    """
    if not released_checkpoint.is_released_side_settings(cfg):
        return cfg
    backbone = argparse.Namespace(_name="parallel_lm", **released_checkpoint.copied_backbone_settings(cfg))
    scope = str(safe_getattr(safe_getattr(task, "args", None), "memory_scope", "document"))
    return argparse.Namespace(
        **released_checkpoint.side_network_settings(cfg),
        save_backbone=True,
        backbone_config=json.dumps(backbone_config(backbone, len(task.source_dictionary))),
        memory_scope=scope,
        memory_dtype="float16" if scope == "shared" else "auto",
    )


def _describe_backbone(cfg, description: str) -> None:
    """Let checkpoints say what rebuilds the backbone.

    fairseq builds a model from a copy of its configuration, and saves the original, which has the same parent.
    """
    cfg.backbone_config = description
    original = OmegaConf.select(cfg._get_parent(), "model") if OmegaConf.is_config(cfg) and cfg._get_parent() else None
    if original is not None and "backbone_config" in original:
        original.backbone_config = description


def _architecture(cfg, retrieval_layer: int) -> None:
    """Set every option that the command line left open; fairseq takes what is missing for unset."""
    if isinstance(cfg, argparse.Namespace) and not hasattr(cfg, "memory_scope"):
        raise ValueError(OTHER_TASK)  # before fairseq looks for the task's option in vain
    cfg.retrieval_layer_index = safe_getattr(cfg, "retrieval_layer_index", retrieval_layer)
    for name, entry in LongMemConfig.__dataclass_fields__.items():
        if not name.startswith("_") and not hasattr(cfg, name) and not str(entry.default).startswith("${"):
            setattr(cfg, name, entry.default)


# The sizes are the backbone's; what an architecture adds is the layer to remember: an odd one, about two thirds up,
# since side layer m // 2 starts from backbone layer 2 * (m // 2) + 1, whose queries were made for these keys.
_RETRIEVAL_LAYERS = {"tiny": 3, "mini": 5, "small": 9, "medium": 17, "large": 25, "xl": 33}


@register_model_architecture("longmem_lm", "longmem_gpt2_tiny")
def longmem_gpt2_tiny(cfg):
    """For a backbone of 4 layers."""
    _architecture(cfg, _RETRIEVAL_LAYERS["tiny"])


@register_model_architecture("longmem_lm", "longmem_gpt2_mini")
def longmem_gpt2_mini(cfg):
    """For a backbone of 6 layers, as that of the quick start."""
    _architecture(cfg, _RETRIEVAL_LAYERS["mini"])


@register_model_architecture("longmem_lm", "longmem_gpt2_small")
def longmem_gpt2_small(cfg):
    """For a backbone of 12 layers, as GPT-2 small."""
    _architecture(cfg, _RETRIEVAL_LAYERS["small"])


@register_model_architecture("longmem_lm", "longmem_gpt2_medium")
def longmem_gpt2_medium(cfg):
    """For a backbone of 24 layers, as GPT-2 medium: the published setting."""
    _architecture(cfg, _RETRIEVAL_LAYERS["medium"])


@register_model_architecture("longmem_lm", "longmem_gpt2_large")
def longmem_gpt2_large(cfg):
    """For a backbone of 36 layers, as GPT-2 large."""
    _architecture(cfg, _RETRIEVAL_LAYERS["large"])


@register_model_architecture("longmem_lm", "longmem_gpt2_xl")
def longmem_gpt2_xl(cfg):
    """For a backbone of 48 layers, as GPT-2 xl."""
    _architecture(cfg, _RETRIEVAL_LAYERS["xl"])
