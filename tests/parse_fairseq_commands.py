"""Let fairseq's own parsers read command lines without running them; a process of its own, since parsers register.

Standard input: a JSON list of command lines, each a list of words. Standard output: a JSON list of the same length with
the parser's complaint, or null.
"""

import contextlib
import io
import json
import sys

from fairseq import options

PARSERS = {
    "fairseq-train": options.get_training_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-preprocess": options.get_preprocessing_parser,
}


def complaint(command):
    """Return the complaint of a command line's parser, or None where it accepts the command."""
    if command[0] not in PARSERS:
        return f"{command[0]} is not one of {', '.join(PARSERS)}"
    sys.argv = command  # fairseq looks for --user-dir there while it makes the parser
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            parser = PARSERS[command[0]]()
            if command[0] == "fairseq-preprocess":
                parser.parse_args()
            else:
                options.parse_args_and_arch(parser)
        except SystemExit as exit_:
            return output.getvalue()[-500:] if exit_.code else None
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    print(json.dumps([complaint(command) for command in json.load(sys.stdin)]))
