"""A memory of documents on disk: keys and values with the backbone and layer that they belong to.

Legend: H_kv key/value heads, d width of a head.
"""

import json
from typing import Dict

import torch
from torch import Tensor

from .container import SnapshotError, read_container, sha256, write_container
from .document_memory import DocumentMemory, MemorizedDocument

FORMAT = "longmem memory 1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def save_memory(path: str, memory: DocumentMemory, backbone: str, layer: int, dtype: str = "float16") -> None:
    """Write a memory to a file, whole or not at all; a file of that name is replaced.

    Args:
        path: Path of the file.
        memory: Memory to write.
        backbone: Fingerprint of the backbone that computed the keys and values.
        layer: Number of the backbone layer that they belong to.
        dtype: Precision in the file: ``float16``, ``bfloat16`` or ``float32``.

    Raises:
        ValueError: The memory is empty, or its values do not fit the precision.
        OSError: The file cannot be written.
    """
    if memory.tokens == 0:
        raise ValueError(f"nothing was memorized, so there is nothing to save in {path}")
    keys, values = (x.cpu() for x in memory.bank.tokens(0, DTYPES[dtype]))  # (H_kv, tokens, d)
    for x in (keys, values):
        # A number that is not finite makes an extreme not finite, and extremes cost a fraction of testing every number.
        if not torch.isfinite(torch.stack(x.aminmax())).all():
            raise ValueError(f"the memory has values that do not fit {dtype}: save it in bfloat16 or float32")
    oldest = memory.oldest
    documents = [[name, max(0, begin - oldest), end - oldest] for name, begin, end in memory.documents]
    header = {
        "format": FORMAT,
        "backbone": backbone,
        "layer": str(layer),
        "chunk_size": str(memory.bank.chunk_size),
        "tokens": str(memory.tokens),
        "documents": json.dumps(documents),
    }
    write_container(path, {"keys": keys, "values": values}, header, sha256)


def load_memory(path: str, memory: DocumentMemory, backbone: str, layer: int) -> None:
    """Read a memory from a file in place of what a memory holds; if the file has more tokens, the newest are kept.

    Args:
        path: Path of the file.
        memory: Memory that takes the tokens, in its own precision and chunks.
        backbone: Fingerprint of the model's backbone; the file must have the same.
        layer: Number of the model's memory layer; the file must have the same.

    Raises:
        SnapshotError: The file is missing, damaged, changed, or of another model.
    """
    header, tensors = read_container(path, FORMAT, sha256, "memory")
    _check(path, header, tensors, memory, backbone, layer)
    documents = [MemorizedDocument(*entry) for entry in json.loads(header["documents"])]
    device = memory.bank.keys.device
    memory.replace(tensors["keys"].to(device), tensors["values"].to(device), documents)


def _check(
    path: str, header: Dict[str, str], tensors: Dict[str, Tensor], memory: DocumentMemory, backbone: str, layer: int
) -> None:
    """Refuse a file of another model."""
    if header.get("backbone") != backbone:
        raise SnapshotError(
            f"the memory {path} was made by a backbone with fingerprint {str(header.get('backbone'))[:12]}, but the "
            f"model's has {backbone[:12]}: memorize the documents again with this one"
        )
    if header.get("layer") != str(layer):
        raise SnapshotError(
            f"the memory {path} is of layer {header.get('layer')}, but the model's memory layer is {layer} "
            "(--retrieval-layer-index): memorize the documents again"
        )
    keys, values, bank = tensors["keys"], tensors["values"], memory.bank
    if keys.shape != values.shape or keys.shape[::2] != (bank.heads, bank.head_dim):
        raise SnapshotError(
            f"the memory {path} has {keys.shape[0]} heads of width {keys.shape[2]}, not {bank.heads} of {bank.head_dim}"
        )
