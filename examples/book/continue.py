"""Continue a book from one of its pages: without a memory, with all that comes before, and with the whole book.

    python examples/book/continue.py --path CHECKPOINT --data DATA --text novel.txt --page 200

The model is given the page (`--page-length` characters) and continues it. Three times: with the memory off, so that it
sees its window only; with the memory of all pages before; and with the memory of the whole book, in which it can look
up what follows. Printed are the continuations, how likely each memory makes the page that really follows (perplexity;
lower is better), and what everything took. Without `--text` the book is the longest module of Python's standard
library, which the quick start holds out for its test.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

import torch

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from examples.quickstart.standard_library import standard_library
from longmem_fairseq.hub import LongMem
from longmem_fairseq.text import read_text


class Book(NamedTuple):
    """A book, opened at a page."""

    name: str
    text: str
    before: str
    page: str
    following: str


def pages(text: str, length: int) -> List[str]:
    """A text in pages of so many characters; one that is shorter than half a page joins the page before."""
    cut = [text[begin : begin + length] for begin in range(0, len(text), length)]
    return cut if len(cut) == 1 or len(cut[-1]) >= length / 2 else [*cut[:-2], cut[-2] + cut[-1]]


def surprise(model: LongMem, page: str, following: str) -> float:
    """Perplexity of the page that follows, behind a page and what is remembered."""
    both, first = model.score(page + following), len(model.encode(page))
    return float(torch.exp(-both.log_probabilities[first:].mean()))


def continued(model: LongMem, memory: str, name: str, book: Book, options: Dict) -> Dict[str, object]:
    """One row of the result: the continuation with the text ``memory`` memorised, and what it took."""
    row = {"memory": name, "memory_tokens": 0, "memorise_seconds": 0.0}
    if memory:
        model.forget()
        began = time.perf_counter()
        model.memorize(memory, name)
        row.update(memory_tokens=model.document_memory.tokens, memorise_seconds=time.perf_counter() - began)
    torch.manual_seed(1)
    began = time.perf_counter()
    row["continuation"] = model.generate(book.page, **options)
    row["generate_seconds"] = time.perf_counter() - began
    row["perplexity"] = surprise(model, book.page, book.following)
    return row


def report(rows: Sequence[Dict], book: Book) -> str:
    """The continuations, and a table of figures in Markdown."""
    lines = [book.name, "", "... " + book.page[-200:].strip(), ""]
    for row in rows:
        lines += [f"--- memory: {row['memory']}", str(row["continuation"]).rstrip(), ""]
    lines += ["--- the book goes on", book.following[:400].rstrip(), ""]
    lines += ["| memory | tokens in it | memorising | generating | perplexity of the next page |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['memory']} | {row['memory_tokens']:,} | {row['memorise_seconds']:.1f} s | "
            f"{row['generate_seconds']:.1f} s | {row['perplexity']:.2f} |"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--path", required=True, help="checkpoint of a LongMem model, or its directory")
    add("--data", help="directory of dict.txt and the tokenizer (default: the checkpoint's, then that of its training)")
    add("--text", help="the book, a UTF-8 file (default: the longest module of the standard library)")
    add("--page", type=int, help="page to continue, from 1 (default: that in the middle)")
    add("--page-length", type=int, default=1800, help="characters of a page (default: %(default)s)")
    add("--memory-size", type=int, default=65536, help="tokens that the memory holds (default: %(default)s)")
    add("--max-new-tokens", type=int, default=100, help="length of the continuation (default: %(default)s)")
    add("--beam", type=int, default=1, help="hypotheses (default: %(default)s)")
    add("--top-p", type=float, help="sample from the likeliest tokens that make up this share, instead of searching")
    add("--no-repeat-ngram-size", type=int, default=0, help="n-grams that a continuation may have only once")
    add("--pretrained-model-path", help="the backbone, where it is not where the checkpoint says")
    add("--json", help="write the result there")
    add("--cpu", action="store_true", help="do not use a GPU")
    options = parser.parse_args(arguments)
    for name in ("page_length", "memory_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} is less than 1")
    return options


def choose(options: argparse.Namespace) -> Book:
    """The book that the options name, at their page.

    Raises:
        ValueError: it has no such page.
        OSError: it cannot be read.
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
            "characters (--page-length), and one must come before and one after"
        )
    return Book(f"{name}, page {page} of {len(cut)}", text, "".join(cut[: page - 1]), cut[page - 1], cut[page])


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    settings = {"device": "cpu" if options.cpu else None}
    if options.pretrained_model_path:
        settings["pretrained_model_path"] = options.pretrained_model_path
    how = {"max_new_tokens": options.max_new_tokens, "beam": options.beam}
    how["no_repeat_ngram_size"] = options.no_repeat_ngram_size
    if options.top_p is not None:
        how.update(sampling=True, top_p=options.top_p)
    try:
        book = choose(options)
        off = LongMem.from_pretrained(options.path, options.data, memory_size=0, **settings)
        on = LongMem.from_pretrained(options.path, options.data, memory_size=options.memory_size, **settings)
        rows = [
            continued(off, "", "off", book, how),
            continued(on, book.before, "the pages before", book, how),
            continued(on, book.text, "the whole book", book, how),
        ]
    except (ValueError, OSError) as error:
        sys.exit(f"continue.py: {error}")
    print(report(rows, book))
    if options.json:
        part = f"{options.json}.part"
        Path(part).write_text(json.dumps({"book": book.name, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
