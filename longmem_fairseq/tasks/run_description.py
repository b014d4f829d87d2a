"""Description of an evaluation: what independent processes must have in common for their results to be merged."""

import hashlib
import json
import os
from typing import Any, Dict, Optional

from omegaconf import OmegaConf

from ..data.lane_dataset import LaneDataset
from ..memory.document_memory import DocumentMemory


def describe_run(cfg, model_cfg, lanes: LaneDataset, memory: Optional[DocumentMemory] = None) -> Dict[str, Any]:
    """Describe an evaluation.

    Args:
        cfg: Configuration of the task.
        model_cfg: Configuration of the model, an OmegaConf or a Namespace.
        lanes: Segments that are evaluated.
        memory: Memory that each document starts with; None for an empty one.

    Returns:
        Identity of the checkpoint's file, configuration of the model, and layout of the data, as plain JSON types.
    """
    if OmegaConf.is_config(model_cfg):
        settings = OmegaConf.to_container(model_cfg, resolve=True, enum_to_str=True)
    else:
        settings = vars(model_cfg)
    documents = lanes.documents
    given = None
    if memory is not None:
        means = memory.bank.contents(0)[2].contiguous().cpu().numpy()
        given = [memory.tokens, hashlib.sha256(means).hexdigest()]
    return {
        "checkpoint": [os.path.getsize(cfg.path), os.path.getmtime(cfg.path)] if cfg.path else None,
        "model": {**json.loads(json.dumps(settings, default=str)), "inference_dtype": str(cfg.inference_dtype)},
        "memory": given,
        "data": [
            documents.split,
            len(documents),
            documents.tokens,
            lanes.n_lanes,
            lanes.T,
            lanes.context,
            lanes.scope,
            lanes.seed,
        ],
    }
