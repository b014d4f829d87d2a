"""The fingerprint that tells two backbones apart."""

import hashlib
import json
from typing import Dict, Optional

from torch import Tensor

from .base import Backbone


def backbone_fingerprint(backbone: Backbone, weights: Optional[Dict[str, Tensor]] = None) -> str:
    """Return the SHA-256 of a backbone's description and of all its weights as float32.

    It is the same in every version of fairseq.

    Args:
        backbone: Backbone with loaded weights.
        weights: Weights of the backbone by their names in its state dict, in place of the loaded ones, which may be
            rounded; None for the loaded ones.

    Returns:
        The digest in hexadecimal, 64 characters.
    """
    digest = hashlib.sha256(json.dumps(backbone.config, sort_keys=True).encode())
    weights = backbone.state_dict() if weights is None else weights
    for name, tensor in sorted((name[len("decoder.") :], tensor) for name, tensor in weights.items()):
        if name.endswith("._float_tensor"):  # of sinusoidal positions in fairseq 0.12.2: never initialized, never read
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()
