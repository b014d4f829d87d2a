"""Test the page of what a text reads: its command, its data, and its behavior in a headless browser."""

import json
import math
import os
import re
import resource

import pytest
import torch

from examples.inspect import page
from longmem_fairseq.hub import LongMem
from tests.browser import Page, in_browser
from tests.examples.commands import run_example
from tests.text_models import gpt2_model, sentencepiece_model

NASTY = "<script>document.title = 'no'</script><!-- &amp; </pre>\n\tdéjà vu 漢字 🎉\u2028{{data}}\n"
TEXT = NASTY * 4 + "end"
BOOK = "A book that was read before: déjà vu 漢字.\n" * 3
PARTS = {"begin": 30, "tokens": 60}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """The directory of a model with a byte-level BPE, a text and a book in it, and their page made by the command."""
    directory = gpt2_model(tmp_path_factory.mktemp("gpt2"), [TEXT, BOOK])
    (directory / "<b>text & co.txt").write_text(TEXT, encoding="utf-8")
    (directory / "book").write_text(BOOK, encoding="utf-8")
    done = run_example(
        "inspect.page",
        "--path",
        directory,
        "--text",
        directory / "<b>text & co.txt",
        "--cpu",
        "--memory-size",
        90,
        "--memory-text",
        directory / "book",
        "--from",
        PARTS["begin"],
        "--tokens",
        PARTS["tokens"],
        "--reads",
        3,
        "--output",
        directory / "page.html",
    )
    assert done.returncode == 0, done.stderr
    assert "page.html: 0." in done.stdout
    return directory


@pytest.fixture(scope="module")
def trace(gpt2):
    """The model of that page, and what it reads."""
    model = LongMem.from_pretrained(str(gpt2), device="cpu", memory_size=90)
    model.memorize(BOOK, str(gpt2 / "book"))
    return model, model.trace(TEXT, **PARTS, reads=3)


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_a_page_is_one_file(gpt2):
    html = (gpt2 / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?:", html)
    assert html.count("<script") == html.count("</script>") == 2, "nothing of the text is markup"
    assert html.count("<!--") == 0 and "<title>What &lt;b&gt;text &amp; co.txt reads</title>" in html
    assert not list(gpt2.glob("*.part*"))


def test_the_data_is_the_trace(gpt2, trace):
    model, result = trace
    data = data_of((gpt2 / "page.html").read_text(encoding="utf-8"))
    assert (data["begin"], data["length"], data["reads"]) == (30, 60, 3)
    assert data["settings"]["perplexity"] == pytest.approx(math.exp(-result.log_probabilities.mean()), rel=1e-3)
    nats, shown_text = -float(result.log_probabilities.sum()), "".join(model.token_texts(result.tokens))
    assert data["settings"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(shown_text.encode()), rel=0.01)
    assert data["documents"] == [[str(gpt2 / "book"), 0, result.position]]
    stream = page.StreamTexts(model)
    stream.add(0, model.encode(BOOK))
    stream.add(result.position, model.encode(TEXT))
    assert "".join(text for _, text in sorted(stream.texts.items())) == BOOK + TEXT
    shown = dict(enumerate(data["texts"]))
    assert "".join(shown.values()) != "" and set(shown.values()) <= set(stream.texts.values())


@in_browser
def test_in_a_browser(gpt2, trace):
    model, result = trace
    texts = model.token_texts(model.encode(TEXT))
    gain = result.log_probabilities - result.without_memory
    chosen = int(gain.argmax())
    with Page(gpt2 / "page.html") as shown:
        assert shown.run("document.title") == "What <b>text & co.txt reads"
        spans = shown.run("[...document.querySelectorAll('#text span')].map(e => e.textContent)")
        assert len(spans) == 60
        for text, expected in zip(spans, texts[30:90]):
            assert text == (expected.replace("\n", "↵\n").replace("\t", "→\t") or "·")
        colors = shown.run("[...document.querySelectorAll('#text span')].map(e => e.style.backgroundColor)")
        opacity = torch.tensor([float(re.findall(r"[\d.]+(?=\))", color or "0)")[0]) for color in colors])
        order = result.strongest.argsort()
        assert opacity[order[-20:]].min() > opacity[order[:20]].max(), "tokens that read more are darker"

        def panel():
            return shown.run("document.getElementById('panel').innerText")

        shown.mouse(f"document.querySelectorAll('#text span')[{chosen}]", click=False)
        assert f"token {30 + chosen}" in panel(), "pointing at a token shows its reads"
        shown.mouse(f"document.querySelectorAll('#text span')[{chosen}]")
        shown.mouse("document.querySelectorAll('#text span')[1]", click=False)
        assert f"token {30 + chosen}" in panel(), "a click keeps them"
        reads = panel()
        assert f"gain {float(gain[chosen]):.2f} nats" in reads
        excerpts = shown.run("[...document.querySelectorAll('#panel mark')].map(e => e.textContent)")
        assert len(excerpts) == 3
        inputs = ["", *model.token_texts(model.encode(BOOK)), "", *texts]
        for r, excerpt in enumerate(excerpts):
            place, head = int(result.chunks[chosen, r]), int(result.heads[chosen, r])
            back = result.position + 30 + chosen + 1 - place
            name = result.where(place)[0]
            assert f"{back} tokens back" + (f", in {name}" if name else "") in reads
            share = float(result.gates[chosen, head] * result.masses[chosen, r])
            assert f"layer {result.layers[head // 3]}, head {head % 3} · gate × mass {share:.3f}" in reads
            assert f"score {float(result.scores[chosen, r]):.2f}" in reads
            chunk = "".join(inputs[place : place + result.chunk_size]).replace("\n", "↵\n").replace("\t", "→\t")
            assert excerpt.replace("⟨start⟩", "") == (chunk or "·")
        shown.key("ArrowRight")
        assert f"token {31 + chosen}" in panel()
        shown.key("Escape")
        shown.mouse("document.querySelectorAll('#text span')[2]", click=False)
        assert "token 32\n" in panel(), "Escape releases it"
        shown.mouse("document.getElementById('next')")
        assert f"token {30 + chosen}\n" in panel(), "the first jump is to what the memory helped most"
        for option in ("gain", "0"):
            shown.run(
                f"(() => {{ const s = document.getElementById('color'); s.value = '{option}'; "
                "s.dispatchEvent(new Event('change')); })()"
            )
            other = shown.run("[...document.querySelectorAll('#text span')].map(e => e.style.backgroundColor)")
            assert other != colors
            colors = other
        assert shown.errors == [] and shown.requests == [(gpt2 / "page.html").resolve().as_uri()]


@in_browser
def test_sentencepiece_in_a_browser(tmp_path):
    """Show 20,000 tokens: the page stays small, and the browser shows the text unchanged."""
    directory = str(sentencepiece_model(tmp_path))
    model = LongMem.from_pretrained(directory, device="cpu", memory_size=64, tokens_per_sample=24)
    text = (NASTY + "for i in range(10):\n    print(i)\n") * 300
    text = text[: int(len(text) * 20000 / len(model.encode(text)))]
    made = page.make_page(model, "text", text, [])
    assert len(made.encode()) < 8 * 2**20
    (tmp_path / "page.html").write_text(made, encoding="utf-8")
    with Page(tmp_path / "page.html") as shown:
        content = shown.run("document.getElementById('text').textContent")
        assert content.replace("↵\n", "\n").replace("→\t", "\t").replace("·", "") == text
        assert shown.errors == []


def test_refusals(gpt2, tmp_path):
    done = run_example(
        "inspect.page", "--path", gpt2, "--text", gpt2 / "book", "--output", tmp_path / "page", "--cpu", "--from", 5000
    )
    assert done.returncode == 1 and "none of them between 5000" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written(gpt2, tmp_path, capsys):
    """A full disk, a device, and no directory; then a text and a page with names that are not UTF-8."""

    def refusal(output):
        with pytest.raises(SystemExit) as refused:
            page.main(["--path", str(gpt2), "--text", str(text), "--output", str(output), "--cpu"])
        return str(refused.value)

    text = tmp_path / os.fsdecode(b"t\xe9xt")
    text.write_text("some words")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert refusal(tmp_path / "a.html") == f"page.py: {tmp_path / 'a.html'} cannot be written: File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "/dev/full is a device, not a regular file: name another path" in refusal("/dev/full")
    assert "does not exist" in refusal(tmp_path / "none" / "a.html")
    assert [path.name for path in tmp_path.iterdir()] == [text.name]
    output = tmp_path / os.fsdecode(b"p\xe4ge.html")
    page.main(["--path", str(gpt2), "--text", str(text), "--output", str(output), "--cpu"])
    assert "p\\udce4ge.html: 0." in capsys.readouterr().out
    html = output.read_text(encoding="utf-8")
    assert "What t\\udce9xt reads" in html and data_of(html)["settings"]["bits_per_byte"] > 0


@pytest.mark.parametrize(
    "options, sentence",
    [("--tokens 0", "--tokens 0 is not from 1"), ("--reads 65", "--reads 65 is not"), ("--from -1", "--from -1 is")],
)
def test_bad_options(options, sentence, capsys):
    with pytest.raises(SystemExit):
        page.parse(["--path", "x", "--text", "x", "--output", "x", *options.split()])
    assert sentence in capsys.readouterr().err
