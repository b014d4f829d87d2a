"""The container of memories on disk: a safetensors file whose header says what it is, with a checksum over both."""

import hashlib
import json
import zlib
from typing import Any, Callable, Dict, Tuple

import torch
from torch import Tensor

from ..files import parse_json
from ..tensor_files import Header, read_tensors, write_tensors

Checksum = Callable[[Header, Dict[str, Tensor]], str]


class SnapshotError(ValueError):
    """A file is not a container that can be used here; the message gives the reason."""


def sha256(header: Header, tensors: Dict[str, Tensor]) -> str:
    """Return the SHA-256 of a header and tensors, in hexadecimal."""
    digest = hashlib.sha256(_header_bytes(header))
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update(_data(x))
    return digest.hexdigest()


def crc32(header: Header, tensors: Dict[str, Tensor]) -> str:
    """Return the CRC-32 of a header and tensors, 8 hexadecimal digits; three times as fast as SHA-256 on gigabytes."""
    crc = zlib.crc32(_header_bytes(header))
    for name in sorted(tensors):
        x = tensors[name]
        crc = zlib.crc32(f"{name} {tuple(x.shape)} {x.dtype}".encode(), crc)
        crc = zlib.crc32(_data(x), crc)
    return f"{crc:08x}"


def write_container(path: str, tensors: Dict[str, Tensor], header: Header, checksum: Checksum) -> None:
    """Write a container, whole or not at all; a file of that name is replaced.

    Args:
        path: Path of the file.
        tensors: Contiguous tensors on the CPU, by name.
        header: Strings by name, with the format under ``format``.
        checksum: Function of header and tensors, :func:`sha256` or :func:`crc32`; its result is added to the header
            under its name.

    Raises:
        OSError: The file cannot be written.
    """
    write_tensors(path, tensors, {**header, checksum.__name__: checksum(header, tensors)})


def read_container(path: str, file_format: str, checksum: Checksum, kind: str) -> Tuple[Header, Dict[str, Tensor]]:
    """Read a container and compare its checksum; the tensors are mapped rather than read where that is possible.

    Args:
        path: Path of the file.
        file_format: Expected format.
        checksum: Function that it was written with.
        kind: Kind of the file, for messages, such as "memory" or "snapshot".

    Returns:
        Header and tensors.

    Raises:
        SnapshotError: The file is missing, damaged, changed, or of another format.
    """
    try:
        header, tensors = read_tensors(path)
    except (ValueError, OSError) as error:
        raise SnapshotError(f"the {kind} {error}") from error
    if header.get("format") != file_format:
        raise SnapshotError(
            f"the {kind} {path} has the format {header.get('format')}, but this version reads {file_format}"
        )
    if header.get(checksum.__name__) != checksum(header, tensors):
        raise SnapshotError(f"the {kind} {path} is not as it was written: its checksum ({checksum.__name__}) differs")
    return header, tensors


def parse_entry(path: str, kind: str, header: Header, name: str) -> Any:
    """Parse an entry of a container's header.

    Args:
        path: Path of the file, for messages.
        kind: Kind of the file, as for :func:`read_container`.
        header: Header of the file.
        name: Name of an entry that is JSON.

    Raises:
        SnapshotError: The entry is missing, or not JSON.
    """
    try:
        return parse_json(header[name])
    except KeyError:
        raise malformed(path, kind, f"it lacks {name}") from None
    except ValueError as error:
        raise malformed(path, kind, f"{name} is not JSON ({error})") from error


def malformed(path: str, kind: str, reason: str) -> SnapshotError:
    """Return the exception for a file whose checksum is right and whose content is not what this package writes.

    Args:
        path: Path of the file.
        kind: Kind of the file, as for :func:`read_container`.
        reason: Clause that names what is wrong.
    """
    return SnapshotError(f"the {kind} {path} was not written by this package: {reason}")


def _header_bytes(header: Header) -> bytes:
    checked = {name: value for name, value in header.items() if name not in (sha256.__name__, crc32.__name__)}
    return json.dumps(checked, sort_keys=True).encode()


def _data(x: Tensor) -> memoryview:
    return memoryview(x.flatten().view(torch.uint8).numpy())
