"""Dialogue of several sessions: the earlier ones in the memory, the current one in the window; what is said next?"""

from typing import Any, Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor

from .command import Evaluation, name_of
from .conversations import Conversation, Session, read_conversations
from .reporting.finished_items import digest
from .reporting.statistics import PERPLEXITY, Sample, Statistic
from .reporting.table import Table
from .scoring.generate import generate

DISTANCES = ((0, "0"), (1, "1"), (2, "2"), (3, "3"), (4, "4-7"), (8, "8-15"), (16, "16 and more"))


class Bleu:
    """BLEU-4 of sacrebleu with its defaults, from counts that can be summed over responses."""

    def __init__(self):
        try:
            from sacrebleu.metrics import BLEU
        except ImportError:
            raise ValueError("BLEU needs sacrebleu: pip install it, or leave BLEU out with --generate none") from None
        self._metric = BLEU()
        self.statistic = Statistic("BLEU-4", "", self._compute, digits=2)
        self.counts("a", "a")  # the signature says how many references there were
        self.signature = str(self._metric.get_signature())

    def counts(self, answer: str, reference: str) -> List[int]:
        """Lengths of answer and reference in sacrebleu's tokens, n-grams that match (n = 1 to 4), and all n-grams."""
        score = self._metric.corpus_score([answer], [[reference]])
        return [score.sys_len, score.ref_len, *score.counts, *score.totals]

    def _compute(self, sums: np.ndarray) -> np.ndarray:
        """Sums (..., 10) to BLEU (...)."""
        rows = np.rint(sums).astype(int).reshape(-1, 10)
        scores = [
            self._metric.compute_bleu(
                correct=row[2:6],
                total=row[6:],
                sys_len=row[0],
                ref_len=row[1],
                smooth_method=self._metric.smooth_method,
                smooth_value=self._metric.smooth_value,
            ).score
            for row in rows.tolist()
        ]
        return np.array(scores).reshape(sums.shape[:-1])


class Dialogue(Evaluation):
    """Scores the true responses, and generates others in their place."""

    name, title = "dialogue", "Responses in dialogues of several sessions"

    def __init__(self):
        self._at, self._past = (None, 0), None

    def add_arguments(self, parser) -> None:
        parser.add_argument(
            "--data", required=True, metavar="FILE", help="MSC, LoCoMo, Conversation Chronicles, or our JSON lines"
        )
        parser.add_argument("--valid", metavar="FILE", help="the same, for tuning the neural cache")
        parser.add_argument(
            "--generate",
            choices=("last", "all", "none"),
            default="last",
            help="sessions whose responses are generated for BLEU: the last of each conversation, all, or none",
        )
        parser.add_argument("--max-new-tokens", type=int, default=60, metavar="N", help="of a response (60)")
        parser.add_argument("--beam", type=int, default=1, metavar="N", help="hypotheses (1: greedy)")

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        for option in ("max_new_tokens", "beam"):
            if getattr(args, option) < 1:
                raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)} is less than 1")
        if args.max_new_tokens >= scorer.size // 2:
            raise ValueError(
                f"--max-new-tokens {args.max_new_tokens} leaves less than half of the window of {scorer.size} tokens: "
                f"lower it to {scorer.size // 2 - 1}"
            )
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
        }

    def tuning_documents(self) -> List[Tensor]:
        conversations = [] if self.args.valid is None else read_conversations(self.args.valid)
        return [
            torch.cat([torch.cat(self._pieces(session, i)) for i, session in enumerate(conversation.sessions)])
            for conversation in conversations
        ]

    def items(self) -> List[str]:
        return [f"{c.name} session {i}" for c in self.conversations.values() for i in range(len(c.sessions))]

    def _pieces(self, session: Session, number: int) -> List[Tensor]:
        """Tokens of a session: its heading, then of each turn the speaker and the response, a line each."""
        tokenizer, when = self.scorer.tokenizer, "" if session.when is None else f", {session.when}"
        heading = f"[Session {number + 1}{when}]\n"
        pieces = [tokenizer.encode_continuation("\n" + heading) if number else tokenizer.encode(heading)]
        for turn in session.turns:
            pieces.append(tokenizer.encode_continuation(f"{turn.speaker}:"))
            pieces.append(tokenizer.encode_continuation(f" {turn.text}\n"))
        return pieces

    def _before(self, conversation: Conversation, number: int):
        """The past that holds the sessions before one; from one session to the next it goes on."""
        name, held = self._at
        if name != conversation.name or held > number:
            length = sum(len(x) for i, s in enumerate(conversation.sessions) for x in self._pieces(s, i))
            self._past, held = self.scorer.new_state(at_most=length), 0
        for i in range(held, number):
            self.scorer.memorize(self._past, torch.cat(self._pieces(conversation.sessions[i], i)))
        self._at = (conversation.name, number)
        return self._past

    def score(self, item: str) -> Dict[str, Any]:
        name, number = item.rsplit(" session ", 1)
        conversation, number = self.conversations[name], int(number)
        session, past = conversation.sessions[number], self._before(conversation, number)
        pieces = self._pieces(session, number)
        turns, prompts = [], []
        for i, turn in enumerate(session.turns):
            prompt = torch.cat(pieces[: 2 * i + 2])
            response = pieces[2 * i + 2][: self.scorer.size // 2]
            (found,) = self.scorer.window(past, prompt, len(response)).score([response])
            losses = {system: round(-float(x.double().sum()), 4) for system, x in found.items()}
            turns.append({"reference": turn.text, "tokens": len(response), "loss": losses})
            prompts.append(prompt)
        if self.args.generate == "all" or (self.args.generate == "last" and number == len(conversation.sessions) - 1):
            for system in self.scorer.systems:
                answers = generate(self.scorer, system, past, prompts, self.args.max_new_tokens, self.args.beam)
                for turn, answer in zip(turns, answers):
                    text = self.scorer.tokenizer.decode(answer).strip()
                    turn.setdefault("answers", {})[system] = text
                    turn.setdefault("bleu", {})[system] = self.bleu.counts(text, turn["reference"])
        return {"earlier_sessions": number, "turns": turns}

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        perplexity: Dict[str, Sample] = {}
        bleu: Dict[str, Sample] = {}
        distances: Dict[str, Dict[str, Sample]] = {title: {} for _, title in DISTANCES}
        for item, result in results.items():
            earlier = [title for begin, title in DISTANCES if result["earlier_sessions"] >= begin][-1]
            for i, turn in enumerate(result["turns"]):
                for system, loss in turn["loss"].items():
                    for place in (perplexity, distances[earlier]):
                        place.setdefault(system, Sample({}, PERPLEXITY)).items[f"{item} {i}"] = (loss, turn["tokens"])
                for system, counts in turn.get("bleu", {}).items():
                    bleu.setdefault(system, Sample({}, self.bleu.statistic)).items[f"{item} {i}"] = counts
        columns = {"perplexity of the true response": perplexity, **({"BLEU-4": bleu} if bleu else {})}
        by_distance = {title: rows for title, rows in distances.items() if rows}
        return [
            Table("Responses", columns),
            Table("Perplexity of the true response by earlier sessions", by_distance, "lines"),
        ]

    def notes(self) -> List[str]:
        sessions = sum(len(conversation.sessions) for conversation in self.conversations.values())
        turns = sum(len(s.turns) for conversation in self.conversations.values() for s in conversation.sessions)
        notes = [
            f"{len(self.conversations):,} conversations of {name_of(self.args.data)}, {sessions:,} sessions, {turns:,} "
            "responses; each is predicted from all turns before it.",
            f"Earlier sessions are in the memory and the cache; the window of {self.scorer.size} tokens holds the "
            "current one. What does not fit into it is memorised too; the backbone and memory off do not see it.",
        ]
        if self.bleu is not None:
            notes.append(
                f"Responses of {'the last session' if self.args.generate == 'last' else 'all sessions'} are generated "
                f"with --beam {self.args.beam}, at most {self.args.max_new_tokens} tokens, to the end of the line; "
                f"BLEU by sacrebleu, signature {self.bleu.signature}."
            )
        return notes

    def figures(self, results: Dict[str, Any]) -> Dict[str, Any]:
        """Some answers, to look at."""
        examples: List[Tuple[str, Any]] = []
        for item, result in results.items():
            examples += [(item, turn) for turn in result["turns"][:1] if "answers" in turn]
        return {"examples": [{"item": item, "reference": t["reference"], **t["answers"]} for item, t in examples[:20]]}
