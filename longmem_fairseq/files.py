"""Writing files whole or not at all: a reader, or a later run, never sees a part of one."""

import json
import os
from pathlib import Path
from typing import Any, Callable, Union

PathLike = Union[str, "os.PathLike[str]"]


def write_whole(path: PathLike, write: Callable[[str], Any]) -> None:
    """Let a function write a file under a temporary name beside its place, then move it there in one step.

    The temporary file is removed when the function fails or is interrupted; what was at ``path`` before is then still
    there. It keeps the suffix of ``path``, because some libraries choose a format by it. The file gets the mode of the
    one that it replaces, otherwise that of any new file, whatever mode the function gave it.

    Args:
        path: Path of the file to write.
        write: Function that writes the whole file to the path it is called with.

    Raises:
        OSError: The file cannot be written; the message names ``path``.
    """
    target = Path(path)
    temporary = target.with_name(f"{target.stem}.part.{os.getpid()}{target.suffix}")
    try:
        write(str(temporary))
        os.chmod(temporary, target.stat().st_mode & 0o777 if target.exists() else _default_mode())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_text(path: PathLike, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all, with the newlines that the text has.

    Args:
        path: Path of the file to write.
        text: Content of the file.

    Raises:
        OSError: The file cannot be written; the message names ``path``.
    """

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)


def write_json(path: PathLike, value: Any, indent: int = 2) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        path: Path of the file to write.
        value: Value of plain JSON types.
        indent: Number of spaces by which each level is indented.

    Raises:
        OSError: The file cannot be written; the message names ``path``.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def _default_mode() -> int:
    """Return the mode that the process gives new files."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
