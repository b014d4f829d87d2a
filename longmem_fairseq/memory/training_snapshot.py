"""The memory of a training on disk: all lanes, bit by bit, with the place in the data that they belong to.

A memory is a function of the data before it and of the frozen backbone, not of what is trained. So what a file must
match is a place in the data, the backbone, and the settings of the memory. A carried window also holds keys and values
of the side network, which only a file keeps as they were.
"""

import json
from typing import Any, Dict, Optional

from torch import Tensor

from .container import SnapshotError, crc32, malformed, parse_entry, read_container, write_container
from .lane_streams import LaneStreams
from .stream_memory import StreamMemory

FORMAT = "longmem training memory 1"
_WINDOW = "window."  # in front of the names of a carried window's tensors


def save_training_memory(
    path: str, memory: Optional[StreamMemory], place: Dict[str, Any], window: Optional[LaneStreams] = None
) -> int:
    """Write a memory to a file, whole or not at all; a file of that name is replaced.

    Args:
        path: Path of the file.
        memory: Memory to write; None where this rank has none yet.
        place: What must be the same when the file is read, JSON types by the name that messages use.
        window: Carried window to write, or None.

    Returns:
        Number of bytes of the tensors.

    Raises:
        OSError: The file cannot be written.
    """
    tensors, state = ({}, None) if memory is None else memory.state()
    header = {"format": FORMAT, "state": json.dumps(state)}
    if window is not None:
        carried, places = window.state()
        tensors.update((_WINDOW + name, x) for name, x in carried.items())
        header["window"] = json.dumps(places)
    place = place if memory is None else {**place, **_sizes(memory)}
    header["about"] = json.dumps(place)
    tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
    write_container(path, tensors, header, crc32)
    return sum(x.numel() * x.element_size() for x in tensors.values())


def load_training_memory(
    path: str, memory: Optional[StreamMemory], place: Dict[str, Any], window: Optional[LaneStreams] = None
) -> None:
    """Read a memory from a file in place of what a memory holds, bit by bit.

    Args:
        path: Path of the file.
        memory: Memory of the model that continues; None where it has none.
        place: What the file must match, as in :func:`save_training_memory`.
        window: Carried window of the model, or None.

    Raises:
        SnapshotError: The file is missing, damaged, changed, or of another place, backbone or setting.
    """
    header, tensors = read_container(path, FORMAT, crc32, "snapshot")
    saved, current = (
        parse_entry(path, "snapshot", header, "about"),
        {**place, **({} if memory is None else _sizes(memory))},
    )
    if not isinstance(saved, dict):
        raise malformed(path, "snapshot", "it does not state its place in the data")
    state = parse_entry(path, "snapshot", header, "state")
    if state is not None:  # a memory without a token memory does not state its size
        saved, current = ({"--token-memory": 0, **sizes} for sizes in (saved, current))
    changed = [f"{name} was {x} and is {current.get(name)}" for name, x in saved.items() if x != current.get(name)]
    if changed:
        raise SnapshotError(f"the snapshot {path} does not fit: {'; '.join(changed)}")
    if window is not None:
        places = parse_entry(path, "snapshot", header, "window")
        if not _is_window(places, len(window.streams)):
            raise malformed(path, "snapshot", "its counters are not those of a carried window")
        carried = {name[len(_WINDOW) :]: x for name, x in tensors.items() if name.startswith(_WINDOW)}
        _restore(path, window, carried, places)
    if state is None or memory is None:
        return
    if not _is_state(state, memory.bank.lanes):
        raise malformed(path, "snapshot", "its counters are not those of a memory")
    _restore(path, memory, tensors, state)


def _restore(path: str, streams: LaneStreams, tensors: Dict[str, Tensor], places: Dict[str, Any]) -> None:
    try:
        streams.restore(tensors, places)
    except (IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise malformed(path, "snapshot", f"it cannot be put into a memory ({error})") from error


def _is_window(places: Any, lanes: int) -> bool:
    """Return whether a value has the form of the places of a carried window."""
    try:
        counters = [places["lengths"], places["streams"], places["ends"]]
    except (KeyError, TypeError):
        return False
    return all(isinstance(x, list) and len(x) == lanes and set(map(type, x)) <= {int} for x in counters)


def _is_state(state: Any, lanes: int) -> bool:
    """Return whether a value has the form of a memory's state: counters of its bank's lanes, and its streams."""
    try:
        bank = state["bank"]
        counters, streams = [bank["first"], bank["written"], bank["position"]], [state["streams"], state["ends"]]
    except (KeyError, TypeError):
        return False
    if not all(isinstance(x, list) and set(map(type, x)) <= {int} for x in (*counters, *streams)):
        return False
    if len(bank) != len(counters) or set(map(len, counters)) != {lanes} or len(streams[0]) != len(streams[1]):
        return False
    return all(0 <= first <= written and 0 <= position for first, written, position in zip(*counters))


def _sizes(memory: StreamMemory) -> Dict[str, Any]:
    """Return what decides the shape of a memory, by the options that set it."""
    bank = memory.bank
    return {
        **_token_sizes(memory),
        "lanes of the memory": bank.lanes,
        "heads": [bank.heads, bank.head_dim],
        "--memory-size (in whole chunks)": bank.chunks * bank.chunk_size,
        "--chunk-size": bank.chunk_size,
        "precision (--memory-dtype, or the model's)": str(bank.keys.dtype).split(".")[-1],
    }


def _token_sizes(memory: StreamMemory) -> Dict[str, Any]:
    """Return what decides the shape of a token memory; nothing without one."""
    if memory.token_streams is None:
        return {}
    bank = memory.token_streams.bank
    return {
        "--token-memory": bank.size,
        "width of the token memory": bank.width,
        "precision of the token memory (--memory-dtype)": str(bank.hidden.dtype).split(".")[-1],
    }
