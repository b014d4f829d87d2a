"""Open-book question answering (SQuAD): the passages are in the memory, or the right one is in the window."""

import re
import string
from collections import Counter
from typing import Any, Dict, List, NamedTuple

import numpy as np
from torch import Tensor

from ..files import parse_json
from .base import Evaluation
from .command_line import check_max_new_tokens, name_of
from .records import read_file, text_of, texts_of
from .reporting.finished_items import digest
from .reporting.statistic import ACCURACY, PERPLEXITY
from .reporting.system_scores import SystemScores
from .reporting.table import Table, TextLoss, text_tables
from .scoring.generate import generate
from .scoring.text_state import TextState

MEMORY, WINDOW = "passages in the memory", "the right passage in the window"
_QUESTIONS = 16  # of an item
_EXAMPLES = 20  # in the report
EXACT, F1 = ACCURACY._replace(name="exact match"), ACCURACY._replace(name="F1")


class Question(NamedTuple):
    """A question about a passage.

    Attributes:
        name: Name of the question.
        passage: Text of the passage.
        text: Text of the question.
        answers: The right answers.
    """

    name: str
    passage: str
    text: str
    answers: List[str]


class Article(NamedTuple):
    """An article with questions about it.

    Attributes:
        title: Title of the article.
        passages: Its passages, in order.
        questions: Questions about the passages.
    """

    title: str
    passages: List[str]
    questions: List[Question]


def read_articles(path: str) -> List[Article]:
    """Read the articles of a file.

    Args:
        path: Path of a file in SQuAD's JSON, or of JSON lines of ``id, title, context, question, answers``.

    Raises:
        ValueError: The file has another layout, or a question without an answer (SQuAD 2.0 has some).
    """
    text = read_file(path)
    try:
        lines = filter(None, text.split("\n"))
        rows = list(map(parse_json, lines)) if path.endswith(".jsonl") else _official(parse_json(text))
        articles: Dict[str, Article] = {}
        for row in rows:
            article = articles.setdefault(row["title"], Article(row["title"].replace("_", " "), [], []))
            context = text_of(row["context"])
            if context not in article.passages:
                article.passages.append(context)
            if row["question"] is not None:
                question = row["question"].strip()
                article.questions.append(Question(str(row["id"]), context, question, texts_of(row["answers"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has neither SQuAD's layout (data, paragraphs, qas) nor lines of id, title, context, question and "
            "answers"
        ) from error
    unanswered = [q.name for article in articles.values() for q in article.questions if not any(q.answers)]
    if unanswered:
        raise ValueError(f"{path}: question {unanswered[0]} has no answer: give SQuAD 1.1, or leave such questions out")
    return list(articles.values())


def _official(content: Dict[str, Any]) -> List[Dict[str, Any]]:
    rows = []
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            passage = {"title": article["title"], "context": paragraph["context"]}
            for qa in paragraph["qas"]:
                answers = [answer["text"] for answer in qa["answers"]]
                rows.append({**passage, "id": qa["id"], "question": qa["question"], "answers": answers})
            if not paragraph["qas"]:
                rows.append({**passage, "question": None})
    return rows


def normalize(answer: str) -> str:
    """Return an answer as SQuAD's evaluation compares it: lower case, no punctuation, no articles, single spaces."""
    answer = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def exact_match(answer: str, truth: str) -> float:
    """Return 1 if an answer equals the truth after normalization, else 0."""
    return float(normalize(answer) == normalize(truth))


def f1(answer: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall of an answer's words after normalization.

    Args:
        answer: Answer to evaluate.
        truth: Right answer.

    Returns:
        A value from 0, without a common word, to 1.
    """
    words, true_words = normalize(answer).split(), normalize(truth).split()
    common = sum((Counter(words) & Counter(true_words)).values())
    return 2 * common / (len(words) + len(true_words)) if common else 0.0


class QuestionAnswering(Evaluation):
    """Answer questions about articles."""

    name, title = "qa", "Question answering with passages in the memory"

    def __init__(self):
        self._memorized, self._state = None, None  # article that the state has read

    def add_arguments(self, parser) -> None:
        parser.add_argument(
            "--data", required=True, metavar="FILE", help="SQuAD 1.1's JSON, or JSON lines (docs/evaluation.md)"
        )
        parser.add_argument("--train", metavar="FILE", help="the same, for demonstrations and to tune the cache on")
        parser.add_argument(
            "--demonstrations",
            type=int,
            metavar="K",
            help="answered questions, without passages, in the window before each question (4 with --train, else 0)",
        )
        parser.add_argument("--seed", type=int, default=0, help="seed of the choice of demonstrations (0)")
        parser.add_argument(
            "--max-new-tokens", type=int, default=20, metavar="N", help="maximum number of tokens of an answer (20)"
        )
        parser.add_argument("--beam", type=int, default=1, metavar="N", help="hypotheses (1: greedy)")

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        self.shown = args.demonstrations if args.demonstrations is not None else (4 if args.train else 0)
        check_max_new_tokens(args, scorer)
        if self.shown < 0:
            raise ValueError(f"--demonstrations {self.shown} is less than 0: raise it")
        if self.shown and not args.train:
            raise ValueError(f"--demonstrations {self.shown} need questions with answers: name their file with --train")
        self.articles = {article.title: article for article in read_articles(args.data)}
        self.train = read_articles(args.train) if args.train else []
        questions = [question for article in self.train for question in article.questions]
        if len(questions) < self.shown:
            raise ValueError(f"--train {args.train} has {len(questions)} questions, not --demonstrations {self.shown}")
        chosen = np.random.default_rng(args.seed).permutation(len(questions))[: self.shown]
        self.demonstrations = "".join(_demonstration(questions[i]) for i in chosen)
        left = args.limit
        self.groups: Dict[str, List[Question]] = {}
        for title, article in self.articles.items():
            questions = article.questions[:left]
            left = None if left is None else left - len(questions)
            for begin in range(0, len(questions), _QUESTIONS):
                group = questions[begin : begin + _QUESTIONS]
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
            texts.append(_passages(article) + "".join(map(_demonstration, article.questions)))
        return [self.scorer.tokenizer.encode(text) for text in texts]

    def items(self) -> List[str]:
        return list(self.groups)

    def score(self, item: str) -> Dict[str, Any]:
        questions, article = self.groups[item], self.articles[item.rsplit(": ", 1)[0]]
        rows: List[Dict[str, Any]] = [{"name": q.name, "answers": {}, "loss": {}} for q in questions]
        start = self.scorer.new_state(at_most=self.scorer.size)
        for place, state, passages in (
            (MEMORY, self._state_behind(article), [""] * len(questions)),
            (WINDOW, start, [question.passage + "\n\n" for question in questions]),
        ):
            texts = [passage + self.demonstrations + _prompt(q) for passage, q in zip(passages, questions)]
            prompts = [self._encode(text, state) for text in texts]
            for system in self.scorer.systems:
                answers = generate(self.scorer, system, state, prompts, self.args.max_new_tokens, self.args.beam)
                for row, answer in zip(rows, answers):
                    row["answers"].setdefault(place, {})[system] = self.scorer.tokenizer.decode(answer).strip()
            for row, question, prompt in zip(rows, questions, prompts):
                truth = self.scorer.tokenizer.encode_continuation(f" {question.answers[0]}\n")[: self.scorer.size // 2]
                (scores,) = self.scorer.window(state, prompt, len(truth)).score([truth])
                size = self.scorer.tokenizer.measure([truth], continues=True)
                row.update(tokens=len(truth), size=size and size[0])
                row["loss"][place] = {system: round(-float(x.double().sum()), 4) for system, x in scores.items()}
        return {"questions": rows}

    def _encode(self, text: str, state: TextState) -> Tensor:
        tokenizer = self.scorer.tokenizer
        return tokenizer.encode_continuation(text) if state.tokens else tokenizer.encode(text)

    def _state_behind(self, article: Article) -> TextState:
        """Return the state behind an article's passages, memorized once for all its questions."""
        if self._memorized != article.title:
            tokens = self.scorer.tokenizer.encode(_passages(article))
            self._state, self._memorized = self.scorer.new_state(at_most=len(tokens)), article.title
            self.scorer.memorize(self._state, tokens)
        return self._state

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        truths = {q.name: q.answers for article in self.articles.values() for q in article.questions}
        answers: Dict[str, Dict[str, SystemScores]] = {
            f"{figure.name}, {place}": {} for place in (MEMORY, WINDOW) for figure in (EXACT, F1)
        }
        losses: Dict[str, Dict[str, SystemScores]] = {MEMORY: {}, WINDOW: {}}
        for row in (row for result in results.values() for row in result["questions"]):
            for place in (MEMORY, WINDOW):
                for system, answer in row["answers"][place].items():
                    for figure, measure in ((EXACT, exact_match), (F1, f1)):
                        best = max(measure(answer, truth) for truth in truths[row["name"]])
                        scores = answers[f"{figure.name}, {place}"].setdefault(system, SystemScores({}, figure))
                        scores.items[row["name"]] = (best, 1)
                for system, loss in row["loss"][place].items():
                    scores = losses[place].setdefault(system, SystemScores({}, PERPLEXITY))
                    scores.items[row["name"]] = (loss, row["tokens"])
        tables = [Table("Answers", answers, "bars"), Table("Perplexity of the right answer", losses, "bars")]
        for place in (MEMORY, WINDOW):
            rows = [row for result in results.values() for row in result["questions"]]
            text_losses = [TextLoss(row["name"], row["loss"][place], row.get("size")) for row in rows]
            tables += text_tables(f"Right answer, {place}", text_losses)
        return tables

    def notes(self) -> List[str]:
        questions = sum(map(len, self.groups.values()))
        shown = f"after {self.shown} demonstrations without passages" if self.shown else "without demonstrations"
        return [
            f"{questions:,} questions on {len(self.articles):,} articles of {name_of(self.args.data)}, 'Question: ... "
            f"Answer:' {shown}; answers with --beam {self.args.beam} to the end of the line, at most "
            f"{self.args.max_new_tokens} tokens.",
            f"{MEMORY.capitalize()}: all passages of the article, memorized once for its questions; the backbone and "
            "memory off do not see them (closed book).",
            f"{WINDOW.capitalize()}: before the demonstrations, nothing in the memory; of more than the window of "
            f"{self.scorer.size} tokens the beginning is memorized.",
            "Exact match and F1 after SQuAD's normalization, the best over the right answers.",
        ]

    def figures(self, results: Dict[str, Any]) -> Dict[str, Any]:
        """Return the answers to some questions."""
        rows = [row for result in results.values() for row in result["questions"][:2]][:_EXAMPLES]
        questions = {q.name: q for group in self.groups.values() for q in group}
        return {
            "examples": [
                {"question": questions[row["name"]].text, "right": questions[row["name"]].answers, **row["answers"]}
                for row in rows
            ]
        }


def _passages(article: Article) -> str:
    return "\n\n".join([article.title, *article.passages]) + "\n\n"


def _prompt(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"


def _demonstration(question: Question) -> str:
    return f"{_prompt(question)} {question.answers[0]}\n\n"
