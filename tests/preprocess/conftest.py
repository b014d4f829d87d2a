"""Text and tokenizers that every machine can make: the standard library's sources, and small tokenizers of them."""

import sysconfig
from pathlib import Path

import pytest

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="session")
def source_files() -> list[Path]:
    """Modules of the running Python's standard library, about 1.5 MB."""
    files = [path for path in sorted(STANDARD_LIBRARY.glob("[a-h]*.py")) if path.stat().st_size]
    files += sorted((STANDARD_LIBRARY / "email").glob("*.py"))
    return [path for path in files if path.stat().st_size]


@pytest.fixture(scope="session")
def sources(source_files) -> list[str]:
    return [path.read_bytes().decode("utf-8") for path in source_files]


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory, sources) -> tuple[Path, Path]:
    """``encoder.json`` and ``vocab.bpe`` in the format of GPT-2's files, 2,000 entries, trained on the sources."""
    from preprocess.benchmark import train_byte_level_bpe

    return train_byte_level_bpe(sources, 2000, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def model_file(tmp_path_factory, sources) -> Path:
    """A sentencepiece model of 1,000 symbols of the sources, as the scripts train it."""
    from preprocess.sentencepiece_training import train

    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(train(sources, 1000))
    return path
