"""Filters that decide which source files enter the pretraining corpus, and the licenses that a package may have."""

import email
import re
import sys
import sysconfig
import tokenize
import zipfile
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Dict, Optional, Set

from tqdm import tqdm

MIN_CHARS = 1500  # shorter files are mostly imports and re-exports
LONG_LINE = 30  # characters, stripped; shorter lines occur in many unrelated files
MAX_STDLIB_SHARE = 0.08  # of a file's distinct long lines
RUN = 6, 120  # this many consecutive lines with this many characters in total count as copied
MAX_REPEATED_SHARE = 0.6  # of a file's distinct long lines that occur in files kept before it

_LICENCE_NAMES = {
    "MIT": r"\bMIT\b",
    "BSD": r"\bBSD\b|0BSD",
    "Apache-2.0": r"\bApache\b",
    "PSF": r"\bPSF\b|Python Software Foundation|License agreement for matplotlib",
    "Zlib": r"\bZlib\b",
    "CC0-1.0": r"\bCC0\b",
}
_LICENCE_TEXTS = {
    "BSD": r"Redistribution and use in source and binary forms",
    "MIT": r"Permission is hereby granted, free of charge",
    "Apache-2.0": r"Apache License",
}
_REFUSED = re.compile(r"\b[AL]?GPL|GNU |Mozilla|\bMPL|\bEPL|Eclipse|\bCC.BY", re.IGNORECASE)
# A file under other terms than its package states them in one of these ways.
_FOREIGN_LICENCE = re.compile(
    r"GNU\s+(?:\w+\s+)?General\s+Public|\b[AL]?GPL(?:v?[23])?\b|Mozilla\s+Public|\bMPL.?2|CC.BY.(?:SA|NC)"
)
_GENERATED = re.compile(r"auto(?:matically|-)?\s*generated|do not edit|generated (?:by|from)\b", re.IGNORECASE)
_DATA_LINE = re.compile(r"""[(\[{]*[ubr]{0,2}(['"]).*\1[)\]}]*,?|[-+0-9.,xXeEjJLa-fA-F\s()\[\]{}:]+""")


class License:
    """The license of a wheel, read from its metadata or, if they name no known one, from its license file.

    Args:
        wheel: The open wheel.

    Attributes:
        names: Names of the permissive licenses, such as ``["BSD"]``.

    Raises:
        ValueError: The license is not permissive, or not known.
    """

    def __init__(self, wheel: zipfile.ZipFile):
        info = [name for name in wheel.namelist() if ".dist-info/" in name]
        metadata = email.message_from_bytes(
            wheel.read(next(n for n in info if n.count("/") == 1 and n.endswith("/METADATA")))
        )
        stated = [str(metadata.get("License-Expression") or metadata.get("License") or "")[:200]]
        stated += [c for c in metadata.get_all("Classifier", []) if c.startswith("License")]
        stated = "\n".join(stated)
        if _REFUSED.search(stated):
            raise ValueError(
                f"{wheel.filename} is under '{stated.strip()}', which is not permissive: remove it from the list"
            )
        self.names = [name for name, pattern in _LICENCE_NAMES.items() if re.search(pattern, stated)]
        if not self.names:
            files = [n for n in info if re.search(r"/(licen[cs]e|copying)[^/]*$", n, re.IGNORECASE)]
            text = "\n".join(wheel.read(n).decode("utf-8", "replace") for n in files)
            self.names = [name for name, pattern in _LICENCE_TEXTS.items() if re.search(pattern, text)]
            if not self.names or re.search(r"GNU\s+(?:\w+\s+)?General\s+Public", text):
                raise ValueError(f"{wheel.filename} names no known permissive license: remove it from the list")


def decode(data: bytes) -> Optional[str]:
    """Decode the bytes of a source file to text with Unix line ends; None if they are not text in their encoding."""
    try:
        encoding, _ = tokenize.detect_encoding(BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return None if "\0" in text else text


def long_lines(text: str) -> Set[bytes]:
    """Return 8-byte digests of the distinct stripped lines of at least ``LONG_LINE`` characters."""
    stripped = {line.strip() for line in text.split("\n")}
    return {blake2b(line.encode(), digest_size=8).digest() for line in stripped if len(line) >= LONG_LINE}


def line_runs(text: str) -> Set[bytes]:
    """Return 8-byte digests of the runs of consecutive stripped non-blank lines that ``RUN`` describes."""
    count, chars = RUN
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    runs = ("\n".join(lines[i : i + count]) for i in range(len(lines) - count + 1))
    return {blake2b(run.encode(), digest_size=8).digest() for run in runs if len(run) >= chars + count - 1}


def is_data(text: str) -> bool:
    """Detect tables and generated files: very long lines, mostly digits, escapes, quoted items or non-ASCII."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines or max(map(len, lines)) > 2000 or sum(map(len, lines)) / len(lines) > 110:
        return True
    size = sum(map(len, lines))
    if sum(text.count(d) for d in "0123456789") > 0.2 * size or text.count("\\") > 0.04 * size:
        return True
    if len(text.encode()) - len(text) > 0.1 * size:
        return True
    if _GENERATED.search(text[:600]):
        return True
    return sum(bool(_DATA_LINE.fullmatch(line)) for line in lines) > 0.5 * len(lines)


class Filters:
    """Filters that decide file by file, in order, and count the reasons for dropping files.

    Attributes:
        dropped: Number of dropped files by reason.
        stdlib_files: Number of files of the running Python's standard library that were read.

    Raises:
        FileNotFoundError: The sources of the standard library are not installed.
    """

    def __init__(self):
        root = Path(sysconfig.get_path("stdlib"))
        paths = sorted(
            p for p in root.rglob("*.py") if "site-packages" not in p.parts and "dist-packages" not in p.parts
        )
        if len(paths) < 500:
            raise FileNotFoundError(
                f"{root} holds {len(paths)} files of the standard library, fewer than 500: run a Python that is "
                "installed with its sources"
            )
        self._stdlib: Set[bytes] = set()
        self._stdlib_runs: Set[bytes] = set()
        for path in tqdm(paths, desc=f"Python {sys.version_info.major}.{sys.version_info.minor} stdlib", unit="file"):
            text = decode(path.read_bytes())
            if text is not None:
                self._stdlib |= long_lines(text)
                self._stdlib_runs |= line_runs(text)
        self.stdlib_files = len(paths)
        self._kept: Set[bytes] = set()
        self.dropped: Dict[str, int] = {}

    def accept(self, data: bytes) -> Optional[str]:
        """Decide about the next file.

        Args:
            data: Content of the source file.

        Returns:
            The text of the file, or None if the file is dropped.
        """
        text = decode(data)
        reason = self._reason_to_drop(text)
        if reason:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
            return None
        self._kept |= long_lines(text)
        return text

    def _reason_to_drop(self, text: Optional[str]) -> Optional[str]:
        if text is None:
            return "not text"
        if len(text) < MIN_CHARS:
            return f"under {MIN_CHARS} characters"
        if _FOREIGN_LICENCE.search(text):
            return "names another license"
        if is_data(text):
            return "generated or data"
        lines = long_lines(text)
        if not lines:
            return "generated or data"
        if len(lines & self._stdlib) > MAX_STDLIB_SHARE * len(lines):
            return "overlaps with the standard library"
        if not self._stdlib_runs.isdisjoint(line_runs(text)):
            return "has a run of lines of the standard library"
        if len(lines & self._kept) > MAX_REPEATED_SHARE * len(lines):
            return "repeats files kept before"
        return None
