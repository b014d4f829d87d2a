"""Read checkpoints without running code from them: torch's pickles may contain calls of any function."""

import os
import re
import zipfile
from argparse import Namespace
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional

import numpy as np
import torch


def _dtype(name: str, *flags: bool) -> np.dtype:
    """Return the type of a numpy number; others may hold objects."""
    dtype = np.dtype(name, *flags)
    if dtype.kind not in "biufc":
        raise ValueError(f"numpy's type {name} is not one of numbers")
    return dtype


def _number(dtype: np.dtype, data: bytes) -> np.generic:
    """Return a numpy number from its bytes, which a pickle holds as a string if Python 2 wrote it."""
    return np.frombuffer(data if isinstance(data, bytes) else data.encode("latin-1"), dtype, 1)[0]


# Types allowed in a checkpoint besides tensors and plain data. Options of before fairseq 0.11, and those of the
# released LongMem, are kept in an argparse.Namespace, which only holds attributes. numpy's numbers, such as losses, are
# written as calls of numpy functions of these names, in whose place the functions above make numbers and nothing else.
ALLOWED = [
    Namespace,
    (_dtype, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    *sorted({type(np.dtype(code)) for code in "?bhilqBHILQefdgFDG"}, key=str),
]


def allow_plain_data() -> None:
    """Let torch's safe loader accept :data:`ALLOWED` in this process from now on.

    fairseq reads the files of ``--path`` and ``--restore-file`` itself, with ``torch.load``. So this is called before:
    when a task is set up, and by the hub.
    """
    torch.serialization.add_safe_globals(ALLOWED)


@contextmanager
def plain_data_allowed() -> Iterator[None]:
    """Let torch's safe loader accept :data:`ALLOWED` within a block.

    torch's own context manager withdraws at its end what was allowed before it, too.
    """
    missing = [allowed for allowed in ALLOWED if allowed not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(missing):
        yield


def load_safely(path: str, mapped: bool = False, checked: bool = True) -> Any:
    """Read a file of ``torch.save`` and compare its checksums; one of torch before 1.6 has none.

    Args:
        path: Path of the file.
        mapped: Whether the tensors stay on disk until they are used.
        checked: Whether checksums are compared, for which the whole file is read.

    Returns:
        The file's content, tensors on the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or needs anything but tensors, plain data and :data:`ALLOWED`; the message is
            the reason alone.
    """
    try:
        archived = zipfile.is_zipfile(path)
        wrong = _wrong_part(path) if archived and checked else None
        if wrong is None:
            with plain_data_allowed():
                return torch.load(path, map_location="cpu", mmap=mapped and archived, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file makes its reader raise anything
        raise ValueError(why_unreadable(error)) from error
    raise ValueError(f"it is damaged: the checksum of its part {wrong} is wrong")


def _wrong_part(path: str) -> Optional[str]:
    """Return the name of the first part of an archive whose checksum is wrong, or None."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def refuse_adapter(path: str) -> None:
    """Refuse an adapter (LoRA and others of peft), which is a change to a model and not one.

    Args:
        path: Path of a directory, or of a file of weights.

    Raises:
        ValueError: It is an adapter.
    """
    whole = os.path.isdir(path)
    directory = path if whole else os.path.dirname(path)
    adapted = whole or os.path.basename(path).startswith("adapter_model")
    if adapted and os.path.isfile(os.path.join(directory, "adapter_config.json")):
        raise ValueError(
            f"{path} is an adapter (adapter_config.json), not a model: merge it into its base model first, as with "
            "peft's merge_and_unload, and convert the merged model"
        )


def why_unreadable(error: Exception) -> str:
    """Explain why a file could not be read; torch's own words advise to trust the file.

    Args:
        error: Exception of torch's safe loader.

    Returns:
        The reason, a clause without the file's name.
    """
    code = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {code[1]}, which may run code" if code else "it is damaged, or of another format"


def settings(state: Dict[str, Any]) -> Namespace:
    """Copy the model's settings from a checkpoint, whichever version of fairseq wrote it.

    Args:
        state: Content of the checkpoint.

    Returns:
        The settings by name.
    """
    cfg = state["cfg"]["model"] if state.get("cfg") else state["args"]
    return Namespace(**(dict(cfg) if isinstance(cfg, dict) else vars(cfg)))
