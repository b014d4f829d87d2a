"""The memory of a training on disk: all lanes, bit by bit, as safetensors, with a header that says where it belongs.

A memory is a function of the data before it and of the frozen backbone, not of what is trained. So what a file must
match is a place in the data, the backbone, and the settings of the memory.
"""

import json
import os
import zlib
from typing import Any, Dict, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .memory_file import SnapshotError, write_safetensors
from .stream_memory import Memory

FORMAT = "longmem training memory 1"


def save_training_memory(path: str, memory: Optional[Memory], about: Dict[str, Any]) -> int:
    """Write a memory to a file; a file of that name is replaced at once, or not at all.

    Args:
        path: of the file.
        memory: what is written; ``None`` where this rank has none yet.
        about: what it must match when it is read again: name -> value, as JSON can hold it.

    Returns:
        bytes of the tensors.

    Raises:
        OSError: it cannot be written.
    """
    tensors, state = ({}, None) if memory is None else memory.state()
    tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
    about = about if memory is None else {**about, **_sizes(memory)}
    header = {"format": FORMAT, "about": json.dumps(about), "state": json.dumps(state)}
    header["crc32"] = _checksum(header, tensors)
    write_safetensors(path, tensors, header)
    return sum(x.numel() * x.element_size() for x in tensors.values())


def load_training_memory(path: str, memory: Memory, about: Dict[str, Any]) -> None:
    """Read a memory from a file, in place of what ``memory`` holds; bit by bit what was written.

    Args:
        path: of the file.
        memory: of the model that goes on.
        about: what the file must match, as in :func:`save_training_memory`.

    Raises:
        SnapshotError: the file is missing, damaged, changed, or of another place, backbone or setting.
    """
    if not os.path.isfile(path):
        raise SnapshotError(f"there is no snapshot {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise SnapshotError(f"{path} is of the format {header.get('format')}, not {FORMAT}")
            _compare(path, json.loads(header["about"]), {**about, **_sizes(memory)})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise SnapshotError(f"the snapshot {path} is damaged ({error})") from error
    if header.get("crc32") != _checksum(header, tensors):
        raise SnapshotError(f"the snapshot {path} is not as it was written: its checksum differs")
    state = json.loads(header["state"])
    if state is not None:
        memory.restore(tensors, state)


def _sizes(memory: Memory) -> Dict[str, Any]:
    """What decides the shape of a memory, by the options that set it."""
    bank = memory.bank
    return {
        "lanes of the memory": bank.lanes,
        "heads": [bank.heads, bank.head_dim],
        "--memory-size (in whole chunks)": bank.chunks * bank.chunk_size,
        "--chunk-size": bank.chunk_size,
        "precision (--memory-dtype, or the model's)": str(bank.keys.dtype).split(".")[-1],
    }


def _compare(path: str, saved: Dict[str, Any], here: Dict[str, Any]) -> None:
    changed = [f"{name} was {saved[name]} and is {here.get(name)}" for name in saved if saved[name] != here.get(name)]
    if changed:
        raise SnapshotError(f"the snapshot {path} does not fit: {'; '.join(changed)}")


def _checksum(header: Dict[str, str], tensors: Dict[str, Tensor]) -> str:
    """CRC-32 of the header, but for itself, and of the tensors; as in fairseq's checkpoints, and three times as fast
    as SHA-256 on gigabytes."""
    said = {name: value for name, value in header.items() if name != "crc32"}
    crc = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        crc = zlib.crc32(f"{name} {tuple(x.shape)} {x.dtype}".encode(), crc)
        crc = zlib.crc32(memoryview(x.flatten().view(torch.uint8).numpy()), crc)
    return f"{crc:08x}"
