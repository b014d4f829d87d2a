"""A memory of documents on disk: keys and values with the backbone and layer that they belong to.

Legend: H_kv key/value heads of all memory layers, d width of a head.
"""

import json
from typing import Any, Dict, List, Optional, Union

import torch
from torch import Tensor

from ..tensor_files import Header
from .container import SnapshotError, malformed, parse_entry, read_container, sha256, write_container
from .document_memory import DocumentMemory, MemorizedDocument
from .token_bank import TokenBank

FORMAT = "longmem memory 1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def save_memory(
    path: str, memory: DocumentMemory, backbone: str, layers: Union[int, str], dtype: str = "float16"
) -> None:
    """Write a memory to a file, whole or not at all; a file of that name is replaced.

    Args:
        path: Path of the file.
        memory: Memory to write.
        backbone: Fingerprint of the backbone that computed the keys and values.
        layers: Number of the backbone layer that they belong to, or numbers separated by commas.
        dtype: Precision in the file: ``float16``, ``bfloat16`` or ``float32``.

    Raises:
        ValueError: The memory is empty, or its values do not fit the precision.
        OSError: The file cannot be written.
    """
    if memory.tokens == 0:
        raise ValueError(f"nothing was memorized, so there is nothing to save in {path}")
    keys, values = (x.cpu() for x in memory.bank.tokens(0, DTYPES[dtype]))  # (H_kv, tokens, d)
    for x in (keys, values):
        if not largest(x) < float("inf"):
            raise ValueError(f"the memory has values that do not fit {dtype}: save it in bfloat16 or float32")
    tensors = {"keys": keys, "values": values}
    if memory.bank.token_bank is not None:
        hidden, tokens = memory.bank.token_bank.contents(0)
        tensors.update(hidden=hidden.cpu().contiguous(), tokens=tokens.cpu().contiguous())
    oldest = memory.oldest
    documents = [[name, max(0, begin - oldest), end - oldest] for name, begin, end in memory.documents]
    header = {
        "format": FORMAT,
        "backbone": backbone,
        "layer": str(layers),
        "chunk_size": str(memory.bank.chunk_size),
        "tokens": str(memory.tokens),
        "documents": json.dumps(documents),
    }
    write_container(path, tensors, header, sha256)


def load_memory(path: str, memory: DocumentMemory, backbone: str, layers: Union[int, str]) -> None:
    """Read a memory from a file in place of what a memory holds; if the file has more tokens, the newest are kept.

    Args:
        path: Path of the file.
        memory: Memory that takes the tokens, in its own precision and chunks.
        backbone: Fingerprint of the model's backbone; the file must have the same.
        layers: Number of the model's memory layer, or numbers separated by commas; the file must have the same.

    Raises:
        SnapshotError: The file is missing, damaged, changed, or of another model.
    """
    header, tensors = read_container(path, FORMAT, sha256, "memory")
    _check_model(path, header, backbone, str(layers))
    _check_tensors(path, tensors, memory)
    tokens, earlier = tensors["keys"].size(1), 0  # earlier: tokens that only the token memory of the file has
    if "tokens" in tensors:
        earlier = max(0, len(tensors["tokens"]) - tokens)
    documents = _read_documents(path, header, earlier + tokens)
    states = None
    if memory.bank.token_bank is not None:
        states = tensors["hidden"], tensors["tokens"]
    elif earlier:
        documents = [
            MemorizedDocument(x.name, x.begin - earlier, x.end - earlier) for x in documents if x.end > earlier
        ]
    device = memory.bank.keys.device
    memory.replace(tensors["keys"].to(device), tensors["values"].to(device), documents, states)


def largest(x: Tensor) -> float:
    """Return the largest magnitude in a tensor, 0 where it is empty; not a number if one in it is not."""
    # Extremes cost a fraction of testing every number, and one that is not finite makes an extreme not finite.
    return float(torch.stack(x.aminmax()).abs().max()) if x.numel() else 0.0


def _check_model(path: str, header: Header, backbone: str, layers: str) -> None:
    """Refuse a file of another model."""
    if header.get("backbone") != backbone:
        raise SnapshotError(
            f"the memory {path} was made by a backbone with fingerprint {str(header.get('backbone'))[:12]}, but the "
            f"model's has {backbone[:12]}: memorize the documents again with this one"
        )
    if header.get("layer") != layers:
        several = "memory layers are" if "," in layers else "memory layer is"
        raise SnapshotError(
            f"the memory {path} is of layer {header.get('layer')}, but the model's {several} {layers} "
            "(--retrieval-layer-index): memorize the documents again"
        )


def _check_tensors(path: str, tensors: Dict[str, Tensor], memory: DocumentMemory) -> None:
    """Refuse tensors that are not numbers of the right shape, or that the memory's precision cannot hold."""
    bank = memory.bank
    if tensors.keys() - {"hidden", "tokens"} != {"keys", "values"}:
        raise malformed(path, "memory", f"it holds {', '.join(sorted(tensors)) or 'nothing'}, not keys and values")
    if bank.token_bank is not None or tensors.keys() & {"hidden", "tokens"}:
        _check_states(path, tensors, bank.token_bank)
    keys, values = tensors["keys"], tensors["values"]
    if keys.dim() != 3 or keys.shape != values.shape:
        shapes = f"{list(keys.shape)} and {list(values.shape)}"
        raise malformed(path, "memory", f"the shapes {shapes} are not (heads, tokens, width)")
    if keys.shape[::2] != (bank.heads, bank.head_dim):
        raise SnapshotError(
            f"the memory {path} has {keys.shape[0]} heads of width {keys.shape[2]}, not {bank.heads} of {bank.head_dim}"
        )
    for name, x in (("keys", keys), ("values", values)):
        if x.dtype not in DTYPES.values():
            raise malformed(path, "memory", f"its {name} are {x.dtype}, not {', '.join(DTYPES)}")
        most = largest(x)
        if not most < float("inf"):
            raise malformed(path, "memory", f"its {name} are not all finite numbers")
        if most > torch.finfo(bank.keys.dtype).max:
            raise SnapshotError(
                f"the {name} of the memory {path} reach {most:.4g}, more than {bank.keys.dtype} holds: load the "
                "model with --memory-dtype bfloat16 or float32"
            )


def _check_states(path: str, tensors: Dict[str, Tensor], bank: Optional[TokenBank]) -> None:
    """Refuse a token memory that is missing, not numbers of the right shape, or of another model."""
    if not {"hidden", "tokens"} <= tensors.keys():
        raise SnapshotError(
            f"the memory {path} was saved without a token memory, which the model has: memorize the documents again, "
            "or load the model with --token-memory 0"
        )
    hidden, tokens = tensors["hidden"], tensors["tokens"]
    if hidden.dim() != 2 or tokens.dim() != 1 or len(hidden) != len(tokens):
        shapes = f"{list(hidden.shape)} and {list(tokens.shape)}"
        raise malformed(path, "memory", f"the shapes {shapes} are not (tokens, width) and (tokens)")
    if hidden.dtype not in DTYPES.values():
        raise malformed(path, "memory", f"its hidden states are {hidden.dtype}, not {', '.join(DTYPES)}")
    if not largest(hidden) < float("inf"):
        raise malformed(path, "memory", "its hidden states are not all finite numbers")
    if bank is None:
        return
    if hidden.size(1) != bank.width:
        raise SnapshotError(f"the memory {path} has hidden states of width {hidden.size(1)}, not {bank.width}")
    try:
        bank.require_symbols(tokens)
    except ValueError as error:
        raise malformed(path, "memory", str(error)) from error


def _read_documents(path: str, header: Header, tokens: int) -> List[MemorizedDocument]:
    """Return the documents of a file, in order and apart, each with a name of its own."""
    entries = parse_entry(path, "memory", header, "documents")
    if not isinstance(entries, list) or not all(map(_is_document, entries)):
        raise malformed(path, "memory", "its documents are not a list of [name, begin, end]")
    documents = [MemorizedDocument(*entry) for entry in entries]
    ends = [0, *(document.end for document in documents)]
    in_order = all(end <= document.begin < document.end for end, document in zip(ends, documents))
    if not in_order or ends[-1] > tokens:
        raise malformed(path, "memory", f"the places of its documents do not fit its {tokens:,} tokens")
    if len({document.name for document in documents}) < len(documents):
        raise malformed(path, "memory", "two of its documents have the same name")
    return documents


def _is_document(entry: Any) -> bool:
    return isinstance(entry, list) and list(map(type, entry)) == [str, int, int]
