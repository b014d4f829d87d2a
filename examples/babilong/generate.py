"""BABILong's tasks in sentences of our own, hidden in books: samples to evaluate on, and documents to adapt on.

    python -m examples.babilong.generate --books books_test/ --tokenizer DIR --destdir babilong/ \
        --lengths 0k 1k 4k 16k 64k --samples 100
    python -m examples.babilong.generate --books books_train/ --tokenizer DIR --destdir adapt/ --documents 1000

The first writes qaN/LENGTH.json as BABILong's own files are: lists of ``input``, ``question`` and ``target``. The
second writes train.jsonl (``name``, ``text``): in each document the facts of a world are told far apart, and asked for
again and again. The same books, options and seed give the same files.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

from fairseq.data import Dictionary

from examples.babilong.stories import WORLDS, tell
from longmem_fairseq.evaluation.babilong import prompt_of, tokens_of
from longmem_fairseq.evaluation.scoring.text_tokenizer import TextTokenizer
from longmem_fairseq.files import write_text
from preprocess.documents import iter_documents
from preprocess.errors import InputError

PROG = "python -m examples.babilong.generate"
SHORTEST, LONGEST = 8, 120  # tokens of a sentence of a book
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Books:
    """Sentences of books, one after the other from random places.

    Args:
        texts: Texts of the books.
        tokenizer: Tokenizer that counts.
        rng: Source of all random choices.

    Raises:
        ValueError: The books have no sentences of a usual length.
    """

    def __init__(self, texts: Sequence[str], tokenizer: TextTokenizer, rng: random.Random):
        self.tokenizer, self.rng = tokenizer, rng
        self.books = [[" ".join(s.split()) for s in _SENTENCE_END.split(text)] for text in texts]
        self.books = [[s for s in sentences if len(s) > SHORTEST] for sentences in self.books]
        self.books = [sentences for sentences in self.books if sentences]
        if not any(self._fits(self.count(s)) for sentences in self.books for s in sentences[:200]):
            raise ValueError("the books have no sentences: give more text with --books")
        self._following = iter(())

    def count(self, sentence: str) -> int:
        """Return the number of tokens that a sentence adds to a text."""
        return len(self.tokenizer.encode_continuation(f" {sentence}"))

    def _fits(self, tokens: int) -> bool:
        return SHORTEST <= tokens <= LONGEST

    def _endless(self) -> Iterator[str]:
        while True:
            sentences = self.rng.choice(self.books)
            yield from sentences[self.rng.randrange(len(sentences)) :]

    def passage(self, tokens: int) -> List[str]:
        """Return sentences of at most some tokens together, from a random place of a book on.

        Args:
            tokens: Number of tokens to come close to.
        """
        sentences, endless = [], self._endless()
        while True:
            sentence = next(endless)
            n = self.count(sentence)
            if n > tokens:
                return sentences
            if self._fits(n):
                sentences.append(sentence)
                tokens -= n


def hide(facts: Sequence[str], passage: Sequence[str], rng: random.Random) -> str:
    """Put facts, in their order, between the sentences of a passage, each place as likely as another."""
    places = sorted(rng.randint(0, len(passage)) for _ in facts)
    parts: List[str] = []
    for number in range(len(passage) + 1):
        parts += [fact for fact, place in zip(facts, places) if place == number]
        parts += passage[number : number + 1]
    return " ".join(parts)


def sample(task: str, length: str, books: Books) -> Dict[str, str]:
    """Return one sample in BABILong's form.

    Args:
        task: Task, such as ``qa1``.
        length: Length of the text, such as ``4k``; ``0k`` for the facts alone.
        books: Sentences between the facts.
    """
    story = tell(task, books.rng)
    passage = books.passage(max(0, tokens_of(length) - sum(map(books.count, story.facts))))
    return {"input": hide(story.facts, passage, books.rng), "question": story.question, "target": story.answer}


def training_document(books: Books, tokens: int) -> str:
    """Return a document that tells facts between passages of a book, and asks for some of them behind each passage.

    Args:
        books: Sentences between the facts.
        tokens: Number of tokens to come close to.
    """
    rng = books.rng
    world, text, used = WORLDS[rng.choice(list(WORLDS))](rng), "", 0
    while used < tokens:
        facts = [fact for fact in (world.fact() for _ in range(rng.randint(1, 3))) if fact is not None]
        # Half of the passages are short, so that what is asked for can also be found in the window.
        part = hide(facts, books.passage(rng.choice((60, 600))), rng)
        questions = world.questions()
        for question, answer in rng.sample(questions, min(len(questions), 3)):
            part += f"{prompt_of(question)} {answer}"
        text += part + "\n"
        used += books.count(part)
    return text


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__.split("\n")[0])
    parser.add_argument("--books", nargs="+", required=True, metavar="PATH", help="books: text files or directories")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="directory of dict.txt and the tokenizer that counts tokens"
    )
    parser.add_argument("--destdir", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--tasks", nargs="+", default=list(WORLDS), choices=WORLDS, help="tasks (all)")
    parser.add_argument("--lengths", nargs="+", metavar="N", help="tokens of the texts, such as 0k 4k 1M")
    parser.add_argument("--samples", type=int, default=100, metavar="N", help="samples of each task and length (100)")
    parser.add_argument("--documents", type=int, metavar="N", help="documents to adapt on")
    parser.add_argument(
        "--document-tokens",
        nargs=2,
        type=int,
        default=(2000, 8000),
        metavar=("LEAST", "MOST"),
        help="tokens of a document to adapt on (2000 8000)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of all random choices (1)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Check the options.

    Raises:
        ValueError: An option is out of range, or there is nothing to make.
    """
    if not args.lengths and not args.documents:
        raise ValueError("there is nothing to make: give --lengths for samples, or --documents to adapt on")
    for option in ("samples", "documents"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value} is less than 1: raise it")
    for length in args.lengths or []:
        if not re.fullmatch(r"\d+[kM]", length):
            raise ValueError(f"--lengths {length} is not a number with k or M, such as 4k: correct it")
    least, most = args.document_tokens
    if not 0 < least <= most:
        raise ValueError(f"--document-tokens {least} {most} is not a range above 0: change it")


def run(args: argparse.Namespace) -> None:
    """Write the files.

    Args:
        args: Parsed command line.

    Raises:
        ValueError: An option or the books are not valid.
        OSError: A file cannot be read or written.
    """
    check(args)
    dictionary = Dictionary.load(str(Path(args.tokenizer) / "dict.txt"))
    texts = [document.text for document in iter_documents(args.books)]
    tokenizer = TextTokenizer.load(args.tokenizer, dictionary)
    for task in args.tasks if args.lengths else ():
        for length in args.lengths:
            books = Books(texts, tokenizer, random.Random(f"{args.seed} {task} {length}"))
            samples = [sample(task, length, books) for _ in range(args.samples)]
            (args.destdir / task).mkdir(parents=True, exist_ok=True)
            write_text(args.destdir / task / f"{length}.json", json.dumps(samples, ensure_ascii=False, indent=1) + "\n")
    if args.documents:
        books = Books(texts, tokenizer, random.Random(f"{args.seed} documents"))
        lines = []
        for number in range(args.documents):
            text = training_document(books, books.rng.randint(*args.document_tokens))
            lines.append(json.dumps({"name": f"document {number}", "text": text}, ensure_ascii=False) + "\n")
        args.destdir.mkdir(parents=True, exist_ok=True)
        write_text(args.destdir / "train.jsonl", "".join(lines))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; exit with one sentence if it fails.

    Args:
        argv: Command line; by default that of the process.
    """
    try:
        run(parser().parse_args(argv))
    except (InputError, ValueError, OSError) as error:
        sys.exit(f"{PROG}: {error}")


if __name__ == "__main__":
    main()
