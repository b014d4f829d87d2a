"""Run an evaluation as a command: load a checkpoint, score the items that are left, write the report."""

import argparse
import logging
import os
import platform
import sys
import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from tqdm import tqdm

from ..files import printable, write_text
from ..memory.cache import CacheSettings
from .base import Evaluation
from .command_line import check, model_overrides, parser_of
from .reporting.finished_items import FinishedItems
from .reporting.markdown import as_markdown
from .reporting.plots import require_matplotlib
from .reporting.report_files import as_json, write_report
from .reporting.table import Table
from .reporting.times import times_table, total_times
from .scoring.cache_tuning import tune
from .scoring.scorer import Scorer
from .scoring.systems import BACKBONE, ON

_CACHE = "neural cache"  # name of the item that holds the tuned settings
BRACKETS = "In brackets: 95 % intervals, bootstrap over what was tested; differences are paired.\n"


class Outcome(NamedTuple):
    """The outcome of a run.

    Attributes:
        report: Content of ``report.json``.
        tables: Tables with the scores of all items, so that runs can be compared.
    """

    report: Dict[str, Any]
    tables: List[Table]


def configure_logging() -> None:
    """Log what this package reports of a run on standard error, and only warnings about models and of libraries."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", force=True)
    package = __name__.partition(".")[0]
    for name in ("fairseq", "faiss", "matplotlib", f"{package}.backbones", f"{package}.models", f"{package}.released"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main(evaluation: Evaluation, argv: Optional[Sequence[str]] = None) -> str:
    """Run an evaluation as a command; exit with one sentence if it fails.

    Args:
        evaluation: Evaluation to run.
        argv: Command line; by default that of the process.

    Returns:
        The report in Markdown.
    """
    configure_logging()
    parser = parser_of(evaluation)
    args = parser.parse_args(argv)
    try:
        outcome = run(evaluation, args)
    except KeyboardInterrupt:
        sys.exit(interrupted(parser.prog, args.results_path))
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {sentence(error)}")
    return outcome.report["markdown"]


def run(evaluation: Evaluation, args: argparse.Namespace) -> Outcome:
    """Score the items that are left and write the report.

    Args:
        evaluation: Evaluation to run.
        args: Parsed command line.

    Raises:
        ValueError: An option or the data are not valid.
        OSError: A file cannot be read or written.
    """
    check(args)
    require_matplotlib()
    overrides = model_overrides(args)
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
    description = {
        "model": scorer.describe(),
        "model_overrides": overrides,
        **evaluation.describe(),
        "cache": _cache_options(args),
    }
    finished = FinishedItems(args.results_path, {"evaluation": evaluation.name, **description})
    tuning = _set_cache(scorer, evaluation, args, finished)
    items = evaluation.items()
    left = [item for item in items if item not in finished]
    progress = tqdm(
        left, desc=evaluation.name, total=len(items), initial=len(items) - len(left), unit=" items", disable=None
    )
    for item in progress:
        started = time.time()
        scorer.times.reset()
        result = evaluation.score(item)
        finished.add(item, {**result, "seconds": round(time.time() - started, 2), "times": scorer.times.by_system()})
    return _report(evaluation, scorer, description, tuning, dict(finished.of(items)), args.results_path)


def _report(evaluation: Evaluation, scorer: Scorer, description, tuning, results, directory: str) -> Outcome:
    tables = evaluation.tables(results)
    notes = [*evaluation.notes(), *_cache_notes(tuning, scorer)]
    times = total_times(result.get("times", {}) for result in results.values())
    parts = [f"# {evaluation.title}", bullets(notes), *map(as_markdown, tables), BRACKETS, times_table(times)]
    text = printable("\n\n".join(parts))
    report = {
        "evaluation": evaluation.name,
        "title": evaluation.title,
        **description,
        "notes": notes,
        "tuning": tuning,
        "tables": [as_json(table) for table in tables],
        **evaluation.figures(results),
        "items": len(results),
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "times": times,
        "device": torch.cuda.get_device_name() if scorer.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "markdown": text,
    }
    write_report(directory, report, text, tables)
    for name, content in evaluation.further_files(results).items():
        write_text(os.path.join(directory, name), content)
    return Outcome(report, tables)


def bullets(notes: Sequence[str]) -> str:
    """Return notes as a Markdown list."""
    return "\n".join(f"* {note}" for note in notes)


def _cache_options(args: argparse.Namespace) -> Any:
    if args.no_cache:
        return None
    if args.cache_lambda is not None:
        return {"lambda": args.cache_lambda, "theta": args.cache_theta}
    return {"tuned on": args.tuning_tokens}


def _set_cache(scorer: Scorer, evaluation: Evaluation, args, finished: FinishedItems) -> List[Dict[str, Any]]:
    """Set the scorer's cache settings, tuned in the first run and kept; return the rows of the tuning."""
    if args.no_cache:
        return []
    if args.cache_lambda is not None:
        setting = CacheSettings(args.cache_lambda, args.cache_theta)
        scorer.cache = {system: setting for system in (BACKBONE, ON) if system == BACKBONE or scorer.has_memory}
        return []
    if _CACHE not in finished:
        finished.add(_CACHE, tune(scorer, evaluation.tuning_documents(), args.tuning_tokens))
    tuning = finished[_CACHE]
    scorer.cache = {row["system"]: CacheSettings(row["weight"], row["theta"]) for row in tuning}
    return tuning


def _cache_notes(tuning: List[Dict[str, Any]], scorer: Scorer) -> List[str]:
    if not scorer.cache:
        return ["The neural cache was left out (--no-cache)."]
    if not tuning:
        setting = next(iter(scorer.cache.values()))
        return [f"The neural cache has lambda {setting.weight:g} and theta {setting.theta:.4g}, as given."]
    rows = ", ".join(
        f"for {row['system']} lambda {row['weight']:g}, theta {row['theta']:.4g} (validation perplexity "
        f"{row['perplexity_without']:.2f} to {row['perplexity']:.2f})"
        for row in tuning
    )
    return [f"The neural cache was tuned on {tuning[0]['tokens']:,} validation tokens: {rows}."]


def interrupted(program: str, directory: str) -> str:
    """Return the message of an interrupted command."""
    return f"{program}: interrupted; the same command continues from {directory}"


def sentence(error: Exception) -> str:
    """Return the message of an error in one sentence."""
    if isinstance(error, OSError) and error.filename and error.strerror:  # Python's own wording starts with a number
        return f"{error.filename} cannot be used: {error.strerror}"
    return str(error)
