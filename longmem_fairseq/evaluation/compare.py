"""All evaluations for several checkpoints, in one report with paired differences between them."""

import argparse
import logging
import os
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..files import printable, read_json
from .base import Evaluation
from .command import BRACKETS, Outcome, bullets, configure_logging, interrupted, run, sentence
from .command_line import parser_of
from .records import text_of, texts_of
from .reporting.markdown import as_markdown, markdown_table
from .reporting.report_files import as_json, write_report
from .reporting.system_scores import SystemScores
from .reporting.table import Table
from .scoring.systems import BACKBONE, WITH_CACHE

logger = logging.getLogger(__name__)

Evaluations = Dict[str, Callable[[], Evaluation]]
# Backbones that agree in these give the same scores; the last one is the size of their cache.
_READ_ALIKE = ("backbone_fingerprint", "tokens_per_sample", "memory_size")
_PASSED_ON = ("tokenizer", "tokens_per_sample", "memory_size", "tuning_tokens", "limit")


class PlannedEvaluation(NamedTuple):
    """One evaluation of a plan.

    Attributes:
        name: Name of its part of the report.
        evaluation: Name of the evaluation.
        arguments: Command line without the checkpoint and the results.
    """

    name: str
    evaluation: str
    arguments: List[str]


def read_plan(
    path: str, data: str, evaluations: Evaluations, only: Optional[Sequence[str]] = None
) -> List[PlannedEvaluation]:
    """Read the evaluations of a plan, in its order.

    Args:
        path: Path of a JSON file ``{name: {"evaluation": ..., "arguments": [...]}}``; ``{data}`` in an argument stands
            for ``data``.
        data: Path of the directory of the data.
        evaluations: Available evaluations by name.
        only: Names of the planned evaluations to keep; by default all.

    Raises:
        ValueError: The file is not a plan, or lacks a name of ``only``.
        FileNotFoundError: The data of an evaluation do not exist.
    """
    try:
        plan = [
            PlannedEvaluation(name, text_of(row["evaluation"]), texts_of(row["arguments"]))
            for name, row in read_json(path).items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--plan {path} is not a plan: it must name evaluations with their arguments") from error
    names = [planned.name for planned in plan]
    for name in only or []:
        if name not in names:
            raise ValueError(f"--only {name} is not in {path}, which has {', '.join(names)}")
    return [_with_data(planned, path, data, evaluations) for planned in plan if not only or planned.name in only]


def _with_data(planned: PlannedEvaluation, path: str, data: str, evaluations: Evaluations) -> PlannedEvaluation:
    if planned.evaluation not in evaluations:
        raise ValueError(f"--plan {path}: there is no evaluation {planned.evaluation}: {', '.join(evaluations)}")
    arguments = [argument.replace("{data}", data) for argument in planned.arguments]
    for template, argument in zip(planned.arguments, arguments):
        if template.startswith("{data}") and not os.path.exists(argument):
            raise FileNotFoundError(f"{planned.name} needs {argument}, which does not exist: leave it out with --only")
    return planned._replace(arguments=arguments)


def named(values: Sequence[str], option: str) -> Dict[str, str]:
    """Return ``NAME=VALUE`` arguments as a dictionary, in order.

    Args:
        values: Arguments of the option.
        option: Name of the option, for messages.

    Raises:
        ValueError: A value has no name, or two have the same.
    """
    by_name: Dict[str, str] = {}
    for value in values:
        name, _, rest = value.partition("=")
        if not rest or not name:
            raise ValueError(f"{option} {value} has no name: write NAME={value or '...'}")
        if name in by_name:
            raise ValueError(f"{option}: two are named {name}")
        by_name[name] = rest
    return by_name


def parser(default_plan: str) -> argparse.ArgumentParser:
    """Return the command line.

    Args:
        default_plan: Path of the plan that is followed without ``--plan``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.compare.evaluate",
        description="All evaluations for several checkpoints, in one report.",
    )
    parser.add_argument("--path", nargs="+", required=True, metavar="NAME=CHECKPOINT", help="checkpoints to compare")
    parser.add_argument("--data", required=True, metavar="DIR", help="directory of the data that the plan names")
    parser.add_argument(
        "--results-path",
        required=True,
        metavar="DIR",
        help="directory of the report; an interrupted run continues there",
    )
    parser.add_argument("--plan", default=default_plan, metavar="FILE", help="evaluations with their arguments, JSON")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="evaluations of the plan to run (default: all)")
    parser.add_argument("--backbone", nargs="+", default=[], metavar="NAME=FILE", help="backbones that have moved")
    parser.add_argument("--tokenizer", metavar="DIR", help="for all checkpoints (default: each one's own)")
    parser.add_argument("--tokens-per-sample", metavar="N", help="tokens of the window")
    parser.add_argument("--memory-size", metavar="N", help="tokens of memory and cache")
    parser.add_argument("--tuning-tokens", metavar="N", help="validation tokens to tune the neural cache on")
    parser.add_argument("--limit", metavar="N", help="maximum number of documents, examples or questions of each")
    parser.add_argument("--no-cache", action="store_true", help="leave the neural cache out")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return parser


def main(evaluations: Evaluations, default_plan: str, argv: Optional[Sequence[str]] = None) -> str:
    """Run a comparison as a command; exit with one sentence if it fails.

    Args:
        evaluations: Functions that make an evaluation, by name.
        default_plan: Path of the plan that is followed without ``--plan``.
        argv: Command line; by default that of the process.

    Returns:
        The report in Markdown.
    """
    configure_logging()
    command_line = parser(default_plan)
    args = command_line.parse_args(argv)
    try:
        return compare(evaluations, args)
    except KeyboardInterrupt:
        sys.exit(interrupted(command_line.prog, args.results_path))
    except (ValueError, OSError) as error:
        sys.exit(f"{command_line.prog}: {sentence(error)}")


def compare(evaluations: Evaluations, args: argparse.Namespace) -> str:
    """Run what is left to run, write ``report.json``, ``report.md`` and ``report.png``, and return the report's text.

    Each evaluation of each checkpoint has a report of its own in ``runs/NAME/EVALUATION``.

    Args:
        evaluations: Functions that make an evaluation, by name.
        args: Parsed command line.

    Raises:
        ValueError: An option or the data are not valid.
        OSError: A file cannot be read or written.
    """
    checkpoints, backbones = named(args.path, "--path"), named(args.backbone, "--backbone")
    for name in backbones:
        if name not in checkpoints:
            raise ValueError(f"--backbone {name}=... names no checkpoint of --path: {', '.join(checkpoints)}")
    plan = read_plan(args.plan, args.data, evaluations, args.only)
    passed_on = _passed_on(args)
    outcomes: Dict[str, Dict[str, Outcome]] = {}
    for planned in plan:
        for name, checkpoint in checkpoints.items():
            logger.info("%s: %s", planned.name, name)
            evaluation = evaluations[planned.evaluation]()
            directory = os.path.join(args.results_path, "runs", name, planned.name)
            backbone = ["--backbone", backbones[name]] if name in backbones else []
            arguments = ["--path", checkpoint, "--results-path", directory, *planned.arguments, *passed_on, *backbone]
            outcome = run(evaluation, parser_of(evaluation).parse_args(arguments))
            outcomes.setdefault(planned.name, {})[name] = outcome
    return _report(args.results_path, outcomes)


def _passed_on(args: argparse.Namespace) -> List[str]:
    """Return the arguments that every evaluation gets."""
    arguments = []
    for name in _PASSED_ON:
        if getattr(args, name) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if args.no_cache:
        arguments.append("--no-cache")
    if args.cpu:
        arguments.append("--cpu")
    return arguments


def _report(directory: str, outcomes: Dict[str, Dict[str, Outcome]]) -> str:
    models = {name: outcome.report["model"] for runs in outcomes.values() for name, outcome in runs.items()}
    first_models = {name: outcome.report["model"] for name, outcome in next(iter(outcomes.values())).items()}
    parts, plots, evaluations = ["# Comparison", _models(first_models)], [], {}
    for name, runs in outcomes.items():
        tables = merge(runs)
        notes = list(next(iter(runs.values())).report["notes"])
        parts += [f"## {name}", bullets(notes), *map(as_markdown, tables)]
        plots += [Table(f"{name}: {table.title}", table.columns, table.plot, table.pairs) for table in tables]
        evaluations[name] = {
            "notes": notes,
            "tuning": {checkpoint: outcome.report["tuning"] for checkpoint, outcome in runs.items()},
            "tables": [as_json(table) for table in tables],
            "seconds": {checkpoint: outcome.report["seconds"] for checkpoint, outcome in runs.items()},
            "devices": {checkpoint: outcome.report["device"] for checkpoint, outcome in runs.items()},
        }
    text = printable("\n\n".join([*parts, BRACKETS]))
    write_report(directory, {"models": models, "evaluations": evaluations, "markdown": text}, text, plots)
    return text


def _models(models: Dict[str, Dict[str, Any]]) -> str:
    """Return a Markdown table of the checkpoints that are compared."""
    names = (
        "backbone",
        "layers",
        "width",
        "parameters",
        "side_network_parameters",
        "tokens_per_sample",
        "memory_size",
        "k",
        "chunk_size",
        "retrieval_layer_index",
        "mean_gate",
    )
    shown = [name for name in names if any(name in model for model in models.values())]
    body = []
    for label, model in models.items():
        values = [model.get(name, "") for name in shown]
        body.append([label, *(f"{value:,}" if isinstance(value, int) else str(value) for value in values)])
    return markdown_table(["checkpoint", *(name.replace("_", " ") for name in shown)], body)


def merge(outcomes: Dict[str, Outcome]) -> List[Table]:
    """Merge the main tables of several checkpoints; rows are named after checkpoint and system.

    A backbone that several checkpoints share appears once, under the first one's name. Differences are those within
    each checkpoint, and of each system between every checkpoint and those before it. Perplexities of different
    tokenizers are not compared.

    Args:
        outcomes: Outcomes of one evaluation by checkpoint.
    """
    models = {name: outcome.report["model"] for name, outcome in outcomes.items()}
    one_tokenizer = len({model["dictionary_sha256"] for model in models.values()}) == 1

    def label(name: str, row: str) -> str:
        if row.startswith(BACKBONE):
            keys = _READ_ALIKE if WITH_CACHE in row else _READ_ALIKE[:-1]
            values = [models[name].get(key) for key in keys]
            name = next(other for other in models if [models[other].get(key) for key in keys] == values)
        return f"{name}: {row}"

    merged = []
    main_tables = {table.title: table for outcome in outcomes.values() for table in outcome.tables}
    for i, (title, main_table) in enumerate(main_tables.items()):
        if i and not (main_table.plot or main_table.compared):
            continue
        columns: Dict[str, Dict[str, SystemScores]] = {}
        pairs: Dict[Tuple[str, str], None] = {}  # in order, each once
        before: Dict[str, List[str]] = {}  # rows of a system in the checkpoints before
        for name, outcome in outcomes.items():
            table = next((table for table in outcome.tables if table.title == title), None)
            if table is None:  # the text of this checkpoint's tokens is not known
                continue
            for column, rows in table.columns.items():
                for row, scores in rows.items():
                    columns.setdefault(column, {}).setdefault(label(name, row), scores)
            pairs.update({(label(name, a), label(name, b)): None for a, b in table.pairs})
            relative = any(statistic.relative for statistic in table.statistics)
            for row in table.rows if one_tokenizer or not relative else ():
                labeled = label(name, row)
                pairs.update({(labeled, other): None for other in before.get(row, []) if other != labeled})
                before.setdefault(row, []).append(labeled)
        merged.append(Table(title, columns, main_table.plot, list(pairs)))
    return merged
