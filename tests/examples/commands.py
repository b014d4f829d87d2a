"""Commands of the examples, run as a reader runs them: from the root of the clone."""

import subprocess
import sys

from tests.repository import ROOT


def run_example(module: str, *arguments) -> subprocess.CompletedProcess:
    """Run ``python -m examples.MODULE``.

    Args:
        module: Name of the module below ``examples``.
        arguments: Arguments of the command.
    """
    command = [sys.executable, "-m", f"examples.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
