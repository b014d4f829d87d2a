"""Small arrays of the host, copied to the model's device without waiting for it."""

from typing import Union

import numpy as np
import torch
from torch import Tensor


def staged(array: Union[np.ndarray, Tensor], device: torch.device) -> Tensor:
    """Copy an array to a device; a GPU is given the copy like a kernel, and the host continues.

    Args:
        array: Array of any shape, or tensor on the CPU, which may change afterwards.
        device: Device of the copy.
    """
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor.clone()
    # From memory that is not pinned the copy would make the host wait for everything before it.
    return tensor.pin_memory().to(device, non_blocking=True)
