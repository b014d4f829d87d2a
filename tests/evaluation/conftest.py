"""A tiny LongMem with random weights and the shipped tokenizer, as files and loaded, for all tests of evaluations."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf, open_dict

from longmem_fairseq.evaluation.scoring.scorer import Scorer
from longmem_fairseq.models.longmem_lm import LongMemConfig
from longmem_fairseq.tasks.options import LongMemLanguageModelingConfig
from tests.models.tiny import build_longmem, randomize, stock_config, stock_model, write_checkpoint
from tests.repository import ROOT

SHIPPED = ROOT / "examples" / "pretrained" / "mini"
T = 32  # tokens of a window
LONGMEM = {"memory_size": 128, "k": 6, "chunk_size": 3, "retrieval_layer_index": "1,3", "tokens_per_sample": T}
POSITIONS = {"max_target_positions": 2 * T, "tokens_per_sample": 2 * T}


@pytest.fixture(scope="module", autouse=True)
def restored_loggers():
    """Restore the levels of all loggers behind a file whose commands run in this process, and set them."""
    before = {logger: logger.level for logger in _loggers()}
    yield
    for logger in _loggers():
        logger.setLevel(before.get(logger, logging.NOTSET))


def _loggers():
    loggers = (logging.root, *logging.root.manager.loggerDict.values())
    return [logger for logger in loggers if isinstance(logger, logging.Logger)]


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> SimpleNamespace:
    """``directory`` with a tokenizer and a dictionary, and the values of :func:`write_checkpoints`."""
    directory = tmp_path_factory.mktemp("tiny_evaluation")
    for name in ("sentencepiece.model", "dict.txt"):
        shutil.copy(SHIPPED / name, directory)
    return SimpleNamespace(directory=directory, **write_checkpoints(directory))


def write_checkpoints(directory: Path, seed: int = 0) -> dict:
    """``backbone`` and ``longmem``, paths of checkpoints, and ``models``, the two themselves."""
    dictionary = Dictionary.load(str(directory / "dict.txt"))
    model = stock_model(dictionary=dictionary, seed=seed, **POSITIONS)
    backbone = directory / f"backbone{seed}.pt"
    cfg = OmegaConf.structured(FairseqConfig)
    with open_dict(cfg):
        cfg.task, cfg.model = OmegaConf.structured(LongMemLanguageModelingConfig), OmegaConf.structured(LongMemConfig)
    settings = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    settings["task"].update(_name="longmem_language_modeling", data=str(directory), tokens_per_sample=T)
    plain = {name: value for name, value in stock_config(**POSITIONS).items() if value is not None}
    write_checkpoint(backbone, model, None, {"cfg": {**settings, "model": plain}})
    settings["model"].update(_name="longmem_lm", pretrained_model_path=str(backbone), **LONGMEM)
    longmem = build_longmem(backbone, dictionary, **LONGMEM)
    randomize(longmem.decoder.layers, seed + 1)
    randomize(longmem.decoder.layer_norm, seed + 2)
    path = directory / f"longmem{seed}.pt"
    write_checkpoint(path, longmem, None, {"cfg": settings})
    return {"backbone": backbone, "longmem": path, "models": (model, longmem.eval())}


@pytest.fixture(scope="session")
def loaded(files) -> Scorer:
    return Scorer.load(str(files.longmem), str(files.directory), "cpu")


@pytest.fixture
def scorer(loaded) -> Scorer:
    """Without a cache, whichever an earlier test set."""
    loaded.cache = {}
    return loaded


@pytest.fixture(scope="session")
def text() -> str:
    """About 2,400 characters of English."""
    return (ROOT / "README.md").read_text(encoding="utf-8")[:2400]
