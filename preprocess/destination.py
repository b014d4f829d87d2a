"""Places to write to: checked before the work begins, and left as they were when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preprocess.errors import InputError
from preprocess.package_modules import files


def check_output(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Args:
        path: Path of the file.
        option: Option that names it, for the message.

    Raises:
        InputError: Something other than a file is there, or its directory does not exist or cannot be written to.
    """
    try:
        files.require_writable(path)
    except OSError as error:
        raise InputError(f"{option} {error}") from None


@contextmanager
def whole_directory(destination: Path) -> Iterator[Path]:
    """Write several files to a directory, all of them or none.

    Args:
        destination: Path of the directory; it is created if it does not exist. Other files in it stay.

    Yields:
        Path of the directory ``.part`` in it, whose files are moved into it at the end of the block. What a killed run
        left there is removed first.

    Raises:
        OSError: A file cannot be written; the message names its path in ``destination``.
    """
    absolute = destination.absolute()
    created = [path for path in (absolute, *absolute.parents) if not path.exists()]
    destination.mkdir(parents=True, exist_ok=True)
    try:
        with files.private_directory(destination / ".part") as temporary:
            yield temporary
            paths = sorted(temporary.iterdir())
            for path in paths:
                files.require_file_place(destination / path.name)
            for path in paths:
                files.move_into_place(path, destination / path.name)
        created = []
    except OSError as error:
        raise OSError(str(error).replace(str(destination / ".part"), str(destination))) from error
    finally:
        for path in created:
            path.rmdir()
