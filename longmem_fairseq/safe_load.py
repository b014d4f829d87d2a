"""Reading checkpoints without running code from them: torch's pickles may hold calls of any function."""

import re
from argparse import Namespace
from typing import Any, Dict

import torch

# What may lie in a checkpoint besides tensors and plain data: options of before fairseq 0.11, and of the released
# LongMem, are kept in an argparse.Namespace, which only holds attributes.
ALLOWED = [Namespace]


def load_safely(path: str) -> Any:
    """What a file of torch.save holds, tensors on the CPU.

    Raises:
        FileNotFoundError: where it does not exist.
        ValueError: where it is damaged, or asks for anything but tensors, plain data and :data:`ALLOWED`; the message
            is the reason alone.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(why_unreadable(error)) from error


def why_unreadable(error: Exception) -> str:
    """Why a file could not be read, of what torch's safe reader raised; its own words advise to trust the file."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {code[1]}, which may run code" if code else "it is damaged, or of another format"


def settings(state: Dict[str, Any]) -> Namespace:
    """The model's settings in a checkpoint of fairseq, a copy, whichever way they are kept there."""
    cfg = state["cfg"]["model"] if state.get("cfg") else state["args"]
    return Namespace(**(dict(cfg) if isinstance(cfg, dict) else vars(cfg)))
