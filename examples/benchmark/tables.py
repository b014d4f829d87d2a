"""What the benchmarks share: the machine in words, tables in Markdown, files that are written whole."""

import json
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Callable, Dict, List, Sequence

import torch


def machine() -> Dict[str, str]:
    """What figures depend on: processor, accelerator, versions."""
    found = {
        "cpu": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    for name in ("faiss", "triton", "fairseq"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_resident() -> int:
    """Peak resident memory of this process so far, in bytes.

    ``ru_maxrss`` begins with the peak of the process that started this one, so Linux is asked for its own.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(rows: Sequence[Dict[str, object]], columns: Dict[str, str]) -> str:
    """Rows as a Markdown table; ``columns`` gives each key's heading, absent values are left blank."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --: |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |")
    return "\n".join(lines)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: str, content: Dict) -> None:
    """Write a JSON file whole or not at all."""
    part = f"{path}.part"
    Path(part).write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def save_plot(path: str, draw: Callable) -> None:
    """Write a PNG of what ``draw`` puts into a pair of axes, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    draw(axes)
    figure.tight_layout()
    figure.savefig(f"{path}.part", format="png", dpi=120)
    plt.close(figure)
    os.replace(f"{path}.part", path)


def stop(message: str) -> None:
    """End the program with one sentence."""
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def lines_of(description: Dict[str, str]) -> List[str]:
    """A description, one Markdown list item an entry."""
    return [f"* {key}: {value}" for key, value in description.items()]


if __name__ == "__main__":
    print(*lines_of(machine()), sep="\n")
