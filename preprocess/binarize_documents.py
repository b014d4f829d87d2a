r"""Text documents to fairseq data: one item per document, nothing lost, an end-of-document symbol after each.

    python -m preprocess.binarize_documents --train books/ --valid valid/ --test test.jsonl.zst \
        --tokenizer sentencepiece --vocab-size 8000 --destdir data --workers 2
    fairseq-train data --user-dir longmem_fairseq --task longmem_language_modeling ...

Inputs are text files (one document each, or several with --document-separator), directories of them, JSON lines
(``text``, ``name``) or Parquet files, also compressed (gzip, zstd, xz, bzip2). Tokenizers:

* ``sentencepiece``: train one on the --train documents (``data/sentencepiece.model``);
* ``gpt2``: GPT-2's BPE from local files (--gpt2-encoder-json, --gpt2-vocab-bpe; --dict for a backbone's dictionary);
* ``FILE.model``: an existing sentencepiece model;
* a directory of a Hugging Face model, or a ``tokenizer.json``: its tokenizer, with the ids of transformers;
* a data directory that this script wrote, or a converted backbone: its tokenizer and dictionary.

Written to --destdir: ``dict.txt``, ``{train,valid,test}.{bin,idx}`` (fairseq's mmap format), the tokenizer's files,
``manifest.json`` and ``{split}.documents.jsonl`` (name, tokens and subset of each document, in order; the
end-of-document symbol counts as a token). The same command continues a killed run and does not repeat a finished one.

A collection the size of the Pile: run the command once for each shard, in any order, on any machines,

    python -m preprocess.binarize_documents --train pile/*.jsonl.zst --tokenizer gpt2 ... --workers 16 \
        --subset-weights "Books3=0.4" "PubMed Central=0.3" "Pile-CC=0.3" --token-budget 26000000000 \
        --survey pile-survey.json --shard-id 0 --num-shards 8 --destdir data/0

and train on ``data/0:data/1:...``. Weights are shares of the mixture's tokens. To make a mixture the collection is read
once before, to measure it; --survey keeps the result for the other shards. Validation and test data go into shard 0,
where fairseq looks for them.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import logging
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from preprocess.blocks import START, Position
from preprocess.destination import check_output
from preprocess.dictionary import SPECIALS, dictionary_lines
from preprocess.document_source import DocumentSource, list_sources
from preprocess.documents import iter_documents
from preprocess.encoder import EncoderSettings
from preprocess.encoder_pool import EncoderPool
from preprocess.errors import InputError
from preprocess.format_options import add_format_options, check_sources, document_format
from preprocess.mixture import parse_weights, plan, take_survey
from preprocess.package_modules import manifest as manifests
from preprocess.selection import Selection
from preprocess.sentencepiece_tokenizer import SentencePieceTokenizer
from preprocess.sentencepiece_training import SAMPLE_BYTES, VOCAB_SIZE, train
from preprocess.shards import shard
from preprocess.split_writer import SplitWriter, smallest_dtype
from preprocess.tokenization import load_tokenizer
from preprocess.tokenizer import Tokenizer
from preprocess.workspace import Workspace

logger = logging.getLogger("preprocess.binarize_documents")

PROG = "python -m preprocess.binarize_documents"

SPLITS = ("train", "valid", "test")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        arguments: Arguments of the command line; if None, those of the process.

    Returns:
        The value of each option.
    """
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for split in SPLITS:
        add(f"--{split}", nargs="+", metavar="P", help=f"text files, directories or JSON lines of the {split} split")
    add("--destdir", required=True, type=Path, metavar="D", help="data directory to write")
    add(
        "--tokenizer",
        default="sentencepiece",
        metavar="T",
        help="sentencepiece (to train one), gpt2, FILE.model, tokenizer.json, or a directory of a Hugging Face model "
        "or of data (default: %(default)s)",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"largest number of symbols in the dictionary of the tokenizer to train (default: {VOCAB_SIZE})",
    )
    add(
        "--tokenizer-sample-bytes",
        type=int,
        default=SAMPLE_BYTES,
        metavar="N",
        help="bytes of text to train the tokenizer on, sampled from more (default: %(default)s)",
    )
    add("--gpt2-encoder-json", metavar="F", help="GPT-2's encoder.json")
    add("--gpt2-vocab-bpe", metavar="F", help="GPT-2's vocab.bpe")
    add("--dict", metavar="F", help="existing fairseq dict.txt to use")
    add(
        "--allow-lossy-tokenizer",
        action="store_true",
        help="accept a .model that does not give every text back",
    )
    add_format_options(parser)
    add("--workers", type=int, default=1, metavar="N", help="number of processes that encode (default: %(default)s)")
    add(
        "--subset-weights",
        nargs="+",
        default=[],
        metavar="NAME=W",
        help="shares of subsets in the tokens of --train; other subsets are left out",
    )
    add("--token-budget", type=int, metavar="N", help="approximate number of --train tokens, over all shards")
    add(
        "--survey", type=Path, metavar="F", help="file to keep the measurement of the collection in, or to read it from"
    )
    add("--shard-id", type=int, default=0, metavar="I", help="index of the shard of --train (default: %(default)s)")
    add("--num-shards", type=int, default=1, metavar="N", help="number of shards of --train (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="seed of all random choices (default: %(default)s)")
    add(
        "--save-interval",
        type=float,
        default=5.0,
        metavar="S",
        help="most seconds of work that a kill loses (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace the data in --destdir, finished or not")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can repair ends it with one sentence.

    Args:
        arguments: Arguments of the command line; if None, those of the process.
    """
    args = parse_arguments(arguments)
    logging.basicConfig(format="%(asctime)s | %(levelname)s | %(message)s", stream=sys.stderr)
    logging.getLogger("preprocess").setLevel(logging.INFO)
    hint = "run the same command again to continue"
    try:
        binarize(args)
    except InputError as error:
        raise SystemExit(f"{PROG}: error: {error}") from None
    except OSError as error:  # a full disk, a directory that cannot be written
        raise SystemExit(f"{PROG}: error: {error}; repair it, then {hint}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{PROG}: interrupted; {hint}") from None


def binarize(args: argparse.Namespace) -> dict:
    """Write a data directory, unless it is finished.

    Args:
        args: Options of the command line.

    Returns:
        The manifest.

    Raises:
        InputError: An input or option cannot be used.
    """
    form = document_format(args)
    inputs = {split: list_sources(getattr(args, split), form) for split in SPLITS if getattr(args, split)}
    _check_arguments(args, inputs)
    check_sources(itertools.chain(*inputs.values()), args)
    trained = args.tokenizer == "sentencepiece"
    tokenizer = None if trained else load_tokenizer(**_tokenizer_arguments(args))
    if tokenizer is not None and not tokenizer.lossless:
        logger.warning("--tokenizer %s changes some texts: decoding will not give them back", args.tokenizer)
    workspace = Workspace(args.destdir, _request(args, inputs, tokenizer), args.overwrite)
    if workspace.finished:
        logger.info("%s already holds this data: nothing to do", args.destdir)
    elif "publishing" in workspace.journal:
        workspace.publish(workspace.journal["publishing"])
    else:
        try:
            names = _write_all(args, inputs, tokenizer, workspace)
        except InputError:
            workspace.abandon()
            raise
        workspace.publish([*names, manifests.MANIFEST])
    manifest = manifests.read_manifest(args.destdir)
    for split, described in manifest["splits"].items():
        logger.info("%s: %d documents, %d tokens", split, described["documents"], described["tokens"])
    return manifest


def _check_arguments(args: argparse.Namespace, inputs: dict[str, list[DocumentSource]]) -> None:
    """Refuse options that cannot be used, or not together."""
    if not inputs:
        raise InputError("no input: give --train, --valid or --test")
    if args.workers < 1:
        raise InputError(f"--workers {args.workers} is smaller than 1")
    if not 0 <= args.shard_id < args.num_shards:
        raise InputError(f"--shard-id {args.shard_id} is not from 0 to --num-shards {args.num_shards} - 1")
    if args.token_budget is not None and args.token_budget < 1:
        raise InputError(f"--token-budget {args.token_budget} is smaller than 1")
    if (args.subset_weights or args.token_budget or args.num_shards > 1) and "train" not in inputs:
        raise InputError("--subset-weights, --token-budget and --num-shards are for --train, which is missing")
    if args.survey is not None and not args.survey.exists():
        check_output(args.survey, "--survey")
    if args.tokenizer != "sentencepiece":
        if args.vocab_size is not None:
            raise InputError(f"--vocab-size is for training; --tokenizer {args.tokenizer} already has a vocabulary")
        return
    if "train" not in inputs:
        raise InputError("--tokenizer sentencepiece needs --train to train a tokenizer on: give it, or a .model file")
    if args.dict:
        raise InputError("--dict does not go with training a tokenizer: give --tokenizer FILE.model or gpt2")
    if args.num_shards > 1:
        raise InputError(
            f"--num-shards {args.num_shards} needs one tokenizer for all shards: train it once with "
            "preprocess.sentencepiece_training and give --tokenizer FILE.model"
        )


def _request(args: argparse.Namespace, inputs: dict[str, list[DocumentSource]], tokenizer: Tokenizer | None) -> dict:
    """Collect all values that decide the data, by which a run recognizes one that it continues."""
    request: dict[str, object] = {}
    for split, sources in inputs.items():
        digest = hashlib.sha256()
        for source in sources:
            line = f"{source.path.resolve()}\0{source.size}\0{source.path.stat().st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        request[f"--{split}"] = digest.hexdigest()
    if tokenizer is None:
        request["--tokenizer"] = "sentencepiece"
        request["--vocab-size"] = args.vocab_size or VOCAB_SIZE
        request["--tokenizer-sample-bytes"] = args.tokenizer_sample_bytes
    else:
        request["--tokenizer"] = tokenizer.fingerprint()
        request["--dict"] = hashlib.sha256("\n".join(tokenizer.symbols).encode()).hexdigest()
    for option, default in (("text_key", "text"), ("document_separator", "")):
        if getattr(args, option) != default:  # data that was made before the options existed is recognized
            request[f"--{option.replace('_', '-')}"] = getattr(args, option)
    request["--subset-weights"] = parse_weights(args.subset_weights)
    # not --bad-documents: the data written before the first bad document is the same with either choice
    for option in ("token_budget", "shard_id", "num_shards", "seed"):
        request[f"--{option.replace('_', '-')}"] = getattr(args, option)
    return request


def _tokenizer_arguments(args: argparse.Namespace) -> dict[str, object]:
    """Return the arguments of ``load_tokenizer``."""
    return {
        "tokenizer": args.tokenizer,
        "gpt2_encoder_json": args.gpt2_encoder_json,
        "gpt2_vocab_bpe": args.gpt2_vocab_bpe,
        "dictionary": args.dict,
        "allow_lossy": args.allow_lossy_tokenizer,
    }


def _write_all(
    args: argparse.Namespace, inputs: dict[str, list[DocumentSource]], tokenizer: Tokenizer | None, workspace: Workspace
) -> list[str]:
    """Write all files to the workspace; returns their names, without the manifest."""
    if tokenizer is None:
        args.tokenizer = str(_train_tokenizer(args, workspace))
        tokenizer = load_tokenizer(**_tokenizer_arguments(args))
    dtype = smallest_dtype(len(tokenizer))
    settings = EncoderSettings(_tokenizer_arguments(args), dtype.__name__, args.bad_documents, args.seed)
    record: dict[str, object] = {"request_sha256": workspace.request_sha256, "dtype": dtype.__name__}
    splits = {}
    with EncoderPool(settings, args.workers, tokenizer) as pool:
        for split, sources in inputs.items():
            selection, stripe = None, (0, 1)
            if split == "train":
                if args.subset_weights or args.token_budget:
                    survey = take_survey(sources, pool, args.survey or workspace.path("survey.json"))
                    weights = parse_weights(args.subset_weights)
                    selection, record["mixture"] = plan(survey, weights, args.token_budget, args.seed)
                if args.num_shards > 1:
                    sources, stripe, divided = shard(sources, args.shard_id, args.num_shards)
                    record["shard"] = {"id": args.shard_id, "of": args.num_shards, "divided_by": divided}
            elif args.shard_id > 0:
                logger.info("%s is written by shard 0, where fairseq looks for it", split)
                continue
            splits[split] = _write_split(split, sources, stripe, selection, pool, workspace, dtype, args.save_interval)
    record["splits"] = splits
    names = _write_tokenizer(args, tokenizer, workspace, record)
    for split in splits:
        manifests.verify(workspace.directory, split)
    return [*names, *(name for described in splits.values() for name in described["files"])]


def _train_tokenizer(args: argparse.Namespace, workspace: Workspace) -> Path:
    """Train a tokenizer unless a killed run did; returns the path of the model."""
    model = workspace.path(SentencePieceTokenizer.FILE)
    if "tokenizer" not in workspace.journal:
        documents = iter_documents(args.train, args.bad_documents, True, document_format(args))
        texts = (document.text for document in documents)
        model.write_bytes(train(texts, args.vocab_size or VOCAB_SIZE, args.tokenizer_sample_bytes, args.seed))
        workspace.journal["tokenizer"] = "trained"
        workspace.save()
    return model


def _write_split(
    split: str,
    sources: list[DocumentSource],
    stripe: tuple[int, int],
    selection: Selection | None,
    pool: EncoderPool,
    workspace: Workspace,
    dtype: type,
    save_interval: float,
) -> dict:
    """Encode the documents of one split, or those that a killed run had left; returns its part of the manifest."""
    finished = workspace.journal.setdefault("finished", {})
    if split in finished:
        return finished[split]
    writer = SplitWriter(workspace, split, dtype)
    start = Position(**writer.state["position"]) if writer.state["position"] else START
    if start != START:
        logger.info("%s: continuing after %d documents", split, writer.state["documents"])
    saved = time.monotonic()
    for encoded, position in pool.work("encode", sources, split, selection, start, stripe):
        writer.append(encoded)
        if time.monotonic() - saved >= save_interval:
            writer.save(asdict(position))
            saved = time.monotonic()
    if not writer.state["documents"]:
        raise InputError(f"there is not one --{split} document to write in {len(sources)} files")
    finished[split] = writer.finish()
    workspace.save()
    return finished[split]


def _write_tokenizer(
    args: argparse.Namespace, tokenizer: Tokenizer, workspace: Workspace, record: dict[str, object]
) -> list[str]:
    """Write dictionary, tokenizer and manifest, completing its ``record``; returns the names of the other files."""
    dictionary = workspace.path("dict.txt")
    if args.dict:
        shutil.copyfile(args.dict, dictionary)
    else:
        dictionary.write_text("".join(dictionary_lines(tokenizer.symbols)), encoding="utf-8")
    tokenizer.write_files(workspace.directory)
    record["tokenizer"] = {
        "kind": tokenizer.kind,
        "files": sorted(tokenizer.files),
        "fingerprint": tokenizer.fingerprint(),
        "lossless": tokenizer.lossless,
    }
    record["dictionary"] = {
        "symbols": len(tokenizer),
        "fingerprint": manifests.dictionary_fingerprint([*SPECIALS, *tokenizer.symbols]),
        "sha256": manifests.file_sha256(dictionary),
    }
    manifests.write_manifest(workspace.path(manifests.MANIFEST), record)
    return ["dict.txt", *tokenizer.files]


if __name__ == "__main__":
    main()
