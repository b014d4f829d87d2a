"""Read checkpoints without running code from them: torch's pickles may contain calls of any function."""

import os
import re
from argparse import Namespace
from contextlib import contextmanager
from typing import Any, Dict, Iterator

import torch

# Types allowed in a checkpoint besides tensors and plain data: options of before fairseq 0.11, and those of the
# released LongMem, are kept in an argparse.Namespace, which only holds attributes.
ALLOWED = [Namespace]


def allow_namespaces() -> None:
    """Let torch's safe loader accept :data:`ALLOWED` in this process from now on.

    fairseq reads the files of ``--path`` and ``--restore-file`` itself, with ``torch.load``. So this is called before:
    when a task is set up, and by the hub.
    """
    torch.serialization.add_safe_globals(ALLOWED)


@contextmanager
def namespaces_allowed() -> Iterator[None]:
    """Let torch's safe loader accept :data:`ALLOWED` within a block.

    torch's own context manager withdraws at its end what was allowed before it, too.
    """
    missing = [allowed for allowed in ALLOWED if allowed not in torch.serialization.get_safe_globals()]
    with torch.serialization.safe_globals(missing):
        yield


def load_safely(path: str) -> Any:
    """Read a file of ``torch.save``.

    Args:
        path: Path of the file.

    Returns:
        The file's content, tensors on the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or needs anything but tensors, plain data and :data:`ALLOWED`; the message is
            the reason alone.
    """
    try:
        with namespaces_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file makes its reader raise anything
        raise ValueError(why_unreadable(error)) from error


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
