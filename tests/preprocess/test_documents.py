"""Documents come out of every kind of input exactly as they went in, in the same order everywhere."""

import gzip
import json
import sys

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.blocks import Position, read_blocks
from preprocess.document_source import list_sources
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


@pytest.mark.parametrize("compress", [None, "gz", "zst", "zst frames"])
def test_json_lines_plain_and_compressed(tmp_path, compress):
    data = json_lines(TEXTS)
    path = tmp_path / ("d.jsonl" + (f".{compress.split()[0]}" if compress else ""))
    if compress == "gz":
        data = gzip.compress(data)
    elif compress == "zst":
        data = zstandard.compress(data)
    elif compress == "zst frames":  # as pzstd writes
        data = b"".join(zstandard.compress(data[i : i + 100]) for i in range(0, len(data), 100))
    path.write_bytes(data)
    documents = list(iter_documents([path]))
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"{path.name}:{i}" for i in range(1, len(TEXTS) + 1)]
    assert {document.subset for document in documents} == {"d"}


def test_names_and_subsets_of_json_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    records = [
        {"text": "a", "name": "first"},
        {"text": "b", "meta": {"pile_set_name": "Books3"}},
        {"text": "c", "name": "", "meta": "none"},
    ]
    path.write_text("\n\n".join(map(json.dumps, records)))  # blank lines are not documents
    documents = [(document.name, document.subset) for document in iter_documents([path])]
    assert documents == [("first", "d"), ("d.jsonl:3", "Books3"), ("d.jsonl:5", "d")]


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst", "d.txt.gz", "d.txt.zst"])
def test_truncated_compressed_file_is_an_error(tmp_path, name):
    data = json_lines(str(i) * 50 for i in range(2000))
    compressed = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data)
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
    'line 2, has no string under "text"': b'{"txt": "a"}',
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


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    directory = tmp_path_factory.mktemp("collection")
    (directory / "a.jsonl").write_bytes(json_lines(f"a{i}" * (i % 7 + 1) for i in range(40)))
    (directory / "b.txt").write_text("b")
    (directory / "c.txt").write_text("c" * 90)
    (directory / "d.jsonl.gz").write_bytes(gzip.compress(json_lines(f"d{i}" for i in range(30))))
    (directory / "e.txt").write_text("e")
    return list_sources([directory])


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
