"""Report of gpu_check.sh: join the results of its parts into report.json and report.md, and compare them with targets.

python -m examples.benchmark.gpu_report WORK OUT [--tiny]
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional

from examples.benchmark.machine import describe_machine
from examples.benchmark.tables import bullet_list, table
from longmem_fairseq.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent.parent


def read_parts(work: Path) -> List[Dict]:
    """Read the result of every part.

    Args:
        work: Directory of the parts' status, log and JSON files.

    Returns:
        Name, status, seconds, time limit, log lines and figures of each part, in the order in which they ended.
    """
    parts = []
    for file in sorted(work.glob("*.status"), key=lambda file: file.stat().st_mtime_ns):
        status, seconds, limit = file.read_text().split()
        log, figures = file.with_suffix(".log"), file.with_suffix(".json")
        parts.append(
            {
                "part": file.stem,
                "status": {"0": "passed", "124": "too long", "137": "too long"}.get(status, status),
                "seconds": int(seconds),
                "limit": int(limit),
                "log": _without_paths(log.read_text(errors="replace"), work).splitlines() if log.exists() else [],
                "result": json.loads(_without_paths(figures.read_text(), work)) if figures.exists() else None,
            }
        )
    return parts


def _without_paths(text: str, work: Path) -> str:
    """Replace the directories of this machine in a text by names."""
    for place, name in ((work, "WORK"), (ROOT, "."), (sys.prefix, "PYTHON"), (tempfile.gettempdir(), "TMP")):
        text = text.replace(str(place), name)
    return text


def sections(parts: List[Dict]) -> List[str]:
    """Collect the tables that the parts printed; for a part that failed or printed none, the end of its log."""
    text = []
    for part in parts:
        lines, name = part["log"], part["part"]
        tables = [i for i, line in enumerate(lines) if line.startswith(("## ", "|"))]
        if part["status"] == "passed" and tables:
            text += ["", *lines[tables[0] : tables[-1] + 1]]
            text += lines[tables[-1] + 1 : tables[-1] + 3] if "throughput" in name else []
        else:
            length = {"passed": 8}.get(part["status"], 40)
            text += ["", f"## {name}: {part['status']}", "", "```", *(line[:300] for line in lines[-length:]), "```"]
    return text


# Targets at the published shape: share of the speed without memory, and the paper's figures against full attention.
LARGEST = 65536
SHARE_OF_OFF = {"eval": 0.90, "train": 0.85}
FULL_ATTENTION = {4096: (1.54, 0.65), 8192: (2.54, 0.25)}  # window: LongMem's speed, its memory
EXACT = 1e-3  # largest error of scores, which are about 30
ROOFLINES = 3.0  # largest time of search, reading and joint attention, in multiples of the machine's least time


def targets(parts: List[Dict]) -> List[Dict]:
    """Compare figures with their targets.

    Args:
        parts: Parts, as ``read_parts`` returns them.

    Returns:
        Part, name, limit and figure of each target, and whether it is met.
    """
    rows = []

    def add(part: str, target: str, limit: float, figure: Optional[float], least: bool) -> None:
        if figure is not None:
            met = figure >= limit if least else figure <= limit
            bound = f"{'at least' if least else 'at most'} {limit:g}"
            rows.append({"part": part, "target": target, "limit": bound, "found": figure, "met": met})

    for part in parts:
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


def fastest(parts: List[Dict]) -> List[Dict]:
    """Choose the fastest exact search for each number of tokens in memory: it should be the default."""
    results = [part["result"]["rows"] for part in parts if part["part"] == "search" and part["result"]]
    # The product alone has no result to compare, and an approximate index is not judged by scores.
    rows = [row for result in results for row in result if row.get("worst") is not None and row["worst"] <= EXACT]
    by_size: Dict[int, Dict] = {}
    for row in sorted(rows, key=lambda row: (row["tokens"], row["milliseconds"])):
        by_size.setdefault(row["tokens"], row)
    return list(by_size.values())


def markdown(parts: List[Dict], tiny: bool) -> str:
    """Format the report in Markdown.

    Args:
        parts: Parts, as ``read_parts`` returns them.
        tiny: If true, the report warns that its figures mean nothing.
    """
    columns = {"part": "part", "status": "status", "seconds": "seconds", "limit": "limit"}
    text = ["# GPU check", ""]
    if tiny:
        text += [
            "**A tiny run, on a CPU: it shows that the commands work and how the report looks. Its figures mean "
            "nothing, and nothing here has run on a GPU.**",
            "",
        ]
    text += [*bullet_list(describe_machine()), "", table(parts, columns)]
    rows = targets(parts)
    if rows:
        heads = {"part": "part", "target": "target", "limit": "limit", "found": "figure", "met": "met"}
        text += ["", "## Targets", "", table([{**row, "met": "yes" if row["met"] else "no"} for row in rows], heads)]
    rows = fastest(parts)
    if rows:
        heads = {"tokens": "tokens", "backend": "fastest exact search", "milliseconds": "median ms"}
        text += ["", "## Which search should be the default", "", table(rows, heads)]
    return "\n".join([*text, *sections(parts)]) + "\n"


def main(work: str, out: str, tiny: str = "") -> int:
    """Write the report.

    Args:
        work: Directory of the parts' status, log and JSON files.
        out: Directory of the report.
        tiny: ``--tiny`` for a run on tiny shapes.

    Returns:
        Exit status of the command, 0 if all parts passed.
    """
    parts = read_parts(Path(work))
    text = markdown(parts, tiny == "--tiny")
    for part in parts:
        part["log"] = part["log"][-60:]
    content = {"tiny": tiny == "--tiny", "machine": describe_machine(), "targets": targets(parts), "parts": parts}
    write_json(Path(out, "report.json"), content)
    write_text(Path(out, "report.md"), text)
    print(text, end="")
    return int(any(part["status"] != "passed" for part in parts))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
