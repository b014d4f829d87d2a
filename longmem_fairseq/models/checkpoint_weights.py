"""Fitting the weights of a checkpoint to a model: names of earlier versions, and parts that the checkpoint lacks."""

import logging
import re
from typing import Dict, Iterable, Sequence

from torch import Tensor

from ..modules.joint_attention import GATE_PACE
from .longmem_decoder import LongMemDecoder
from .memory_layers import memory_layers_setting

logger = logging.getLogger(__name__)

Weights = Dict[str, Tensor]  # of a checkpoint, by name; changed in place
_TOKEN_MIXTURE = "decoder.predictor.token_mixture."


def fit_weights(state_dict: Weights, decoder: LongMemDecoder) -> None:
    """Let a checkpoint of any version have the weights of a model's side network.

    Args:
        state_dict: Tensors of the checkpoint under this version's names, but for gates, which may have earlier ones.
        decoder: Decoder of the model.

    Raises:
        ValueError: Other layers of the checkpoint's side network read the memory, or its gates depend on the query and
            the model's do not.
    """
    _rename_gates(state_dict)
    _check_gates(state_dict, decoder.backbone.memory_layers, decoder.reduction)
    _fit_gate_weights(state_dict, decoder)
    _fit_token_mixture(state_dict, decoder)


def _rename_gates(state_dict: Weights) -> None:
    """Bring the gates of an earlier version under their new name and scale."""
    for name in [name for name in state_dict if name.endswith(".memory_gate")]:
        gate = state_dict.pop(name)
        state_dict[name[: -len("memory_gate")] + "gate_bias"] = gate.float() / GATE_PACE


def _check_gates(names: Iterable[str], layers: Sequence[int], reduction: int) -> None:
    """Refuse the weights of a side network of which other layers read the memory.

    Args:
        names: Names of the weights; those of a model without gates are not checked.
        layers: Numbers m of this model's memory layers.
        reduction: Number of backbone layers per layer of its side network, R.

    Raises:
        ValueError: Other side layers have gates.
    """
    matches = (re.fullmatch(r"decoder\.layers\.(\d+)\.self_attn\.gate_bias", name) for name in names)
    saved, reading = sorted(int(match[1]) for match in matches if match), [m // reduction for m in layers]
    if saved and saved != reading:
        raise ValueError(
            f"--retrieval-layer-index {memory_layers_setting(layers)} and --layer-reduction-factor {reduction} let "
            f"side layer {' and '.join(map(str, reading))} read, but the checkpoint was trained to read in side layer "
            f"{' and '.join(map(str, saved))}: give the values of its training"
        )


def _fit_gate_weights(state_dict: Weights, decoder: LongMemDecoder) -> None:
    """Let a checkpoint whose gates do not depend on the query start a model whose gates do, as the same function."""
    saved = [name for name in state_dict if name.endswith(".gate_weight")]
    weights = {f"decoder.{name}": p.detach() for name, p in decoder.named_parameters() if name.endswith(".gate_weight")}
    if saved and not weights:
        raise ValueError("--gate head does not fit the checkpoint, whose gates depend on the token: set --gate token")
    if weights and not saved:
        logger.info("--gate token: the checkpoint's gates depend on the head alone, and start so")
        state_dict.update(weights)


def _fit_token_mixture(state_dict: Weights, decoder: LongMemDecoder) -> None:
    """Let a checkpoint have weights of the token memory exactly where the model has one."""
    mixture = decoder.predictor.token_mixture
    if mixture is None:
        for key in [key for key in state_dict if key.startswith(_TOKEN_MIXTURE)]:
            del state_dict[key]
        return
    present = mixture.state_dict(prefix=_TOKEN_MIXTURE)
    if not present.keys() & state_dict.keys():
        logger.warning(
            "the checkpoint was trained without a token memory: --token-memory %d starts with a small constant weight, "
            "which training makes one for each token",
            decoder.cfg.token_memory,
        )
        state_dict.update(present)
