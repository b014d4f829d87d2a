"""The arguments of a model in lm-evaluation-harness: their checks, and the scorer that they load."""

import re
from typing import Any, Dict, List, Optional, Tuple, Union

from ..evaluation.scoring.scorer import Scorer
from ..evaluation.scoring.systems import BACKBONE, OFF, ON

SYSTEMS = {"memory": ON, "off": OFF, "backbone": BACKBONE}
AUTO = "auto"
_OF_MEMORY = ("memory_size", "k", "chunk_size")
_RENAMED = {"tokens_per_sample": "max_length"}
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "num_beams"}
_LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens")  # other names of max_gen_toks


def load_scorer(path: str, data: Optional[str], system: Optional[str], window: Any, settings: Dict[str, Any]) -> Scorer:
    """Load a model that scores with one system.

    Args:
        path: Path of a checkpoint, of a directory of checkpoints, or of a model directory.
        data: Directory of the dictionary and the tokenizer; None for the checkpoint's.
        system: Name in :data:`SYSTEMS`; None for the memory of a model that has one, or for a backbone alone.
        window: Number of tokens of a window, T; None for the checkpoint's.
        settings: Settings in place of the checkpoint's, and ``device`` and ``backbone``; None keeps the checkpoint's.

    Returns:
        A scorer that skips all other systems, and gives no probability to symbols that a conversion added.

    Raises:
        ValueError: An argument does not fit the model, or the others.
        FileNotFoundError: The checkpoint or the dictionary is missing.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if system is not None and system not in SYSTEMS:
        raise ValueError(f"system={system} is unknown: choose {', '.join(SYSTEMS)}")
    for name in (*_OF_MEMORY, "max_length"):
        value = window if name == "max_length" else settings.get(name)
        least = 0 if name == "memory_size" else 1
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name}={value} is not a number of tokens from {least} on: change it")
    given = [name for name in _OF_MEMORY if settings.get(name)]
    if system in ("off", "backbone"):
        if given:
            raise ValueError(
                f"{name_of(settings, given[0])} acts on the memory, which system={system} does not read: "
                "leave it out, or set system=memory"
            )
        settings["memory_size"] = 0
    if system == "memory" and settings.get("memory_size") == 0:
        raise ValueError("system=memory contradicts memory_size=0: raise it, or set system=off")
    try:
        scorer = Scorer.load(str(path), data, tokens_per_sample=window, **settings)
    except ValueError as error:
        raise ValueError(_in_argument_names(str(error))) from error
    if scorer.decoder is None and (given or system in ("memory", "off")):
        argument = name_of(settings, given[0]) if given else f"system={system}"
        raise ValueError(f"{argument} needs a LongMem, and {path} is a backbone alone: leave it out")
    if system == "memory" and not scorer.has_memory:
        raise ValueError(f"{path} was saved with its memory off: give memory_size, or set system=off")
    kept = SYSTEMS[system] if system is not None else scorer.systems[-1]
    scorer.skipped = frozenset({BACKBONE, OFF, ON} - {kept})
    scorer.excluded = scorer.added_symbols.symbols.to(scorer.device)
    return scorer


def name_of(settings: Dict[str, Any], name: str) -> str:
    """Spell a setting as an argument of ``--model_args``."""
    return f"{name}={settings[name]}"


def _in_argument_names(message: str) -> str:
    """Spell the options in a message as arguments of ``--model_args``."""

    def argument(option: "re.Match[str]") -> str:
        name = option[1].replace("-", "_")
        return _RENAMED.get(name, name)

    return re.sub(r"--([a-z][a-z-]*)", argument, message)


def rows_at_once(batch_size: Union[int, str, None], max_batch_size: Optional[int]) -> Optional[int]:
    """Return the largest number of texts that are read side by side; None to count by tokens.

    Args:
        batch_size: Number of texts, or ``auto``.
        max_batch_size: The harness's limit of ``auto``.

    Raises:
        ValueError: A value is not supported.
    """
    if max_batch_size is not None:
        raise ValueError(
            f"max_batch_size={max_batch_size} is not supported, since batch_size=auto counts tokens: leave it out"
        )
    if batch_size in (None, AUTO):
        return None
    if not str(batch_size).isdigit() or not int(batch_size):
        raise ValueError(f"batch_size={batch_size} is neither a number from 1 on nor auto: change it")
    return int(batch_size)


class GenerationArguments:
    """The arguments of one request of ``generate_until``.

    Args:
        arguments: Arguments of the task, and of ``--gen_kwargs``.
        default_length: Largest number of new tokens where the arguments do not tell.

    Attributes:
        stops: Texts at which a continuation ends.
        max_new_tokens: Largest number of new tokens.
        sampling: ``top_k`` and ``top_p`` of drawn tokens, -1 for no limit; None where the likeliest are searched for.
        options: Options of fairseq's generator.

    Raises:
        ValueError: An argument is not supported, or out of range.
    """

    def __init__(self, arguments: Dict[str, Any], default_length: int):
        values = dict(arguments)
        for name in _LENGTHS:
            if name in values:
                values.setdefault("max_gen_toks", values.pop(name))
        unknown = sorted(set(values) - _GENERATION)
        if unknown:
            raise ValueError(
                f"{name_of(values, unknown[0])} is not supported in generation: leave it out, or choose among "
                f"{', '.join(sorted(_GENERATION))}"
            )
        until = values.get("until") or []
        self.stops: List[str] = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        self.max_new_tokens = _number(values, "max_gen_toks", default_length, (1, None), int)
        temperature = float(_number(values, "temperature", 0.0, (0, None), float))
        draws = bool(values.get("do_sample", temperature > 0))
        beam = _number(values, "num_beams", 1, (1, None), int)
        if draws and not temperature:
            raise ValueError("do_sample=True needs temperature above 0: give it, or leave do_sample out")
        if draws and beam > 1:
            raise ValueError(f"num_beams={beam} contradicts do_sample=True: leave one out")
        top_k = _number(values, "top_k", 0, (-1, None), int) or -1
        top_p = _number(values, "top_p", 1.0, (0, 1), float)
        if draws and top_k > 0 and top_p < 1:
            raise ValueError(f"top_k={top_k} and top_p={top_p} are two ways to choose samples: leave one out")
        self.sampling: Optional[Tuple[int, float]] = (top_k, top_p if top_p < 1 else -1.0) if draws else None
        self.options = {"beam_size": beam, "temperature": temperature if draws else 1.0}


def _number(values: Dict[str, Any], name: str, default: float, limits: Tuple[float, Optional[float]], kind: type):
    """Return an argument of generation as a number within its limits."""
    value = values.get(name)
    if value is None:
        return default
    low, high = limits
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value < low or (high is not None and value > high):
        raise ValueError(
            f"{name}={value} is not {'a whole number' if kind is int else 'a number'} from {low} "
            f"{'on' if high is None else f'to {high}'}: change it"
        )
    return kind(value)
