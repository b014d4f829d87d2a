"""Dialogue of several sessions: the earlier ones in the memory, the current one in the window; what comes next?"""

from typing import Any, Dict, List

import torch
from torch import Tensor

from .base import Evaluation
from .bleu import Bleu
from .command_line import check_max_new_tokens, name_of
from .conversations import Conversation, Session, read_conversations
from .judged_pairs import JUDGED, JUDGED_KEY, JudgedPair, as_lines
from .reporting.finished_items import digest
from .reporting.statistic import PERPLEXITY
from .reporting.system_scores import SystemScores
from .reporting.table import Table, TextLoss, text_tables
from .scoring.generate import generate
from .scoring.systems import OFF, ON
from .scoring.text_state import TextState

DISTANCES = ((0, "0"), (1, "1"), (2, "2"), (3, "3"), (4, "4-7"), (8, "8-15"), (16, "16 and more"))
_EXAMPLES = 20  # in the report


class Dialogue(Evaluation):
    """Score the true responses, and generate others in their place."""

    name, title = "dialogue", "Responses in dialogues of several sessions"

    def __init__(self):
        self._memorized, self._state = (None, 0), None  # conversation and number of sessions that the state has read

    def add_arguments(self, parser) -> None:
        parser.add_argument(
            "--data",
            required=True,
            metavar="FILE",
            help="MSC, MiSC, LoCoMo, Conversation Chronicles, or our JSON lines",
        )
        parser.add_argument("--valid", metavar="FILE", help="conversations to tune the neural cache on")
        parser.add_argument(
            "--generate",
            choices=("last", "all", "none"),
            default="last",
            help="sessions whose responses are generated for BLEU: the last of each conversation, all, or none",
        )
        parser.add_argument(
            "--max-new-tokens", type=int, default=60, metavar="N", help="maximum number of tokens of a response (60)"
        )
        parser.add_argument("--beam", type=int, default=1, metavar="N", help="hypotheses (1: greedy)")

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        check_max_new_tokens(args, scorer)
        self.bleu = None if args.generate == "none" else Bleu()
        self.conversations = {c.name: c for c in read_conversations(args.data)[: args.limit]}

    def describe(self) -> Dict[str, Any]:
        return {
            "data": name_of(self.args.data),
            "data_sha256": digest([self.args.data]),
            "generate": self.args.generate,
            "max_new_tokens": self.args.max_new_tokens,
            "beam": self.args.beam,
            "valid": None if self.args.valid is None else name_of(self.args.valid),
            "sacrebleu": None if self.bleu is None else self.bleu.signature,
            "sentence_bleu": None if self.bleu is None else self.bleu.sentence_signature,
        }

    def tuning_documents(self) -> List[Tensor]:
        conversations = [] if self.args.valid is None else read_conversations(self.args.valid)
        return [self._encode(conversation, len(conversation.sessions)) for conversation in conversations]

    def items(self) -> List[str]:
        return [f"{c.name} session {i}" for c in self.conversations.values() for i in range(len(c.sessions))]

    def _pieces(self, session: Session, number: int) -> List[Tensor]:
        """Encode a session: its heading, then for each turn the speaker and the response, a line each."""
        tokenizer, heading = self.scorer.tokenizer, f"{_heading(session, number)}\n"
        pieces = [tokenizer.encode_continuation("\n" + heading) if number else tokenizer.encode(heading)]
        for turn in session.turns:
            pieces.append(tokenizer.encode_continuation(f"{turn.speaker}:"))
            pieces.append(tokenizer.encode_continuation(f" {turn.text}\n"))
        return pieces

    def _encode(self, conversation: Conversation, end: int, begin: int = 0) -> Tensor:
        """Encode the sessions of a conversation from number ``begin`` to before ``end``."""
        pieces: List[Tensor] = []
        for number in range(begin, end):
            pieces += self._pieces(conversation.sessions[number], number)
        return torch.cat(pieces)

    def _state_before(self, conversation: Conversation, number: int) -> TextState:
        """Return the state behind the sessions before one; it is kept for the next session."""
        name, memorized = self._memorized
        if name != conversation.name or memorized > number:
            length = len(self._encode(conversation, len(conversation.sessions)))
            self._state, memorized = self.scorer.new_state(at_most=length), 0
        for i in range(memorized, number):
            self.scorer.memorize(self._state, self._encode(conversation, i + 1, begin=i))
        self._memorized = (conversation.name, number)
        return self._state

    def score(self, item: str) -> Dict[str, Any]:
        name, number = item.rsplit(" session ", 1)
        conversation, number = self.conversations[name], int(number)
        session, state = conversation.sessions[number], self._state_before(conversation, number)
        pieces = self._pieces(session, number)
        turns, prompts = [], []
        for i, turn in enumerate(session.turns):
            prompt = torch.cat(pieces[: 2 * i + 2])
            response = pieces[2 * i + 2][: self.scorer.size // 2]
            (scores,) = self.scorer.window(state, prompt, len(response)).score([response])
            losses = {system: round(-float(x.double().sum()), 4) for system, x in scores.items()}
            size = self.scorer.tokenizer.measure([response], continues=True)
            turns.append({"reference": turn.text, "tokens": len(response), "size": size and size[0], "loss": losses})
            prompts.append(prompt)
        if self.args.generate == "all" or (self.args.generate == "last" and number == len(conversation.sessions) - 1):
            for system in self.scorer.systems:
                answers = generate(self.scorer, system, state, prompts, self.args.max_new_tokens, self.args.beam)
                for turn, answer in zip(turns, answers):
                    text = self.scorer.tokenizer.decode(answer).strip()
                    turn.setdefault("answers", {})[system] = text
                    turn.setdefault("bleu", {})[system] = self.bleu.counts(text, turn["reference"])
                    sentence = self.bleu.of_sentence(text, turn["reference"])
                    turn.setdefault("sentence_bleu", {})[system] = round(sentence, 4)
        return {"earlier_sessions": number, "turns": turns}

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        perplexity: Dict[str, SystemScores] = {}
        bleu: Dict[str, SystemScores] = {}
        sentence_bleu: Dict[str, SystemScores] = {}
        distances: Dict[str, Dict[str, SystemScores]] = {title: {} for _, title in DISTANCES}
        text_losses = []
        for item, result in results.items():
            distance = [title for begin, title in DISTANCES if result["earlier_sessions"] >= begin][-1]
            for i, turn in enumerate(result["turns"]):
                text_losses.append(TextLoss(f"{item} {i}", turn["loss"], turn.get("size")))
                for system, loss in turn["loss"].items():
                    for column in (perplexity, distances[distance]):
                        scores = column.setdefault(system, SystemScores({}, PERPLEXITY))
                        scores.items[f"{item} {i}"] = (loss, turn["tokens"])
                for system, counts in turn.get("bleu", {}).items():
                    scores = bleu.setdefault(system, SystemScores({}, self.bleu.statistic))
                    scores.items[f"{item} {i}"] = counts
                for system, value in turn.get("sentence_bleu", {}).items():
                    scores = sentence_bleu.setdefault(system, SystemScores({}, self.bleu.sentence_statistic))
                    scores.items[f"{item} {i}"] = (value, 1)
        columns, title = {"perplexity of the true response": perplexity}, "Responses"
        if bleu:
            columns.update({"BLEU-4": bleu, "sentence BLEU-4": sentence_bleu})
            title += f" (BLEU-4: {self.bleu.signature}; sentence BLEU-4: {self.bleu.sentence_signature})"
        by_distance = {title: rows for title, rows in distances.items() if rows}
        return [
            Table(title, columns),
            Table("Perplexity of the true response by earlier sessions", by_distance, "lines"),
            *text_tables("True response", text_losses),
        ]

    def notes(self) -> List[str]:
        sessions = sum(len(conversation.sessions) for conversation in self.conversations.values())
        turns = sum(len(s.turns) for conversation in self.conversations.values() for s in conversation.sessions)
        notes = [
            f"{len(self.conversations):,} conversations of {name_of(self.args.data)}, {sessions:,} sessions, {turns:,} "
            "responses; each is predicted from all turns before it.",
            f"Earlier sessions are in the memory and the cache; the window of {self.scorer.size} tokens holds the "
            "current one. What does not fit into it is memorized too; the backbone and memory off do not see it.",
        ]
        if self.bleu is not None:
            notes.append(
                f"Responses of {'the last session' if self.args.generate == 'last' else 'all sessions'} are generated "
                f"with --beam {self.args.beam}, at most {self.args.max_new_tokens} tokens, to the end of the line; "
                f"BLEU by sacrebleu, signature {self.bleu.signature}; sentence BLEU, the mean over responses, by "
                f"{self.bleu.sentence_signature}."
            )
            if self.scorer.has_memory:
                notes.append(
                    f"{JUDGED} has each dialogue with the responses of memory off and on in random order, and "
                    f"{JUDGED_KEY} tells which is whose: python -m examples.dialogue.judge has them judged."
                )
        return notes

    def figures(self, results: Dict[str, Any]) -> Dict[str, Any]:
        """Return the first generated responses of some sessions."""
        examples: List[Dict[str, Any]] = []
        for item, result in results.items():
            for turn in result["turns"][:1]:
                if "answers" in turn:
                    examples.append({"item": item, "reference": turn["reference"], **turn["answers"]})
        return {"examples": examples[:_EXAMPLES]}

    def further_files(self, results: Dict[str, Any]) -> Dict[str, str]:
        """Return the generated responses with the memory off and on for a judge, and the key to their order."""
        pairs = []
        for item, result in results.items():
            name, number = item.rsplit(" session ", 1)
            sessions = self.conversations[name].sessions
            for i, turn in enumerate(result["turns"]):
                answers = turn.get("answers", {})
                if OFF in answers and ON in answers:
                    dialogue = _dialogue_before(sessions, int(number), i)
                    speaker = sessions[int(number)].turns[i].speaker
                    answers = {system: answers[system] for system in (OFF, ON)}
                    pairs.append(JudgedPair(f"{item} response {i}", dialogue, speaker, answers, turn["reference"]))
        return as_lines(pairs) if pairs else {}


def _heading(session: Session, number: int) -> str:
    return f"[Session {number + 1}{'' if session.when is None else f', {session.when}'}]"


def _dialogue_before(sessions: List[Session], number: int, turn: int) -> str:
    """Return the text of a conversation up to a turn of one of its sessions."""
    lines = []
    for i, session in enumerate(sessions[: number + 1]):
        lines.append(_heading(session, i))
        turns = session.turns[:turn] if i == number else session.turns
        lines += [f"{utterance.speaker}: {utterance.text}" for utterance in turns]
    return "\n".join(lines)
