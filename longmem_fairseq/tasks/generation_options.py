"""Options of generation: those that a language model with a memory cannot honor, and values out of range."""

import math
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

from ..arguments import require_number

_REFUSED = {
    "match_source_len": "there is no source whose length could be matched",
    "constraints": "prompts are continued freely",
    "print_alignment": "there is no source to align with",
    "score_reference": "fairseq-eval-lm scores documents",
}

# Options of fairseq under their names in Python, where those differ.
_IN_PYTHON = {
    "sampling_topk": "top_k",
    "sampling_topp": "top_p",
    "max_len_b": "max_new_tokens",
    "min_len": "min_new_tokens",
    "lenpen": "length_penalty",
    "nbest": "n_best",
}

_WHOLE = {"beam", "nbest", "sampling_topk", "max_len_b", "min_len", "no_repeat_ngram_size"}

Spelling = Callable[..., str]


def on_command_line(option: str, value: Any = None) -> str:
    """Spell an option, with its value if there is one, as the commands do."""
    name = f"--{option.replace('_', '-')}"
    return name if value is None or value is True else f"{name} {value}"


def in_python(option: str, value: Any = None) -> str:
    """Spell an option, with its value if there is one, as an argument of ``LongMem.generate``."""
    name = _IN_PYTHON.get(option, option)
    return name if value is None else f"{name}={value}"


def fairseq_options(options: Dict[str, Any]) -> Dict[str, Any]:
    """Return options of ``LongMem.generate`` under their names in fairseq."""
    names = {python: option for option, python in _IN_PYTHON.items()}
    return {names.get(name, name): value for name, value in options.items()}


def check_generation(args, models, vocabulary: int) -> None:
    """Refuse options of a command that are not supported without an encoder, or that contradict each other.

    Args:
        args: fairseq's configuration of generation, or any object with some of its attributes.
        models: Models of the ensemble.
        vocabulary: Number of symbols in the dictionary.

    Raises:
        ValueError: An option is not supported.
    """
    for option, reason in _REFUSED.items():
        if getattr(args, option, None):
            raise ValueError(f"{on_command_line(option)} is not supported by a language model: {reason}")
    if getattr(args, "lm_path", None):
        raise ValueError(
            "--lm-path is not supported: the other model would not read the prompts; name both in --path a:b"
        )
    names = [*_LIMITS, "sampling"]
    values = {option: getattr(args, option) for option in names if getattr(args, option, None) is not None}
    check_values({**_DEFAULTS, **values}, vocabulary, grows=bool(getattr(args, "max_len_a", 0)))
    stock = [type(model).__name__ for model in models if not hasattr(model, "memorize")]
    if stock:
        raise ValueError(f"--path names models with a memory and without ({stock[0]}): generate with one kind")


def check_values(
    values: Dict[str, Any], vocabulary: Optional[int] = None, grows: bool = False, spelled: Spelling = on_command_line
) -> None:
    """Refuse values that are not numbers, out of range, or contradict each other.

    Args:
        values: Values of fairseq's options by name, and ``repetition_penalty``; some may be missing.
        vocabulary: Number of symbols in the dictionary; None where it is not known.
        grows: Whether the largest length grows with the prompt's (``--max-len-a``).
        spelled: Function that spells an option for the message.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is out of range, or two contradict each other.
    """
    if not isinstance(values.get("sampling", False), bool):
        raise TypeError(f"{spelled('sampling')} is {values['sampling']!r}: it must be True or False")
    for option, (holds, limit) in _LIMITS.items():
        if option in values:
            require_number(spelled(option), values[option], int if option in _WHOLE else float)
            if not holds(values[option]):
                raise ValueError(f"{spelled(option, values[option])} {limit}")
    for problem in _contradictions(values, vocabulary, grows, spelled):
        raise ValueError(problem)


def check_stops(stops: Sequence[str], spelled: str) -> None:
    """Refuse stop strings that are empty.

    Args:
        stops: Texts at which a continuation ends.
        spelled: Name of the option, for the message.

    Raises:
        ValueError: One is empty.
    """
    if not all(stops):
        raise ValueError(f"{spelled} has an empty text, which would end every continuation at once: leave it out")


def _contradictions(values: Dict[str, Any], vocabulary: Optional[int], grows: bool, spelled: Spelling) -> Iterator[str]:
    """Yield a sentence for each pair of values that contradict each other."""

    def given(option: str) -> str:
        return spelled(option, values[option])

    for option in ("beam", "sampling_topk"):
        symbols = math.inf if vocabulary is None else vocabulary - (option == "beam")  # padding is never chosen
        if values.get(option, 1) > symbols:
            yield f"{given(option)} is more than the {symbols:,} symbols that can be chosen: lower it"
    draws = [option for option in ("sampling_topk", "sampling_topp") if values.get(option, -1) > 0]
    if draws and not values["sampling"]:
        yield f"{given(draws[0])} chooses among samples: set {spelled('sampling', True)}"
    if len(draws) == 2:
        yield f"{given(draws[0])} and {given(draws[1])} are two ways to choose samples: leave one out"
    if values.get("nbest", 1) > values.get("beam", 1):
        beam = spelled("beam")
        yield f"{given('nbest')} is more than the {values['beam']} hypotheses of {beam}: raise {beam}"
    if not grows and values.get("min_len", 0) > values.get("max_len_b", math.inf):
        yield f"{given('min_len')} is more than {given('max_len_b')} new tokens: raise {spelled('max_len_b')}"


def _finite_above_0(value: float) -> bool:
    return 0 < value < math.inf


_DEFAULTS = {"beam": 5, "nbest": 1, "max_len_b": 200, "min_len": 1, "sampling": False}

# The condition on each option's value, and the words for a value that does not hold it.
_LIMITS: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        _finite_above_0,
        "is not above 0 and finite: for the likeliest token use a beam of 1 without sampling",
    ),
    "repetition_penalty": (_finite_above_0, "is not above 0 and finite: set 1 for no penalty"),
    "beam": (lambda value: value >= 1, "is less than one hypothesis: raise it"),
    "nbest": (lambda value: value >= 1, "is less than one hypothesis: raise it"),
    "sampling_topk": (lambda value: value >= -1, "is negative: set -1 for all tokens"),
    "sampling_topp": (lambda value: value == -1 or 0 < value <= 1, "is not above 0 and at most 1: set -1 for all"),
    "max_len_b": (lambda value: value >= 0, "is negative: raise it"),
    "min_len": (lambda value: value >= 0, "is negative: set it to 0 or more"),
    "no_repeat_ngram_size": (lambda value: value >= 0, "is negative: set 0 for no limit"),
    "lenpen": (math.isfinite, "is not a finite number: set 1 for the mean over tokens"),
    "unkpen": (math.isfinite, "is not a finite number: set 0 for no penalty"),
}
