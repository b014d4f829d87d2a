"""The one setting of LayerNorm that fairseq's layers do not take: what is added to the variance."""

from torch import nn


def set_layer_norm_eps(module: nn.Module, eps: float) -> None:
    """Set eps of every LayerNorm in a module, fused or not."""
    for norm in module.modules():
        if hasattr(norm, "normalized_shape"):
            norm.eps = eps
