import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.data.mmap_index import pack_header
from longmem_fairseq.data.token_file import TokenFile
from tests.fairseq_runs import write_split

DOCUMENTS = [np.arange(4, 4 + n) for n in (3, 1, 40, 7)]


@pytest.fixture
def prefix(tmp_path):
    write_split(tmp_path / "train", DOCUMENTS)
    return tmp_path / "train"


def edit(path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def index_of(prefix):
    return prefix.with_suffix(".idx")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64])
def test_reads_what_fairseq_wrote(tmp_path, dtype):
    write_split(tmp_path / "train", DOCUMENTS, dtype)
    file = TokenFile(str(tmp_path / "train"))
    assert len(file) == len(DOCUMENTS)
    for i, document in enumerate(DOCUMENTS):
        read = file.read(i, 0, len(document))
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, document)


def test_reads_slices(prefix):
    np.testing.assert_array_equal(TokenFile(str(prefix)).read(2, 5, 9), DOCUMENTS[2][5:9])


def test_a_pickle_holds_no_tokens(prefix):
    pickled = pickle.dumps(TokenFile(str(prefix)))
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).read(2, 0, 40), DOCUMENTS[2])


def test_long_documents_keep_their_length(tmp_path):
    write_split(tmp_path / "train", [np.full(70_001, 5), np.full(3, 6)])
    np.testing.assert_array_equal(np.diff(TokenFile(str(tmp_path / "train")).offsets), [70_001, 3])


def test_pointers_that_overflowed_do_not_matter(prefix):
    # fairseq adds up the pointers of merged files in 32 bits under numpy 2
    bad = np.full(len(DOCUMENTS), -(2**31), dtype=np.int64).tobytes()
    edit(index_of(prefix), lambda data: data[: -len(bad)] + bad)
    np.testing.assert_array_equal(TokenFile(str(prefix)).read(3, 0, 7), DOCUMENTS[3])


def test_sizes_that_wrapped_are_taken_from_the_pointers(tmp_path):
    # 2**32 + 3 one-byte tokens, which a sparse file need not store
    lengths = np.array([2**32 + 3, 5])
    with open(tmp_path / "train.bin", "wb") as f:
        f.truncate(int(lengths.sum()))
    pointers = np.array([0, lengths[0]], dtype=np.int64)
    sizes = lengths.astype(np.int32)
    (tmp_path / "train.idx").write_bytes(pack_header(np.uint8, 2) + sizes.tobytes() + pointers.tobytes())
    np.testing.assert_array_equal(np.diff(TokenFile(str(tmp_path / "train")).offsets), lengths)


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_missing_file(prefix, end):
    prefix.with_suffix(end).unlink()
    with pytest.raises(FileNotFoundError, match=f"train{end} is missing"):
        TokenFile(str(prefix))


@pytest.mark.parametrize("end", [".bin", ".idx"])
@pytest.mark.parametrize("change", ["cut", "longer"])
def test_files_of_another_length_are_refused(prefix, end, change):
    edit(prefix.with_suffix(end), lambda data: data[:-6] if change == "cut" else data + b"\0" * 6)
    with pytest.raises(ValueError, match=r"train\.(bin|idx) has \d+ bytes"):
        TokenFile(str(prefix))


@settings(max_examples=50)
@given(garbage=st.binary(max_size=80))
def test_garbage_is_refused(tmp_path_factory, garbage):
    prefix = tmp_path_factory.mktemp("garbage") / "train"
    write_split(prefix, DOCUMENTS)
    index_of(prefix).write_bytes(garbage)
    with pytest.raises(ValueError, match="train.idx"):
        TokenFile(str(prefix))


def test_other_formats_are_named(prefix):
    index_of(prefix).write_bytes(b"TNTIDX\x00\x00" + struct.pack("<QQQQQ", 1, 4, 4, 0, 0))
    with pytest.raises(ValueError, match="cached or lazy format.*--dataset-impl mmap"):
        TokenFile(str(prefix))


def test_unknown_token_types_are_refused(prefix):
    edit(index_of(prefix), lambda data: data[:17] + bytes([6]) + data[18:])
    with pytest.raises(ValueError, match="token type 6"):
        TokenFile(str(prefix))


def test_data_of_another_split_is_refused(prefix, tmp_path):
    write_split(tmp_path / "other", DOCUMENTS[:3])
    (tmp_path / "other.bin").replace(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="belongs to other data"):
        TokenFile(str(prefix))


def test_empty_documents_are_refused(tmp_path):
    write_split(tmp_path / "train", [DOCUMENTS[0], np.array([]), DOCUMENTS[1]])
    with pytest.raises(ValueError, match=r"document 1 of .*train.bin is empty \(1 of 3"):
        TokenFile(str(tmp_path / "train"))


def test_no_documents_at_all(tmp_path):
    write_split(tmp_path / "train", [])
    with pytest.raises(ValueError, match="lists no items"):
        TokenFile(str(tmp_path / "train"))
