"""Files that are written whole or not at all, JSON that is read without surprises, and names that can be printed."""

import errno
import fcntl
import json
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, Union

PathLike = Union[str, "os.PathLike[str]"]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def printable(name: PathLike) -> str:
    r"""Spell a name so that it can be encoded in UTF-8.

    A file name that is not UTF-8, or half of a surrogate pair in JSON, reaches Python as a lone surrogate, which cannot
    be encoded. It is spelled ``\udcff`` here and in every file that this module writes; in JSON that is the same name.

    Args:
        name: Name, or any other text.
    """
    return os.fspath(name).encode("utf-8", "backslashreplace").decode("utf-8")


def require_file_place(path: PathLike) -> None:
    """Refuse a path where only something other than a regular file is; a file or nothing may be there.

    Args:
        path: Path of a file to write; a symbolic link stands for what it points to.

    Raises:
        OSError: There is a directory, a device, a named pipe or a socket.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    if kind != stat.S_IFREG:
        raise OSError(f"{os.fspath(path)} is {_KINDS.get(kind, 'not a file')}, not a regular file: name another path")


def require_writable(path: PathLike) -> None:
    """Refuse a path at which :func:`write_whole` will fail, before any work is done for its content.

    Args:
        path: Path of the file to write.

    Raises:
        OSError: Something other than a file is there, or its directory is missing or cannot be written.
    """
    require_file_place(path)
    directory = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(directory):
        raise OSError(f"{os.fspath(path)} cannot be written: the directory {directory} does not exist")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise OSError(f"{os.fspath(path)} cannot be written: the directory {directory} is read-only")


def write_whole(path: PathLike, write: Callable[[str], Any]) -> None:
    """Let a function write a file in a directory beside its place, then move it there in one step.

    What was at ``path`` before stays until then. The file gets the mode of the one that it replaces, otherwise that of
    any new file; through a symbolic link, the file that it points to is replaced. The directory is ``path`` with
    ``.part``, and only this user can read it. It is removed when the function fails or is interrupted; that of a killed
    process is removed when ``path`` is next written. Processes that write the same file wait for each other.

    Args:
        path: Path of the file to write.
        write: Function that writes the whole file to the path it is called with, which has the name of the file. What
            else it leaves in that file's directory is removed.

    Raises:
        OSError: The file cannot be written; the message names ``path``.
    """
    require_file_place(path)
    target = Path(os.path.realpath(path))
    try:
        with private_directory(target.with_name(f"{target.name}.part")) as directory:
            unfinished = directory / target.name
            write(str(unfinished))
            move_into_place(unfinished, target)
    except OSError as error:
        raise OSError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error


def move_into_place(source: PathLike, path: PathLike) -> None:
    """Replace a file by another one on the same disk in one step, with the mode of the file that is replaced.

    Args:
        source: Path of the new file.
        path: Path of the file to replace, or of none; through a symbolic link, the file that it points to is replaced.

    Raises:
        OSError: Something other than a file is at ``path``, or it cannot be replaced.
    """
    require_file_place(path)
    target = os.path.realpath(path)
    os.chmod(source, os.stat(target).st_mode & 0o777 if os.path.exists(target) else _default_mode())
    os.replace(source, target)


def write_text(path: PathLike, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all, with the newlines that the text has.

    Args:
        path: Path of the file to write.
        text: Content of the file; lone surrogates are spelled as :func:`printable` does.

    Raises:
        OSError: The file cannot be written; the message names ``path``.
    """

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
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


def parse_json(text: Union[str, bytes]) -> Any:
    """Parse JSON that anyone may have written.

    Args:
        text: JSON, as text or in UTF-8.

    Raises:
        ValueError: It is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: PathLike) -> Any:
    """Read a JSON file.

    Args:
        path: Path of the file.

    Raises:
        ValueError: It is not JSON; the message is the reason alone.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        return parse_json(file.read())


def remove_tree(path: PathLike) -> None:
    """Remove a file or a directory with all that is in it; of a symbolic link, the link alone.

    Args:
        path: Path of the file, directory or link.

    Raises:
        OSError: Something cannot be removed.
    """
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


@contextmanager
def private_directory(directory: Path) -> Iterator[Path]:
    """Make an empty directory that no other process uses, and remove it at the end.

    Args:
        directory: Path of the directory. One that a killed process left there is emptied and taken over; another
            process's is waited for.

    Yields:
        The path.

    Raises:
        OSError: The directory cannot be made.
    """
    handle = _lock(directory)
    try:
        for entry in directory.iterdir():
            remove_tree(entry)
        yield directory
    finally:
        try:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(handle)


def _lock(directory: Path) -> int:
    """Make a directory if it does not exist, and wait until no other process has it; return its file descriptor."""
    while True:
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        try:
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process has just removed it
            continue
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise OSError(f"{directory} is in the way: remove it") from error
            raise
        with suppress(OSError):  # not every network file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(directory)):
                return handle
        os.close(handle)


def _default_mode() -> int:
    """Return the mode that the process gives new files."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
