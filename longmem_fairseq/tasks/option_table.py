"""The commands in which each option of the task acts; in all others it is refused.

Options of other groups that the task reads (``--batch-size``, ``--path``...) are not in the table.
"""

from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

from fairseq.dataclass import FairseqDataclass

TRAIN, VALIDATE, EVAL_LM = "fairseq-train", "fairseq-validate", "fairseq-eval-lm"
GENERATE, INTERACTIVE = "fairseq-generate", "fairseq-interactive"
COMMANDS = (TRAIN, VALIDATE, EVAL_LM, GENERATE, INTERACTIVE)  # fairseq-hydra-train is fairseq-train


class OptionUse(NamedTuple):
    """Where an option acts.

    Attributes:
        commands: Commands in which it acts.
        otherwise: Reason why it does not act elsewhere, and what to do instead.
    """

    commands: Tuple[str, ...]
    otherwise: str = ""


_SPLITS, _PROMPTS = (TRAIN, VALIDATE, EVAL_LM), (GENERATE, INTERACTIVE)
_RESUMING = OptionUse((TRAIN,), "no training is continued; leave it out")
_GIVEN_MEMORY = OptionUse(
    (EVAL_LM, *_PROMPTS), "memories start empty; evaluate a split behind a given memory with fairseq-eval-lm"
)
_UNPADDED = OptionUse((), "segments are padded only at a document's end; leave it out")
_NEXT_TOKEN = OptionUse((), "the target is always the next token; leave it out")

TABLE: Dict[str, OptionUse] = {
    "data": OptionUse(COMMANDS),
    "tokens_per_sample": OptionUse(COMMANDS),
    "data_no_shuffle": OptionUse(_SPLITS, "prompts are not shuffled; leave it out"),
    "memory_scope": OptionUse(_SPLITS, "each prompt has a memory of its own; leave it out"),
    "memory_snapshot": _RESUMING,
    "resume_memory": _RESUMING,
    "memory_text": _GIVEN_MEMORY,
    "memory_load": _GIVEN_MEMORY,
    "memory_save": OptionUse(
        (EVAL_LM, *_PROMPTS), "no document is memorized by name; save a memory with fairseq-interactive"
    ),
    "memory_save_dtype": OptionUse((EVAL_LM, *_PROMPTS), "no memory is saved; leave it out"),
    "memorize_turns": OptionUse(_PROMPTS, "there are no prompts and answers; leave it out"),
    "prompt_tokens": OptionUse((GENERATE,), "it cuts the prompts of fairseq-generate from documents; leave it out"),
    "stop": OptionUse(_PROMPTS, "no text is generated; leave it out"),
    "repetition_penalty": OptionUse(_PROMPTS, "no text is generated; leave it out"),
    "train_dtype": OptionUse((TRAIN,), "nothing is trained; leave it out, and set --inference-dtype"),
    "inference_dtype": OptionUse(
        (VALIDATE, EVAL_LM, *_PROMPTS),
        "it is for evaluation and generation; leave it out, and train with --train-dtype",
    ),
    "cuda_graphs": OptionUse(
        _SPLITS, "the caches of generation grow with every token, so no step has the sizes of another; leave it out"
    ),
    "future_target": OptionUse(COMMANDS),  # what is always done
    "self_target": _NEXT_TOKEN,
    "past_target": _NEXT_TOKEN,
    "max_target_positions": OptionUse((TRAIN,), "the model's positions are those of its checkpoint; leave it out"),
    "sample_break_mode": OptionUse(
        (), "segments of --tokens-per-sample tokens are cut from whole documents; leave it out"
    ),
    "output_dictionary_size": OptionUse(
        (), "the frozen backbone's output projection covers its whole dictionary; leave it out"
    ),
    "add_bos_token": OptionUse(
        (),
        "a document's first token is predicted from end-of-sentence, as in the backbone's training; leave it out",
    ),
    "shorten_method": OptionUse((), "it would drop tokens, but every token of a document is read; leave it out"),
    "shorten_data_split_list": OptionUse((), "no document is shortened; leave it out"),
    "pad_to_fixed_length": _UNPADDED,
    "pad_to_fixed_bsz": _UNPADDED,
}


def refusal(name: str, value: Any, default: Any, command: Optional[str]) -> Optional[str]:
    """Explain why an option does not act in a command.

    Args:
        name: Name of the option as a field of the task's configuration.
        value: Value of the option.
        default: Value that it has where the user does not give it.
        command: Name of the command; None where it is not known, and only what acts in no command is refused.

    Returns:
        A sentence, or None where the option acts or has its default.
    """
    use = TABLE.get(name)
    if use is None or value is None or str(value) == str(default):
        return None
    if command in use.commands or (command is None and use.commands):
        return None
    option = "--" + name.replace("_", "-")
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    shown = option if isinstance(value, bool) else " ".join(map(str, [option, *values]))
    where = f" by {command}" if use.commands else ""
    return f"{shown} is not supported{where}: {use.otherwise}"


def check_use(cfg: Any, config_class: type, command: Optional[str]) -> None:
    """Refuse options that do not act in a command.

    Args:
        cfg: Configuration of the task.
        config_class: Dataclass of the configuration.
        command: Name of the command, or None where it is not known.

    Raises:
        ValueError: An option does not act.
    """
    for name in TABLE:
        sentence = refusal(name, getattr(cfg, name), default_of(config_class, name), command)
        if sentence is not None:
            raise ValueError(sentence)


def default_of(config_class: type, name: str) -> Any:
    """Return the default of a field of a fairseq dataclass."""
    defaults: FairseqDataclass = config_class()
    return getattr(defaults, name)
