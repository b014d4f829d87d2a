"""Conversations of several sessions: MSC, MiSC, LoCoMo, Conversation Chronicles, or our JSON lines."""

import re
from typing import Any, Dict, Iterable, List, NamedTuple, Optional

from ..files import parse_json
from .records import read_file, text_of

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")  # sessions of Conversation Chronicles and MiSC


class Turn(NamedTuple):
    """An utterance.

    Attributes:
        speaker: Name of the speaker.
        text: Text of the utterance, on one line.
    """

    speaker: str
    text: str


class Session(NamedTuple):
    """A part of a conversation without a break.

    Attributes:
        turns: Utterances, in order.
        when: Date of the session, or time since the session before; None if unknown.
    """

    turns: List[Turn]
    when: Optional[str] = None


class Conversation(NamedTuple):
    """A conversation of several sessions.

    Attributes:
        name: Name of the conversation.
        sessions: Sessions in order, of the same speakers or, in MiSC, of one speaker with several partners.
    """

    name: str
    sessions: List[Session]


def read_conversations(path: str) -> List[Conversation]:
    """Read the conversations of a file; its keys tell the layout.

    The layouts are

    * ours: ``id``, ``sessions`` of ``turns`` of ``speaker`` and ``text``;
    * MSC (ParlAI's ``session_N/*.txt``): ``previous_dialogs``, ``dialog``, ``metadata``;
    * LoCoMo (``locomo10.json``): ``sample_id``, ``conversation`` of ``session_1``, ``session_1_date_time``...;
    * Conversation Chronicles: ``dataID``, ``time_interval``, ``first_session_dialogue``,
      ``first_session_speakers``...;
    * MiSC: ``main_speaker``, ``first_session_dialogue``..., each a list of speakers and a list of their utterances.

    Args:
        path: Path of a JSON file, or of JSON lines with one conversation each.

    Raises:
        ValueError: The file has none of these layouts, or two conversations of one name.
    """
    text = read_file(path)
    conversations: List[Conversation] = []
    try:
        rows = parse_json(text) if text.lstrip().startswith("[") else map(parse_json, filter(None, text.split("\n")))
        for row in rows:
            conversations.append(_read(row, len(conversations)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path}, conversation {len(conversations) + 1}, has no known layout (MSC, MiSC, LoCoMo, Conversation "
            "Chronicles, or lines of id and sessions)"
        ) from error
    names = [conversation.name for conversation in conversations]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{path} has two conversations of the name {repeated[0]}: rename one")
    return conversations


def _read(row: Dict[str, Any], number: int) -> Conversation:
    if "sessions" in row:
        sessions = [Session(_turns(x["turns"]), x.get("since_previous") or x.get("date_time")) for x in row["sessions"]]
        name = row["id"]
    elif "previous_dialogs" in row:
        name, sessions = row["metadata"]["initial_data_id"], _msc(row)
    elif "conversation" in row:
        name, sessions = row["sample_id"], _locomo(row["conversation"])
    elif "main_speaker" in row:
        name, sessions = row.get("dataID", row.get("id", str(number))), _misc(row)
    else:
        name, sessions = row.get("dataID", str(number)), _chronicles(row)
    return Conversation(str(name), [session for session in sessions if session.turns])


def _turns(rows: Iterable[Dict[str, Any]]) -> List[Turn]:
    turns = []
    for row in rows:
        caption = row.get("image_caption") or row.get("blip_caption")
        text = " ".join(filter(None, [row["text"].strip(), f"(shows {caption.strip()})" if caption else None]))
        turns.append(Turn(text_of(row["speaker"]), " ".join(text.split())))  # a turn is one line
    return [turn for turn in turns if turn.text]


def _msc(row: Dict[str, Any]) -> List[Session]:
    """Return the sessions before, where speakers take turns, and the session of the file."""

    def alternating(lines: List[Dict[str, Any]]) -> List[Turn]:
        speakers = [line.get("id", f"Speaker {i % 2 + 1}") for i, line in enumerate(lines)]
        return _turns({"speaker": speaker, "text": line["text"]} for speaker, line in zip(speakers, lines))

    previous, times = row["previous_dialogs"], [None]
    # Each one's time is that before the *next* session.
    times += [f"{x['time_num']} {x['time_unit']} later" if "time_num" in x else None for x in previous]
    dialogs = [x["dialog"] for x in previous] + [row["dialog"]]
    return [Session(alternating(dialog), time) for dialog, time in zip(dialogs, times)]


def _locomo(conversation: Dict[str, Any]) -> List[Session]:
    numbers = sorted(int(key[8:]) for key in conversation if re.fullmatch(r"session_\d+", key))
    return [Session(_turns(conversation[f"session_{n}"]), conversation.get(f"session_{n}_date_time")) for n in numbers]


def _chronicles(row: Dict[str, Any]) -> List[Session]:
    sessions = []
    for i, ordinal in enumerate(_ORDINALS):
        if f"{ordinal}_session_dialogue" in row:
            rows = zip(row[f"{ordinal}_session_speakers"], row[f"{ordinal}_session_dialogue"])
            turns = _turns({"speaker": speaker, "text": text} for speaker, text in rows)
            sessions.append(Session(turns, row["time_interval"][i] if i else None))
    if not sessions:
        raise KeyError("no session")
    return sessions


def _misc(row: Dict[str, Any]) -> List[Session]:
    """Return the sessions of the main speaker, each with one of the partners."""
    sessions = []
    for ordinal in _ORDINALS:
        if f"{ordinal}_session_dialogue" in row:
            speakers, texts = row[f"{ordinal}_session_dialogue"]
            if len(speakers) != len(texts):
                raise ValueError(f"{len(speakers)} speakers of {len(texts)} utterances")
            sessions.append(Session(_turns({"speaker": x, "text": text} for x, text in zip(speakers, texts))))
    if not sessions:
        raise KeyError("no session")
    return sessions
