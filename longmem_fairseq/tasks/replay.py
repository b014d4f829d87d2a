"""Rebuild memories that do not end where a batch starts: after a resume, or after a batch that failed."""

import logging
import time
from typing import Any, Dict

import torch
from fairseq import utils
from tqdm import tqdm

from ..data.lane_dataset import LaneDataset

logger = logging.getLogger(__name__)


def replay_past(sample: Dict[str, Any], model, dataset: LaneDataset, autocast: bool = False) -> None:
    """Give each lane of a batch the memory that it would have, had this process read the epoch from its start.

    The backbone is frozen, so a memory is a function of the tokens before: the batches of this rank before this one are
    encoded again, as many as a memory holds, in their old composition, which makes the result equal bit for bit on CPU.

    Args:
        sample: The batch that comes next, on the model's device.
        model: Model with ``needs_replay``, ``memorize`` and ``memory_tokens``, in the mode (training or evaluation)
            whose memory is rebuilt.
        dataset: Dataset of the batch.
        autocast: If true, encode under CUDA's automatic mixed precision, as fairseq's ``--amp`` runs the forward pass.
    """
    rows = model.needs_replay(sample["net_input"]["segments"])
    if not rows.any():
        return
    start = time.time()
    batches = dataset.history(sample, model.memory_tokens)
    device = sample["target"].device
    for i, indices in enumerate(tqdm(batches, desc="rebuilding memory", unit="batch", leave=False, disable=None)):
        past = dataset.collater([dataset[index] for index in indices])["net_input"]
        if device.type == "cuda":
            past = utils.move_to_cuda(past, device=device)
        with torch.no_grad(), torch.autocast("cuda", enabled=autocast):
            model.memorize(past["src_tokens"], past["segments"], restart=i == 0)
    logger.info(
        "memory of %d lanes rebuilt by replay of the %d batches before in %.1f s",
        rows.sum(),
        len(batches),
        time.time() - start,
    )
