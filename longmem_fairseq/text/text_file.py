"""Text files as the commands and examples read them."""

import sys


def read_text(path: str) -> str:
    """Read a UTF-8 text.

    Args:
        path: Path of the file, or ``-`` for standard input.

    Returns:
        The text.

    Raises:
        ValueError: The file is not UTF-8.
        OSError: The file cannot be read.
    """
    if path == "-":
        data = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            data = file.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error
