"""Join what the parts of gpu_check.sh left into report.json and report.md.

    python -m examples.benchmark.gpu_report WORK OUT
"""

import json
import os
import sys
from pathlib import Path
from typing import Dict, List

from examples.benchmark.report import lines_of, machine, table, write_json


def parts(work: Path) -> List[Dict]:
    """Every part in the order in which they ended: its name, status, seconds, last lines and figures."""
    found = []
    for file in sorted(work.glob("*.status"), key=lambda file: file.stat().st_mtime_ns):
        status, seconds, limit = file.read_text().split()
        log, figures = file.with_suffix(".log"), file.with_suffix(".json")
        found.append(
            {
                "part": file.stem,
                "status": {"0": "passed", "124": "too long", "137": "too long"}.get(status, status),
                "seconds": int(seconds),
                "limit": int(limit),
                "log": log.read_text(errors="replace").splitlines() if log.exists() else [],
                "result": json.loads(figures.read_text()) if figures.exists() else None,
            }
        )
    return found


def sections(found: List[Dict]) -> List[str]:
    """The tables that parts printed, the ends of the logs of those that print none or failed."""
    text = []
    for part in found:
        lines, name = part["log"], part["part"]
        tables = [i for i, line in enumerate(lines) if line.startswith(("## ", "|"))]
        if part["status"] == "passed" and tables:
            text += ["", *lines[tables[0] : tables[-1] + 1]]
            text += lines[tables[-1] + 1 : tables[-1] + 3] if "throughput" in name else []
        else:
            length = {"passed": 8}.get(part["status"], 40)
            text += ["", f"## {name}: {part['status']}", "", "```", *(line[:300] for line in lines[-length:]), "```"]
    return text


def main(work: str, out: str) -> int:
    found = parts(Path(work))
    summary = table(found, {"part": "part", "status": "status", "seconds": "seconds", "limit": "limit"})
    text = ["# GPU check", "", *lines_of(machine()), "", summary, *sections(found)]
    for part in found:
        part["log"] = part["log"][-60:]
    write_json(str(Path(out, "report.json")), {"machine": machine(), "parts": found})
    part = Path(out, "report.md.part")
    part.write_text("\n".join(text) + "\n")
    os.replace(part, Path(out, "report.md"))
    print("\n".join(text))
    return int(any(part["status"] != "passed" for part in found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
