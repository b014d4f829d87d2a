"""Continue a book from one of its pages: without a memory, with all pages before it, and with the whole book.

    python -m examples.book.continue --path CHECKPOINT --data DATA --text novel.txt --page 200

The prompt is the page (`--page-length` characters). It is continued three times: with the memory off, so that the
model sees its window only; with the memory of all pages before; and with the memory of the whole book, which contains
the page that follows. The command prints the continuations, the perplexity of the page that really follows (lower is
better) and the time of each part. Without `--text`, the book is the longest module of Python's standard library, which
the quick start holds out for its test.
"""

import argparse
import os
import sys
import time
from typing import Dict, List, NamedTuple, Sequence

import torch

from examples.quickstart.standard_library import standard_library
from longmem_fairseq.data.text_meter import figures_by_text, measure_text
from longmem_fairseq.files import printable, require_writable, write_json
from longmem_fairseq.hub import LongMem
from longmem_fairseq.text import read_text


class Book(NamedTuple):
    """A book that is open at a page.

    Attributes:
        name: Name of the book and number of the page.
        text: Text of the whole book.
        before: Text of all pages before the page.
        page: Text of the page.
        following: Text of the page that follows.
    """

    name: str
    text: str
    before: str
    page: str
    following: str


def pages(text: str, length: int) -> List[str]:
    """Cut a text into pages; a last page shorter than half a page is joined to the page before.

    Args:
        text: Text of the book.
        length: Number of characters of a page.
    """
    cut = [text[begin : begin + length] for begin in range(0, len(text), length)]
    if len(cut) == 1 or len(cut[-1]) >= length / 2:
        return cut
    return [*cut[:-2], cut[-2] + cut[-1]]


def next_page_figures(model: LongMem, book: Book) -> Dict:
    """Compute the perplexity of the page that follows, given the page and the model's memory.

    Returns:
        ``perplexity`` per token, and ``perplexity_per_word`` and ``bits_per_byte``, None where they are not known.
    """
    score, first = model.score(book.page + book.following), len(model.encode(book.page))
    log_probabilities = score.log_probabilities[first:].double()
    size = measure_text(score.tokens[first:], model.task.dictionary, model.bpe, continues=True)
    return {
        "perplexity": float(torch.exp(-log_probabilities.mean())),
        **figures_by_text(-float(log_probabilities.sum()), size),
    }


def continue_page(model: LongMem, name: str, memory: str, book: Book, options: Dict) -> Dict[str, object]:
    """Continue the page with a memory.

    Args:
        model: Model whose memory is replaced by the text ``memory``.
        name: Name of the memory in the report.
        memory: Text to memorize first; may be empty.
        book: Book that is continued.
        options: Arguments of :meth:`LongMem.generate`.

    Returns:
        One row of the result: the continuation, the perplexity of the next page, and the time of each part.
    """
    row = {"memory": name, "memory_tokens": 0, "memorize_seconds": 0.0}
    if memory:
        model.forget()
        start = time.perf_counter()
        model.memorize(memory, name)
        row.update(memory_tokens=model.memory.tokens, memorize_seconds=time.perf_counter() - start)
    torch.manual_seed(1)
    start = time.perf_counter()
    row["continuation"] = model.generate(book.page, **options)
    row["generate_seconds"] = time.perf_counter() - start
    row.update(next_page_figures(model, book))
    return row


def report(rows: Sequence[Dict], book: Book) -> str:
    """Format the continuations as text, and their figures as a table in Markdown."""
    lines = [book.name, "", "... " + book.page[-200:].strip(), ""]
    for row in rows:
        lines += [f"--- memory: {row['memory']}", str(row["continuation"]).rstrip(), ""]
    lines += ["--- the book continues", book.following[:400].rstrip(), ""]
    heads = ["memory", "tokens in it", "memorizing", "generating", "perplexity of the next page"]
    heads += ["per word", "bits per byte"]
    lines += [f"| {' | '.join(heads)} |", "| ---" + " | ---:" * (len(heads) - 1) + " |"]
    for row in rows:
        by_text = [row["perplexity_per_word"], row["bits_per_byte"]]
        lines.append(
            f"| {row['memory']} | {row['memory_tokens']:,} | {row['memorize_seconds']:.1f} s | "
            f"{row['generate_seconds']:.1f} s | {row['perplexity']:.2f} | "
            f"{' | '.join('' if figure is None else f'{figure:.3f}' for figure in by_text)} |"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.book.continue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--path", required=True, help="checkpoint of a LongMem model, or its directory")
    add("--data", help="directory of dict.txt and the tokenizer (default: the checkpoint's, then that of its training)")
    add("--text", help="UTF-8 file of the book (default: the longest module of the standard library)")
    add("--page", type=int, help="number of the page to continue, from 1 (default: the page in the middle)")
    add("--page-length", type=int, default=1800, help="number of characters of a page (default: %(default)s)")
    add("--memory-size", type=int, default=65536, help="number of tokens that the memory holds (default: %(default)s)")
    add("--max-new-tokens", type=int, default=100, help="length of the continuation in tokens (default: %(default)s)")
    add("--beam", type=int, default=1, help="number of hypotheses (default: %(default)s)")
    add("--top-p", type=float, help="sample from the likeliest tokens that have this total probability, without a beam")
    add("--no-repeat-ngram-size", type=int, default=0, help="length of n-grams that may occur only once; 0: no limit")
    add("--pretrained-model-path", help="path of the backbone, if it is not where the checkpoint expects it")
    add("--json", help="path of a JSON file for the result")
    add("--cpu", action="store_true", help="do not use a GPU")
    options = parser.parse_args(arguments)
    for name in ("page_length", "memory_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} is less than 1")
    return options


def open_book(options: argparse.Namespace) -> Book:
    """Open the book of the options at their page.

    Raises:
        ValueError: The book has no such page.
        OSError: The file cannot be read.
    """
    if options.text:
        name, text = os.path.basename(options.text), read_text(options.text)
    else:
        name, text = max(standard_library(), key=lambda document: len(document[1]))
    cut = pages(text, options.page_length)
    page = options.page if options.page is not None else max(2, len(cut) // 2)
    if not 2 <= page < len(cut):
        raise ValueError(
            f"--page {page} is not from 2 to {len(cut) - 1}: {name} has {len(cut)} pages of {options.page_length} "
            "characters (--page-length), and the page needs one before and one after it"
        )
    return Book(f"{name}, page {page} of {len(cut)}", text, "".join(cut[: page - 1]), cut[page - 1], cut[page])


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    settings = {"device": "cpu" if options.cpu else None}
    if options.pretrained_model_path:
        settings["pretrained_model_path"] = options.pretrained_model_path
    generation = {
        "max_new_tokens": options.max_new_tokens,
        "beam": options.beam,
        "no_repeat_ngram_size": options.no_repeat_ngram_size,
    }
    if options.top_p is not None:
        generation.update(sampling=True, top_p=options.top_p)
    try:
        if options.json:
            require_writable(options.json)
        book = open_book(options)
        model = LongMem.from_pretrained(options.path, options.data, memory_size=options.memory_size, **settings)
        rows = [
            continue_page(model.without_memory(), "off", "", book, generation),
            continue_page(model, "the pages before", book.before, book, generation),
            continue_page(model, "the whole book", book.text, book, generation),
        ]
        print(printable(report(rows, book)))
        if options.json:
            write_json(options.json, {"book": book.name, "rows": rows})
    except (ValueError, OSError) as error:
        sys.exit(f"continue.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
