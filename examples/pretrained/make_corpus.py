"""Build the text on which the example backbone is pretrained: source of permissively licensed packages, and books.

    python -m examples.pretrained.make_corpus --destdir data/corpus --extra-text books/

writes ``train.jsonl`` and ``valid.jsonl`` (one document a line: ``name``, ``text``, and the subset ``code`` or ``text``
where preprocess/binarize_documents.py expects it) and ``CORPUS.md`` (packages, licenses and sizes). The packages are
pinned in ``corpus_packages.txt``. Files of the standard library, and files that share more than a few lines with it,
are left out, so that the standard library stays unseen. The same pins, texts, seed and Python give the same files.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from tqdm import tqdm

from examples.pretrained.corpus_filters import MAX_STDLIB_SHARE, MIN_CHARS, RUN, Filters, License
from longmem_fairseq.files import write_text, write_whole

PACKAGES = Path(__file__).with_name("corpus_packages.txt")
PLATFORMS = (
    "manylinux2014_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_28_x86_64",
)
_TEST_PATH = re.compile(r"(^|/)(tests?|testing)/|(^|/)(test_[^/]*|[^/]*_tests?|conftest)\.py$")


def unit(seed: object, name: str) -> float:
    """Return a number in (0, 1) that depends on ``seed`` and ``name`` only."""
    return (int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:8], "big") + 0.5) / 2**64


def read_pins(path: Path) -> List[Tuple[str, str, bool]]:
    """Read a pin file.

    Args:
        path: Path of the pin file.

    Returns:
        Name and version of each package, and whether it is held out for the valid split.

    Raises:
        ValueError: The file pins no package.
    """
    pins = re.findall(r"^([\w.-]+)==(\S+) --hash=\S+[ \t]*(# valid)?$", path.read_text(), re.MULTILINE)
    if not pins:
        raise ValueError(f"{path} pins no package; a line is 'name==version --hash=sha256:digest'")
    return [(name, version, bool(valid)) for name, version, valid in pins]


def download(path: Path, folder: Path) -> None:
    """Download the pinned wheels; existing ones with the right digest are kept.

    Args:
        path: Path of the pin file.
        folder: Directory of the wheels.

    Raises:
        OSError: The download failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--python-version", "3.11", "--implementation", "cp", "--disable-pip-version-check", "--quiet"]
    command += [word for tag in ("cp311", "abi3", "none") for word in ("--abi", tag)]
    command += [word for tag in PLATFORMS for word in ("--platform", tag)]
    status = subprocess.run([*command, "--dest", str(folder), "--requirement", str(path)], check=False).returncode
    if status:
        raise OSError(
            f"pip could not download the packages pinned in {path.name} (exit status {status}): see its message above"
        )


def wheel_path(folder: Path, name: str, version: str) -> Path:
    """Return the path of the downloaded wheel of one package.

    Raises:
        FileNotFoundError: The folder has no such wheel.
    """
    stem = re.sub(r"[-_.]+", "_", name)
    wheels = sorted(folder.glob(f"{stem}-{version}-*.whl"))
    if not wheels:
        raise FileNotFoundError(f"{folder} has no wheel of {name} {version}: run without --no-download")
    return wheels[0]


def water_level(sizes: Sequence[float], budget: float) -> float:
    """Return the cap at which ``sum(min(size, cap)) == budget``; the largest size if everything fits."""
    left = budget
    for i, size in enumerate(sorted(sizes)):
        if size * (len(sizes) - i) > left:
            return left / (len(sizes) - i)
        left -= size
    return max(sizes, default=0)


def draw(files: Dict[str, str], cap: float, test_share: float, seed: int) -> List[str]:
    """Draw files of one package, long files more often, until the cap is reached.

    The order is that of weighted sampling without replacement: an exponential clock for each file, its rate the length.

    Args:
        files: Text of each file, by name.
        cap: Largest number of characters to draw.
        test_share: Largest share of ``cap`` that tests may take.
        seed: Seed of the draw.

    Returns:
        Names of the drawn files.
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


def draw_all(packages: Dict[str, Dict[str, str]], budget: float, test_share: float, seed: int) -> Dict[str, str]:
    """Draw files of all packages with one cap for all, so that no package dominates.

    Args:
        packages: Files of each package, by its name.
        budget: Number of characters to draw in total.
        test_share: Largest share of a package's code that tests may take.
        seed: Seed of the draw.

    Returns:
        Text of each drawn document, by name.
    """
    sizes = []
    for files in packages.values():
        tests = sum(len(t) for name, t in files.items() if _TEST_PATH.search(name))
        code = sum(map(len, files.values())) - tests
        sizes.append(code + min(tests, code * test_share / (1 - test_share)))  # the most that draw() can take
    cap = water_level(sizes, budget)
    return {name: files[name] for files in packages.values() for name in draw(files, cap, test_share, seed)}


def split_texts(
    paths: Sequence[Path], train_budget: float, valid_budget: float, seed: int
) -> Tuple[Dict[str, str], Dict[str, str]]:
    """Split plain text documents into train and valid.

    The document whose length is nearest to ``valid_budget`` is held out. The others are taken whole, in random order,
    as long as they fit into ``train_budget``.

    Args:
        paths: Paths of text files, or of directories that contain .txt files.
        train_budget: Largest number of characters to train on.
        valid_budget: Number of characters to hold out; 0 for none.
        seed: Seed of the order.

    Returns:
        Text of each document of train and of valid, by name.

    Raises:
        FileNotFoundError: A directory contains no .txt file.
        ValueError: Two files have the same name, or a file is not UTF-8.
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


def write_jsonl(path: Path, documents: Dict[str, str], seed: int) -> None:
    """Write documents as JSON lines, in an order that depends on ``seed`` and the names only.

    Args:
        path: Path of the file to write.
        documents: Text of each document, by name.
        seed: Seed of the order.
    """
    order = sorted(documents, key=lambda name: unit(f"order{seed}", name))

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for name in tqdm(order, desc=path.name, unit="document"):
                subset = "text" if name.startswith("text/") else "code"
                record = {"name": name, "meta": {"pile_set_name": subset}, "text": documents[name]}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    write_whole(path, write)


def report(rows: Sequence[Tuple[str, str, str, bool]], splits: Dict[str, Dict[str, str]], filters: Filters) -> str:
    """Format CORPUS.md.

    Args:
        rows: Name, version and license of each package, and whether it is held out.
        splits: Text of each document of each split, by name.
        filters: Filters that all files went through.
    """
    lines = ["# The pretraining corpus", "", "| package | version | license | split | files | characters |"]
    lines += ["| --- | --- | --- | --- | ---: | ---: |"]
    for name, version, license, held_out in rows:
        docs = [t for split in splits for d, t in splits[split].items() if d.startswith(f"{name}/")]
        split = "valid" if held_out else "train"
        lines.append(f"| {name} | {version} | {license} | {split} | {len(docs)} | {sum(map(len, docs)):,} |")
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


def build(args: argparse.Namespace) -> None:
    """Download, filter, draw and write the corpus of the options."""
    args.destdir.mkdir(parents=True, exist_ok=True)
    wheels = args.wheels or args.destdir / "wheels"
    pins = read_pins(PACKAGES)
    if not args.no_download:
        download(PACKAGES, wheels)
    filters, packages, rows = Filters(), {False: {}, True: {}}, []
    # Held-out packages come first, so that a training file that repeats a held-out file is the one that is dropped.
    for name, version, held_out in tqdm(sorted(pins, key=lambda p: (not p[2], p[0])), desc="packages", unit="package"):
        with zipfile.ZipFile(wheel_path(wheels, name, version)) as wheel:
            rows.append((name, version, ", ".join(License(wheel).names), held_out))
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
    write_text(args.destdir / "CORPUS.md", text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pretrained.make_corpus", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--destdir", type=Path, required=True, metavar="DIR", help="directory of the corpus")
    parser.add_argument(
        "--extra-text",
        type=Path,
        nargs="*",
        default=[],
        metavar="PATH",
        help="plain text documents to add (.txt files, or directories that contain them)",
    )
    parser.add_argument(
        "--extra-share",
        type=float,
        default=0.25,
        metavar="X",
        help="largest share of the characters from --extra-text (default: %(default)s)",
    )
    parser.add_argument(
        "--train-chars",
        type=int,
        default=130_000_000,
        metavar="N",
        help="number of characters to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--valid-chars",
        type=int,
        default=1_000_000,
        metavar="N",
        help="number of characters to hold out (default: %(default)s)",
    )
    parser.add_argument(
        "--test-share",
        type=float,
        default=0.25,
        metavar="X",
        help="largest share of tests in a package's code (default: %(default)s)",
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="directory of the downloaded wheels (default: DESTDIR/wheels)"
    )
    parser.add_argument("--no-download", action="store_true", help="use the wheels in --wheels")
    parser.add_argument("--seed", type=int, default=1, help="seed of all draws (default: %(default)s)")
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
