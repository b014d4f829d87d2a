"""Documents come out of every kind of input exactly as they went in, in the same order everywhere."""

import bz2
import gzip
import json
import lzma
import re
import sys
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.blocks import Position, read_blocks
from preprocess.document_source import DocumentFormat, list_sources, open_source
from preprocess.documents import iter_documents
from preprocess.errors import InputError

TEXTS = ["a\n", "  two\r\n\n\tlines \n", "\ufeffbom é 日本\u2028\x00", "\n", "x" * 3000]


def json_lines(texts, **more) -> bytes:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()


def test_text_file_is_one_document_kept_exactly(tmp_path):
    for number, text in enumerate(TEXTS):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(text.encode())
        (document,) = iter_documents([path])
        assert (document.name, document.text, document.subset) == (f"{number}.txt", text, str(number))


def test_directory_is_walked_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b/z.py", "b-1/a.py", "a.txt", ".hidden/x.py", "b/.x.py", "b/c/d"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)
    documents = list(iter_documents([tmp_path]))
    assert [document.name for document in documents] == ["a.txt", "b/c/d", "b/z.py", "b-1/a.py"]
    assert all(document.text == document.name for document in documents)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("suffix, frames", [(suffix, n) for suffix in COMPRESS for n in (1, 100) if suffix or n == 1])
def test_json_lines_plain_and_compressed(tmp_path, suffix, frames):
    data = json_lines(TEXTS)
    step = -(-len(data) // frames)
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](data[i : i + step]) for i in range(0, len(data), step)))
    documents = list(iter_documents([path]))
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"{path.name}:{i}" for i in range(1, len(TEXTS) + 1)]
    assert {document.subset for document in documents} == {"d"}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_are_recognized_by_their_content(tmp_path, suffix):
    """As C4, Dolma and RedPajama name their files; with other keys beside the text, and any compression in the name."""
    records = [{"url": "u", "text": text} for text in TEXTS]
    data = b"\n".join(json.dumps(record).encode() for record in records)
    for name in (f"c4-train.00000-of-01024.json{suffix}", "part-00000"):
        (tmp_path / name).write_bytes(COMPRESS[suffix](data))
        assert [document.text for document in iter_documents([tmp_path / name])] == TEXTS
    data = data.replace(b'"text"', b'"content"')
    path = tmp_path / f"other.json{suffix}"
    path.write_bytes(COMPRESS[suffix](data))
    assert [document.text for document in iter_documents([path], form=DocumentFormat("content"))] == TEXTS
    with pytest.raises(InputError, match='line 1, has no string under "text": name its key with --text-key'):
        list(iter_documents([path]))


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.txt", json_lines(["its name says text"] * 2).decode()),
        ("package.json", '{"name": "minified", "version": 1}\n'),
        ("settings.json", '{\n  "text": "over several lines"\n}\n'),
        ("tsconfig", '{ // a comment\n"text": 1}'),
        ("list.json", '[{"name": 1}]'),
        ("orchards", "ORCHARDS and GGUF, GIF8 and PAR1, BZh9 and PK"),
        ("empty-ish", "\n"),
    ],
)
def test_text_that_looks_like_another_format(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (document,) = iter_documents([tmp_path])
    assert document.text == text


@pytest.mark.parametrize(
    "head, description",
    [
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF document"),
        (b"PK\x03\x04\x14\x00\x00\x00mimetypeapplication/epub+zipPK", "an EPUB book"),
        (b"PK\x03\x04\x14\x00\x06\x00[Content_Types].xml word/document.xml", "a Word document"),
        (b"PK\x03\x04\x14\x00\x00\x00a.txt", "a ZIP archive"),
        (b"SQLite format 3\x00", "an SQLite database"),
        (b"\x89HDF\r\n\x1a\n\x00", "an HDF5 file"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF model"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
        ("\ufefftext".encode("utf-16-le"), "UTF-16 text"),
        (b'[\n  {"id": 1, "text": "a"},\n  {"text": "b"}]', "a JSON array, which is not read in parts"),
    ],
)
def test_other_formats_are_named_or_skipped(tmp_path, head, description):
    path = tmp_path / "b.bin"
    (tmp_path / "a.txt").write_text("text")
    for compress in (bytes, gzip.compress):
        path.write_bytes(compress(head.ljust(600, b"\1" if b"\0" in head else b" ")))
        with pytest.raises(InputError, match=f"b.bin is {re.escape(description)}.*: give UTF-8 text, JSON lines or"):
            list(iter_documents([tmp_path]))
        assert [document.name for document in iter_documents([tmp_path], "skip")] == ["a.txt"]


def test_separated_documents_of_a_text_file(tmp_path):
    path = tmp_path / "corpus.txt.xz"
    parts = ["one\n", " two <|end", "\n \n", "x" * (3 << 20), "y\n"]
    path.write_bytes(lzma.compress("<|endoftext|>".join(["", *parts, ""]).encode(), preset=0))
    documents = list(iter_documents([path], form=DocumentFormat(separator="<|endoftext|>")))
    assert [document.text for document in documents] == [part for part in parts if part.strip()]
    assert [document.name for document in documents] == [f"corpus.txt.xz:{number}" for number in (2, 3, 5, 6)]
    assert {document.subset for document in documents} == {"corpus"}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"{number}\n" * (number % 9 + 1) for number in range(2000)]
    columns = {"content": texts, "name": [f"n{i}" for i in range(2000)], "other": list(range(2000))}
    path = tmp_path / "train-00000.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=300)
    sources = list_sources([path], DocumentFormat("content"))
    blocks = list(read_blocks(sources, block_bytes=999))
    assert texts_of(blocks) == texts
    documents = list(iter_documents([path], form=DocumentFormat("content")))
    assert [document.name for document in documents] == columns["name"] and documents[0].subset == "train-00000"
    for stop in (1, 4, len(blocks) - 1):  # within and between the groups of rows
        assert texts_of(read_blocks(sources, blocks[stop][1])) == sum(
            map(texts_of, ([b] for b in blocks[stop + 1 :])), []
        )
    assert texts_of(read_blocks(sources, stripe=(1, 3))) == texts[1::3]
    with pytest.raises(
        InputError, match="no column text .its columns are content, name, other.: name that of the text"
    ):
        list(iter_documents([path]))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="train-00000.parquet cannot be read to its end"):
        list(iter_documents([path], form=DocumentFormat("content")))


@pytest.mark.parametrize("suffix", [".zst", ".gz", ".xz", ".bz2"])
def test_memory_does_not_grow_with_the_compression(tmp_path, suffix):
    """A few kilobytes that are 64 MB of short lines."""
    data = json_lines(["a"]) * (1 << 16)
    whole = {".zst": zstandard.compress, ".xz": lambda data: lzma.compress(data, preset=0)}.get(suffix)
    content = whole(data * 64) if whole else COMPRESS[suffix](data) * 64
    assert len(content) < 500_000
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(content)
    tracemalloc.start()
    with open_source(list_sources([path])[0]) as (stream, _):
        assert sum(map(len, iter(lambda: stream.read(1 << 18), b""))) == 64 * len(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20, peak


def test_names_and_subsets_of_json_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    records = [
        {"text": "a", "name": "first"},
        {"text": "b", "meta": {"pile_set_name": "Books3"}},
        {"text": "c", "name": "", "meta": "none"},
        {"text": "d", "name": "\ud800", "meta": {"pile_set_name": "\udcff x"}},  # halves of surrogate pairs
    ]
    path.write_text("\n\n".join(map(json.dumps, records)))  # blank lines are not documents
    documents = [(document.name, document.subset) for document in iter_documents([path])]
    assert documents == [("first", "d"), ("d.jsonl:3", "Books3"), ("d.jsonl:5", "d"), (r"\ud800", r"\udcff x")]


@pytest.mark.parametrize("name", [f"d.{kind}{suffix}" for suffix in COMPRESS if suffix for kind in ("jsonl", "txt")])
def test_truncated_compressed_file_is_an_error(tmp_path, name):
    data = json_lines(str(i) * 50 for i in range(2000))
    compressed = COMPRESS[Path(name).suffix](data)
    path = tmp_path / name
    path.write_bytes(compressed[: len(compressed) * 2 // 3])
    with pytest.raises(InputError, match=f"{name} cannot be read to its end"):
        list(iter_documents([path]))
    path.write_bytes(b"garbage" * 10)
    with pytest.raises(InputError, match=f"{name} cannot be read to its end"):
        list(iter_documents([path]))


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(b"{}"))
    with pytest.raises(InputError, match="d.jsonl.zst needs the Python package zstandard: pip install zstandard"):
        list(iter_documents([tmp_path]))


BAD_LINES = {
    "line 2, is an empty document": b'{"text": ""}',
    "line 2, is not JSON": b'{"text": "a"',
    'line 2, has no string under "text": name its key with --text-key, repair it': b'{"txt": "a"}',
    "line 2, has no string": b'["a"]',
    "line 2, is not UTF-8 text": b'{"text": "\xff"}',
    "line 2, holds a lone surrogate": b'{"text": "a\\ud800"}',
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_bad_json_line_is_named_or_skipped(tmp_path, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + BAD_LINES[message] + b'\n{"text": "b"}\n')
    with pytest.raises(InputError, match=message) as error:
        list(iter_documents([path]))
    assert str(path) in str(error.value) and "--bad-documents skip" in str(error.value)
    assert [document.text for document in iter_documents([path], "skip")] == ["a", "b"]


@pytest.mark.parametrize("data, message", [(b"", "is an empty document"), (b"ab\xff", r"not UTF-8 text \(byte 2\)")])
def test_bad_text_file_is_named_or_skipped(tmp_path, data, message):
    (tmp_path / "a").write_text("a")
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(iter_documents([tmp_path]))
    assert [document.name for document in iter_documents([tmp_path], "skip")] == ["a"]


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(InputError, match="no file or directory .*nowhere"):
        list_sources([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="holds no visible file"):
        list_sources([tmp_path])


@pytest.fixture(scope="module", params=["", "|"])
def collection(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("collection")
    (directory / "a.jsonl").write_bytes(json_lines(f"a{i}" * (i % 7 + 1) for i in range(40)))
    (directory / "b.txt").write_text("b")
    (directory / "c.txt").write_text("c" * 90)
    (directory / "d.jsonl.gz").write_bytes(gzip.compress(json_lines(f"d{i}" for i in range(30))))
    (directory / "e.txt").write_text("|e||" + "|".join(f"e{i}" * (i % 5 + 1) for i in range(20)))
    return list_sources([directory], DocumentFormat(separator=request.param))


def texts_of(blocks) -> list[str]:
    return [document.text for block, _ in blocks for document in block.parse("refuse").documents]


@settings(deadline=None, max_examples=60)
@given(block_bytes=st.integers(1, 2000), stop=st.integers(0, 80), shards=st.integers(1, 5), shard=st.integers(0, 4))
def test_reading_continues_from_any_position(collection, block_bytes, stop, shards, shard):
    stripe = (shard % shards, shards)
    blocks = list(read_blocks(collection, stripe=stripe, block_bytes=block_bytes))
    stop = min(stop, len(blocks))
    position = blocks[stop - 1][1] if stop else Position()
    rest = read_blocks(collection, position, stripe, block_bytes)
    assert texts_of(blocks[:stop]) + texts_of(rest) == texts_of(read_blocks(collection, stripe=stripe))
    if blocks and shards == 1:
        assert blocks[-1][1].consumed == sum(source.size for source in collection)
    assert all(one.consumed <= two.consumed for (_, one), (_, two) in zip(blocks, blocks[1:], strict=False))


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_stripes_divide_the_documents(collection, shards):
    parts = [texts_of(read_blocks(collection, stripe=(i, shards))) for i in range(shards)]
    assert sorted(sum(parts, [])) == sorted(texts_of(read_blocks(collection)))
