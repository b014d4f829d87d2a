"""What a source file must pass to enter the pretraining corpus, and the licences a package may have."""

import email
import re
import sys
import sysconfig
import tokenize
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

from tqdm import tqdm

MIN_CHARS = 1500  # shorter files are mostly imports and re-exports
LONG_LINE = 30  # characters, stripped: lines as long as this tell one file from another
MAX_STDLIB_SHARE = 0.08  # of a file's distinct long lines
RUN = 6, 120  # so many consecutive lines, of so many characters together, are taken over from the standard library
MAX_REPEATED_SHARE = 0.6  # of a file's distinct long lines, seen in files kept before it

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
# A file under other terms than its package's says so in one of these ways.
_FOREIGN_LICENCE = re.compile(
    r"GNU\s+(?:\w+\s+)?General\s+Public|\b[AL]?GPL(?:v?[23])?\b|Mozilla\s+Public|\bMPL.?2|CC.BY.(?:SA|NC)"
)
_GENERATED = re.compile(r"auto(?:matically|-)?\s*generated|do not edit|generated (?:by|from)\b", re.IGNORECASE)
_DATA_LINE = re.compile(r"""[(\[{]*[ubr]{0,2}(['"]).*\1[)\]}]*,?|[-+0-9.,xXeEjJLa-fA-F\s()\[\]{}:]+""")


class Licence:
    """The licence of a wheel, read from its metadata; where that names none, from its licence file.

    Attributes:
        names: the permissive licences found, e.g. ``["BSD"]``.

    Raises:
        ValueError: a licence that is not permissive, or none that is known.
    """

    def __init__(self, wheel):
        """wheel: an open ``zipfile.ZipFile``."""
        info = [name for name in wheel.namelist() if ".dist-info/" in name]
        metadata = email.message_from_bytes(
            wheel.read(next(n for n in info if n.count("/") == 1 and n.endswith("/METADATA")))
        )
        stated = [str(metadata.get("License-Expression") or metadata.get("License") or "")[:200]]
        stated += [c for c in metadata.get_all("Classifier", []) if c.startswith("License")]
        stated = "\n".join(stated)
        if _REFUSED.search(stated):
            raise ValueError(
                f"{wheel.filename} is under '{stated.strip()}', which is not permissive: take it off the list"
            )
        self.names = [name for name, pattern in _LICENCE_NAMES.items() if re.search(pattern, stated)]
        if not self.names:
            files = [n for n in info if re.search(r"/(licen[cs]e|copying)[^/]*$", n, re.IGNORECASE)]
            text = "\n".join(wheel.read(n).decode("utf-8", "replace") for n in files)
            self.names = [name for name, pattern in _LICENCE_TEXTS.items() if re.search(pattern, text)]
            if not self.names or re.search(r"GNU\s+(?:\w+\s+)?General\s+Public", text):
                raise ValueError(f"{wheel.filename} names no known permissive licence: take it off the list")


def decode(data):
    """Source bytes as text with Unix line ends, or None where they are not text in the encoding they declare."""
    try:
        encoding, _ = tokenize.detect_encoding(BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return None if "\0" in text else text


def long_lines(text):
    """The distinct stripped lines of at least ``LONG_LINE`` characters, as 8-byte digests."""
    stripped = {line.strip() for line in text.split("\n")}
    return {blake2b(line.encode(), digest_size=8).digest() for line in stripped if len(line) >= LONG_LINE}


def line_runs(text):
    """The runs of consecutive stripped non-blank lines that ``RUN`` describes, as 8-byte digests."""
    count, chars = RUN
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    runs = ("\n".join(lines[i : i + count]) for i in range(len(lines) - count + 1))
    return {blake2b(run.encode(), digest_size=8).digest() for run in runs if len(run) >= chars + count - 1}


def is_data(text):
    """True for tables and generated files: very long lines, mostly digits, escapes, quoted items or non-ASCII."""
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
    """Decides file by file, in order, and counts the reasons.

    Attributes:
        dropped: reason -> number of files.
        stdlib_files: number of files of the running Python's standard library that were read.
    """

    def __init__(self):
        root = Path(sysconfig.get_path("stdlib"))
        paths = sorted(
            p for p in root.rglob("*.py") if "site-packages" not in p.parts and "dist-packages" not in p.parts
        )
        if len(paths) < 500:
            raise FileNotFoundError(
                f"{root} holds {len(paths)} files of the standard library, too few to tell its code by: "
                "run a Python that is installed with its sources"
            )
        self._stdlib, self._stdlib_runs = set(), set()
        for path in tqdm(paths, desc=f"Python {sys.version_info.major}.{sys.version_info.minor} stdlib", unit="file"):
            text = decode(path.read_bytes())
            if text is not None:
                self._stdlib |= long_lines(text)
                self._stdlib_runs |= line_runs(text)
        self.stdlib_files = len(paths)
        self._kept = set()
        self.dropped = {}

    def _drop(self, reason):
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def accept(self, data):
        """The text of the source file ``data`` (bytes), or None where it is dropped."""
        text = decode(data)
        if text is None:
            return self._drop("not text")
        if len(text) < MIN_CHARS:
            return self._drop(f"under {MIN_CHARS} characters")
        if _FOREIGN_LICENCE.search(text):
            return self._drop("names another licence")
        if is_data(text):
            return self._drop("generated or data")
        lines = long_lines(text)
        if not lines:
            return self._drop("generated or data")
        if len(lines & self._stdlib) > MAX_STDLIB_SHARE * len(lines):
            return self._drop("overlaps with the standard library")
        if not self._stdlib_runs.isdisjoint(line_runs(text)):
            return self._drop("has a run of lines of the standard library")
        if len(lines & self._kept) > MAX_REPEATED_SHARE * len(lines):
            return self._drop("repeats files kept before")
        self._kept |= lines
        return text
