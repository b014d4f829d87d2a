"""A disk that is full, or a place that cannot be written to, leaves nothing behind and costs no work."""

import os
import resource
from contextlib import contextmanager

import pytest

from preprocess import convert_huggingface, convert_safetensors, sentencepiece_training
from preprocess.binarize_documents import main as binarize
from preprocess.destination import whole_directory
from tests.models.tiny import VOCABULARY, stock_config, stock_model, write_checkpoint
from tests.text_models import huggingface_model


@contextmanager
def files_of_at_most(size):
    """Let every longer file fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content_of(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A GPT-2-like checkpoint, the same as a Hugging Face directory, a LongMem checkpoint, and a text."""
    directory = tmp_path_factory.mktemp("models")
    config = dict(decoder_learned_pos=True, decoder_input_dim=12, decoder_output_dim=12, no_scale_embedding=True)
    write_checkpoint(directory / "stock.pt", stock_model(**config), stock_config(**config))
    VOCABULARY.save(str(directory / "dict.txt"))
    convert_huggingface.main(["--export", str(directory / "stock.pt"), str(directory / "hf")])
    (directory / "longmem").mkdir()
    huggingface_model(directory / "longmem", ["a text " * 9])
    (directory / "text.txt").write_text("some words of a text\n" * 900)
    return directory


COMMANDS = {
    "tokenizer": (sentencepiece_training, ["--train", "{d}/text.txt", "--vocab-size", "320", "--output", "{out}"]),
    "from Hugging Face": (convert_huggingface, ["{d}/hf", "{out}"]),
    "to Hugging Face": (convert_huggingface, ["--export", "{d}/stock.pt", "{out}", "--dict", "{d}/dict.txt"]),
    "to a directory": (convert_safetensors, ["{d}/longmem/model.pt", "{out}"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_leaves_everything_as_it_was(models, tmp_path, name):
    script, arguments = COMMANDS[name]
    arguments = [argument.format(d=models, out=tmp_path / "made") for argument in arguments]
    with files_of_at_most(2000), pytest.raises(SystemExit) as error:
        script.main(arguments)
    sentence = str(error.value.code)
    assert "error: " in sentence and str(tmp_path / "made") in sentence and "\n" not in sentence
    assert list(tmp_path.iterdir()) == []
    script.main(arguments)
    before = content_of(tmp_path)
    assert before
    with files_of_at_most(2000), pytest.raises(SystemExit):
        script.main(arguments)
    assert content_of(tmp_path) == before


def test_a_new_directory_with_its_parents_is_removed(tmp_path):
    with pytest.raises(ValueError, match="damaged"), whole_directory(tmp_path / "a" / "b") as directory:
        (directory / "file").write_text("text")
        raise ValueError("damaged")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "other").write_text("other")
    (tmp_path / "a" / "b" / ".part").mkdir()
    (tmp_path / "a" / "b" / ".part" / "half").write_text("of a killed run")
    with whole_directory(tmp_path / "a" / "b") as directory:
        (directory / "file").write_text("text")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["file", "other"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    os.mkfifo(tmp_path / "a" / "b" / "pipe")
    with pytest.raises(OSError, match="a/b/pipe is a named pipe, not a regular file"):
        with whole_directory(tmp_path / "a" / "b") as directory:
            (directory / "file").write_text("new")
            (directory / "pipe").write_text("new")
    assert (tmp_path / "a" / "b" / "file").read_text() == "text"


def test_a_place_that_cannot_be_written_to_is_named_before_the_work(models, tmp_path, model_file):
    text = str(models / "text.txt")
    sentence = "--output .*nowhere/m cannot be written: the directory .*nowhere does not exist"
    with pytest.raises(SystemExit, match=sentence):
        sentencepiece_training.main(["--train", text, "--output", str(tmp_path / "nowhere" / "m")])
    with pytest.raises(SystemExit, match="--output .* is a directory, not a regular file: name"):
        sentencepiece_training.main(["--train", text, "--output", str(tmp_path)])
    survey = ["--token-budget", "100", "--survey", str(tmp_path / "nowhere" / "s.json")]
    with pytest.raises(SystemExit, match="--survey .*nowhere/s.json cannot be written: the directory"):
        binarize(["--train", text, "--tokenizer", str(model_file), "--destdir", str(tmp_path / "made"), *survey])
    assert list(tmp_path.iterdir()) == []
