"""Tiny LongMem checkpoints that know text: random weights, and a real tokenizer beside their dictionary."""

import shutil
from pathlib import Path
from typing import Sequence

from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf, open_dict

from longmem_fairseq.models.longmem_lm import LongMemConfig
from longmem_fairseq.tasks.options import LongMemLanguageModelingConfig
from preprocess.benchmark import train_byte_level_bpe
from tests.models.tiny import LONGMEM, build_longmem, randomize, stock_config, stock_model, write_checkpoint
from tests.repository import ROOT

SHIPPED = ROOT / "examples" / "pretrained" / "mini"
T = LONGMEM["tokens_per_sample"]


def sentencepiece_model(directory: Path) -> Path:
    """A model with the tokenizer of the shipped backbone; gives the directory of checkpoint and data."""
    for name in ("sentencepiece.model", "dict.txt"):
        shutil.copy(SHIPPED / name, directory)
    return _write(directory)


def gpt2_model(directory: Path, texts: Sequence[str], entries: int = 400) -> Path:
    """A model with a byte-level BPE in GPT-2's format, trained on some texts."""
    train_byte_level_bpe(list(texts), entries, directory)
    (directory / "dict.txt").write_text("".join(f"{number} 1\n" for number in range(entries)))
    return _write(directory)


def _write(directory: Path) -> Path:
    dictionary = Dictionary.load(str(directory / "dict.txt"))
    backbone = write_checkpoint(directory / "backbone.pt", stock_model(dictionary=dictionary), stock_config())
    model = build_longmem(backbone, dictionary)
    randomize(model.decoder.layers, 1)
    randomize(model.decoder.layer_norm, 2)
    cfg = OmegaConf.structured(FairseqConfig)
    with open_dict(cfg):
        cfg.task, cfg.model = OmegaConf.structured(LongMemLanguageModelingConfig), OmegaConf.structured(LongMemConfig)
    settings = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    settings["task"].update(_name="longmem_language_modeling", data=str(directory), tokens_per_sample=T)
    settings["model"].update(_name="longmem_lm", pretrained_model_path=backbone, **LONGMEM)
    write_checkpoint(directory / "model.pt", model, None, {"cfg": settings})
    return directory
