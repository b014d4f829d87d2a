"""Tiny models with random weights, and documents read by them segment by segment; no training, no commands."""

import json
from types import SimpleNamespace
from typing import Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.models import MODEL_REGISTRY
from omegaconf import OmegaConf
from torch import Tensor

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.models.longmem_lm import LongMemConfig, LongMemModel
from longmem_fairseq.modules.joint_attention import GATE_PACE
from longmem_fairseq.tasks.options import LongMemLanguageModelingConfig
from tests.fairseq_runs import make_dictionary

VOCABULARY = make_dictionary(30)
LAYERS, WIDTH, HEADS, POSITIONS = 4, 12, 3, 24

BACKBONE = {
    "decoder_layers": LAYERS,
    "decoder_embed_dim": WIDTH,
    "decoder_input_dim": WIDTH,
    "decoder_output_dim": WIDTH,
    "decoder_ffn_embed_dim": 20,
    "decoder_attention_heads": HEADS,
    "decoder_normalize_before": True,
    "activation_fn": "gelu",
    "decoder_learned_pos": True,
    "share_decoder_input_output_embed": True,
    "max_target_positions": POSITIONS,
    "tokens_per_sample": POSITIONS,
}
# Of the Llama family: grouped queries, heads of another width than D / H, and every part that some model has.
LLAMA = {
    "decoder_kv_heads": 1,
    "decoder_head_dim": 6,
    "rope_theta": 100.0,
    "rope_scaling": json.dumps({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12}),
    "qkv_bias": True,
    "out_bias": True,
    "qk_norm": True,
    "start_symbol": 5,
}
LONGMEM = {"memory_size": 16, "k": 6, "chunk_size": 3, "retrieval_layer_index": 1, "tokens_per_sample": 7}


def task_of(dictionary: Dictionary) -> SimpleNamespace:
    """As much of a task as building a model needs."""
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def randomize(module: torch.nn.Module, seed: int, std: float = 0.3) -> None:
    """Give every parameter random values, biases and scales of LayerNorm too, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * std
            if ".gate_" in f".{name}":
                noise /= GATE_PACE  # neither open nor shut
            parameter.copy_(noise + 1.0 if name.endswith("norm.weight") else noise)


def stock_config(model: str = "transformer_lm", **changes) -> dict:
    """The complete configuration of a backbone, as a checkpoint's ``cfg.model`` holds it."""
    cfg = OmegaConf.structured(MODEL_REGISTRY[model].__dataclass())
    values = {key: None if OmegaConf.is_interpolation(cfg, key) else cfg[key] for key in cfg}
    return {**values, **BACKBONE, **(LLAMA if model == "llama_lm" else {}), "_name": model, **changes}


def stock_model(model: str = "transformer_lm", seed: int = 0, dictionary: Dictionary = VOCABULARY, **changes):
    """A model of fairseq (or alibi_lm, llama_lm) with random weights, in evaluation mode."""
    args = SimpleNamespace(**stock_config(model, **changes))
    built = MODEL_REGISTRY[model].build_model(args, task_of(dictionary))
    randomize(built, seed)
    return built.eval()


def write_checkpoint(path, model, config: dict, changes: dict = None) -> str:
    """Write what fairseq-train would have written, with ``changes`` of its parts."""
    state = {
        "args": None,
        "cfg": {"_name": None, "model": config},
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {"optimizer_name": "FairseqAdam", "lr_scheduler_state": {"best": None}, "num_updates": 1}
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save({**state, **(changes or {})}, path)
    return str(path)


def longmem_config(path, **changes):
    """The configuration of ``longmem_lm`` with tiny values, beside the task's as in fairseq's own."""
    root = OmegaConf.create({"task": LongMemLanguageModelingConfig, "model": LongMemConfig})
    return OmegaConf.merge(root, {"model": {**LONGMEM, "pretrained_model_path": str(path), **changes}}).model


def build_longmem(path, dictionary: Dictionary = VOCABULARY, **changes) -> LongMemModel:
    """A ``longmem_lm`` on the backbone of a checkpoint."""
    return LongMemModel.build_model(longmem_config(path, **changes), task_of(dictionary))


def longmem(directory, seed: int = 1, model: str = "transformer_lm", backbone: dict = None, **changes) -> LongMemModel:
    """A ``longmem_lm`` on a backbone with random weights, its side network random too, in evaluation mode."""
    backbone = backbone or {}
    path = write_checkpoint(directory / "backbone.pt", stock_model(model, **backbone), stock_config(model, **backbone))
    built = build_longmem(path, **changes)
    randomize(built.decoder.layers, seed)
    if built.decoder.layer_norm is not None:
        randomize(built.decoder.layer_norm, seed + 1)
    return built.eval()


def documents(lengths: Sequence[int], seed: int = 0) -> List[Tensor]:
    """Random symbols, shape (length,) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, len(VOCABULARY), (length,), generator=generator) for length in lengths]


def batches(docs: Sequence[Tensor], T: int, lanes: Sequence[int] = None) -> Iterator[Tuple[Tensor, Segments]]:
    """Segments of documents, one a lane; those that have ended leave the batch: (tokens (B, T), segments).

    Documents are padded only where another row of the batch is longer.
    """
    lanes = np.arange(len(docs)) if lanes is None else np.asarray(lanes)
    for start in range(0, max(len(doc) for doc in docs), T):
        rows = [i for i, doc in enumerate(docs) if len(doc) > start]
        pieces = [docs[i][start : start + T] for i in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=VOCABULARY.pad())
        lengths = [len(piece) for piece in pieces]
        yield tokens, Segments(lanes[rows], rows, np.full(len(rows), start), lengths, int(lanes.max()) + 1)


def read(model: LongMemModel, docs: Sequence[Tensor], T: int, lanes: Sequence[int] = None) -> List[Tensor]:
    """Logits of documents, shape (length, V) each, in the model's mode and without gradients."""
    logits_of: Dict[int, List[Tensor]] = {i: [] for i in range(len(docs))}
    with torch.no_grad():
        for tokens, segments in batches(docs, T, lanes):
            logits, _ = model(tokens, segments=segments)
            for row, stream in enumerate(segments.streams.tolist()):
                logits_of[stream].append(logits[row, : segments.lengths[row]])
    return [torch.cat(logits_of[i]) for i in range(len(docs))]
