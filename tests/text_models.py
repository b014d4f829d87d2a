"""Tiny LongMem checkpoints that know text: random weights, and a real tokenizer beside their dictionary."""

import shutil
from pathlib import Path
from typing import Sequence

from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import OmegaConf, open_dict

from longmem_fairseq.models.longmem_lm import LongMemConfig
from longmem_fairseq.tasks.options import LongMemLanguageModelingConfig
from preprocess.benchmark import train_byte_level_bpe
from preprocess.tokenization import load_tokenizer
from tests.huggingface_tokenizers import byte_level
from tests.models.tiny import BACKBONE, LONGMEM, build_longmem, randomize, stock_model, write_checkpoint
from tests.repository import ROOT

SHIPPED = ROOT / "examples" / "pretrained" / "mini"
READING = {**LONGMEM, "retrieval_layer_index": "1,3"}
T = READING["tokens_per_sample"]


def sentencepiece_model(directory: Path, **changes) -> Path:
    """A model with the tokenizer of the shipped backbone; gives the directory of checkpoint and data."""
    for name in ("sentencepiece.model", "dict.txt"):
        shutil.copy(SHIPPED / name, directory)
    return _write(directory, **changes)


def gpt2_model(directory: Path, texts: Sequence[str], entries: int = 400) -> Path:
    """A model with a byte-level BPE in GPT-2's format, trained on some texts."""
    train_byte_level_bpe(list(texts), entries, directory)
    (directory / "dict.txt").write_text("".join(f"{number} 1\n" for number in range(entries)))
    return _write(directory)


def huggingface_model(directory: Path, texts: Sequence[str]) -> Path:
    """A model with a byte-level BPE as a ``tokenizer.json``, trained on some texts, with added tokens."""
    (directory / "tokenizer.json").write_bytes(byte_level(list(texts)))
    tokenizer = load_tokenizer(directory)
    tokenizer.dictionary.save(str(directory / "dict.txt"))
    return _write(directory)


def _write(directory: Path, **changes) -> Path:
    reading = {**READING, **changes}
    dictionary = Dictionary.load(str(directory / "dict.txt"))
    settings = _settings(TransformerLanguageModelConfig, LanguageModelingConfig, directory)
    settings["model"].update(BACKBONE, _name="transformer_lm")
    settings["task"].update(_name="language_modeling")
    backbone = directory / "backbone.pt"
    write_checkpoint(backbone, stock_model(dictionary=dictionary), None, {"cfg": settings})
    model = build_longmem(backbone, dictionary, **reading)
    randomize(model.decoder.layers, 1)
    randomize(model.decoder.layer_norm, 2)
    settings = _settings(LongMemConfig, LongMemLanguageModelingConfig, directory)
    settings["model"].update(reading, _name="longmem_lm", pretrained_model_path=str(backbone))
    settings["task"].update(_name="longmem_language_modeling", tokens_per_sample=T)
    write_checkpoint(directory / "model.pt", model, None, {"cfg": settings})
    return directory


def _settings(model: type, task: type, data: Path) -> dict:
    """A whole configuration as checkpoints hold it, with the defaults of a model and a task."""
    cfg = OmegaConf.structured(FairseqConfig)
    with open_dict(cfg):
        cfg.task, cfg.model = OmegaConf.structured(task), OmegaConf.structured(model)
    cfg.task.data = str(data)
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
