"""Options on fairseq's command lines: which of them the user gave, and which the command does not support."""

import argparse
from typing import Any, Dict

from .option_table import EVAL_LM, GENERATE, INTERACTIVE, TRAIN, VALIDATE, refusal

# Options that only one command has, or it and those above it.
_MARKS = (("context_window", EVAL_LM), ("buffer_size", INTERACTIVE), ("beam", GENERATE), ("model_overrides", VALIDATE))
_FLAGS: Dict[str, Dict[str, Any]] = {
    "store_true": {"nargs": 0, "const": True},
    "store_false": {"nargs": 0, "const": False},
}
# fairseq's parser would take a list in one word.
_REPEATABLE = {option: {"repeatable": True, "type": str} for option in ("--memory-text", "--stop")}


def command_of(parser) -> str:
    """Return the name of the fairseq command that a parser belongs to.

    Args:
        parser: Parser of an ``argparse`` command line, with the command's own options.
    """
    return next((command for option, command in _MARKS if parser.get_default(option) is not None), TRAIN)


class ExplicitOption(argparse.Action):
    """An option that is refused where it does not act, and otherwise listed in ``explicit_options``.

    A default and a value that the user gave cannot be told apart afterwards.

    Args:
        arguments: Arguments of :class:`argparse.Action`.
        command: Name of the fairseq command.
        repeatable: Whether the option may be given several times, each time with one value of a list.
        options: Further arguments of :class:`argparse.Action`.
    """

    def __init__(self, *arguments, command: str, repeatable: bool = False, **options):
        super().__init__(*arguments, **options)
        self.command, self.repeatable = command, repeatable
        self.unset = self.default  # fairseq-validate removes defaults from its parser

    def __call__(self, parser, namespace, values, option_string=None):
        value = self.const if self.nargs == 0 else values
        if self.repeatable:
            value = [*(getattr(namespace, self.dest, None) or []), value]
        sentence = refusal(self.dest, value, self.unset, self.command)
        if sentence is not None:
            parser.exit(2, f"{parser.prog}: error: {sentence}\n")
        setattr(namespace, self.dest, value)
        earlier = getattr(namespace, "explicit_options", None) or []
        namespace.explicit_options = sorted({*earlier, self.dest})


class ExplicitOptions:
    """A parser to which fairseq adds a task's options, so that each is an :class:`ExplicitOption`.

    Args:
        parser: Parser of the command line.
    """

    def __init__(self, parser):
        self.parser, self.command = parser, command_of(parser)
        parser.set_defaults(fairseq_command=self.command)

    def add_argument(self, *names: str, **options: Any) -> None:
        """Add an option as :meth:`argparse.ArgumentParser.add_argument` does; what this class sets is not an option."""
        if names[0] in ("--explicit-options", "--fairseq-command"):
            return
        if names[0].startswith("--"):
            options.update(_FLAGS.get(options.pop("action", None), {}))
            options.update(action=ExplicitOption, command=self.command, **_REPEATABLE.get(names[0], {}))
        self.parser.add_argument(*names, **options)
