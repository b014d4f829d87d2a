"""The setting of LayerNorm that fairseq's layers do not take: the number added to the variance."""

from torch import nn


def set_layer_norm_eps(module: nn.Module, eps: float) -> None:
    """Set the number added to the variance in every LayerNorm of a module, fused or not.

    Args:
        module: Module to change in place.
        eps: Number added to the variance.
    """
    for norm in module.modules():
        if hasattr(norm, "normalized_shape"):
            norm.eps = eps
