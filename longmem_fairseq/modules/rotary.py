"""Rotary position embeddings (RoPE; Su et al., 2021), and the scalings by which models reach beyond their first window.

Pair i of a head, the numbers i and i + d / 2, turns by the angle ``position * frequency_i``. A scaling changes the
frequencies: ``linear`` (Chen et al., 2023), ``llama3`` (Llama 3.1) and ``yarn`` (Peng et al., 2023), defined as in
Hugging Face's transformers.

Legend: B rows of a batch, H heads, T tokens, d width of a head.
"""

import math
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
from torch import Tensor

_Tables = Tuple[Tensor, Tensor]

# Parameters of scalings that are numbers.
_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
_LARGEST = 1e12
_FIRST_TABLE = 2048  # positions in a new table; longer ones are made when they are needed


class RotaryPositions:
    """The rotation of one model: the frequencies of its pairs, and tables of sines and cosines for all its layers.

    Args:
        head_dim: Width d of a head, an even number.
        theta: Base of the frequencies.
        scaling: Parameters of the scaling under the names of Hugging Face's ``rope_parameters`` (``rope_type``,
            ``factor`` ...); None for none.

    Attributes:
        frequencies: Angle by which each pair turns from one position to the next, shape (d / 2,), float32.
        magnitude: Factor of rotated queries and of rotated keys, which YaRN has; 1 otherwise.

    Raises:
        ValueError: The width is odd, or the scaling is unknown or incomplete.
    """

    def __init__(self, head_dim: int, theta: float, scaling: Optional[Mapping[str, Any]] = None):
        if head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of numbers, so a head of odd width {head_dim} has none")
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
        self.frequencies, self.magnitude = 1.0 / theta**exponents, 1.0
        scaling = scaling or {}
        kind = rope_type(scaling)
        if not isinstance(kind, str) or kind not in _SCALINGS:
            raise ValueError(
                f"rotary positions with the scaling {kind!r} are not supported: {', '.join(_SCALINGS)} are"
            )
        for name in _NUMBERS:
            value = scaling.get(name)
            if value is not None and (type(value) not in (int, float) or not 0 < value <= _LARGEST):
                raise ValueError(
                    f"the {kind} scaling of the rotary positions has {name}={value!r:.40}: it must be positive"
                )
        required = {name: value for name, value in scaling.items() if value is not None}
        try:
            self.frequencies, self.magnitude = _SCALINGS[kind](self.frequencies, theta, required)
        except KeyError as error:
            raise ValueError(f"the {kind} scaling of the rotary positions lacks {error.args[0]!r}") from None
        self._tables: Dict[torch.device, _Tables] = {}
        self._turns: Dict[Tuple[int, torch.dtype, torch.device], _Tables] = {}

    def rotate(self, x: Tensor, start: int = 0, left: Optional[Tensor] = None) -> Tensor:
        """Rotate queries or keys to their positions.

        Args:
            x: Queries or keys, shape (B, H, T, d).
            start: Number of columns before the first token.
            left: Number of columns of each row, from the left, that are padding and not counted, shape (B,), int64;
                None for none.

        Returns:
            The rotated ones, times :attr:`magnitude`, of the same shape and dtype.
        """
        stop = start + x.size(2)
        cos, sin = self._table(stop, x.device)
        if left is None:
            cos, sin = cos[start:stop], sin[start:stop]  # (T, d / 2)
        else:
            columns = torch.arange(start, stop, device=x.device)
            positions = (columns - left[:, None]).clamp(min=0)  # (B, T)
            cos, sin = cos[positions][:, None], sin[positions][:, None]  # (B, 1, T, d / 2)
        return _turn(x, cos.to(x.dtype), sin.to(x.dtype))

    def rotate_to(self, x: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Rotate queries or keys (B, H, T, d) to given positions.

        Args:
            x: Queries or keys, shape (B, H, T, d).
            positions: Position of each, shape (B, T), int64.
            longest: A number that no position exceeds.

        Returns:
            The rotated ones, times :attr:`magnitude`, of the same shape and dtype.
        """
        cos, sin = (table[positions][:, None] for table in self._table(longest + 1, x.device))  # (B, 1, T, d / 2)
        return _turn(x, cos.to(x.dtype), sin.to(x.dtype))

    def turn_by(self, x: Tensor, distance: int) -> Tensor:
        """Rotate all queries or keys (B, H, T, d) by the same distance, without :attr:`magnitude`."""
        turn = distance, x.dtype, x.device
        if turn not in self._turns:
            angles = distance * self.frequencies.double()
            with torch.inference_mode(False):  # as for the tables
                self._turns[turn] = angles.cos().to(x), angles.sin().to(x)
        return _turn(x, *self._turns[turn])

    def _table(self, length: int, device: torch.device) -> _Tables:
        """Return cosines and sines (at least ``length``, d / 2), float32, of the positions from 0 on."""
        tables = self._tables.get(device)
        if tables is None or tables[0].size(0) < length:
            rows = max(_FIRST_TABLE, 1 << (length - 1).bit_length())
            with torch.inference_mode(False):  # otherwise a training that follows could not use them
                angles = torch.arange(rows, device="cpu").float()[:, None] * self.frequencies
                tables = tuple((part * self.magnitude).to(device) for part in (angles.cos(), angles.sin()))
            self._tables[device] = tables
        return tables


def rope_type(scaling: Optional[Mapping[str, Any]]) -> str:
    """Return the name of a scaling; ``default`` for none.

    Args:
        scaling: Parameters under the names of Hugging Face's ``rope_parameters``, or None.
    """
    scaling = scaling or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d / 2) of x (..., d) by angles whose cosines and sines are given, (..., d / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _default(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tuple[Tensor, float]:
    return frequencies, 1.0


def _linear(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tuple[Tensor, float]:
    return frequencies / scaling["factor"], 1.0


def _llama3(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tuple[Tensor, float]:
    """Divide low frequencies by the factor, keep high ones, and pass smoothly from one to the other."""
    window = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = window * frequencies / (2 * math.pi)  # of each pair within the original window
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies, 1.0


def _yarn(frequencies: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tuple[Tensor, float]:
    """Divide by the factor what turns less than ``beta_slow`` times in the original window, keep what turns more than
    ``beta_fast`` times, and ramp between them."""
    window, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    pairs = len(frequencies)

    def pair_of(turns: float) -> float:  # number of the pair that turns so often
        return pairs * math.log(window / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_of(scaling.get("beta_fast", 32)), pair_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = ((torch.arange(pairs, device="cpu").float() - low) / (high - low or 0.001)).clamp(0, 1)
    magnitude = scaling.get("attention_factor")
    if magnitude is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            magnitude = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, mscale_all_dim)
        else:
            magnitude = _yarn_magnitude(factor)
    return ramp * frequencies / factor + (1 - ramp) * frequencies, magnitude


def _yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
