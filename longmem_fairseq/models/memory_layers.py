"""Which backbone layers are remembered: the values of ``--retrieval-layer-index``.

Legend: N layers of the backbone, R backbone layers per layer of the side network, m memory layer, s = m // R the side
layer that reads it.
"""

import re
from typing import Any, List, Sequence, Tuple, Union

from fairseq.utils import safe_getattr

from ..backbones.base import Backbone
from ..memory.policies import memory_policy

MemoryLayers = Union[int, str]  # a layer's number, or several separated by commas: what files and settings hold


def default_memory_layer(num_layers: int, reduction: int) -> int:
    """Return the memory layer of a backbone for which the user named none.

    Side layer s = m // R reads the memory of backbone layer m and starts from backbone layer R * s + 1, so its queries
    fit the keys where m = R * s + 1. Of these layers the first one at two thirds of the depth is taken: layer 17 of 24,
    the published setting.

    Args:
        num_layers: Number of layers of the backbone, N.
        reduction: Number of backbone layers per layer of the side network, R.

    Returns:
        Number m of the layer, counted from 0.
    """
    fitting = range(1, num_layers, reduction) if reduction > 1 else range(num_layers)
    return next((m for m in fitting if 3 * m >= 2 * num_layers), fitting[-1])


def parse_memory_layers(value: Any) -> Tuple[int, ...]:
    """Read the numbers of layers in a setting.

    Args:
        value: Number of a layer, or numbers in a list or separated by commas.

    Returns:
        The numbers, ascending.

    Raises:
        ValueError: The setting has something else, or a layer twice.
    """
    parts: List[Any] = value.split(",") if isinstance(value, str) else _listed(value)
    shown = ",".join(str(part).strip() for part in parts)
    for part in parts:
        if isinstance(part, bool) or not re.fullmatch(r"\s*-?[0-9]+\s*", str(part)):
            raise ValueError(
                f"--retrieval-layer-index {shown} is neither the number of a layer nor numbers separated by commas: "
                "write it as 17 or 13,17,21"
            )
    numbers = sorted(map(int, parts))
    for number in numbers:
        if numbers.count(number) > 1:
            raise ValueError(f"--retrieval-layer-index {shown} names layer {number} twice: leave one out")
    return tuple(numbers)


def _listed(value: Any) -> List[Any]:
    try:
        return list(value) or [""]
    except TypeError:  # not a sequence
        return [value]


def memory_layers_setting(layers: Sequence[int]) -> MemoryLayers:
    """Return the form in which settings and files hold memory layers: the number of one, ``13,17`` for several."""
    return layers[0] if len(layers) == 1 else ",".join(map(str, layers))


def select_memory_layers(cfg: Any, backbone: Backbone) -> None:
    """Select the backbone's memory layers as a model's configuration names them.

    Args:
        cfg: Configuration of the model, whose reduction factor fits the backbone.
        backbone: Backbone of the model.

    Raises:
        ValueError: The setting does not name layers of the backbone that can be read together.
    """
    R = cfg.layer_reduction_factor
    if cfg.retrieval_layer_index is None:
        layers: Tuple[int, ...] = (default_memory_layer(backbone.num_layers, R),)
    else:
        layers = parse_memory_layers(cfg.retrieval_layer_index)
    backbone.select_memory_layers(layers)
    if len(layers) > 1:
        _check_several(cfg, layers)


def _check_several(cfg: Any, layers: Sequence[int]) -> None:
    """Refuse several memory layers that cannot be read together."""
    R, setting = cfg.layer_reduction_factor, memory_layers_setting(layers)
    for below, above in zip(layers, layers[1:]):
        if below // R == above // R:
            raise ValueError(
                f"--retrieval-layer-index {setting}: layers {below} and {above} would both be read by side layer "
                f"{below // R} (--layer-reduction-factor {R}): leave one out"
            )
    if cfg.normalize_last_hidden:
        raise ValueError(
            f"--retrieval-layer-index {setting} names {len(layers)} layers, but a model of the released LongMem reads "
            "one: name one of them"
        )
    scope = str(safe_getattr(cfg, "memory_scope", "document"))
    if memory_policy(scope).shares_memory:
        raise ValueError(
            f"--retrieval-layer-index {setting} names {len(layers)} layers, but --memory-scope {scope} holds one: name "
            "one of them, or set --memory-scope document"
        )
