"""What the examples' ``evaluate.py`` do: load a checkpoint, score what is left to score, write the report."""

import argparse
import ast
import logging
import os
import platform
import sys
import time
from abc import ABC, abstractmethod
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..memory.cache import CacheSettings
from .reporting import table as reports
from .reporting.finished_items import Records
from .reporting.table import Table
from .scoring.cache_tuning import tune
from .scoring.scorer import Scorer
from .scoring.systems import BACKBONE, ON

logger = logging.getLogger(__name__)

MEMORY_SIZES = (4096, 16384, 65536)
_CACHE = "neural cache"  # the item under which its settings are kept


class Evaluation(ABC):
    """One evaluation; subclasses say what is scored and what is made of it.

    Attributes:
        name: of its example.
        title: of its report.
        script: the command, by default ``examples/NAME/evaluate.py``.
    """

    name: str
    title: str
    script = ""

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add ``--data`` and whatever else it has."""

    @abstractmethod
    def prepare(self, args: argparse.Namespace, scorer: Scorer) -> None:
        """Read the data.

        Raises:
            ValueError: the data are not what they should be.
            OSError: they cannot be read.
        """

    @abstractmethod
    def describe(self) -> Dict[str, Any]:
        """The data and the settings that decide the results, plain JSON types, without places of this machine."""

    @abstractmethod
    def tuning_documents(self) -> List[Tensor]:
        """Tokens of documents for tuning the neural cache; none where the user named none."""

    @abstractmethod
    def items(self) -> List[str]:
        """What is to be scored, by names that stay the same from run to run."""

    @abstractmethod
    def score(self, item: str) -> Dict[str, Any]:
        """The result of one item, plain JSON types."""

    @abstractmethod
    def tables(self, results: Dict[str, Any]) -> List[Table]:
        """What was found, from the results by item; the first table has the main figures."""

    @abstractmethod
    def notes(self) -> List[str]:
        """Sentences that say what was done."""

    def figures(self, results: Dict[str, Any]) -> Dict[str, Any]:
        """What else the report's JSON shall hold."""
        return {}


class Outcome(NamedTuple):
    """What a run left.

    Attributes:
        report: what ``report.json`` holds.
        tables: with the items behind the figures, so that runs can be compared.
    """

    report: Dict[str, Any]
    tables: List[Table]


def parser_of(evaluation: Evaluation) -> argparse.ArgumentParser:
    """The command line of an evaluation."""
    prog = evaluation.script or f"examples/{evaluation.name}/evaluate.py"
    parser = argparse.ArgumentParser(prog=prog, description=evaluation.title)
    parser.add_argument("--path", required=True, help="checkpoint, or its directory: a LongMem, or a backbone alone")
    parser.add_argument("--results-path", required=True, help="directory of the report; a stopped run goes on there")
    evaluation.add_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="directory of dict.txt and sentencepiece.model, or encoder.json and vocab.bpe (default: where the "
        "checkpoint is, then where it was trained)",
    )
    model.add_argument("--backbone", metavar="FILE", help="the LongMem's backbone, where it has moved")
    model.add_argument("--tokens-per-sample", type=int, metavar="N", help="window (default: the checkpoint's)")
    model.add_argument("--memory-size", type=int, metavar="N", help="tokens of memory and cache (the checkpoint's)")
    model.add_argument("--k", type=int, metavar="N", help="tokens read per query and head (the checkpoint's)")
    model.add_argument("--chunk-size", type=int, metavar="N", help="tokens of a chunk (the checkpoint's)")
    model.add_argument(
        "--model-overrides",
        default="{}",
        metavar="DICT",
        help="other settings of a LongMem as a Python dictionary, such as \"{'memory_dtype': 'float16'}\"",
    )
    model.add_argument("--cpu", action="store_true", help="do not use a GPU")
    cache = parser.add_argument_group("baseline: a neural cache (kNN-LM) over the same tokens as the memory")
    cache.add_argument("--cache-lambda", type=float, metavar="X", help="its weight, instead of tuning it")
    cache.add_argument("--cache-theta", type=float, metavar="X", help="its sharpness, instead of tuning it")
    cache.add_argument("--no-cache", action="store_true", help="leave it out")
    cache.add_argument("--tuning-tokens", type=int, default=50_000, metavar="N", help="validation tokens for tuning it")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after so many of what is tested")
    return parser


def quiet() -> None:
    """Log what this package has to say of a run, on standard error, and of the document_memories only warnings."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", force=True)
    for name in ("fairseq", "faiss", "matplotlib", "longmem_fairseq.models"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main(evaluation: Evaluation, argv: Optional[Sequence[str]] = None) -> str:
    """Run an evaluation as a command: the report's tables, in Markdown; exits with a sentence where it cannot."""
    quiet()
    parser = parser_of(evaluation)
    args = parser.parse_args(argv)
    try:
        outcome = run(evaluation, args)
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted; the same command goes on with what is in {args.results_path}")
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {sentence(error)}")
    return outcome.report["markdown"]


def run(evaluation: Evaluation, args: argparse.Namespace) -> Outcome:
    """Score what is left to score and write the report.

    Raises:
        ValueError: an option or the data are not what they should be.
        OSError: a file cannot be read or written.
    """
    _check(args)
    reports.need_plots()
    overrides = _overrides(args)
    scorer = Scorer.load(
        args.path,
        args.tokenizer,
        "cpu" if args.cpu else None,
        args.backbone,
        args.tokens_per_sample,
        **overrides,
        memory_size=args.memory_size,
        k=args.k,
        chunk_size=args.chunk_size,
    )
    evaluation.prepare(args, scorer)
    described = {
        "model": scorer.describe(),
        "model_overrides": overrides,
        **evaluation.describe(),
        "cache": _wanted_cache(args),
    }
    records = Records(args.results_path, {"evaluation": evaluation.name, **described})
    tuned = _set_cache(scorer, evaluation, args, records)
    items = evaluation.items()
    left = [item for item in items if item not in records]
    progress = tqdm(
        left, desc=evaluation.name, total=len(items), initial=len(items) - len(left), unit=" items", disable=None
    )
    for item in progress:
        began = time.time()
        result = evaluation.score(item)
        records.add(item, {**result, "seconds": round(time.time() - began, 2)})
    return _report(evaluation, scorer, described, tuned, dict(records.of(items)), args.results_path)


def _report(evaluation, scorer, described, tuned, results, directory: str) -> Outcome:
    tables = evaluation.tables(results)
    notes = [*evaluation.notes(), *_cache_notes(tuned, scorer)]
    said = "\n".join(f"* {note}" for note in notes)
    text = "\n\n".join([f"# {evaluation.title}", said, *map(reports.as_markdown, tables)])
    text += "\n\nIn brackets: 95 % intervals, bootstrap over what was tested; differences are paired.\n"
    report = {
        "evaluation": evaluation.name,
        "title": evaluation.title,
        **described,
        "notes": notes,
        "tuning": tuned,
        "tables": [reports.as_json(table) for table in tables],
        **evaluation.figures(results),
        "items": len(results),
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "device": torch.cuda.get_device_name() if scorer.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "markdown": text,
    }
    reports.write(directory, report, text, tables)
    return Outcome(report, tables)


def _check(args: argparse.Namespace) -> None:
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
            raise ValueError(f"--{option.replace('_', '-')} {value} is less than 1")
    if args.memory_size is not None and args.memory_size < 0:
        raise ValueError(f"--memory-size {args.memory_size} is less than none")


def _overrides(args: argparse.Namespace) -> Dict[str, Any]:
    try:
        found = ast.literal_eval(args.model_overrides)
        if not isinstance(found, dict):
            raise ValueError(found)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"--model-overrides {args.model_overrides} is no Python dictionary") from error
    twice = {"memory_size", "k", "chunk_size", "tokens_per_sample"} & set(found)
    if twice:
        name = min(twice)
        raise ValueError(f"--model-overrides has {name}: give it as --{name.replace('_', '-')}")
    return found


def _wanted_cache(args: argparse.Namespace) -> Any:
    if args.no_cache:
        return None
    if args.cache_lambda is not None:
        return {"lambda": args.cache_lambda, "theta": args.cache_theta}
    return {"tuned on": args.tuning_tokens}


def _set_cache(scorer: Scorer, evaluation: Evaluation, args, records: Records) -> List[Dict[str, Any]]:
    """Give the scorer its cache, tuned once and kept; returns what tuning found."""
    if args.no_cache:
        return []
    if args.cache_lambda is not None:
        setting = CacheSettings(args.cache_lambda, args.cache_theta)
        scorer.cache = {BACKBONE: setting, **({ON: setting} if scorer.has_memory else {})}
        return []
    if _CACHE not in records:
        records.add(_CACHE, tune(scorer, evaluation.tuning_documents(), args.tuning_tokens))
    found = records[_CACHE]
    scorer.cache = {row["system"]: CacheSettings(row["weight"], row["theta"]) for row in found}
    return found


def _cache_notes(tuned: List[Dict[str, Any]], scorer: Scorer) -> List[str]:
    if not scorer.cache:
        return ["The neural cache was left out (--no-cache)."]
    if not tuned:
        setting = next(iter(scorer.cache.values()))
        return [f"The neural cache has lambda {setting.weight:g} and theta {setting.theta:.4g}, as given."]
    rows = ", ".join(
        f"for {row['system']} lambda {row['weight']:g}, theta {row['theta']:.4g} (validation perplexity "
        f"{row['perplexity_without']:.2f} to {row['perplexity']:.2f})"
        for row in tuned
    )
    return [f"The neural cache was tuned on {tuned[0]['tokens']:,} validation tokens: {rows}."]


def add_memory_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the option of evaluations that compare memories of several sizes."""
    parser.add_argument(
        "--memory-sizes",
        nargs="+",
        type=int,
        metavar="N",
        help="tokens of each memory, and of the cache beside it (default: --memory-size, else 4096 16384 65536)",
    )


def memory_sizes(args: argparse.Namespace, scorer: Scorer) -> List[int]:
    """The sizes that are asked for, in tokens, each once, smallest first.

    Raises:
        ValueError: one is smaller than a segment.
    """
    sizes = sorted(set(args.memory_sizes or ([args.memory_size] if args.memory_size else MEMORY_SIZES)))
    if sizes[0] < scorer.size:
        raise ValueError(f"--memory-sizes {sizes[0]} is smaller than one segment of {scorer.size} tokens: raise it")
    return sizes


def sentence(error: Exception) -> str:
    """What to tell the user of an error."""
    if isinstance(error, OSError) and error.filename and error.strerror:  # the system's own wording has a number first
        return f"{error.filename} cannot be used: {error.strerror}"
    return str(error)


def name_of(path: str) -> str:
    """The last part of a path, which says what it was and not where."""
    return os.path.basename(os.path.normpath(path))
