"""The contract of a backbone family, and the registry of families.

A family adapts one kind of decoder-only language model of fairseq, so that LongMem can read its hidden states. A new
one is added in a file of its own (see docs/extending.md).

Legend: B lanes, T tokens of a segment, S cached tokens, D width, H heads, H_kv key/value heads, d width of a head,
N layers, V symbols, n memory layers.
"""

from abc import ABC, abstractmethod
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type, TypeVar, Union

import numpy as np
import torch
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from torch import Tensor, nn

from ..modules.cached_attention import IncrementalState
from ..modules.side_layer import SideLayer, SideNetworkOptions

Start = Union[int, np.ndarray]  # position of the first token of a window, or of each row's


class BackboneError(ValueError):
    """A checkpoint cannot be a backbone; the message gives the reason."""


class EncodedSegment(NamedTuple):
    """What the backbone computed for one segment.

    Attributes:
        hidden: Hidden states h_0 (embedding output) to h_N, each (T, B, D); after
            :meth:`Backbone.encode_for_memory` only h_0 to h_m of the highest memory layer m.
        keys: Keys of the memory layers without position, heads of the lowest layer first, shape (B, n * H_kv, T, d).
        values: Values of the memory layers, shape (B, n * H_kv, T, d).
    """

    hidden: List[Tensor]
    keys: Tensor
    values: Tensor


class Backbone(nn.Module, ABC):
    """A frozen decoder: always in evaluation mode, never with a gradient.

    Weights are named as in the checkpoints of the family's models: ``decoder.*``.

    Args:
        config: Description from which :meth:`build` makes the same model again, plain JSON types, with the name of
            the fairseq model under ``model`` and the number of symbols under ``vocabulary``.

    Attributes:
        config: The description.
        memory_layers: Numbers m of the n layers whose keys and values are written into the memory, counted from 0,
            ascending.
        fingerprint: SHA-256 of the weights that were loaded (see
            :func:`longmem_fairseq.backbones.fingerprint.backbone_fingerprint`); None before.
        normalize_last_hidden: Whether h_N is taken behind the final norm, as in the released LongMem.
        builds_on_meta: Whether :meth:`build` also works on PyTorch's meta device, so that weights are loaded without
            being drawn first.
        has_relative_positions: Whether only the distance between two tokens matters, so that keys and values of one
            window can be read from the next one.
        has_rotary_positions: Whether positions are rotations of queries and keys, so that the queries that read the
            memory can be rotated by a distance.
    """

    builds_on_meta = False
    has_relative_positions = False
    has_rotary_positions = False

    def __init__(self, config: Dict[str, Any]):
        super().__init__()
        self.config = config
        self.memory_layers: Tuple[int, ...] = (0,)
        self.fingerprint: Optional[str] = None
        self.normalize_last_hidden = False

    # What a family implements ------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def describe(cls, cfg: Any, vocabulary: int) -> Dict[str, Any]:
        """Return the description of a model of this family.

        Args:
            cfg: Configuration of the model as its checkpoint holds it (``cfg.model``).
            vocabulary: Number of symbols in the model's dictionary, V.

        Returns:
            The decisive settings, plain JSON types, without ``model`` and ``vocabulary``.

        Raises:
            BackboneError: A model with these settings cannot be a backbone.
        """

    @classmethod
    @abstractmethod
    def build(cls, config: Dict[str, Any], dictionary) -> "Backbone":
        """Build a backbone with random weights from its description.

        Args:
            config: Description, with ``model`` and ``vocabulary``.
            dictionary: fairseq dictionary of the data.
        """

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The N decoder layers.

        ``layer(x, incremental_state=...)`` takes (T, B, D) and returns a tuple that starts with (T, B, D);
        ``layer.self_attn`` is a :class:`longmem_fairseq.modules.cached_attention.CachedAttention`, whose
        ``cached_without_position`` gives what a memory holds.
        """

    @property
    @abstractmethod
    def final_norm(self) -> Optional[nn.Module]:
        """The norm between the last layer and the output projection; None where the model has none."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the width of the hidden states."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """H, the number of query heads."""

    @property
    def num_kv_heads(self) -> int:
        """H_kv, the number of key/value heads; H unless the family groups its queries."""
        return self.num_heads

    @property
    @abstractmethod
    def head_dim(self) -> int:
        """d, the width of a head."""

    @property
    @abstractmethod
    def max_positions(self) -> Optional[int]:
        """The longest window that the positions allow, in tokens; None where there is no limit."""

    @abstractmethod
    def embed(self, tokens: Tensor, start: Start = 0) -> Tensor:
        """Return h_0.

        Args:
            tokens: Token ids, shape (B, T), int64.
            start: Position of the first token in the window; or one for each row, shape (B,), int64, on the host.

        Returns:
            Embeddings with whatever position term the family adds to them, shape (T, B, D).

        Raises:
            BackboneError: The window is longer than :attr:`max_positions`.
        """

    @abstractmethod
    def memory_keys_and_values(self, x: Tensor, number: int) -> Tuple[Tensor, Tensor]:
        """Return a layer's keys and values without running the layer.

        Args:
            x: Input of the layer, shape (T, B, D).
            number: Number of the layer, counted from 0.

        Returns:
            Keys without position and values, shape (B, H_kv, T, d).
        """

    @abstractmethod
    def output(self, features: Tensor) -> Tensor:
        """Return logits (..., V) of normalized features (..., D)."""

    @abstractmethod
    def side_layer(self, reads_memory: bool, options: SideNetworkOptions) -> SideLayer:
        """Build a trainable side layer of this family's kind and shape.

        Args:
            reads_memory: Whether the layer attends to the memory too.
            options: Options of the side network.
        """

    @abstractmethod
    def side_norm(self, options: SideNetworkOptions) -> Optional[nn.Module]:
        """Build the side network's final norm, of the kind of :attr:`final_norm`; None where that is None."""

    # What all families share -------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Take the gradient from all weights; a family calls this at the end of ``__init__``."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode, whatever is requested."""
        return super().train(False)

    @property
    def num_layers(self) -> int:
        """N, the number of layers."""
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        """V, the number of symbols."""
        return self.config["vocabulary"]

    @property
    def trained_window(self) -> Optional[int]:
        """The window that the model was trained with, in tokens, as far as its description tells."""
        return self.max_positions

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the activations between the layers."""
        return (next(self.parameters()) if self.final_norm is None else self.final_norm.weight).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def select_memory_layers(self, numbers: Sequence[int]) -> None:
        """Choose the layers whose keys and values are written into the memory.

        Args:
            numbers: Numbers m of the layers, counted from 0, at least one and none twice.

        Raises:
            BackboneError: The backbone does not have one of the layers.
        """
        for number in numbers:
            if not 0 <= number < self.num_layers:
                raise BackboneError(
                    f"--retrieval-layer-index {number} is outside the backbone, whose layers are 0 to "
                    f"{self.num_layers - 1}"
                )
        self.memory_layers = tuple(sorted(numbers))

    def forward(self, tokens: Tensor, state: IncrementalState = None, start: Start = 0) -> EncodedSegment:
        """See :meth:`encode`."""
        return self.encode(tokens, state, start)

    @torch.no_grad()
    def encode(self, tokens: Tensor, state: IncrementalState = None, start: Start = 0) -> EncodedSegment:
        """Encode one segment of each lane with all layers.

        Args:
            tokens: Token ids, shape (B, T), int64.
            state: Incremental state of decoding, which is extended; None for a window that starts here.
            start: Position of the first token in the window, as for :meth:`embed`.
        """
        hidden, remembered = [self.embed(tokens, start)], []
        for number, layer in enumerate(self.layers):
            # A memory layer always runs with a cache, from which its keys and values are taken.
            layer_state = {} if state is None and number in self.memory_layers else state
            hidden.append(layer(hidden[-1], incremental_state=layer_state)[0])  # (T, B, D)
            if number in self.memory_layers:
                cached = layer.self_attn.cached_without_position(layer_state)
                remembered.append(tuple(x[:, :, -tokens.size(1) :] for x in cached))
        return EncodedSegment(self._residual_stream(hidden), *_heads_of_all(remembered))

    @torch.no_grad()
    def encode_for_memory(self, tokens: Tensor, state: IncrementalState = None, start: Start = 0) -> EncodedSegment:
        """Encode one segment of each lane only as far as the memory needs: the highest memory layer does not run.

        Args:
            tokens: Token ids, shape (B, T), int64.
            state: Incremental state, which is extended; None for a window that starts here.
            start: Position of the first token in the window, as for :meth:`embed`.
        """
        hidden = [self.embed(tokens, start)]
        for layer in self.layers[: self.memory_layers[-1]]:
            hidden.append(layer(hidden[-1], incremental_state=state)[0])
        remembered = [self.memory_keys_and_values(hidden[number], number) for number in self.memory_layers]
        return EncodedSegment(hidden, *_heads_of_all(remembered))

    def cached_memory(self, state: IncrementalState) -> Tuple[Tensor, Tensor]:
        """Return the memory layers' keys and values of a window that is being decoded, shape (B, n * H_kv, S, d)."""
        layers = [self.layers[number] for number in self.memory_layers]
        return _heads_of_all([layer.self_attn.cached_without_position(state) for layer in layers])

    def final_hidden(self, encoded: EncodedSegment) -> Tensor:
        """Return what the output projection takes, shape (B, T, D), of a segment encoded with all layers."""
        x = encoded.hidden[-1]
        if self.final_norm is not None and not self.normalize_last_hidden:  # else h_N was normalized already
            x = self.final_norm(x)
        return x.transpose(0, 1)

    def load_weights(self, weights: Dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        """Load weights of a checkpoint.

        Args:
            weights: Tensors by their names in the checkpoint, ``decoder.*``.
            dtype: Precision of the matrices of a model that was built on the meta device.

        Raises:
            BackboneError: They do not fit the description.
        """
        for name, value in weights.items():
            if not value.is_floating_point():
                raise BackboneError(f"its weights are quantized ({name} is {value.dtype}): give its original weights")
        try:
            weights = self.upgrade_weights(weights)
            if self.device.type == "meta":  # the tensors of the checkpoint become the model's
                weights = {name: x.to(dtype if x.dim() > 1 else torch.float32) for name, x in weights.items()}
                missing, unexpected = self.load_state_dict(weights, strict=False, assign=True)
            else:
                missing, unexpected = self.load_state_dict(weights, strict=False)
        except RuntimeError as error:  # lists every tensor of another shape, one a line
            first = str(error).splitlines()[1].strip()
            raise BackboneError(f"its weights do not fit its configuration: {first}") from error
        for names, problem in ((missing, "are missing"), (unexpected, "are left over")):
            if names:
                raise BackboneError(
                    f"its weights do not fit its configuration: {len(names)} {problem}, such as {names[0]}"
                )

    def upgrade_weights(self, weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Return the weights of an older checkpoint under today's names; families override this where they differ."""
        return weights

    def _residual_stream(self, hidden: List[Tensor]) -> List[Tensor]:
        """Return the hidden states as the side network's residual connections use them."""
        if self.normalize_last_hidden and self.final_norm is not None:
            return hidden[:-1] + [self.final_norm(hidden[-1])]
        return hidden


def _heads_of_all(layers: Sequence[Tuple[Tensor, Tensor]]) -> Tuple[Tensor, Tensor]:
    """Join keys and values of several layers, (B, H_kv, T, d) each, to those of all their heads."""
    if len(layers) == 1:
        return layers[0]
    keys, values = zip(*layers)
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


Family = TypeVar("Family", bound=Type[Backbone])
_FAMILIES: Dict[type, Type[Backbone]] = {}


def register_backbone_family(model_class: type) -> Callable[[Family], Family]:
    """Register a family for a class of fairseq models and the classes derived from it.

    Args:
        model_class: Class that is registered with fairseq (``register_model``), or a base class of such classes.

    Raises:
        ValueError: The class has a family already.
    """

    def register(family: Family) -> Family:
        if model_class in _FAMILIES:
            raise ValueError(
                f"{model_class.__name__} already has the backbone family {_FAMILIES[model_class].__name__}"
            )
        _FAMILIES[model_class] = family
        return family

    return register


def backbone_family(model: Optional[str]) -> Type[Backbone]:
    """Return the family of a fairseq model: that of its class, or of the nearest base class that has one.

    Args:
        model: Name of the model or of an architecture, as fairseq's registries have it.

    Raises:
        BackboneError: There is no such family.
    """
    model_class = ARCH_MODEL_REGISTRY.get(model) or MODEL_REGISTRY.get(model)
    for base in () if model_class is None else model_class.__mro__:
        if base in _FAMILIES:
            return _FAMILIES[base]
    raise BackboneError(
        f"the model is a {model}: a backbone must be a decoder-only transformer_lm (or alibi_lm) of fairseq, or of "
        "another registered backbone family"
    )
