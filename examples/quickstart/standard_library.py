"""The standard library of the running Python as documents, and the quick start's split into train, valid and test.

    python -m examples.quickstart.standard_library --destdir DIR [--text FILE-OR-DIRECTORY]

writes DIR/train.jsonl, DIR/valid.jsonl and DIR/test.jsonl, one document a line (``name``, ``text``). With --text, the
documents are read from there instead. The split depends on the lengths of the documents only: of the long ones, longest
first, every third is held out, for test or (every ninth) for valid; all others are for training. Fewer than nine
documents are cut instead: 70 % of each for training, 10 % for valid and the end for test. With --test-characters N, the
longest documents of the test split are kept, up to N characters.
"""

import argparse
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

from longmem_fairseq.files import write_text
from preprocess.documents import iter_documents
from preprocess.errors import InputError

# Tests and their data, installed packages, programs rather than library, and modules that are tables.
LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "idle_test",
    "lib2to3",
    "lib-dynload",
    "msilib",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
LONG, SHORT = 50_000, 400  # characters

NamedText = Tuple[str, str]


def standard_library() -> Iterator[NamedText]:
    """Yield the name and text of each module, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8")
            if len(text) >= SHORT:
                yield str(name), text


def split(documents: Sequence[NamedText]) -> Dict[str, List[NamedText]]:
    """Split documents into train, valid and test by their lengths.

    Args:
        documents: Name and text of each document.

    Returns:
        The documents, or parts of them, of ``train``, ``valid`` and ``test``.
    """
    splits: Dict[str, List[NamedText]] = {"train": [], "valid": [], "test": []}
    if len(documents) < 9:
        for name, text in documents:
            first, second = (line_end(text, len(text) * share // 10) for share in (7, 8))
            for part, piece in zip(splits, (text[:first], text[first:second], text[second:])):
                if piece:
                    splits[part].append((name, piece))
        return splits
    by_length = sorted(documents, key=lambda d: (-len(d[1]), d[0]))
    long = [d for d in by_length if len(d[1]) >= LONG]
    if len(long) < 9:
        long = by_length[: max(9, len(documents) // 3)]
    held_out = {long[rank][0]: "valid" if rank % 9 == 6 else "test" for rank in range(0, len(long), 3)}
    for name, text in documents:
        splits[held_out.get(name, "train")].append((name, text))
    return splits


def longest(documents: Sequence[NamedText], characters: int) -> List[NamedText]:
    """Keep the longest documents that together have at most a number of characters, and at least one.

    Args:
        documents: Name and text of each document.
        characters: Largest number of characters.

    Returns:
        The kept documents, the longest first.
    """
    kept: List[NamedText] = []
    for document in sorted(documents, key=lambda d: (-len(d[1]), d[0])):
        if not kept or sum(len(text) for _, text in kept) + len(document[1]) <= characters:
            kept.append(document)
    return kept


def line_end(text: str, at: int) -> int:
    """Return the index behind the line that contains character ``at``."""
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.standard_library", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--destdir", required=True, help="directory of the three files")
    parser.add_argument("--text", help="a text file, a directory of text files, or JSON lines")
    parser.add_argument("--test-characters", type=int, help="largest number of characters in the test split")
    args = parser.parse_args()
    try:
        documents = [(d.name, d.text) for d in iter_documents([args.text])] if args.text else list(standard_library())
    except (OSError, InputError) as error:
        sys.exit(f"standard_library.py: {error}")
    os.makedirs(args.destdir, exist_ok=True)
    for name, part in split(documents).items():
        if name == "test" and args.test_characters is not None:
            part = longest(part, args.test_characters)
        if not part:
            sys.exit(f"standard_library.py: {args.text} is too little text: nothing is left for {name}")
        lines = [json.dumps({"name": document, "text": text}) + "\n" for document, text in part]
        write_text(os.path.join(args.destdir, f"{name}.jsonl"), "".join(lines))
        print(f"{name}: {len(part)} documents, {sum(len(text) for _, text in part):,} characters")


if __name__ == "__main__":
    main()
