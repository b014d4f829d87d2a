"""The registered model ``longmem_lm`` and its architectures."""

import argparse
import contextlib
import json
import logging
import sys
from typing import Any, ContextManager, Optional

import numpy as np
import torch
from fairseq.models import FairseqLanguageModel, register_model, register_model_architecture
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf
from torch import Tensor

from ..backbones.base import Backbone, BackboneError
from ..backbones.checkpoint_formats import CheckpointFormat, checkpoint_formats
from ..backbones.fingerprint import backbone_fingerprint
from ..backbones.loading import HOW_TO_NAME, build_backbone, load_backbone
from ..data.segments import Segments
from ..files import parse_json
from ..memory.factory import MemoryFactory
from ..memory.settings import MemorySettings
from .checkpoint_weights import fit_weights
from .longmem_config import (
    OTHER_TASK,
    LongMemConfig,
    check_options,
    check_task,
    plain,
    with_defaults,
)
from .longmem_decoder import LongMemDecoder
from .memory_layers import memory_layers_setting, select_memory_layers

logger = logging.getLogger(__name__)

_BACKBONE = "decoder.backbone."
_FINGERPRINT_TENSOR = "decoder.backbone_fingerprint"  # in older checkpoints, where newer ones have a setting


@register_model("longmem_lm", dataclass=LongMemConfig)
class LongMemModel(FairseqLanguageModel):
    """A language model with a long-term memory (Wang et al., 2023).

    Args:
        cfg: Configuration of the model.
        decoder: Its decoder.

    Attributes:
        score_without_memory: If true, every call also returns ``extra["logits_without_memory"]``, the logits of the
            side network when it reads nothing.
        num_updates: Number of updates of the training so far.
        autocast_dtype: Precision of products under autocast; None for that of the weights.
        gpu_autocast_dtype: The same on GPUs alone, where attention in half precision has a kernel of its own.
    """

    def __init__(self, cfg, decoder: LongMemDecoder):
        super().__init__(decoder)
        self.cfg = cfg
        self.score_without_memory = False
        self.num_updates = 0
        self.autocast_dtype: Optional[torch.dtype] = None
        self.gpu_autocast_dtype: Optional[torch.dtype] = None

    def __getstate__(self):
        return {**self.__dict__, "cfg": plain(self.cfg)}

    @classmethod
    def add_args(cls, parser):
        """Add the options; those that are on by default get a ``--no-`` form."""
        for name in ("use_external_memory", "reload_ptm_layer", "zero_init_side_layers"):
            parser.add_argument(
                "--" + name.replace("_", "-"),
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=LongMemConfig.__dataclass_fields__[name].metadata["help"],
            )
        super().add_args(parser)  # leaves out what the parser has already

    @classmethod
    def build_model(cls, cfg, task) -> "LongMemModel":
        """Build the model around its backbone, from ``--pretrained-model-path`` or from its own checkpoint.

        Args:
            cfg: Configuration of the model.
            task: fairseq task with the dictionary.

        Raises:
            ValueError: Options contradict each other or the backbone.
        """
        check_task(cfg)
        cfg = with_defaults(_longmem_settings(cfg, task))
        backbone = _find_backbone(cfg, task.source_dictionary)
        _check_fingerprint(cfg.backbone_fingerprint, backbone, cfg.pretrained_model_path)
        check_options(cfg, backbone)
        select_memory_layers(cfg, backbone)
        settings = MemorySettings.from_config(cfg)
        settings.check_token_memory()
        if settings.enabled:
            settings.check(backbone.head_dim, safe_getattr(cfg, "tokens_per_sample", None))
        else:
            logger.info("the memory is off")
        for option in ("gpt_encoder_path", "no_token_positional_embeddings"):
            if safe_getattr(cfg, option, None):
                logger.info("--%s has no effect: the backbone and the data decide it", option.replace("_", "-"))
        layers = backbone.memory_layers
        factory = MemoryFactory(
            settings,
            backbone.num_kv_heads,
            backbone.head_dim,
            layers=len(layers),
            width=backbone.width,
            symbols=backbone.vocabulary,
        )
        decoder = LongMemDecoder(cfg, task.source_dictionary, backbone, factory)
        if cfg.reload_ptm_layer:
            decoder.start_from_backbone()
        for s, layer in enumerate(decoder.layers):
            if cfg.zero_init_side_layers and s not in decoder.reading_layers:
                layer.silence()
        _save_settings(
            cfg,
            backbone_config=json.dumps(backbone.config, sort_keys=True),
            backbone_fingerprint=backbone.fingerprint or cfg.backbone_fingerprint,
            retrieval_layer_index=memory_layers_setting(layers),
        )
        model = cls(cfg, decoder)
        readings = [f"layer {s} reads the memory of backbone layer {m}" for s, m in zip(decoder.reading_layers, layers)]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(
            "side network: %d layers, %s; %s parameters to train",
            len(decoder.layers),
            ", ".join(readings),
            f"{trained:,}",
        )
        return model

    def forward(self, src_tokens: Tensor, without_memory: bool = False, **kwargs):
        """See :meth:`LongMemDecoder.forward`."""
        with self.autocast(src_tokens):
            return self.decoder(src_tokens, without_memory=without_memory or self.score_without_memory, **kwargs)

    def reset_memory(self) -> None:
        """Forget everything that was read."""
        self.decoder.reset_memory()

    def memory_contents(self, lane: int = 0):
        """Return what the memory holds (see :meth:`LongMemDecoder.memory_contents`)."""
        return self.decoder.memory_contents(lane)

    def needs_replay(self, segments: Segments) -> np.ndarray:
        """Return which rows' memory is not where their segment starts, shape (B,), bool."""
        return self.decoder.needs_replay(segments)

    def memorize(self, src_tokens: Tensor, segments: Segments, restart: bool = False) -> None:
        """Write tokens into the memory without reading it (see :meth:`LongMemDecoder.memorize`)."""
        with self.autocast(src_tokens):  # as forward, so that a memory is rebuilt bit by bit
            self.decoder.memorize(src_tokens, segments, restart=restart)

    def autocast(self, tokens: Tensor) -> ContextManager:
        """Return the context in which the decoder computes, given a batch's tokens on the model's device.

        A model without a precision of its own leaves fairseq's (``--amp``) as it is.
        """
        # Here and not around the training step, in which fairseq turns autocast off.
        dtype = self.autocast_dtype or (self.gpu_autocast_dtype if tokens.is_cuda else None)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(tokens.device.type, dtype)

    @property
    def memory_tokens(self) -> int:
        """Number of tokens of a stream's past that decide its memory: what it holds, and the start of a chunk.

        With a carried window all tokens count, since each layer passes on what the layer below saw of the past.
        """
        settings = self.decoder.memory_factory.settings
        if self.decoder.lane_state.windows.size:
            return sys.maxsize
        return max(settings.size + settings.chunk_size, settings.token_memory) if settings.enabled else 0

    def state_dict(self, *args, **kwargs):
        """Return the side network's weights; with --save-backbone the backbone's too."""
        state = super().state_dict(*args, **kwargs)
        if not self.cfg.save_backbone:
            for key in [key for key in state if _BACKBONE in key]:
                del state[key]
        return state

    def upgrade_state_dict_named(self, state_dict, name):
        """Compare the checkpoint's backbone with the model's, and add the model's where the checkpoint has none.

        Args:
            state_dict: Tensors of the checkpoint, changed in place.
            name: Prefix of the names.

        Raises:
            BackboneError: The checkpoint was made with another backbone.
            ValueError: The checkpoint has a foreign format, and this model has other settings; or its side network
                reads the memory in other layers, or by other gates.
        """
        for checkpoint_format in checkpoint_formats():
            if checkpoint_format.holds_longmem(state_dict):
                self._rename_foreign(state_dict, checkpoint_format)
        backbone, saved = self.decoder.backbone, _pop_fingerprint(state_dict)
        fit_weights(state_dict, self.decoder)
        _check_fingerprint(saved, backbone, self.cfg.pretrained_model_path)
        if not any(key.startswith(_BACKBONE) for key in state_dict):
            weights = backbone
            if backbone.fingerprint is None:  # built from its description alone, for a file that does not hold it
                weights = _load_named(self.cfg, self.decoder.dictionary)
            state_dict.update({f"{_BACKBONE}{key}": value for key, value in weights.state_dict().items()})
        else:
            # fairseq's moving averages leave the version out, and without it its decoder drops the final LayerNorm.
            for key, value in backbone.state_dict(prefix=_BACKBONE).items():
                if key.endswith(".version"):
                    state_dict.setdefault(key, value)
            if backbone.fingerprint is not None:
                self._check_copy(state_dict)
        backbone.fingerprint = backbone.fingerprint or self.cfg.backbone_fingerprint or saved
        super().upgrade_state_dict_named(state_dict, name)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Load weights as fairseq does; a backbone of which no fingerprint was saved gets that of its weights."""
        result = super().load_state_dict(state_dict, *args, **kwargs)
        if self.decoder.backbone.fingerprint is None:
            self.decoder.backbone.fingerprint = backbone_fingerprint(self.decoder.backbone)
        return result

    def _rename_foreign(self, state_dict, checkpoint_format: CheckpointFormat) -> None:
        """Bring weights of a foreign format under the names of this model."""
        settings = checkpoint_format.model_settings
        if any(getattr(self.cfg, name) != value for name, value in settings.items()):
            raise ValueError(
                f"the checkpoint has the format of the {checkpoint_format.name}, whose side network differs in its "
                f"LayerNorms and its last residual: train it further with --arch {checkpoint_format.architecture}"
            )
        checkpoint_format.rename_longmem(state_dict, _BACKBONE)
        gate = f"decoder.layers.{self.decoder.reading_layers[0]}.self_attn.memory_gate"
        state_dict.setdefault(gate, torch.zeros(self.decoder.backbone.num_heads))  # one trained without a memory
        if any(key.startswith(_BACKBONE) for key in state_dict) and self.decoder.backbone.fingerprint is None:
            self.cfg.pretrained_model_path = None  # a path of its authors' machine

    def _check_copy(self, state_dict) -> None:
        """Compare the backbone in a checkpoint with the one that was loaded.

        Either may be in half precision, and averaging the same weights rounds them.
        """
        for key, weight in self.decoder.backbone.state_dict(prefix=_BACKBONE).items():
            if key not in state_dict or key.endswith("._float_tensor"):  # never initialized, never read
                continue
            saved = state_dict[key]
            tolerance = 1e-5 if weight.dtype == saved.dtype == torch.float32 else 1e-2
            if not torch.allclose(weight.cpu().float(), saved.cpu().float(), rtol=tolerance, atol=1e-6):
                raise BackboneError(
                    f"the checkpoint's copy of its backbone differs from {self.cfg.pretrained_model_path}, first "
                    f"in {key[len(_BACKBONE) :]}: name the backbone that it was trained on, or none"
                )

    def set_num_updates(self, num_updates):
        """Take the number of updates, which fairseq passes before every update."""
        self.num_updates = num_updates
        super().set_num_updates(num_updates)

    def max_positions(self):
        """Return None: there is no limit, since documents are read segment by segment."""
        return None


def _pop_fingerprint(state_dict) -> Optional[str]:
    """Remove the fingerprint from the tensors of an older checkpoint; None where there is none."""
    saved = state_dict.pop(_FINGERPRINT_TENSOR, None)
    return bytes(saved.tolist()).hex() if saved is not None and saved.any() else None


def _check_fingerprint(saved: Optional[str], backbone: Backbone, path: Optional[str]) -> None:
    if saved is not None and backbone.fingerprint is not None and saved != backbone.fingerprint:
        raise BackboneError(
            f"the checkpoint was trained on a backbone with fingerprint {saved[:12]}, but {path} has "
            f"{backbone.fingerprint[:12]}: name the right one {HOW_TO_NAME}"
        )


def _find_backbone(cfg, dictionary) -> Backbone:
    """Return the backbone that a self-contained checkpoint describes, else that of --pretrained-model-path."""
    if cfg.save_backbone and cfg.backbone_config:
        return build_backbone(parse_json(cfg.backbone_config), dictionary)
    return _load_named(cfg, dictionary)


def _load_named(cfg, dictionary) -> Backbone:
    if not cfg.pretrained_model_path:
        raise BackboneError("longmem_lm needs a backbone: name its checkpoint with --pretrained-model-path")
    return load_backbone(cfg.pretrained_model_path, dictionary, dtype=getattr(torch, str(cfg.backbone_dtype)))


def _longmem_settings(cfg: Any, task):
    """Return the configuration; that of a checkpoint of a foreign format as this model has it."""
    scope = str(safe_getattr(safe_getattr(task, "args", None), "memory_scope", "document"))
    for checkpoint_format in checkpoint_formats():
        settings = checkpoint_format.longmem_settings(cfg, len(task.source_dictionary), scope)
        if settings is not None:
            overrides = getattr(getattr(task, "saved", None), "overrides", {})  # of settings that the format lacks too
            known = {name: x for name, x in overrides.items() if name in LongMemConfig.__dataclass_fields__}
            return argparse.Namespace(**{**settings, **known})
    return cfg


def _save_settings(cfg, **settings: Any) -> None:
    """Let checkpoints contain settings that were found while the model was built.

    fairseq builds a model from a copy of its configuration, and saves the original, which has the same parent.
    """
    parent = cfg._get_parent() if OmegaConf.is_config(cfg) else None  # noqa: SLF001  (omegaconf has no public name)
    original = OmegaConf.select(parent, "model") if parent else None
    for name, value in settings.items():
        setattr(cfg, name, value)
        if original is not None and name in original:
            setattr(original, name, value)


def _architecture(cfg) -> None:
    """Set every option that the command line left open; fairseq takes missing ones for unset."""
    if isinstance(cfg, argparse.Namespace) and not hasattr(cfg, "memory_scope"):
        raise ValueError(OTHER_TASK)  # before fairseq looks for the task's option in vain
    for name, entry in LongMemConfig.__dataclass_fields__.items():
        if not name.startswith("_") and not hasattr(cfg, name) and not str(entry.default).startswith("${"):
            setattr(cfg, name, entry.default)


# The sizes are the backbone's, and the memory layer follows from its depth, so these names differ in nothing but their
# documentation: they say which backbone a command is meant for.
@register_model_architecture("longmem_lm", "longmem_gpt2_tiny")
def longmem_gpt2_tiny(cfg):
    """For a backbone of 4 layers."""
    _architecture(cfg)


@register_model_architecture("longmem_lm", "longmem_gpt2_mini")
def longmem_gpt2_mini(cfg):
    """For a backbone of 6 layers, as that of the quick start."""
    _architecture(cfg)


@register_model_architecture("longmem_lm", "longmem_gpt2_small")
def longmem_gpt2_small(cfg):
    """For a backbone of 12 layers, as GPT-2 small."""
    _architecture(cfg)


@register_model_architecture("longmem_lm", "longmem_gpt2_medium")
def longmem_gpt2_medium(cfg):
    """For a backbone of 24 layers, as GPT-2 medium: the published setting."""
    _architecture(cfg)


@register_model_architecture("longmem_lm", "longmem_gpt2_large")
def longmem_gpt2_large(cfg):
    """For a backbone of 36 layers, as GPT-2 large."""
    _architecture(cfg)


@register_model_architecture("longmem_lm", "longmem_gpt2_xl")
def longmem_gpt2_xl(cfg):
    """For a backbone of 48 layers, as GPT-2 xl."""
    _architecture(cfg)
