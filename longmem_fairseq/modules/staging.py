"""Small arrays of the host, copied to the model's device without waiting for it."""

import numpy as np
import torch
from torch import Tensor


def staged(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; a GPU is given the copy like a kernel, and the host continues.

    Args:
        array: Array of any shape, which may change afterwards.
        device: Device of the copy.
    """
    if device.type == "cpu":
        return torch.from_numpy(array.copy())
    # From memory that is not pinned the copy would make the host wait for everything before it.
    return torch.from_numpy(np.ascontiguousarray(array)).pin_memory().to(device, non_blocking=True)
