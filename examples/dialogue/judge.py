"""Have the responses of a dialogue run judged, memory off against memory on, by a model or by hand.

    python -m examples.dialogue.judge --judge-file RESULTS/judge.jsonl --endpoint http://localhost:8000/v1 \
        --model NAME --results-path JUDGED
    python -m examples.dialogue.judge --judge-file RESULTS/judge.jsonl --by-hand --results-path JUDGED

The judge sees the dialogue, the true response and the two responses in random order, gives each from 1 to 10 for
coherence, consistency and engagingness, and says which is better. The key of the endpoint is read from an environment
variable. Finished pairs are kept; the same command continues an interrupted run.
"""

import argparse
import os
import re
import sys
from typing import Any, Callable, Dict, List, Optional, Sequence

from tqdm import tqdm

from examples.dialogue.endpoint import Endpoint
from longmem_fairseq.evaluation.command import BRACKETS, interrupted, sentence
from longmem_fairseq.evaluation.judged_pairs import JUDGED_KEY, JudgedPair, read_pairs
from longmem_fairseq.evaluation.reporting.finished_items import FinishedItems, digest
from longmem_fairseq.evaluation.reporting.markdown import as_markdown
from longmem_fairseq.evaluation.reporting.report_files import as_json
from longmem_fairseq.evaluation.reporting.statistic import ACCURACY, MEAN
from longmem_fairseq.evaluation.reporting.system_scores import SystemScores
from longmem_fairseq.evaluation.reporting.table import Table
from longmem_fairseq.files import parse_json, write_json, write_text

PROG = "python -m examples.dialogue.judge"
CRITERIA = {
    "coherence": "it fits what was just said",
    "consistency": "it does not contradict anything earlier in the dialogue, earlier sessions included",
    "engagingness": "one would like to continue the conversation",
}
NAMES = ("A", "B")
_ANSWERS_TRIED = 3  # answers of a model that are not in the format
_QUESTION = """Two responses were written for the next utterance of {speaker} in the dialogue below.

{dialogue}
{speaker}:

Response A: {first}
Response B: {second}
For comparison, what {speaker} really said: {reference}

Give each response a whole number from 1 (worst) to 10 (best) for
{criteria}
and say which is the better response: "A", "B" or "tie". Answer with this JSON object and nothing else:
{{"A": {{{scores}}}, "B": {{{scores}}}, "better": "A"}}"""

Verdict = Dict[str, Any]  # "A" and "B": numbers by criterion; "better": "A", "B" or "tie"


def question_of(pair: JudgedPair, characters: Optional[int]) -> str:
    """Return what a model is asked about a pair.

    Args:
        pair: Pair to judge.
        characters: Largest number of characters of the dialogue, of which the end is kept; None for all.
    """
    first, second = pair.responses.values()
    return _QUESTION.format(
        speaker=pair.speaker,
        dialogue=pair.dialogue if characters is None else pair.dialogue[-characters:],
        first=first or "(nothing)",
        second=second or "(nothing)",
        reference=pair.reference,
        criteria="\n".join(f"* {name}: {meaning}" for name, meaning in CRITERIA.items()),
        scores=", ".join(f'"{name}": 1' for name in CRITERIA),
    )


def parse_verdict(answer: str) -> Verdict:
    """Read a verdict from the answer of a model, which may have text around it.

    Raises:
        ValueError: The answer has no verdict.
    """
    match = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        row = parse_json(match[0])
        verdict = {name: {criterion: row[name][criterion] for criterion in CRITERIA} for name in NAMES}
        for numbers in verdict.values():
            if not all(type(number) is int and 1 <= number <= 10 for number in numbers.values()):
                raise ValueError(f"{numbers} are not whole numbers from 1 to 10")
        if row["better"] not in (*NAMES, "tie"):
            raise ValueError(f"better is {row['better']!r}")
        return {**verdict, "better": row["better"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{answer[:200]!r} is not a verdict") from error


def by_model(endpoint: Endpoint, characters: Optional[int]) -> Callable[[JudgedPair], Verdict]:
    """Return a judge that asks a model; arguments are those of :class:`Endpoint` and :func:`question_of`."""

    def judge(pair: JudgedPair) -> Verdict:
        messages = [{"role": "user", "content": question_of(pair, characters)}]
        for attempt in range(1, _ANSWERS_TRIED + 1):
            answer = endpoint.answer(messages)
            try:
                return parse_verdict(answer)
            except ValueError as error:
                if attempt == _ANSWERS_TRIED:
                    raise ValueError(
                        f"--model {endpoint.model} gave {attempt} answers without a verdict: {error}"
                    ) from None
                messages += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": "Answer with the JSON object alone, with whole numbers from 1 to 10."},
                ]
        raise AssertionError("every try returns or raises")

    return judge


def by_hand(pair: JudgedPair, characters: Optional[int] = None) -> Verdict:
    """Ask the person at the terminal; arguments are those of :func:`question_of`."""
    first, second = pair.responses.values()
    print(f"\n{pair.dialogue if characters is None else pair.dialogue[-characters:]}\n")
    for name, text in (("A", first), ("B", second), ("really said", pair.reference)):
        print(f"{pair.speaker} ({name}): {text or '(nothing)'}")
    numbers = {
        criterion: _asked(f"{criterion}: {meaning}; 1 to 10 for A and B", r"([1-9]|10)[ ,]+([1-9]|10)")
        for criterion, meaning in CRITERIA.items()
    }
    (better,) = _asked("better: A, B or tie", r"(A|B|a|b|tie)")
    verdict: Verdict = {
        name: {criterion: int(pair_numbers[i]) for criterion, pair_numbers in numbers.items()}
        for i, name in enumerate(NAMES)
    }
    return {**verdict, "better": better if better == "tie" else better.upper()}


def _asked(prompt: str, pattern: str) -> Sequence[str]:
    """Return the parts of an answer at the terminal; asks again until it has the form."""
    while True:
        try:
            answer = re.fullmatch(pattern, input(f"{prompt}> ").strip())
        except EOFError:
            raise KeyboardInterrupt from None
        if answer:
            return answer.groups()
        print("this is not an answer to it")


def table_of(pairs: Sequence[JudgedPair], verdicts: Dict[str, Verdict]) -> Table:
    """Return the mean of each criterion and the share of preferred responses by system, with their intervals.

    Args:
        pairs: Pairs that were judged.
        verdicts: Verdict by pair.
    """
    columns: Dict[str, Dict[str, SystemScores]] = {criterion: {} for criterion in CRITERIA}
    preferred: Dict[str, SystemScores] = {}
    for pair in pairs:
        verdict = verdicts[pair.id]
        for name, system in sorted(zip(NAMES, pair.responses), key=lambda entry: entry[1]):
            for criterion, scores in columns.items():
                value = verdict[name][criterion]
                scores.setdefault(system, SystemScores({}, MEAN)).items[pair.id] = (value, 1)
            won = 0.5 if verdict["better"] == "tie" else float(verdict["better"] == name)
            statistic = ACCURACY._replace(name="preferred")
            preferred.setdefault(system, SystemScores({}, statistic)).items[pair.id] = (won, 1)
    return Table(f"{len(pairs):,} judged responses (a tie is half)", {**columns, "preferred": preferred})


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__.split("\n")[0])
    parser.add_argument("--judge-file", required=True, metavar="FILE", help="judge.jsonl of a dialogue run")
    parser.add_argument("--key-file", metavar="FILE", help="key to its order (default: judge_key.jsonl beside it)")
    parser.add_argument("--results-path", required=True, metavar="DIR", help="directory of verdicts and report")
    parser.add_argument(
        "--endpoint", metavar="URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1"
    )
    parser.add_argument("--model", metavar="NAME", help="model that judges there")
    parser.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the endpoint's key, if it needs one (OPENAI_API_KEY)",
    )
    parser.add_argument("--by-hand", action="store_true", help="judge in the terminal")
    parser.add_argument(
        "--dialogue-characters", type=int, metavar="N", help="show the judge the dialogue's last N only"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="maximum number of pairs")
    return parser


def _judge_of(args: argparse.Namespace) -> Callable[[JudgedPair], Verdict]:
    for option in ("limit", "dialogue_characters"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} is less than 1: raise it")
    if args.by_hand and (args.endpoint or args.model):
        raise ValueError("--by-hand contradicts --endpoint and --model: leave one out")
    if args.by_hand:
        return lambda pair: by_hand(pair, args.dialogue_characters)
    if not (args.endpoint and args.model):
        raise ValueError("a judge is missing: give --endpoint and --model, or --by-hand")
    if not re.match(r"https?://[^/]", args.endpoint):
        raise ValueError(
            f"--endpoint {args.endpoint} is not an address that starts with http:// or https://: correct it"
        )
    endpoint = Endpoint(args.endpoint, args.model, os.environ.get(args.key_variable) or None)
    return by_model(endpoint, args.dialogue_characters)


def run(args: argparse.Namespace) -> str:
    """Judge the pairs that are left and write the report.

    Args:
        args: Parsed command line.

    Returns:
        The report in Markdown.

    Raises:
        ValueError: An option, a file or an answer is not valid.
        OSError: A file cannot be read or written, or the endpoint does not answer.
    """
    judge = _judge_of(args)
    key = args.key_file or os.path.join(os.path.dirname(args.judge_file), JUDGED_KEY)
    pairs = read_pairs(args.judge_file, key)[: args.limit]
    description = {
        "judge": "by hand" if args.by_hand else args.model,
        "judge_file_sha256": digest([args.judge_file]),
        "dialogue_characters": args.dialogue_characters,
        "criteria": CRITERIA,
    }
    finished = FinishedItems(args.results_path, description)
    left: List[JudgedPair] = [pair for pair in pairs if pair.id not in finished]
    for pair in tqdm(
        left, total=len(pairs), initial=len(pairs) - len(left), unit=" pairs", disable=args.by_hand or None
    ):
        finished.add(pair.id, judge(pair))
    table = table_of(pairs, dict(finished.of(pair.id for pair in pairs)))
    text = "\n\n".join([f"# Judged responses, judge: {description['judge']}", as_markdown(table), BRACKETS])
    write_text(os.path.join(args.results_path, "judged.md"), text)
    write_json(os.path.join(args.results_path, "judged.json"), {**description, "table": as_json(table)})
    return text


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; exit with one sentence if it fails.

    Args:
        argv: Command line; by default that of the process.
    """
    args = parser().parse_args(argv)
    try:
        print(run(args))
    except KeyboardInterrupt:
        sys.exit(interrupted(PROG, args.results_path))
    except (ValueError, OSError) as error:
        sys.exit(f"{PROG}: {sentence(error)}")


if __name__ == "__main__":
    main()
