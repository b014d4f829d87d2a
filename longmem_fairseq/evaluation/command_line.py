"""The options that all evaluations share, with their checks."""

import argparse
import os
from typing import Any, Dict, List

from ..tasks.saved_settings import parse_overrides
from .base import Evaluation
from .scoring.scorer import Scorer

MEMORY_SIZES = (4096, 16384, 65536)


def parser_of(evaluation: Evaluation) -> argparse.ArgumentParser:
    """Return the command line of an evaluation."""
    script = evaluation.script or f"examples.{evaluation.name}.evaluate"
    parser = argparse.ArgumentParser(prog=f"python -m {script}", description=evaluation.title)
    parser.add_argument("--path", required=True, help="checkpoint or directory of a LongMem, or of a backbone alone")
    parser.add_argument(
        "--results-path", required=True, help="directory of the report; an interrupted run continues there"
    )
    evaluation.add_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="directory of dict.txt and tokenizer.json, sentencepiece.model, or encoder.json and vocab.bpe "
        "(default: that of the checkpoint, then that of its training data)",
    )
    model.add_argument("--backbone", metavar="FILE", help="checkpoint of the LongMem's backbone, if it has moved")
    model.add_argument("--tokens-per-sample", type=int, metavar="N", help="tokens of the window (default: as trained)")
    model.add_argument("--memory-size", type=int, metavar="N", help="tokens of memory and cache (default: as trained)")
    model.add_argument("--k", type=int, metavar="N", help="tokens read per query and head (default: as trained)")
    model.add_argument("--chunk-size", type=int, metavar="N", help="tokens of a chunk (default: as trained)")
    model.add_argument(
        "--model-overrides",
        default="{}",
        metavar="DICT",
        help="other settings of a LongMem as a Python dictionary, such as \"{'memory_dtype': 'float16'}\"",
    )
    model.add_argument("--cpu", action="store_true", help="do not use a GPU")
    cache = parser.add_argument_group("baseline: a neural cache (kNN-LM) over the same tokens as the memory")
    cache.add_argument("--cache-lambda", type=float, metavar="X", help="weight of the cache, instead of tuning it")
    cache.add_argument("--cache-theta", type=float, metavar="X", help="sharpness of the cache, instead of tuning it")
    cache.add_argument("--no-cache", action="store_true", help="leave the cache out")
    cache.add_argument(
        "--tuning-tokens", type=int, default=50_000, metavar="N", help="validation tokens to tune the cache on"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="maximum number of documents, examples or questions")
    return parser


def check(args: argparse.Namespace) -> None:
    """Check the shared options.

    Raises:
        ValueError: An option is out of range, or contradicts another one.
    """
    if (args.cache_lambda is None) != (args.cache_theta is None):
        raise ValueError("--cache-lambda and --cache-theta belong together: give both, or neither to have them tuned")
    if args.cache_lambda is not None and args.no_cache:
        raise ValueError("--no-cache contradicts --cache-lambda: leave one out")
    if args.cache_lambda is not None and not (0 <= args.cache_lambda < 1 and args.cache_theta > 0):
        raise ValueError(
            f"--cache-lambda {args.cache_lambda} must be from 0 to below 1 and --cache-theta {args.cache_theta} above 0"
        )
    for option in ("limit", "tuning_tokens", "tokens_per_sample", "k", "chunk_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} is less than 1: raise it")
    if args.memory_size is not None and args.memory_size < 0:
        raise ValueError(f"--memory-size {args.memory_size} is less than 0: raise it")


def model_overrides(args: argparse.Namespace) -> Dict[str, Any]:
    """Return the dictionary of ``--model-overrides``.

    Raises:
        ValueError: It is not a dictionary, or has a setting with an option of its own.
    """
    overrides = parse_overrides(args.model_overrides)
    twice = {"memory_size", "k", "chunk_size", "tokens_per_sample"} & set(overrides)
    if twice:
        name = min(twice)
        raise ValueError(f"--model-overrides has {name}: give it as --{name.replace('_', '-')}")
    return overrides


def add_memory_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the option of evaluations that compare memories of several sizes."""
    parser.add_argument(
        "--memory-sizes",
        nargs="+",
        type=int,
        metavar="N",
        help="tokens of each memory and of the cache beside it (default: --memory-size, else 4096 16384 65536)",
    )


def memory_sizes(args: argparse.Namespace, scorer: Scorer) -> List[int]:
    """Return the distinct sizes of ``--memory-sizes`` in tokens, smallest first.

    Args:
        args: Parsed command line.
        scorer: Scorer of the systems to evaluate.

    Raises:
        ValueError: A size is smaller than a segment.
    """
    sizes = sorted(set(args.memory_sizes or ([args.memory_size] if args.memory_size else MEMORY_SIZES)))
    if sizes[0] < scorer.size:
        raise ValueError(f"--memory-sizes {sizes[0]} is smaller than one segment of {scorer.size} tokens: raise it")
    return sizes


def check_max_new_tokens(args: argparse.Namespace, scorer: Scorer) -> None:
    """Check ``--max-new-tokens`` and ``--beam`` of evaluations that generate.

    Args:
        args: Parsed command line.
        scorer: Scorer of the systems to evaluate.

    Raises:
        ValueError: An option is less than 1, or answers would take half of the window.
    """
    for option in ("max_new_tokens", "beam"):
        value = getattr(args, option)
        if value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} is less than 1: raise it")
    if args.max_new_tokens >= scorer.size // 2:
        raise ValueError(
            f"--max-new-tokens {args.max_new_tokens} leaves less than half of the window of {scorer.size} tokens: "
            f"lower it to {scorer.size // 2 - 1}"
        )


def name_of(path: str) -> str:
    """Return the last part of a path, so that reports name the data and not where it is stored."""
    return os.path.basename(os.path.normpath(path))
