"""The released LongMem's checkpoints as a checkpoint format of this package."""

import argparse
import json
from typing import Any, Dict, MutableMapping, Optional, Tuple

from fairseq.models import register_model_architecture
from fairseq.utils import safe_getattr
from torch import Tensor

from ..backbones.checkpoint_formats import CheckpointFormat, register_checkpoint_format
from ..backbones.loading import describe_backbone
from ..models.longmem_lm import longmem_gpt2_medium
from . import released_checkpoint


class ReleasedFormat(CheckpointFormat):
    """Checkpoints of the released side network and of its backbone."""

    name = "released LongMem"
    architecture = "longmem_released"
    model_settings = {
        name: released_checkpoint.SIDE_NETWORK[name] for name in ("side_layer_norm_eps", "normalize_last_hidden")
    }

    def read_backbone(self, cfg: Any, weights: Dict[str, Tensor]) -> Optional[Tuple[Any, Dict[str, Tensor]]]:
        return released_checkpoint.released_backbone(cfg, weights)

    def longmem_settings(self, cfg: Any, vocabulary: int, memory_scope: str) -> Optional[Dict[str, Any]]:
        # The segment length is left out: with ALiBi any will do. A shared memory is held as in the released code.
        if not released_checkpoint.is_released_side_settings(cfg):
            return None
        backbone = argparse.Namespace(_name="parallel_lm", **released_checkpoint.copied_backbone_settings(cfg))
        return {
            **released_checkpoint.side_network_settings(cfg),
            "save_backbone": True,
            "backbone_config": json.dumps(describe_backbone(backbone, vocabulary)),
            "memory_scope": memory_scope,
            "memory_dtype": "float16" if memory_scope == "shared" else "auto",
        }

    def holds_longmem(self, weights: MutableMapping[str, Tensor]) -> bool:
        return released_checkpoint.is_released_side_network(weights)

    def rename_longmem(self, weights: MutableMapping[str, Tensor], backbone_prefix: str) -> None:
        released_checkpoint.rename_side_network(weights, f"{backbone_prefix}decoder.")


register_checkpoint_format(ReleasedFormat())


@register_model_architecture("longmem_lm", "longmem_released")
def longmem_released(cfg):
    """Set the options of a side network like the released one, for its backbone and its checkpoints."""
    for name, value in released_checkpoint.SIDE_NETWORK.items():
        setattr(cfg, name, safe_getattr(cfg, name, None) or value)
    longmem_gpt2_medium(cfg)


# Names in the released checkpoints and training scripts; the sizes behind these names are the backbone's.
for _name in ("_gpt2_small", "_gpt2_tiny", "_gpt2_base", "_gpt2_medium", "_gpt2_big", "_gpt", "_big"):
    register_model_architecture("longmem_lm", "transformer_lm_sidenet" + _name)(longmem_released)
