"""Generated responses of two systems as a file for a judge, who must not know which is whose."""

import json
import random
from typing import Dict, List, NamedTuple, Sequence

from ..files import parse_json
from .records import read_file, text_of, texts_of

JUDGED, JUDGED_KEY = "judge.jsonl", "judge_key.jsonl"
_SEED = 0


class JudgedPair(NamedTuple):
    """Two responses to one dialogue.

    Attributes:
        id: Name of the pair.
        dialogue: Text of the dialogue so far, a line per utterance.
        speaker: Name of the speaker who responds.
        responses: Response by system.
        reference: True response.
    """

    id: str
    dialogue: str
    speaker: str
    responses: Dict[str, str]
    reference: str


def as_lines(pairs: Sequence[JudgedPair]) -> Dict[str, str]:
    """Return the contents of the judge's file and of the key to it, JSON lines, by file name.

    The order of two responses is drawn by the pair's name, so that it stays the same from run to run.

    Args:
        pairs: Pairs to judge.
    """
    lines: Dict[str, List[str]] = {JUDGED: [], JUDGED_KEY: []}
    for pair in pairs:
        systems = sorted(pair.responses)
        random.Random(f"{_SEED} {pair.id}").shuffle(systems)
        judged = {
            "id": pair.id,
            "dialogue": pair.dialogue,
            "speaker": pair.speaker,
            "responses": [pair.responses[system] for system in systems],
            "reference": pair.reference,
        }
        for name, row in ((JUDGED, judged), (JUDGED_KEY, {"id": pair.id, "systems": systems})):
            lines[name].append(json.dumps(row, ensure_ascii=False) + "\n")
    return {name: "".join(rows) for name, rows in lines.items()}


def read_pairs(path: str, key_path: str) -> List[JudgedPair]:
    """Read the files of :func:`as_lines`; the responses of a pair are in the order of the judge's file.

    Args:
        path: Path of the judge's file.
        key_path: Path of the key to it.

    Raises:
        ValueError: A file is not one of these, or the key is another's.
        OSError: A file cannot be read.
    """
    systems = {}
    for row in _rows(key_path):
        systems[row["id"]] = row["systems"]
    pairs = []
    for row in _rows(path):
        if row["id"] not in systems:
            raise ValueError(f"{key_path} does not have {row['id']}, which {path} has: name the key of the same run")
        responses = dict(zip(systems[row["id"]], row["responses"]))
        pairs.append(JudgedPair(row["id"], row["dialogue"], row["speaker"], responses, row["reference"]))
    if not pairs:
        raise ValueError(f"{path} has no responses: generate some with --generate last or all")
    return pairs


_TEXTS = ("id", "dialogue", "speaker", "reference")  # entries of a line that must be text
_LISTS = ("responses", "systems")  # entries that must be two texts


def _rows(path: str) -> List[Dict]:
    """Return the lines of a file, whose known entries have their types."""
    rows = []
    for number, line in enumerate(filter(None, read_file(path).split("\n")), start=1):
        try:
            row = dict(parse_json(line))
            for name in _TEXTS:
                text_of(row.get(name, ""))
            for name in _LISTS:
                if len(texts_of(row.get(name, ["", ""]))) != 2:
                    raise ValueError(f"{name} are not two")
            entries = {"id", "systems"} if "systems" in row else {*_TEXTS, "responses"}
            if not entries <= set(row):
                raise KeyError(min(entries - set(row)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is not a pair of responses: {error}") from error
        rows.append(row)
    return rows
