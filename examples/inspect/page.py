"""One HTML page that shows what a text reads from the memory: colored tokens, and the chunks that each of them read.

    python -m examples.inspect.page --path CHECKPOINT --data DATA --text novel.txt --output novel.html

Open the page in any browser; it is one file and loads nothing else. The color of a token shows how much of a reading
layer's output, at the step that predicts the token, came from one chunk of the memory (gate x mass); a click shows the
chunks. The color can also show by how many nats the memory made each token more likely. `--memory-text FILE` memorizes
other documents first. `--from N --tokens M` shows a part of a long text; the whole text is read in any case.
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
from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from longmem_fairseq.data.text_meter import figures_by_text, measure_text
from longmem_fairseq.files import printable, require_writable, write_text
from longmem_fairseq.hub import LongMem
from longmem_fairseq.models.trace import Trace
from longmem_fairseq.text import read_text

AROUND = 10  # tokens of context shown on both sides of a chunk
MOST_TOKENS = 50_000  # more in one page make browsers slow


class Run(NamedTuple):
    """Consecutive tokens that the page shows.

    Attributes:
        begin: Place of the first token in the memory's stream.
        texts: Text of each token.
    """

    begin: int
    texts: List[str]


class StreamTexts:
    """Texts of the tokens in the memory's stream: the memorized documents, then the text that is shown.

    Args:
        model: Model that tokenized the texts.

    Attributes:
        texts: Text of each token, by its place in the stream; an end-of-sentence has an empty text.
    """

    def __init__(self, model: LongMem):
        self.model = model
        self.texts: Dict[int, str] = {}

    def add(self, begin: int, tokens: Tensor) -> None:
        """Add a document.

        Args:
            begin: Place of the document's first input, an end-of-sentence, in the stream.
            tokens: Token ids of the document, shape (length,), int64.
        """
        self.texts[begin] = ""
        self.texts.update(enumerate(self.model.token_texts(tokens), begin + 1))

    def shown(self, trace: Trace) -> List[Run]:
        """Return the runs of tokens that the page shows: the traced text, and the surroundings of what it read."""
        chunks = trace.chunks[trace.heads >= 0].unique()
        around = torch.arange(-AROUND, trace.chunk_size + AROUND)
        first = trace.position + trace.begin + 1
        text = torch.arange(first, first + len(trace.tokens))
        places = torch.cat([(chunks[:, None] + around).flatten(), text]).unique().tolist()
        runs: List[Run] = []
        for place in places:
            if place not in self.texts:
                continue
            if not runs or runs[-1].begin + len(runs[-1].texts) != place:
                runs.append(Run(place, []))
            runs[-1].texts.append(self.texts[place])
        return runs


def packed(x: Tensor, dtype: str) -> str:
    """Encode the numbers of a tensor as little-endian bytes in base64.

    Args:
        x: Numbers, any shape.
        dtype: Type of the numbers in numpy's notation, such as ``f4``.
    """
    return base64.b64encode(x.numpy().astype(f"<{dtype}").tobytes()).decode("ascii")


def payload(trace: Trace, stream: StreamTexts, settings: Dict[str, object]) -> Dict[str, object]:
    """Build the data of the page's script.

    Args:
        trace: What the text read.
        stream: Texts of the memory's stream.
        settings: Settings and figures of the page's head.

    Returns:
        A dictionary of plain JSON types; tensors are packed in base64.
    """
    runs = stream.shown(trace)
    texts = sorted({text for run in runs for text in run.texts})
    numbers = {text: i for i, text in enumerate(texts)}
    every = torch.tensor([numbers[text] for run in runs for text in run.texts], dtype=torch.int64)
    return {
        "settings": settings,
        "position": trace.position,
        "begin": trace.begin,
        "length": len(trace.tokens),
        "chunk": trace.chunk_size,
        "around": AROUND,
        "documents": [[name, begin, end] for name, begin, end in trace.documents],
        "layers": trace.layers,
        "gates": [round(gate, 4) for gate in trace.gates.mean(dim=0).tolist()],
        "reads": trace.heads.size(1),
        "texts": texts,
        "runs": [[run.begin, len(run.texts)] for run in runs],
        "text": packed(every, "u4"),
        "logp": packed(trace.log_probabilities, "f4"),
        "without": packed(trace.without_memory, "f4"),
        "strongest": packed(trace.strongest * 65535, "u2"),
        "byHead": packed(trace.by_head * 255, "u1"),
        "heads": packed(trace.heads, "i2"),
        "chunks": packed(trace.chunks.clamp(min=0), "u4"),
        "scores": packed(trace.scores, "f4"),
        "masses": packed(trace.masses.clamp(min=0) * 65535, "u2"),
        "readGates": packed(gates_of_reads(trace) * 65535, "u2"),
    }


def render_page(title: str, content: Dict[str, object]) -> str:
    """Render the page with its style, script and data inside.

    Args:
        title: Name of the text.
        content: Data of the page's script.
    """
    here = Path(__file__).parent
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    # In a script element only "<" can begin something else ("</script>", "<!--"); JSON allows this spelling of it:
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    parts = {
        "title": escape(title),
        "style": (here / "page.css").read_text(encoding="utf-8"),
        "script": (here / "page.js").read_text(encoding="utf-8"),
        "data": data,
    }
    template = (here / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)  # the inserted texts are not searched again


def gates_of_reads(trace: Trace) -> Tensor:
    """Return the gate of the head that made each read, shape (L, S), float32."""
    return trace.gates.gather(1, trace.heads.clamp(min=0))


def summary(trace: Trace, model: LongMem) -> Dict[str, object]:
    """Collect the settings and figures of the page's head."""
    decoder = model.model.decoder
    memory = decoder.memory_factory.settings
    read = trace.heads >= 0
    places = trace.position + trace.begin + 1 + torch.arange(len(trace.tokens))[:, None]
    weights = trace.masses * gates_of_reads(trace) * read
    distance = float(((places - trace.chunks) * weights).sum() / weights.sum()) if read.any() else 0.0
    size = measure_text(trace.tokens, model.task.dictionary, model.bpe, continues=trace.begin > 0)
    return {
        **figures_by_text(-float(trace.log_probabilities.double().sum()), size),
        "perplexity": round(math.exp(-float(trace.log_probabilities.mean())), 3),
        "without": round(math.exp(-float(trace.without_memory.mean())), 3),
        "distance": round(distance),
        "memory": memory.size,
        "k": memory.tokens_per_query,
        "window": model.task.args.tokens_per_sample,
    }


def make_page(model: LongMem, title: str, text: str, documents: Sequence[Tuple[str, str]], **part) -> str:
    """Memorize documents, trace a text behind them and render its page.

    Args:
        model: Model with an empty memory.
        title: Name of the text.
        text: Text to trace.
        documents: Name and text of each document to memorize first.
        part: The part of the text to show, as in :meth:`LongMem.trace`.

    Raises:
        ValueError: A text is empty, or the text has no such part.
    """
    stream = StreamTexts(model)
    for name, document in documents:
        model.memorize(document, name)
        placed = model.memory.documents[-1]
        stream.add(placed.begin, model.encode(document))
    trace = model.trace(text, **part)
    stream.add(trace.position, model.encode(text))
    return render_page(title, payload(trace, stream, summary(trace, model)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.inspect.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--path", required=True, help="checkpoint of a LongMem model, or its directory")
    add("--data", help="directory of dict.txt and the tokenizer (default: the checkpoint's, then that of its training)")
    add("--text", required=True, help="UTF-8 file of the text to show; - is standard input")
    add("--output", required=True, help="path of the HTML page to write")
    add("--memory-text", action="append", default=[], metavar="FILE", help="memorize this document first (repeatable)")
    add(
        "--from",
        dest="begin",
        type=int,
        default=0,
        metavar="N",
        help="number of the first token to show (default: %(default)s)",
    )
    add("--tokens", type=int, help=f"number of tokens to show (default: all that follow; at most {MOST_TOKENS:,})")
    add("--reads", type=int, default=8, help="number of chunks shown for each token (default: %(default)s)")
    add("--memory-size", type=int, help="number of tokens that the memory holds (default: the checkpoint's)")
    add("--pretrained-model-path", help="path of the backbone, if it is not where the checkpoint expects it")
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
        require_writable(options.output)
        model = LongMem.from_pretrained(options.path, options.data, device="cpu" if options.cpu else None, **settings)
        text = read_text(options.text)
        length = len(model.encode(text)) - options.begin
        if options.tokens is None and length > MOST_TOKENS:
            raise ValueError(
                f"the text has {length:,} tokens from {options.begin} on, but a page shows at most {MOST_TOKENS:,}: "
                "choose a part with --from and --tokens"
            )
        documents = [(path, read_text(path)) for path in options.memory_text]
        content = make_page(
            model,
            os.path.basename(options.text),
            text,
            documents,
            begin=options.begin,
            tokens=options.tokens,
            reads=options.reads,
        )
        write_text(options.output, content)
    except (ValueError, OSError) as error:
        sys.exit(f"page.py: {error}")
    print(f"{printable(options.output)}: {os.path.getsize(options.output) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
