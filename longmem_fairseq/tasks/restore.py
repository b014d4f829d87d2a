"""What is checked before a training continues: the checkpoint is there, whole, and made with this dictionary."""

import os
import zipfile
from typing import Any, Dict, Optional

import torch
from fairseq.data import Dictionary

from ..data.manifest import dictionary_fingerprint

LAST = "checkpoint_last.pt"  # fairseq's default of --restore-file; it may be missing


def check_dictionary(state: Dict[str, Any], dictionary: Dictionary, checkpoint: str) -> None:
    """Refuse a checkpoint that was made with another dictionary.

    Args:
        state: the checkpoint's ``task_state``.
        dictionary: of the data.
        checkpoint: its name, for the message.

    Raises:
        ValueError: the dictionaries differ.
    """
    saved = state.get("dictionary_sha256")
    here = dictionary_fingerprint(dictionary.symbols)
    if saved is not None and saved != here:
        raise ValueError(
            f"{checkpoint} was made with another dictionary ({state.get('dictionary_size')} symbols, SHA-256 "
            f"{saved[:12]}...) than the data's dict.txt ({len(dictionary)} symbols, {here[:12]}...): "
            "binarize the data with the dictionary of the checkpoint"
        )


def restored_checkpoint(restore_file: str, save_dir: str, finetune_from_model: Optional[str]) -> Optional[str]:
    """The checkpoint that fairseq-train will load, if any.

    Raises:
        FileNotFoundError: the user named one that does not exist (fairseq itself would start from scratch).
    """
    if restore_file != LAST:
        if not os.path.isfile(restore_file):
            raise FileNotFoundError(
                f"--restore-file {restore_file} does not exist: name an existing checkpoint, or leave the option out "
                f"to continue from {os.path.join(save_dir, LAST)} or start anew"
            )
        return restore_file
    last = os.path.join(save_dir, LAST)
    if os.path.isfile(last):
        return last
    if finetune_from_model and not os.path.isfile(finetune_from_model):
        raise FileNotFoundError(f"--finetune-from-model {finetune_from_model} does not exist")
    return finetune_from_model or None


def check_checkpoint(path: str, dictionary: Dictionary) -> None:
    """Refuse a checkpoint that is damaged or was made with another dictionary, before anything is built.

    Raises:
        ValueError: it cannot be continued from.
    """
    advice = "continue from an older one with --restore-file, or move it away to start anew"
    try:
        if zipfile.is_zipfile(path):  # what torch.save writes; older files are pickles, whose damage torch.load finds
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"checkpoint {path} is damaged (checksum of {damaged} is wrong): {advice}")
            state = torch.load(path, map_location="cpu", mmap=True)
        else:
            state = torch.load(path, map_location="cpu")
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"checkpoint {path} cannot be read ({type(error).__name__}: {error}): {advice}") from error
    check_dictionary(state.get("task_state") or {}, dictionary, path)
