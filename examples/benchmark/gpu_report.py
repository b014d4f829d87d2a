"""Report of gpu_check.sh: join the results of its parts into report.json and report.md, compare them with targets, and
keep what each part printed in logs/.

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
            text += lines[tables[-1] + 1 : tables[-1] + 3] if name.startswith(("throughput", "profile")) else []
        else:
            length = {"passed": 8}.get(part["status"], 40)
            text += ["", f"## {name}: {part['status']}", "", "```", *(line[:300] for line in lines[-length:]), "```"]
    return text


# Targets at the published shape, by mode and number of lanes.
SHARE_OF_OFF = {("eval", 8): 0.92, ("train", 8): 0.90, ("eval", 1): 0.90, ("train", 1): 0.90}  # with 65,536 tokens
SHARE_WITH_A_MILLION = 0.75
ROOFLINE_SHARE = {("eval", 8): 0.55, ("train", 8): 0.50, ("generate", 1): 1 / 1.5}  # without memory
ONE_LANE = {"alibi": 3 * 62732, "learned": 3 * 86781}  # tokens/s without memory: three times those of the first run
CONTEXT = "context:65536", 4.0, 0.25  # LongMem's speed and memory beside full attention to as many tokens
SEARCH = {65536: 0.4, 1048576: 3.0}  # ms of the fastest exact search
EXACT = 1e-3  # largest error of scores, which are about 30


class Targets:
    """Figures beside their targets.

    Attributes:
        rows: Part, name, limit and figure of each target, and whether it is met.
    """

    def __init__(self):
        self.rows: List[Dict] = []

    def add(self, part: str, target: str, limit: float, figure: Optional[float], least: bool = True) -> None:
        """Compare a figure with its limit; None is left out."""
        if figure is None:
            return
        met = figure >= limit if least else figure <= limit
        bound = f"{'at least' if least else 'at most'} {limit:,.3g}"
        self.rows.append({"part": part, "target": target, "limit": bound, "found": figure, "met": met})

    def add_throughput(self, part: str, result: Dict) -> None:
        """Compare the figures of a throughput: the best of those with and without CUDA graphs."""
        options = result["options"]
        shape = options["mode"], options["batch"]
        shares = {65536: SHARE_OF_OFF.get(shape), 1048576: SHARE_WITH_A_MILLION}
        best: Dict[int, Dict] = {}
        for row in result["rows"]:
            other = best.setdefault(row["memory_size"], row)
            if row["tokens_per_second"] > other["tokens_per_second"]:
                best[row["memory_size"]] = row
        off = best.get(0)
        for size, row in best.items():
            if off is not None and shares.get(size) is not None:
                share = row["tokens_per_second"] / off["tokens_per_second"]
                self.add(part, f"{size:,} tokens of memory: speed of memory off", shares[size], share)
        if off is not None and shape in ROOFLINE_SHARE:
            self.add(part, "memory off: share of the roofline", ROOFLINE_SHARE[shape], off["roofline_share"])
        if off is not None and shape == ("eval", 1):
            speed = ONE_LANE[options["positions"]]
            self.add(part, "memory off: tokens/s", speed, off["tokens_per_second"])
        for row in result["full_attention"]:
            if row["attention"] == CONTEXT[0]:
                name = f"full attention to {int(CONTEXT[0].split(':')[1]):,} tokens: LongMem's"
                self.add(part, f"{name} speed", CONTEXT[1], row["speed_of_longmem"])
                self.add(part, f"{name} memory", CONTEXT[2], row["memory_of_longmem"], least=False)


def targets(parts: List[Dict]) -> List[Dict]:
    """Compare figures with their targets.

    Args:
        parts: Parts, as ``read_parts`` returns them.

    Returns:
        Part, name, limit and figure of each target, and whether it is met.
    """
    compared = Targets()
    for part in parts:
        if part["part"].startswith("throughput") and part["result"]:
            compared.add_throughput(part["part"], part["result"])
    for row in fastest(parts):
        if row["tokens"] in SEARCH:
            name = f"exact search in {row['tokens']:,} tokens, ms a lane"
            compared.add("search", name, SEARCH[row["tokens"]], row["milliseconds"], least=False)
    return compared.rows


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
    Path(out, "logs").mkdir(exist_ok=True)
    for part in parts:
        write_text(Path(out, "logs", f"{part['part']}.log"), "\n".join(part["log"]) + "\n")
        part["log"] = part["log"][-60:]
    content = {"tiny": tiny == "--tiny", "machine": describe_machine(), "targets": targets(parts), "parts": parts}
    write_json(Path(out, "report.json"), content)
    write_text(Path(out, "report.md"), text)
    print(text, end="")
    return int(any(part["status"] != "passed" for part in parts))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
