"""Join what the parts of gpu_check.sh left into report.json and report.md, and hold the figures against the targets.

python -m examples.benchmark.gpu_report WORK OUT [--tiny]
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional

from examples.benchmark.tables import lines_of, machine, table, write_json

ROOT = Path(__file__).resolve().parent.parent.parent


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
                "log": _without_places(log.read_text(errors="replace"), work).splitlines() if log.exists() else [],
                "result": json.loads(_without_places(figures.read_text(), work)) if figures.exists() else None,
            }
        )
    return found


def _without_places(text: str, work: Path) -> str:
    """A text in which directories of this machine are called by what they are."""
    for place, name in ((work, "WORK"), (ROOT, "."), (sys.prefix, "PYTHON"), (tempfile.gettempdir(), "TMP")):
        text = text.replace(str(place), name)
    return text


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


# Of the published shape: share of the speed without memory, and what the paper states against full attention.
LARGEST = 65536
SHARE_OF_OFF = {"eval": 0.90, "train": 0.85}
FULL_ATTENTION = {4096: (1.54, 0.65), 8192: (2.54, 0.25)}  # window: LongMem's speed, its memory
EXACT = 1e-3  # by how much scores may be off, of about 30
ROOFLINES = 3.0  # time of search, reading and joint attention over what the machine needs at least


def targets(found: List[Dict]) -> List[Dict]:
    """Each target beside what was found: its name, limit, figure and whether it is met."""
    rows = []

    def add(part: str, target: str, limit: float, figure: Optional[float], least: bool) -> None:
        if figure is not None:
            met = figure >= limit if least else figure <= limit
            bound = f"{'at least' if least else 'at most'} {limit:g}"
            rows.append({"part": part, "target": target, "limit": bound, "found": figure, "met": met})

    for part in found:
        result, name = part["result"], part["part"]
        if not name.startswith("throughput") or not result:
            continue
        for row in result["rows"]:
            if row["memory_size"] == LARGEST:
                least = SHARE_OF_OFF[result["options"]["mode"]]
                add(name, "65k of memory: speed of memory off", least, row.get("ratio_to_off"), True)
                if row.get("extra_ms") is not None and row.get("roofline_ms"):
                    add(name, "65k: extra time of its roofline", ROOFLINES, row["extra_ms"] / row["roofline_ms"], False)
        for row in result["full_attention"]:
            if row["window"] in FULL_ATTENTION:
                speed, memory = FULL_ATTENTION[row["window"]]
                window = f"full attention over {row['window']:,}"
                add(name, f"{window}: LongMem's speed", speed, row["speed_of_longmem"], True)
                add(name, f"{window}: LongMem's memory", memory, row["memory_of_longmem"], False)
    return rows


def fastest(found: List[Dict]) -> List[Dict]:
    """Of each number of remembered tokens, the exact search that is fastest: what the default should be."""
    results = [part["result"]["rows"] for part in found if part["part"] == "search" and part["result"]]
    # What only multiplies has no result to be off, and an approximate index is not measured by scores.
    rows = [row for result in results for row in result if row.get("worst") is not None and row["worst"] <= EXACT]
    by_size: Dict[int, Dict] = {}
    for row in sorted(rows, key=lambda row: (row["tokens"], row["milliseconds"])):
        by_size.setdefault(row["tokens"], row)
    return list(by_size.values())


def markdown(found: List[Dict], tiny: bool) -> str:
    """The report; of a tiny run it says that no figure means anything."""
    columns = {"part": "part", "status": "status", "seconds": "seconds", "limit": "limit"}
    text = ["# GPU check", ""]
    if tiny:
        text += [
            "**A tiny run, on a CPU: it shows that the commands work and how the report looks. Its figures mean "
            "nothing, and nothing here has run on a GPU.**",
            "",
        ]
    text += [*lines_of(machine()), "", table(found, columns)]
    rows = targets(found)
    if rows:
        heads = {"part": "part", "target": "target", "limit": "limit", "found": "found", "met": "met"}
        text += ["", "## Targets", "", table([{**row, "met": "yes" if row["met"] else "no"} for row in rows], heads)]
    rows = fastest(found)
    if rows:
        heads = {"tokens": "tokens", "backend": "fastest exact search", "milliseconds": "median ms"}
        text += ["", "## Which search should be the default", "", table(rows, heads)]
    return "\n".join([*text, *sections(found)]) + "\n"


def main(work: str, out: str, tiny: str = "") -> int:
    """Write the report; the exit status is 0 if all parts passed."""
    found = parts(Path(work))
    text = markdown(found, tiny == "--tiny")
    for part in found:
        part["log"] = part["log"][-60:]
    content = {"tiny": tiny == "--tiny", "machine": machine(), "targets": targets(found), "parts": found}
    write_json(str(Path(out, "report.json")), content)
    part = Path(out, "report.md.part")
    part.write_text(text)
    os.replace(part, Path(out, "report.md"))
    print(text, end="")
    return int(any(part["status"] != "passed" for part in found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
