"""The backbone family of ``parallel_lm``, the released LongMem's language model."""

from typing import Tuple

from torch import Tensor

from ..backbones.base import register_backbone_family
from ..backbones.transformer_lm import TransformerBackbone
from ..modules.layer_norm import set_layer_norm_eps
from ..modules.side_layer import SideLayer, SideNetworkOptions
from .parallel_layer import ParallelSideLayer
from .parallel_lm import ParallelLanguageModel


@register_backbone_family(ParallelLanguageModel)
class ParallelBackbone(TransformerBackbone):
    """A decoder of parallel layers; all else is as in fairseq's own decoders."""

    def memory_keys_and_values(self, x: Tensor, number: int) -> Tuple[Tensor, Tensor]:
        layer = self.layers[number]
        # Normalized with the batch first, as in the layer itself: it decides the last digits.
        return layer.self_attn.keys_and_values(layer.ln_1(x.transpose(0, 1) if layer.batch_first else x))

    def side_layer(self, reads_memory: bool, options: SideNetworkOptions) -> SideLayer:
        layer = ParallelSideLayer(self.side_config(options), reads_memory, options.recompute)
        set_layer_norm_eps(layer, self.side_eps(options))
        return layer
