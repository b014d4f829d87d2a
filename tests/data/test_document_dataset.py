import json

import numpy as np
import pytest

from longmem_fairseq.data.directories import find_split
from longmem_fairseq.data.document_dataset import DocumentDataset
from tests.fairseq_runs import make_dictionary, random_documents, write_data, write_split

LENGTHS = [5, 1, 30]


def open_split(data, split="train", combine=False):
    return DocumentDataset(find_split(str(data), split, combine), make_dictionary(), split)


def test_documents_of_several_files_follow_each_other(tmp_path):
    first, second = random_documents(LENGTHS), random_documents([7, 2], seed=1)
    data = write_data(tmp_path, train=first, train1=second)
    dataset = open_split(data, combine=True)
    assert len(dataset) == 5 and dataset.tokens == 45
    np.testing.assert_array_equal(dataset.sizes, [5, 1, 30, 7, 2])
    for i, document in enumerate(first + second):
        np.testing.assert_array_equal(dataset.read(i, 0, len(document)), document)
    assert len(open_split(data)) == 3


@pytest.mark.parametrize(
    "token, message", [(64, "is outside the dictionary of 64 symbols"), (1, "is the padding symbol")]
)
def test_bad_tokens_are_refused(tmp_path, token, message):
    documents = random_documents(LENGTHS)
    documents[2][17] = token
    dataset = open_split(write_data(tmp_path, train=documents))
    assert len(dataset.read(2, 0, 17)) == 17
    with pytest.raises(ValueError, match=rf"token {token} at position 17 of document 2 in .*train.bin {message}"):
        dataset.read(2, 10, 20)


def test_a_missing_split_names_those_there_are(tmp_path):
    data = write_data(tmp_path, train=random_documents(LENGTHS), test=random_documents(LENGTHS))
    with pytest.raises(FileNotFoundError, match=r"no data for the split 'valid'.*: test, train\)"):
        open_split(data, "valid")


def test_names(tmp_path):
    data = write_data(tmp_path, train=random_documents(LENGTHS), train1=random_documents([4]))
    notes = tmp_path / "train.documents.jsonl"
    notes.write_text("".join(json.dumps({"name": name}) + "\n" for name in ("a", "b/ü", "c")), encoding="utf-8")
    assert open_split(data, combine=True).names() == ["a", "b/ü", "c", "train1:0"]
    notes.write_text('{"name": "a"}\n')
    with pytest.raises(ValueError, match="names 1 documents, but .*train.bin holds 3"):
        open_split(data).names()
    notes.write_text('{"name": "a"\n')
    with pytest.raises(ValueError, match="train.documents.jsonl cannot be read"):
        open_split(data).names()


def test_sizes_of_long_documents(tmp_path):
    write_split(tmp_path / "train", [np.full(70_001, 5)])
    assert open_split(tmp_path).size(0) == 70_001
