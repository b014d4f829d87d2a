"""Description of the machine that a benchmark ran on, and the peak memory of its process.

python -m examples.benchmark.machine      # print the description
"""

import os
import platform
import resource
import sys
from pathlib import Path
from typing import Dict

import torch

from examples.benchmark.tables import bullet_list


def describe_machine() -> Dict[str, str]:
    """Return what timings depend on: processor, accelerator and versions of the libraries."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    description = {
        "cpu": _processor(),
        "cores": str(cores),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = str(torch.version.cuda)
    for name in ("faiss", "triton", "fairseq"):
        try:
            description[name] = __import__(name).__version__
        except ImportError:
            description[name] = "not installed"
    return description


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_resident() -> int:
    """Return the peak resident memory of this process so far, in bytes.

    ``ru_maxrss`` starts at the peak of the parent process, so on Linux the value is read from ``/proc`` instead.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(*bullet_list(describe_machine()), sep="\n")
