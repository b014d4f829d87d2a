"""Builds the text on which the example backbone is pretrained: source of permissively licensed packages, and books.

    python examples/pretrained/make_corpus.py --destdir data/corpus --extra-text books/

writes ``train.jsonl`` and ``valid.jsonl`` (one document a line: ``name``, ``text`` and its subset, ``code`` or ``text``
where preprocess/binarize_documents.py looks for it) and ``CORPUS.md`` (what went in, under which licence). The packages
are pinned in ``corpus_packages.txt``. No file of the standard library enters, nor any that shares more than a few lines
with it, so the standard library stays unseen. The same pins, texts, seed and Python give the same files.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

from corpus_filters import MAX_STDLIB_SHARE, MIN_CHARS, RUN, Filters, Licence
from tqdm import tqdm

PACKAGES = Path(__file__).with_name("corpus_packages.txt")
PLATFORMS = (
    "manylinux2014_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_28_x86_64",
)
_TEST_PATH = re.compile(r"(^|/)(tests?|testing)/|(^|/)(test_[^/]*|[^/]*_tests?|conftest)\.py$")


def unit(seed, name):
    """A number in (0, 1) that depends on ``seed`` and ``name`` only."""
    return (int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:8], "big") + 0.5) / 2**64


def read_pins(path):
    """``(name, version, held_out)`` of each package of a pin file."""
    pins = re.findall(r"^([\w.-]+)==(\S+) --hash=\S+[ \t]*(# valid)?$", path.read_text(), re.MULTILINE)
    if not pins:
        raise ValueError(f"{path} pins no package; a line is 'name==version --hash=sha256:digest'")
    return [(name, version, bool(valid)) for name, version, valid in pins]


def download(path, folder):
    """Fetches the wheels pinned in ``path`` into ``folder`` (those already there are kept if their digest is right)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--python-version", "3.11", "--implementation", "cp", "--disable-pip-version-check", "--quiet"]
    command += [word for tag in ("cp311", "abi3", "none") for word in ("--abi", tag)]
    command += [word for tag in PLATFORMS for word in ("--platform", tag)]
    status = subprocess.run([*command, "--dest", str(folder), "--requirement", str(path)], check=False).returncode
    if status:
        raise OSError(
            f"pip could not download the packages pinned in {path.name} (exit status {status}); see above why"
        )


def wheel_path(folder, name, version):
    """The downloaded wheel of one package."""
    stem = re.sub(r"[-_.]+", "_", name)
    found = sorted(folder.glob(f"{stem}-{version}-*.whl"))
    if not found:
        raise FileNotFoundError(f"{folder} has no wheel of {name} {version}: run without --no-download")
    return found[0]


def water_level(sizes, budget):
    """The cap at which ``sum(min(size, cap)) == budget``; the largest size where everything fits."""
    left = budget
    for i, size in enumerate(sorted(sizes)):
        if size * (len(sizes) - i) > left:
            return left / (len(sizes) - i)
        left -= size
    return max(sizes, default=0)


def draw(files, cap, test_share, seed):
    """Names of files of one package up to ``cap`` characters, of them at most ``test_share`` tests; long files first.

    The order is that of weighted sampling without replacement: an exponential clock for each file, its rate the length.
    """
    order = sorted(files, key=lambda name: -math.log(unit(seed, name)) / len(files[name]))
    drawn, size, tests = [], 0, 0
    for name in order:
        length, is_test = len(files[name]), bool(_TEST_PATH.search(name))
        if size + length > cap or (is_test and tests + length > test_share * cap):
            continue
        drawn.append(name)
        size += length
        tests += length * is_test
    return drawn


def draw_all(packages, budget, test_share, seed):
    """The same cap for every package, so that no package dominates; documents as a name -> text dictionary."""
    sizes = []
    for files in packages.values():
        tests = sum(len(t) for name, t in files.items() if _TEST_PATH.search(name))
        code = sum(map(len, files.values())) - tests
        sizes.append(code + min(tests, code * test_share / (1 - test_share)))  # what draw() can give
    cap = water_level(sizes, budget)
    return {name: files[name] for files in packages.values() for name in draw(files, cap, test_share, seed)}


def split_texts(paths, train_budget, valid_budget, seed):
    """Plain text documents, name -> text: ``(train, valid)``.

    The one whose length is nearest to the budget is held out; others are taken whole as long as they fit in theirs.
    """
    files = sorted(q for p in paths for q in (p.rglob("*.txt") if p.is_dir() else [p]))
    if paths and not files:
        raise FileNotFoundError(f"--extra-text {paths[0]} holds no .txt file")
    texts = {}
    for path in files:
        name = f"text/{path.name}"
        if name in texts:
            raise ValueError(f"--extra-text gives {path.name} twice ({path} is the second): rename one of them")
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--extra-text {path} is not UTF-8 text (byte {error.start}): convert or remove it"
            ) from None
    order = sorted(texts, key=lambda name: unit(seed, name))
    valid = {}
    if valid_budget and len(texts) > 1:
        name = min(order, key=lambda n: abs(len(texts[n]) - valid_budget))
        valid[name] = texts[name]
    train, size = {}, 0
    for name in order:
        if name not in valid and size + len(texts[name]) <= train_budget:
            train[name] = texts[name]
            size += len(texts[name])
    return train, valid


def write_jsonl(path, documents, seed):
    """One document a line, in an order that depends on ``seed`` and the names only."""
    with open(f"{path}.part", "w", encoding="utf-8", newline="\n") as out:
        order = sorted(documents, key=lambda n: unit(f"order{seed}", n))
        for name in tqdm(order, desc=path.name, unit="document"):
            subset = "text" if name.startswith("text/") else "code"
            record = {"name": name, "meta": {"pile_set_name": subset}, "text": documents[name]}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(f"{path}.part", path)


def report(rows, splits, filters):
    """The text of CORPUS.md."""
    lines = ["# The pretraining corpus", "", "| package | version | licence | split | files | characters |"]
    lines += ["| --- | --- | --- | --- | ---: | ---: |"]
    for name, version, licence, held_out in rows:
        docs = [t for split in splits for d, t in splits[split].items() if d.startswith(f"{name}/")]
        split = "valid" if held_out else "train"
        lines.append(f"| {name} | {version} | {licence} | {split} | {len(docs)} | {sum(map(len, docs)):,} |")
    lines += [
        "",
        "| split | code files | code characters | plain texts | their characters |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for split, documents in splits.items():
        text = [len(t) for n, t in documents.items() if n.startswith("text/")]
        code = [len(t) for n, t in documents.items() if not n.startswith("text/")]
        lines.append(f"| {split} | {len(code):,} | {sum(code):,} | {len(text)} | {sum(text):,} |")
    lines += [
        "",
        f"Files of the packages that were dropped, compared with {filters.stdlib_files:,} files of the standard",
    ]
    lines += [
        f"library of Python {sys.version.split()[0]} (limits: {MAX_STDLIB_SHARE:.0%} of a file's distinct longer lines,"
    ]
    lines += [f"no run of {RUN[0]} lines and {RUN[1]} characters in common):", ""]
    lines += ["| reason | files |", "| --- | ---: |"]
    lines += [f"| {reason} | {count:,} |" for reason, count in sorted(filters.dropped.items())]
    return "\n".join(lines) + "\n"


def build(args):
    """Downloads, filters, draws and writes; see the options."""
    args.destdir.mkdir(parents=True, exist_ok=True)
    wheels = args.wheels or args.destdir / "wheels"
    pins = read_pins(PACKAGES)
    if not args.no_download:
        download(PACKAGES, wheels)
    filters, packages, rows = Filters(), {False: {}, True: {}}, []
    # Held-out packages come first, so that a training file that repeats one of theirs is the one that is dropped.
    for name, version, held_out in tqdm(sorted(pins, key=lambda p: (not p[2], p[0])), desc="packages", unit="package"):
        with zipfile.ZipFile(wheel_path(wheels, name, version)) as wheel:
            rows.append((name, version, ", ".join(Licence(wheel).names), held_out))
            files = packages[held_out][name] = {}
            members = sorted(
                n for n in wheel.namelist() if n.endswith(".py") and wheel.getinfo(n).file_size >= MIN_CHARS
            )
            for member in tqdm(members, desc=name, unit="file", leave=False):
                text = filters.accept(wheel.read(member))
                if text is not None:
                    files[f"{name}/{member}"] = text
    share = args.extra_share if args.extra_text else 0.0
    train_text, valid_text = split_texts(args.extra_text, share * args.train_chars, share * args.valid_chars, args.seed)
    splits = {
        "train": draw_all(packages[False], args.train_chars * (1 - share), args.test_share, args.seed) | train_text,
        "valid": draw_all(packages[True], args.valid_chars * (1 - share), args.test_share, args.seed) | valid_text,
    }
    for split, documents in splits.items():
        write_jsonl(args.destdir / f"{split}.jsonl", documents, args.seed)
    text = report(sorted(rows), splits, filters)
    (args.destdir / "CORPUS.md.part").write_text(text, encoding="utf-8")
    os.replace(args.destdir / "CORPUS.md.part", args.destdir / "CORPUS.md")
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--destdir", type=Path, required=True, metavar="DIR", help="where the corpus is written")
    parser.add_argument(
        "--extra-text",
        type=Path,
        nargs="*",
        default=[],
        metavar="PATH",
        help="plain text documents (.txt files, or folders of them) to mix in",
    )
    parser.add_argument(
        "--extra-share",
        type=float,
        default=0.25,
        metavar="X",
        help="the characters' largest share from --extra-text (default: %(default)s)",
    )
    parser.add_argument("--train-chars", type=int, default=130_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--valid-chars", type=int, default=1_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--test-share",
        type=float,
        default=0.25,
        metavar="X",
        help="at most this share of a package's code is tests (default: %(default)s)",
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="download folder (default: DESTDIR/wheels)")
    parser.add_argument("--no-download", action="store_true", help="take the wheels that lie in --wheels")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    for name in ("extra_share", "test_share"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not in [0, 1)")
    for name in ("train_chars", "valid_chars"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is smaller than 1")
    for path in args.extra_text:
        if not path.exists():
            parser.error(f"--extra-text {path} does not exist")
    try:
        build(args)
    except (ValueError, OSError) as error:
        sys.exit(f"make_corpus.py: {error}")


if __name__ == "__main__":
    main()
