"""Places to write to: checked before the work begins, and left as they were when it fails."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from preprocess.errors import InputError


def check_output(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Args:
        path: Path of the file.
        option: Option that names it, for the message.

    Raises:
        InputError: The path is a directory, or its directory does not exist or cannot be written to.
    """
    if path.is_dir():
        raise InputError(f"{option} {path} is a directory: name a file")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path} cannot be written: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path} cannot be written: the directory {path.parent} is read-only")


@contextmanager
def whole_directory(destination: Path) -> Iterator[Path]:
    """Write several files to a directory, all of them or none.

    Args:
        destination: Path of the directory; it is created if it does not exist. Other files in it stay.

    Yields:
        Path of a temporary directory beside it, whose files are moved into it at the end of the block.

    Raises:
        OSError: A file cannot be written; the message names its path in ``destination``.
    """
    created = [path for path in destination.absolute().parents if not path.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.part.", dir=destination.parent))
    try:
        yield temporary
        destination.mkdir(exist_ok=True)
        for path in sorted(temporary.iterdir()):
            os.replace(path, destination / path.name)
        created = []
    except SafetensorError as error:
        raise OSError(f"{destination} cannot be written: {error}") from error
    except OSError as error:
        raise OSError(str(error).replace(str(temporary), str(destination))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in created:
            path.rmdir()
