"""One HTML page that shows what a text reads from the memory: its tokens coloured, and for each the chunks it read.

    python examples/inspect/page.py --path CHECKPOINT --data DATA --text novel.txt --output novel.html

Open the page in any browser; it is one file and loads nothing. The colour of a token is how much of what the reading
layer said, when the token was to be predicted, came from one chunk of the memory (gate x mass); a click shows the
chunks. `--memory-text FILE` memorises other documents first; `--from N --tokens M` shows a part of a long text, all of
which is read. The colour can also show by how many nats the memory made each token more likely.
"""

import argparse
import base64
import json
import math
import os
import re
import sys
from html import escape
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from longmem_fairseq.hub import LongMem
from longmem_fairseq.models.trace import Trace
from longmem_fairseq.text import read_text

AROUND = 10  # tokens of context shown on both sides of a chunk
MOST_TOKENS = 50_000  # more in one page make browsers slow


class Stream:
    """The texts of the tokens that lie in the memory's stream: memorised documents, then the text itself."""

    def __init__(self, model: LongMem):
        self.model, self.texts = model, {}

    def add(self, begin: int, tokens: Tensor) -> None:
        """Tokens (n,) of a document that begins, with an end-of-sentence, at ``begin``."""
        self.texts[begin] = ""
        self.texts.update(enumerate(self.model.token_texts(tokens), begin + 1))

    def parts(self, trace: Trace) -> List[Tuple[int, List[str]]]:
        """Runs of tokens that the page shows, (place in the stream, texts): the text, and what is around its reads."""
        read = trace.chunks[trace.heads >= 0].unique()
        around = torch.arange(-AROUND, trace.chunk_size + AROUND)
        first = trace.position + trace.begin + 1
        own = torch.arange(first, first + len(trace.tokens))
        wanted = torch.cat([(read[:, None] + around).flatten(), own]).unique().tolist()
        runs: List[Tuple[int, List[str]]] = []
        for place in wanted:
            if place not in self.texts:
                continue
            if not runs or runs[-1][0] + len(runs[-1][1]) != place:
                runs.append((place, []))
            runs[-1][1].append(self.texts[place])
        return runs


def packed(x: Tensor, dtype: str) -> str:
    """The numbers of a tensor as little-endian bytes in base64."""
    return base64.b64encode(x.numpy().astype(f"<{dtype}").tobytes()).decode("ascii")


def payload(trace: Trace, stream: Stream, settings: Dict[str, object]) -> Dict[str, object]:
    """All that the page's script is given."""
    runs = stream.parts(trace)
    texts = sorted({text for _, run in runs for text in run})
    numbers = {text: i for i, text in enumerate(texts)}
    every = torch.tensor([numbers[text] for _, run in runs for text in run], dtype=torch.int64)
    return {
        "settings": settings,
        "position": trace.position,
        "begin": trace.begin,
        "length": len(trace.tokens),
        "chunk": trace.chunk_size,
        "around": AROUND,
        "documents": [[name, begin, end] for name, begin, end in trace.documents],
        "gates": [round(gate, 4) for gate in trace.gates.tolist()],
        "reads": trace.heads.size(1),
        "texts": texts,
        "runs": [[begin, len(run)] for begin, run in runs],
        "text": packed(every, "u4"),
        "logp": packed(trace.log_probabilities, "f4"),
        "without": packed(trace.without_memory, "f4"),
        "strongest": packed(trace.strongest * 65535, "u2"),
        "byHead": packed(trace.by_head * 255, "u1"),
        "heads": packed(trace.heads, "i1"),
        "chunks": packed(trace.chunks.clamp(min=0), "u4"),
        "scores": packed(trace.scores, "f4"),
        "masses": packed(trace.masses.clamp(min=0) * 65535, "u2"),
    }


def page(title: str, content: Dict[str, object]) -> str:
    """The page, with style, script and data inside."""
    here = Path(__file__).parent
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    # In a script element only "<" can begin something else ("</script>", "<!--"); in JSON it may be written so:
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    parts = {
        "title": escape(title),
        "style": (here / "page.css").read_text(encoding="utf-8"),
        "script": (here / "page.js").read_text(encoding="utf-8"),
        "data": data,
    }
    template = (here / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)  # what is put in is not looked at again


def summary(trace: Trace, model: LongMem) -> Dict[str, object]:
    """Settings and figures of the page's head."""
    cfg = model.model.decoder.cfg
    read = trace.heads >= 0
    places = trace.position + trace.begin + 1 + torch.arange(len(trace.tokens))[:, None]
    weights = trace.masses * trace.gates[trace.heads.clamp(min=0)] * read
    distance = float(((places - trace.chunks) * weights).sum() / weights.sum()) if read.any() else 0.0
    return {
        "perplexity": round(math.exp(-float(trace.log_probabilities.mean())), 3),
        "without": round(math.exp(-float(trace.without_memory.mean())), 3),
        "distance": round(distance),
        "memory": cfg.memory_size,
        "k": cfg.k,
        "layer": cfg.retrieval_layer_index,
        "window": model.task.args.tokens_per_sample,
    }


def write(path: str, text: str) -> None:
    """Write a file whole or not at all."""
    part = f"{path}.part"
    Path(part).write_text(text, encoding="utf-8")
    os.replace(part, path)


def make(model: LongMem, title: str, text: str, memorised: Sequence[Tuple[str, str]], **part) -> str:
    """The page of a text behind memorised documents (name, text); ``part`` is as in :meth:`LongMem.trace`.

    Raises:
        ValueError: a text is empty, or there is no such part of it.
    """
    stream = Stream(model)
    for name, document in memorised:
        model.memorize(document, name)
        placed = model.document_memory.documents[-1]
        stream.add(placed.begin, model.encode(document))
    trace = model.trace(text, **part)
    stream.add(trace.position, model.encode(text))
    return page(title, payload(trace, stream, summary(trace, model)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--path", required=True, help="checkpoint of a LongMem model, or its directory")
    add("--data", help="directory of dict.txt and the tokenizer (default: the checkpoint's, then that of its training)")
    add("--text", required=True, help="the text to look at, a UTF-8 file; - is standard input")
    add("--output", required=True, help="the page")
    add("--memory-text", action="append", default=[], metavar="FILE", help="memorise a document first (repeatable)")
    add("--from", dest="begin", type=int, default=0, metavar="N", help="first token to show (default: %(default)s)")
    add("--tokens", type=int, help=f"tokens to show (default: all from there; {MOST_TOKENS:,} at most)")
    add("--reads", type=int, default=8, help="chunks kept of each token (default: %(default)s)")
    add("--memory-size", type=int, help="tokens that the memory holds, in place of the checkpoint's")
    add("--pretrained-model-path", help="the backbone, where it is not where the checkpoint says")
    add("--cpu", action="store_true", help="do not use a GPU")
    options = parser.parse_args(arguments)
    if options.tokens is not None and not 0 < options.tokens <= MOST_TOKENS:
        parser.error(f"--tokens {options.tokens} is not from 1 to {MOST_TOKENS:,}")
    if not 1 <= options.reads <= 64:
        parser.error(f"--reads {options.reads} is not from 1 to 64")
    if options.begin < 0:
        parser.error(f"--from {options.begin} is before the text")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    names = ("memory_size", "pretrained_model_path")
    settings = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    try:
        model = LongMem.from_pretrained(options.path, options.data, device="cpu" if options.cpu else None, **settings)
        text = read_text(options.text)
        length = len(model.encode(text)) - options.begin
        if options.tokens is None and length > MOST_TOKENS:
            raise ValueError(
                f"the text has {length:,} tokens from {options.begin} on, more than the {MOST_TOKENS:,} that a page "
                "can show: choose a part with --from and --tokens"
            )
        memorised = [(path, read_text(path)) for path in options.memory_text]
        content = make(
            model,
            os.path.basename(options.text),
            text,
            memorised,
            begin=options.begin,
            tokens=options.tokens,
            reads=options.reads,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"page.py: {error}")
    write(options.output, content)
    print(f"{options.output}: {len(content.encode()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
