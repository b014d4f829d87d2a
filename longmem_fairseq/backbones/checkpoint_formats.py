"""Foreign checkpoint formats from which backbones and LongMem models can be read."""

from abc import ABC, abstractmethod
from typing import Any, Dict, List, MutableMapping, Optional, Tuple

from torch import Tensor


class CheckpointFormat(ABC):
    """A checkpoint format of other code; an instance is registered with :func:`register_checkpoint_format`.

    Attributes:
        name: Name of the format, for messages.
        architecture: Value of ``--arch`` with which a model of this format is trained further.
        model_settings: Settings of ``longmem_lm`` that a model must have to load a checkpoint of this format.
    """

    name: str
    architecture: str
    model_settings: Dict[str, Any]

    @abstractmethod
    def read_backbone(self, cfg: Any, weights: Dict[str, Tensor]) -> Optional[Tuple[Any, Dict[str, Tensor]]]:
        """Return the backbone in a checkpoint, None where the checkpoint is not of this format.

        Args:
            cfg: Settings of the model in the checkpoint.
            weights: Tensors of the checkpoint by name.

        Returns:
            Settings of a registered model (with ``_name``), and its tensors, ``decoder.*``.
        """

    @abstractmethod
    def longmem_settings(self, cfg: Any, vocabulary: int, memory_scope: str) -> Optional[Dict[str, Any]]:
        """Return the settings of ``longmem_lm`` for a LongMem checkpoint, None where it is not of this format.

        Args:
            cfg: Settings of the model in the checkpoint.
            vocabulary: Number of symbols in the dictionary.
            memory_scope: The task's ``--memory-scope``.
        """

    @abstractmethod
    def holds_longmem(self, weights: MutableMapping[str, Tensor]) -> bool:
        """Return whether these tensors are a LongMem model of this format."""

    @abstractmethod
    def rename_longmem(self, weights: MutableMapping[str, Tensor], backbone_prefix: str) -> None:
        """Give the tensors of a LongMem checkpoint their names in ``longmem_lm``, in place.

        Args:
            weights: Tensors of the checkpoint by name.
            backbone_prefix: Prefix that the backbone's tensors (``decoder.*``) get.
        """


_FORMATS: List[CheckpointFormat] = []


def register_checkpoint_format(checkpoint_format: CheckpointFormat) -> None:
    """Let backbones and LongMem models be read from checkpoints of a foreign format."""
    _FORMATS.append(checkpoint_format)


def checkpoint_formats() -> Tuple[CheckpointFormat, ...]:
    """Return the registered formats."""
    return tuple(_FORMATS)
