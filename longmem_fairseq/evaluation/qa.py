"""Open-book question answering (SQuAD): the passages lie in the memory, or the right one in the window."""

import json
import re
import string
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np
from torch import Tensor

from .command import Evaluation, name_of
from .reporting.finished_items import digest
from .reporting.statistics import ACCURACY, PERPLEXITY, Sample
from .reporting.table import Table
from .scoring.generate import generate

MEMORY, WINDOW = "passages in the memory", "the right passage in the window"
_TOGETHER = 16  # questions of an item
EXACT, F1 = ACCURACY._replace(name="exact match"), ACCURACY._replace(name="F1")


class Question(NamedTuple):
    """A question about a passage, and the answers that are right."""

    name: str
    passage: str
    text: str
    answers: List[str]


class Article(NamedTuple):
    """A title, its passages in order, and the questions about them."""

    title: str
    passages: List[str]
    questions: List[Question]


def read_articles(path: str) -> List[Article]:
    """The articles of a file: SQuAD's own JSON, or JSON lines of ``id, title, context, question, answers``.

    Raises:
        ValueError: the file has another layout, or a question without an answer (SQuAD 2.0 has some).
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        rows = list(map(json.loads, text.splitlines())) if path.endswith(".jsonl") else _official(json.loads(text))
        articles: Dict[str, Article] = {}
        for row in rows:
            article = articles.setdefault(row["title"], Article(row["title"].replace("_", " "), [], []))
            if row["context"] not in article.passages:
                article.passages.append(row["context"])
            if row["question"] is not None:
                question = Question(str(row["id"]), row["context"], row["question"].strip(), list(row["answers"]))
                article.questions.append(question)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has neither SQuAD's layout (data, paragraphs, qas) nor lines of id, title, context, question and "
            "answers"
        ) from error
    bare = [q.name for article in articles.values() for q in article.questions if not any(q.answers)]
    if bare:
        raise ValueError(f"{path}: question {bare[0]} has no answer: give SQuAD 1.1, or leave such questions out")
    return list(articles.values())


def _official(content: Dict[str, Any]) -> List[Dict[str, Any]]:
    rows = []
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            about = {"title": article["title"], "context": paragraph["context"]}
            rows += [
                {**about, "id": qa["id"], "question": qa["question"], "answers": [a["text"] for a in qa["answers"]]}
                for qa in paragraph["qas"]
            ] or [{**about, "question": None}]
    return rows


def normalize(answer: str) -> str:
    """An answer as SQuAD's evaluation compares it: lower case, without punctuation and articles, single spaces."""
    answer = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def exact_match(answer: str, truth: str) -> float:
    """1 where an answer equals the truth after normalisation, else 0."""
    return float(normalize(answer) == normalize(truth))


def f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the answer's words after normalisation; 0 where none is common."""
    ours, theirs = normalize(answer).split(), normalize(truth).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


class QuestionAnswering(Evaluation):
    """Answers questions about articles."""

    name, title = "qa", "Question answering with passages in the memory"

    def __init__(self):
        self._filled, self._past = None, None

    def add_arguments(self, parser) -> None:
        parser.add_argument("--data", required=True, metavar="FILE", help="SQuAD 1.1's JSON, or our JSON lines")
        parser.add_argument("--train", metavar="FILE", help="likewise, for demonstrations and for tuning the cache")
        parser.add_argument(
            "--demonstrations",
            type=int,
            metavar="K",
            help="questions with answers, without passages, in the window before each question (4 with --train)",
        )
        parser.add_argument("--seed", type=int, default=0, help="of the choice of demonstrations")
        parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="of an answer (20)")
        parser.add_argument("--beam", type=int, default=1, metavar="N", help="hypotheses (1: greedy)")

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        self.shown = args.demonstrations if args.demonstrations is not None else (4 if args.train else 0)
        for option, value, least in (
            ("max-new-tokens", args.max_new_tokens, 1),
            ("beam", args.beam, 1),
            ("demonstrations", self.shown, 0),
        ):
            if value < least:
                raise ValueError(f"--{option} {value} is less than {least}")
        if args.max_new_tokens >= scorer.size // 2:
            raise ValueError(
                f"--max-new-tokens {args.max_new_tokens} leaves less than half of the window of {scorer.size} tokens: "
                f"lower it to {scorer.size // 2 - 1}"
            )
        if self.shown and not args.train:
            raise ValueError(f"--demonstrations {self.shown} need examples: name their file with --train")
        self.articles = {article.title: article for article in read_articles(args.data)}
        self.train = read_articles(args.train) if args.train else []
        questions = [question for article in self.train for question in article.questions]
        if len(questions) < self.shown:
            raise ValueError(f"--train {args.train} has {len(questions)} questions, not --demonstrations {self.shown}")
        drawn = np.random.default_rng(args.seed).permutation(len(questions))[: self.shown]
        self.demonstrations = "".join(_asked(questions[i], questions[i].answers[0]) for i in drawn)
        left = args.limit
        self.groups: Dict[str, List[Question]] = {}
        for title, article in self.articles.items():
            questions = article.questions[:left]
            left = None if left is None else left - len(questions)
            for begin in range(0, len(questions), _TOGETHER):
                group = questions[begin : begin + _TOGETHER]
                self.groups[f"{title}: {begin}-{begin + len(group) - 1}"] = group

    def describe(self) -> Dict[str, Any]:
        return {
            "data": name_of(self.args.data),
            "data_sha256": digest([self.args.data]),
            "train": None if self.args.train is None else name_of(self.args.train),
            "demonstrations": self.shown,
            "seed": self.args.seed,
            "max_new_tokens": self.args.max_new_tokens,
            "beam": self.args.beam,
        }

    def tuning_documents(self) -> List[Tensor]:
        texts = []
        for article in self.train:
            texts.append(_passages(article) + "".join(_asked(q, q.answers[0]) for q in article.questions))
        return [self.scorer.tokenizer.encode(text) for text in texts]

    def items(self) -> List[str]:
        return list(self.groups)

    def score(self, item: str) -> Dict[str, Any]:
        questions, article = self.groups[item], self.articles[item.rsplit(": ", 1)[0]]
        start = self.scorer.new_state(at_most=self.scorer.size)
        found: List[Dict[str, Any]] = [{"name": q.name, "answers": {}, "loss": {}} for q in questions]
        for place, past, passages in (
            (MEMORY, self._memory(article), [""] * len(questions)),
            (WINDOW, start, [question.passage + "\n\n" for question in questions]),
        ):
            texts = [passage + self.demonstrations + _asked(q) for passage, q in zip(passages, questions)]
            prompts = [self._encode(text, past) for text in texts]
            for system in self.scorer.systems:
                answers = generate(self.scorer, system, past, prompts, self.args.max_new_tokens, self.args.beam)
                for row, answer in zip(found, answers):
                    row["answers"].setdefault(place, {})[system] = self.scorer.tokenizer.decode(answer).strip()
            for row, question, prompt in zip(found, questions, prompts):
                truth = self.scorer.tokenizer.encode_continuation(f" {question.answers[0]}\n")[: self.scorer.size // 2]
                (scores,) = self.scorer.window(past, prompt, len(truth)).score([truth])
                row["tokens"] = len(truth)
                row["loss"][place] = {system: round(-float(x.double().sum()), 4) for system, x in scores.items()}
        return {"questions": found}

    def _encode(self, text: str, past) -> Tensor:
        tokenizer = self.scorer.tokenizer
        return tokenizer.encode_continuation(text) if past.tokens else tokenizer.encode(text)

    def _memory(self, article: Article):
        """The memory of an article's passages, filled once for all its questions."""
        if self._filled != article.title:
            tokens = self.scorer.tokenizer.encode(_passages(article))
            self._past, self._filled = self.scorer.new_state(at_most=len(tokens)), article.title
            self.scorer.memorize(self._past, tokens)
        return self._past

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        truths = {q.name: q.answers for article in self.articles.values() for q in article.questions}
        scores: Dict[str, Dict[str, Sample]] = {
            f"{figure.name}, {place}": {} for place in (MEMORY, WINDOW) for figure in (EXACT, F1)
        }
        losses: Dict[str, Dict[str, Sample]] = {MEMORY: {}, WINDOW: {}}
        for row in (row for result in results.values() for row in result["questions"]):
            for place in (MEMORY, WINDOW):
                for system, answer in row["answers"][place].items():
                    for figure, measure in ((EXACT, exact_match), (F1, f1)):
                        best = max(measure(answer, truth) for truth in truths[row["name"]])
                        sample = scores[f"{figure.name}, {place}"].setdefault(system, Sample({}, figure))
                        sample.items[row["name"]] = (best, 1)
                for system, loss in row["loss"][place].items():
                    sample = losses[place].setdefault(system, Sample({}, PERPLEXITY))
                    sample.items[row["name"]] = (loss, row["tokens"])
        return [Table("Answers", scores, "bars"), Table("Perplexity of the right answer", losses, "bars")]

    def notes(self) -> List[str]:
        questions = sum(map(len, self.groups.values()))
        shown = f"after {self.shown} demonstrations without passages" if self.shown else "without demonstrations"
        return [
            f"{questions:,} questions on {len(self.articles):,} articles of {name_of(self.args.data)}, 'Question: ... "
            f"Answer:' {shown}; answers with --beam {self.args.beam} to the end of the line, at most "
            f"{self.args.max_new_tokens} tokens.",
            f"{MEMORY.capitalize()}: all passages of the article, memorised once for its questions; the backbone and "
            "memory off do not see them (closed book).",
            f"{WINDOW.capitalize()}: before the demonstrations, nothing in the memory; of more than the window of "
            f"{self.scorer.size} tokens the beginning is memorised.",
            "Exact match and F1 after SQuAD's normalisation, the best over the right answers.",
        ]

    def figures(self, results: Dict[str, Any]) -> Dict[str, Any]:
        """Some answers, to look at."""
        rows = [row for result in results.values() for row in result["questions"][:2]][:20]
        questions = {q.name: q for group in self.groups.values() for q in group}
        return {
            "examples": [
                {"question": questions[row["name"]].text, "right": questions[row["name"]].answers, **row["answers"]}
                for row in rows
            ]
        }


def _passages(article: Article) -> str:
    return "\n\n".join([article.title, *article.passages]) + "\n\n"


def _asked(question: Question, answer: Optional[str] = None) -> str:
    return f"Question: {question.text}\nAnswer:" + ("" if answer is None else f" {answer}\n\n")
