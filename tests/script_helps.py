"""Print the help of several scripts from one process, so that they share the seconds of importing torch and fairseq.

Standard input: a JSON list of module names. Standard output: a JSON object from each name to its exit status and its
output with ``--help``.
"""

import contextlib
import io
import json
import runpy
import sys
import traceback


def help_of(module):
    """Return the exit status and the output of ``python -m module --help``."""
    sys.argv = [module, "--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exit_:
            return exit_.code or 0, output.getvalue()
        except Exception:
            return 1, output.getvalue() + traceback.format_exc()
    return 0, output.getvalue()


if __name__ == "__main__":
    modules = json.load(sys.stdin)
    print(json.dumps({module: help_of(module) for module in modules}))
