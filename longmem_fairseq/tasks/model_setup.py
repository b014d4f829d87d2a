"""What the task does with a model that was just built: its precision, and its positions against the options."""

from typing import Any

import torch

from ..modules.mixed_precision import compute_products_in


def prepare_model(model: Any, cfg: Any, from_checkpoint: bool) -> None:
    """Set the precision of a model, and compare its positions with the task's options.

    Args:
        model: The model, changed in place.
        cfg: Configuration of the task.
        from_checkpoint: Whether the model will be loaded from a checkpoint, for evaluation or generation.

    Raises:
        ValueError: An option contradicts the model.
    """
    if from_checkpoint and str(cfg.inference_dtype) != "float32":
        dtype = getattr(torch, str(cfg.inference_dtype))
        compute_products_in(model, dtype)
        if hasattr(model, "memorize"):
            model.gpu_autocast_dtype = dtype
    if hasattr(model, "memorize"):
        model.decoder.lane_state.graphs.choose(str(cfg.cuda_graphs), trains=not from_checkpoint)
    elif str(cfg.cuda_graphs) == "on":
        raise ValueError("--cuda-graphs on is for longmem_lm: leave it out")
    if not from_checkpoint and str(cfg.train_dtype) != "float32":
        if not hasattr(model, "memorize"):
            raise ValueError(f"--train-dtype {cfg.train_dtype} is for longmem_lm: use --amp for other models")
        model.autocast_dtype = getattr(torch, str(cfg.train_dtype))
    if not from_checkpoint and hasattr(model, "memorize") and cfg.max_target_positions is not None:
        raise ValueError(
            f"--max-target-positions {cfg.max_target_positions} is not supported by a model with a memory: its "
            "positions are the backbone's; leave it out"
        )
    if not from_checkpoint and hasattr(model, "memorize") and model.cfg.token_memory and not model.memory_tokens:
        raise ValueError(
            f"--token-memory {model.cfg.token_memory} is a part of the memory, which is off (--memory-size 0, or "
            "--no-use-external-memory): leave it out, or turn the memory on"
        )
    positions = model.max_positions()
    if positions is not None and cfg.tokens_per_sample > positions:
        raise ValueError(
            f"--tokens-per-sample {cfg.tokens_per_sample} exceeds the {positions} positions of the model: lower it"
        )
