"""Text documents to fairseq data: one item per document, nothing lost, an end-of-document symbol after each.

    python preprocess/binarize_documents.py --train books/ --valid valid/ --test test.jsonl.zst \
        --tokenizer sentencepiece --vocab-size 8000 --destdir data
    fairseq-train data --user-dir longmem_fairseq --task longmem_language_modeling ...

Inputs are text files (one document each), directories of them, or JSON lines (``text``, ``name``), also compressed
(``.gz``, ``.zst``). Tokenizers:

* ``sentencepiece``: train one on the --train documents (``data/sentencepiece.model``);
* ``gpt2``: GPT-2's BPE from local files (--gpt2-encoder-json, --gpt2-vocab-bpe; --dict for a backbone's dictionary);
* ``FILE.model``: an existing sentencepiece model.

Written to --destdir: ``dict.txt``, ``{train,valid,test}.{bin,idx}`` (fairseq's mmap format), the tokenizer's files,
``manifest.json`` and ``{split}.documents.jsonl`` (name, tokens and subset of each document, in order; tokens counts the
end-of-document symbol). A killed run is continued by the same command; a finished one is not repeated.
"""

import argparse
import logging
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script: find the packages beside this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from preprocess.blocks import Position, read_blocks
from preprocess.documents import Source, iter_documents, list_sources
from preprocess.encoding import Settings, encode_blocks
from preprocess.errors import InputError

logger = logging.getLogger("preprocess.binarize_documents")

SPLITS = ("train", "valid", "test")
SAVE_SECONDS = 5.0  # at most this much work is repeated after a kill


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module for what it means."""
    parser = argparse.ArgumentParser(
        prog="binarize_documents.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for split in SPLITS:
        parser.add_argument(f"--{split}", nargs="+", metavar="P", help=f"{split} documents")
    parser.add_argument("--destdir", required=True, type=Path, metavar="D", help="directory for the data")
    parser.add_argument(
        "--tokenizer", default="sentencepiece", metavar="T", help="sentencepiece (train one), gpt2, or a .model file"
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="size of the dictionary when training (8000)")
    parser.add_argument(
        "--tokenizer-sample-bytes",
        type=int,
        default=20_000_000,
        metavar="N",
        help="train on a sample of this size (20 MB)",
    )
    parser.add_argument("--gpt2-encoder-json", metavar="F", help="GPT-2's encoder.json")
    parser.add_argument("--gpt2-vocab-bpe", metavar="F", help="GPT-2's vocab.bpe")
    parser.add_argument("--dict", metavar="F", help="an existing fairseq dict.txt to use")
    parser.add_argument(
        "--allow-lossy-tokenizer", action="store_true", help="accept a .model that does not give text back as it was"
    )
    parser.add_argument(
        "--bad-documents",
        choices=("refuse", "skip"),
        default="refuse",
        help="at empty or undecodable documents: stop or go on",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of every random choice")
    parser.add_argument("--overwrite", action="store_true", help="replace what --destdir holds, finished or not")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; InputErrors and full disks end it with one sentence."""
    args = parse_arguments(arguments)
    logging.basicConfig(format="%(asctime)s | %(levelname)s | %(message)s", stream=sys.stderr)
    logging.getLogger("preprocess").setLevel(logging.INFO)
    try:
        binarize(args)
    except InputError as error:
        raise SystemExit(f"binarize_documents.py: error: {error}") from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise SystemExit(
            f"binarize_documents.py: error: {error.strerror}{where}; run the same command again to continue"
        ) from None


def binarize(args: argparse.Namespace) -> dict:
    """Do what the command line asks; returns the manifest.

    Raises:
        InputError: the input or an option cannot be used.
    """
    from longmem_fairseq.data.manifest import MANIFEST, read_manifest
    from preprocess.workspace import Workspace

    inputs = {split: list_sources(getattr(args, split)) for split in SPLITS if getattr(args, split)}
    _check_arguments(args, inputs)
    workspace = Workspace(args.destdir, _request(args, inputs), args.overwrite)
    if workspace.finished:
        logger.info("%s already holds this data: nothing to do", args.destdir)
        return read_manifest(args.destdir)
    if "publishing" in workspace.journal:
        workspace.publish(workspace.journal["publishing"])
        return read_manifest(args.destdir)
    _provide_tokenizer(args, workspace)
    names = _write_all(args, inputs, workspace)
    workspace.publish([*names, MANIFEST])
    manifest = read_manifest(args.destdir)
    for split, described in manifest["splits"].items():
        logger.info("%s: %d documents, %d tokens", split, described["documents"], described["tokens"])
    return manifest


def _check_arguments(args: argparse.Namespace, inputs: dict[str, list[Source]]) -> None:
    if not inputs:
        raise InputError("no input: give --train, --valid or --test")
    if args.workers < 1:
        raise InputError(f"--workers {args.workers} is smaller than 1")
    if args.tokenizer == "sentencepiece":
        if "train" not in inputs:
            raise InputError(
                "--tokenizer sentencepiece needs --train to train a tokenizer on: give it, or a .model file"
            )
        if args.dict:
            raise InputError("--dict does not go with training a tokenizer: give --tokenizer FILE.model or gpt2")
    elif args.vocab_size is not None:
        raise InputError(
            f"--vocab-size {args.vocab_size} is for training; --tokenizer {args.tokenizer} has its own size"
        )


def _request(args: argparse.Namespace, inputs: dict[str, list[Source]]) -> dict[str, object]:
    """Everything that decides what the data will be, to tell whether a run continues another."""
    import hashlib

    request: dict[str, object] = {}
    for split, sources in inputs.items():
        digest = hashlib.sha256()
        for source in sources:
            digest.update(f"{source.path.resolve()}\0{source.size}\0{source.path.stat().st_mtime_ns}\n".encode())
        request[f"--{split}"] = digest.hexdigest()
    if args.tokenizer == "sentencepiece":
        request["--tokenizer"] = "sentencepiece"
        request["--vocab-size"] = args.vocab_size or 8000
        request["--tokenizer-sample-bytes"] = args.tokenizer_sample_bytes
    else:
        from preprocess.tokenization import load_tokenizer

        tokenizer = load_tokenizer(**_tokenizer_arguments(args))
        request["--tokenizer"] = tokenizer.fingerprint()
        request["--dict"] = hashlib.sha256("\n".join(tokenizer.symbols).encode()).hexdigest()
    for option in ("bad_documents", "seed"):
        request[f"--{option.replace('_', '-')}"] = getattr(args, option)
    return request


def _tokenizer_arguments(args: argparse.Namespace) -> dict[str, object]:
    return {
        "tokenizer": args.tokenizer,
        "gpt2_encoder_json": args.gpt2_encoder_json,
        "gpt2_vocab_bpe": args.gpt2_vocab_bpe,
        "dictionary": args.dict,
        "allow_lossy": args.allow_lossy_tokenizer,
    }


def _provide_tokenizer(args: argparse.Namespace, workspace) -> None:
    """Train the tokenizer if it is to be trained and was not yet; ``args.tokenizer`` becomes its file."""
    if args.tokenizer != "sentencepiece":
        return
    from preprocess.sentencepiece_training import train

    model = workspace.path("sentencepiece.model")
    if not workspace.journal.get("tokenizer"):
        texts = (document.text for document in iter_documents(args.train, args.bad_documents))
        model.write_bytes(train(texts, args.vocab_size or 8000, args.tokenizer_sample_bytes, args.seed))
        workspace.journal["tokenizer"] = True
        workspace.save()
    args.tokenizer = str(model)


def _write_all(args: argparse.Namespace, inputs: dict[str, list[Source]], workspace) -> list[str]:
    """Write every split, the dictionary, the tokenizer's files and the manifest; returns the files' names."""
    from fairseq.data.indexed_dataset import best_fitting_int_dtype

    from longmem_fairseq.data.manifest import MANIFEST, dictionary_fingerprint, file_sha256, verify, write_manifest
    from preprocess.tokenization import SPECIALS, load_tokenizer

    tokenizer = load_tokenizer(**_tokenizer_arguments(args))
    dtype = best_fitting_int_dtype(len(tokenizer))
    settings = Settings(_tokenizer_arguments(args), dtype.__name__, args.bad_documents)
    splits = {
        split: _write_split(split, sources, settings, args.workers, workspace, dtype)
        for split, sources in inputs.items()
    }
    dictionary = workspace.path("dict.txt")
    if args.dict:
        shutil.copyfile(args.dict, dictionary)
    else:
        with open(dictionary, "w", encoding="utf-8") as stream:
            tokenizer.dictionary.save(stream)
    for name, path in tokenizer.files.items():
        if path != workspace.path(name):
            shutil.copyfile(path, workspace.path(name))
    write_manifest(
        workspace.path(MANIFEST),
        {
            "request_sha256": workspace.request_sha256,
            "tokenizer": {
                "kind": tokenizer.kind,
                "files": sorted(tokenizer.files),
                "fingerprint": tokenizer.fingerprint(),
                "lossless": tokenizer.lossless,
            },
            "dictionary": {
                "symbols": len(tokenizer),
                "fingerprint": dictionary_fingerprint([*SPECIALS, *tokenizer.symbols]),
                "sha256": file_sha256(dictionary),
            },
            "dtype": dtype.__name__,
            "splits": splits,
        },
    )
    for split in splits:
        verify(workspace.directory, split)
    return ["dict.txt", *tokenizer.files, *(name for described in splits.values() for name in described["files"])]


def _write_split(split: str, sources: list[Source], settings: Settings, workers: int, workspace, dtype: type) -> dict:
    from tqdm import tqdm

    from preprocess.workspace import SplitWriter

    done = workspace.journal.get("finished", {}).get(split)
    if done:
        return done
    writer = SplitWriter(workspace, split, dtype)
    start = Position(**writer.state["position"]) if writer.state["position"] else Position()
    if start != Position():
        logger.info("%s: continuing after %d documents", split, writer.state["documents"])
    total = sum(source.size for source in sources)
    saved = time.monotonic()
    with tqdm(total=total, initial=start.consumed, unit="B", unit_scale=True, desc=split, mininterval=0.5) as progress:
        for encoded, position in encode_blocks(read_blocks(sources, start), settings, workers):
            writer.append(encoded)
            progress.update(position.consumed - progress.n)
            if time.monotonic() - saved > SAVE_SECONDS:
                writer.save(asdict(position))
                saved = time.monotonic()
    if not writer.state["documents"]:
        raise InputError(f"--{split} holds no document that can be used")
    described = writer.finish()
    workspace.journal.setdefault("finished", {})[split] = described
    workspace.save()
    return described


if __name__ == "__main__":
    main()
