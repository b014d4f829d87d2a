"""Text and tokenizers that every machine can make: the standard library's sources, and small tokenizers of them."""

import json
import sysconfig
from pathlib import Path

import pytest

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "preprocess" / "binarize_documents.py"


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
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("gpt2")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        sources, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    (directory / "encoder.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = "".join(f"{first} {second}\n" for first, second in merges)
    (directory / "vocab.bpe").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    return directory / "encoder.json", directory / "vocab.bpe"


@pytest.fixture(scope="session")
def model_file(tmp_path_factory, sources) -> Path:
    """A sentencepiece model of 1,000 symbols of the sources, as the scripts train it."""
    from preprocess.sentencepiece_training import train

    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(train(sources, 1000))
    return path
