"""All evaluations for several checkpoints, in one report with paired differences between them."""

import argparse
import json
import logging
import os
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .command import Evaluation, Outcome, parser_of, quiet, run, sentence
from .reporting import table as reports
from .reporting.statistics import Sample
from .reporting.table import Table
from .scoring.systems import BACKBONE, WITH_CACHE

logger = logging.getLogger(__name__)

Evaluations = Dict[str, Callable[[], Evaluation]]
# Where these agree backbones say the same; the last one is the size of their cache.
_READ_ALIKE = ("backbone_fingerprint", "tokens_per_sample", "memory_size")
_PASSED_ON = ("tokenizer", "tokens_per_sample", "memory_size", "tuning_tokens", "limit")


class Step(NamedTuple):
    """One evaluation of the plan.

    Attributes:
        name: of its part of the report.
        evaluation: what runs.
        arguments: of its command line, without checkpoint and results.
    """

    name: str
    evaluation: str
    arguments: List[str]


def read_plan(path: str, data: str, evaluations: Evaluations, only: Optional[Sequence[str]] = None) -> List[Step]:
    """The evaluations that a file lists, in its order.

    Args:
        path: JSON, ``{name: {"evaluation": ..., "arguments": [...]}}``; ``{data}`` in an argument stands for ``data``.
        data: directory of the data.
        evaluations: those that there are.
        only: names to keep.

    Raises:
        ValueError: the file is no plan, or lacks a name of ``only``.
        FileNotFoundError: data that an evaluation needs is not there.
    """
    with open(path, encoding="utf-8") as file:
        try:
            plan = [Step(name, row["evaluation"], list(row["arguments"])) for name, row in json.load(file).items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--plan {path} is no plan: it must name evaluations with their arguments") from error
    names = [step.name for step in plan]
    for name in only or []:
        if name not in names:
            raise ValueError(f"--only {name} is not in {path}, which has {', '.join(names)}")
    steps = []
    for step in plan:
        if only and step.name not in only:
            continue
        if step.evaluation not in evaluations:
            raise ValueError(f"--plan {path}: there is no evaluation {step.evaluation}: {', '.join(evaluations)}")
        places = [argument.replace("{data}", data) for argument in step.arguments]
        for argument, place in zip(step.arguments, places):
            if argument.startswith("{data}") and not os.path.exists(place):
                raise FileNotFoundError(f"{step.name} needs {place}, which does not exist: leave it out with --only")
        steps.append(step._replace(arguments=places))
    return steps


def named(values: Sequence[str], option: str) -> Dict[str, str]:
    """``NAME=VALUE`` as a dictionary, in order.

    Raises:
        ValueError: one has no name, or two have the same.
    """
    found: Dict[str, str] = {}
    for value in values:
        name, _, rest = value.partition("=")
        if not rest or not name:
            raise ValueError(f"{option} {value} has no name: write NAME={value or '...'}")
        if name in found:
            raise ValueError(f"{option}: two are named {name}")
        found[name] = rest
    return found


def parser(default_plan: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="examples/compare/evaluate.py", description="All evaluations for several checkpoints, in one report."
    )
    parser.add_argument("--path", nargs="+", required=True, metavar="NAME=CHECKPOINT", help="what is compared")
    parser.add_argument("--data", required=True, metavar="DIR", help="the data of all evaluations, as the plan has it")
    parser.add_argument("--results-path", required=True, metavar="DIR", help="a run that stopped goes on there")
    parser.add_argument("--plan", default=default_plan, metavar="FILE", help="evaluations and their arguments")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the plan's evaluations these")
    parser.add_argument("--backbone", nargs="+", default=[], metavar="NAME=FILE", help="backbones that have moved")
    parser.add_argument("--tokenizer", metavar="DIR", help="for all checkpoints (default: where each was trained)")
    parser.add_argument("--tokens-per-sample", metavar="N", help="window")
    parser.add_argument("--memory-size", metavar="N", help="tokens of memory and cache")
    parser.add_argument("--tuning-tokens", metavar="N", help="validation tokens for tuning the neural cache")
    parser.add_argument("--limit", metavar="N", help="of what each evaluation tests")
    parser.add_argument("--no-cache", action="store_true", help="leave out the neural cache")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return parser


def main(evaluations: Evaluations, default_plan: str, argv: Optional[Sequence[str]] = None) -> str:
    """Run everything and write the report: its text; exits with a sentence where it cannot.

    Args:
        evaluations: name -> makes one.
        default_plan: file of the plan that is followed without ``--plan``.
        argv: the command line.
    """
    quiet()
    line = parser(default_plan)
    args = line.parse_args(argv)
    try:
        return compare(evaluations, args)
    except KeyboardInterrupt:
        sys.exit(f"{line.prog}: interrupted; the same command goes on with what is in {args.results_path}")
    except (ValueError, OSError) as error:
        sys.exit(f"{line.prog}: {sentence(error)}")


def compare(evaluations: Evaluations, args: argparse.Namespace) -> str:
    """Run what is left to run, write ``report.json``, ``report.md`` and ``report.png``; returns the text.

    Each evaluation of each checkpoint has a report of its own in ``runs/NAME/EVALUATION``.

    Raises:
        ValueError: an option or the data are not what they should be.
        OSError: a file cannot be read or written.
    """
    checkpoints, backbones = named(args.path, "--path"), named(args.backbone, "--backbone")
    for name in backbones:
        if name not in checkpoints:
            raise ValueError(f"--backbone {name}=... is of no checkpoint in --path: {', '.join(checkpoints)}")
    steps = read_plan(args.plan, args.data, evaluations, args.only)
    passed = [x for option in _PASSED_ON if getattr(args, option) is not None for x in _as_option(option, args)]
    passed += [f"--{option.replace('_', '-')}" for option in ("no_cache", "cpu") if getattr(args, option)]
    outcomes: Dict[str, Dict[str, Outcome]] = {}
    for step in steps:
        for name, checkpoint in checkpoints.items():
            logger.info("%s: %s", step.name, name)
            evaluation = evaluations[step.evaluation]()
            directory = os.path.join(args.results_path, "runs", name, step.name)
            backbone = ["--backbone", backbones[name]] if name in backbones else []
            arguments = ["--path", checkpoint, "--results-path", directory, *step.arguments, *passed, *backbone]
            outcomes.setdefault(step.name, {})[name] = run(evaluation, parser_of(evaluation).parse_args(arguments))
    return _report(args.results_path, outcomes)


def _as_option(option: str, args: argparse.Namespace) -> Tuple[str, str]:
    return f"--{option.replace('_', '-')}", str(getattr(args, option))


def _report(directory: str, outcomes: Dict[str, Dict[str, Outcome]]) -> str:
    parts, tables, found = ["# Comparison"], [], {}
    parts.append(_models({name: outcome.report["model"] for name, outcome in next(iter(outcomes.values())).items()}))
    for step, of in outcomes.items():
        merged = merge(of)
        notes = list(next(iter(of.values())).report["notes"])
        tuned = {name: outcome.report["tuning"] for name, outcome in of.items()}
        parts += [f"## {step}", "\n".join(f"* {note}" for note in notes), *map(reports.as_markdown, merged)]
        tables += [Table(f"{step}: {t.title}", t.columns, t.plot, t.pairs) for t in merged]
        found[step] = {
            "notes": notes,
            "tuning": tuned,
            "tables": [reports.as_json(table) for table in merged],
            "seconds": {name: outcome.report["seconds"] for name, outcome in of.items()},
            "devices": {name: outcome.report["device"] for name, outcome in of.items()},
        }
    parts.append("In brackets: 95 % intervals, bootstrap over what was tested; differences are paired.\n")
    text = "\n\n".join(parts)
    models = {name: outcome.report["model"] for of in outcomes.values() for name, outcome in of.items()}
    reports.write(directory, {"models": models, "evaluations": found, "markdown": text}, text, tables)
    return text


def _models(models: Dict[str, Dict[str, Any]]) -> str:
    """A table of what is compared."""
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
    body = [
        [label, *(f"{model[x]:,}" if isinstance(model.get(x), int) else str(model.get(x, "")) for x in shown)]
        for label, model in models.items()
    ]
    return reports.markdown_table(["checkpoint", *(name.replace("_", " ") for name in shown)], body)


def merge(outcomes: Dict[str, Outcome]) -> List[Table]:
    """The main tables of several checkpoints as one each, whose rows are named after checkpoint and system.

    A backbone that several of them have stands there once, under the first one's name. Differences are those within
    each checkpoint, and of each system between every checkpoint and those before it. Perplexities of different
    tokenizers are not compared.
    """
    models = {name: outcome.report["model"] for name, outcome in outcomes.items()}
    one_tokenizer = len({model["dictionary_sha256"] for model in models.values()}) == 1

    def label(name: str, row: str) -> str:
        if row.startswith(BACKBONE):
            read_alike = _READ_ALIKE if WITH_CACHE in row else _READ_ALIKE[:-1]
            ours = [models[name].get(key) for key in read_alike]
            name = next(other for other in models if [models[other].get(key) for key in read_alike] == ours)
        return f"{name}: {row}"

    merged = []
    for i, table in enumerate(next(iter(outcomes.values())).tables):
        if i and not table.plot:
            continue
        columns: Dict[str, Dict[str, Sample]] = {}
        pairs: Dict[Tuple[str, str], None] = {}  # in order, each once
        before: Dict[str, List[str]] = {}
        for name, outcome in outcomes.items():
            theirs = outcome.tables[i]
            for column, samples in theirs.columns.items():
                for row, sample in samples.items():
                    columns.setdefault(column, {}).setdefault(label(name, row), sample)
            pairs.update({(label(name, a), label(name, b)): None for a, b in theirs.pairs})
            relative = any(statistic.relative for statistic in theirs.statistics)
            for row in theirs.rows if one_tokenizer or not relative else ():
                ours = label(name, row)
                pairs.update({(ours, other): None for other in before.get(row, []) if other != ours})
                before.setdefault(row, []).append(ours)
        merged.append(Table(table.title, columns, table.plot, list(pairs)))
    return merged
