"""A memory on disk: keys and values as safetensors, with a header that says whose they are.

Legend: H heads, d width of a head.
"""

import hashlib
import json
import os
import tempfile
from typing import Dict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .document_memory import Document, DocumentMemory

FORMAT = "longmem memory 1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class SnapshotError(ValueError):
    """A file that cannot be a memory of this model; the message says why."""


def save_memory(path: str, document_memory: DocumentMemory, backbone: str, layer: int, dtype: str = "float16") -> None:
    """Write a memory to a file; a file of that name is replaced at once, or not at all.

    Args:
        path: of the file.
        library: what is written.
        backbone: fingerprint of the backbone that made the keys and values.
        layer: the layer that they are of.
        dtype: precision in the file.

    Raises:
        SnapshotError: there is nothing to save, or it does not fit the precision.
        OSError: it cannot be written.
    """
    if document_memory.tokens == 0:
        raise SnapshotError(f"nothing was memorised, so there is nothing to save in {path}")
    keys, values = (x.cpu() for x in document_memory.bank.tokens(0, DTYPES[dtype]))  # (H, tokens, d)
    # What is not finite makes the extremes so, which are found several times as fast as asking every number.
    if not all(bool(torch.isfinite(torch.stack(x.aminmax())).all()) for x in (keys, values)):
        raise SnapshotError(f"the memory has values that do not fit {dtype}: save it in bfloat16 or float32")
    oldest = document_memory.oldest
    documents = [[name, max(0, begin - oldest), end - oldest] for name, begin, end in document_memory.documents]
    header = {
        "format": FORMAT,
        "backbone": backbone,
        "layer": str(layer),
        "chunk_size": str(document_memory.bank.chunk_size),
        "tokens": str(document_memory.tokens),
        "documents": json.dumps(documents),
    }
    header["sha256"] = _digest(header, keys, values)
    write_safetensors(path, {"keys": keys, "values": values}, header)


def write_safetensors(path: str, tensors: Dict[str, Tensor], header: Dict[str, str]) -> None:
    """Write a safetensors file of contiguous tensors on the CPU; one of that name is replaced at once, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    directory, name = os.path.split(os.path.abspath(path))
    # The library has a temporary file of its own, which stays where a process is killed: give it a known place.
    with tempfile.TemporaryDirectory(dir=directory, prefix=f"{name}.tmp") as temporary:
        written = os.path.join(temporary, name)
        try:
            save_file(tensors, written, metadata=header)
        except SafetensorError as error:  # so the library says that a disk is full
            raise OSError(f"{path} cannot be written: {error}") from error
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(written, 0o666 & ~umask)  # the library's are their owner's alone
        os.replace(written, path)


def load_memory(path: str, document_memory: DocumentMemory, backbone: str, layer: int) -> None:
    """Read a memory from a file, mapped rather than read, in place of what a library has.

    Of more tokens than the memory holds, the newest are kept.

    Args:
        path: of the file.
        library: takes the tokens, in its own precision and chunks.
        backbone, layer: as in :func:`save_memory`; the file must have the same.

    Raises:
        SnapshotError: the file is missing, damaged, changed, no memory, or of another model.
    """
    if not os.path.isfile(path):
        raise SnapshotError(f"the memory {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise SnapshotError(
                    f"{path} is no memory of this version: its format is {header.get('format')}, not {FORMAT}"
                )
            keys, values = file.get_tensor("keys"), file.get_tensor("values")
    except (SafetensorError, OSError) as error:
        raise SnapshotError(f"the memory {path} is damaged, or no safetensors file: {error}") from error
    _check(path, header, keys, values, document_memory, backbone, layer)
    documents = [Document(*entry) for entry in json.loads(header["documents"])]
    document_memory.replace(
        keys.to(document_memory.bank.keys.device), values.to(document_memory.bank.keys.device), documents
    )


def _check(
    path, header: Dict[str, str], keys: Tensor, values: Tensor, document_memory: DocumentMemory, backbone, layer
) -> None:
    """Refuse a file that is of another model, or not as it was written."""
    if header.get("backbone") != backbone:
        raise SnapshotError(
            f"the memory {path} was made by a backbone with fingerprint {str(header.get('backbone'))[:12]}, but the "
            f"model's has {backbone[:12]}: memorise the documents again with this one"
        )
    if header.get("layer") != str(layer):
        raise SnapshotError(
            f"the memory {path} is of layer {header.get('layer')}, but the model remembers layer {layer} "
            "(--retrieval-layer-index): memorise the documents again"
        )
    if header.get("sha256") != _digest(header, keys, values):
        raise SnapshotError(f"the memory {path} is not as it was written: its SHA-256 differs")
    H, d = document_memory.bank.heads, document_memory.bank.head_dim
    if keys.shape != values.shape or keys.shape[::2] != (H, d):
        raise SnapshotError(f"the memory {path} has {keys.shape[0]} heads of width {keys.shape[2]}, not {H} of {d}")


def _digest(header: Dict[str, str], keys: Tensor, values: Tensor) -> str:
    """SHA-256 of the header, but for itself, and the tensors."""
    said = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for x in (keys, values):
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update(memoryview(x.view(torch.uint8).numpy().reshape(-1)))
    return digest.hexdigest()
