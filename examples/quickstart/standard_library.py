"""The modules of the running Python's standard library as documents, split into train, valid and test.

    python examples/quickstart/standard_library.py --destdir DIR

writes DIR/train.jsonl, DIR/valid.jsonl and DIR/test.jsonl, one module a line (``name``, ``text``). The split depends
on nothing but the modules: of those of at least 40,000 characters, longest first, every third is held out, for test
or (every ninth) for valid; all others are for training.
"""

import argparse
import json
import os
import sysconfig
from pathlib import Path

# Tests and their data, installed packages, programs rather than library, and modules that are tables.
LEFT_OUT = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "idle_test", "lib2to3", "lib-dynload",
    "msilib", "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}
LONG, SHORT = 40_000, 400  # characters


def modules():
    """(name, text) of each module, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a module in another encoding: there are one or two, old tests of that very thing
            if len(text) >= SHORT:
                yield str(name), text


def split(documents):
    """{"train": [...], "valid": [...], "test": [...]} of (name, text)."""
    splits = {"train": [], "valid": [], "test": []}
    long = sorted((d for d in documents if len(d[1]) >= LONG), key=lambda d: (-len(d[1]), d[0]))
    splits["train"] += [d for d in documents if len(d[1]) < LONG]
    for rank, document in enumerate(long):
        held_out = "valid" if rank % 9 == 6 else "test"
        splits["train" if rank % 3 else held_out].append(document)
    return splits


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--destdir", required=True)
    args = parser.parse_args()
    os.makedirs(args.destdir, exist_ok=True)
    for name, documents in split(list(modules())).items():
        path = os.path.join(args.destdir, f"{name}.jsonl")
        with open(path + ".part", "w", encoding="utf-8") as file:
            for document, text in documents:
                file.write(json.dumps({"name": document, "text": text}) + "\n")
        os.replace(path + ".part", path)
        print(f"{name}: {len(documents)} modules, {sum(len(text) for _, text in documents):,} characters")


if __name__ == "__main__":
    main()
