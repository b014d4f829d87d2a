"""The registry of memory policies: how the streams of a batch share memories, by the name of ``--memory-scope``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Dict, Tuple, Type

if TYPE_CHECKING:
    from .stream_memory import StreamMemory


@dataclass(frozen=True)
class MemoryPolicy:
    """What ``--memory-scope NAME`` selects.

    Attributes:
        name: Name of the policy.
        memory_class: Class of the memory: :class:`longmem_fairseq.memory.stream_memory.StreamMemory` or one derived
            from it.
        joins_documents: Whether all documents of a lane are one stream, instead of each a stream of its own.
        shares_memory: Whether all lanes read and write one memory instead of one each.
        exact_means: Whether chunk means are taken of keys before they are rounded to the bank's precision.
    """

    name: str
    memory_class: Type["StreamMemory"]
    joins_documents: bool = False
    shares_memory: bool = False
    exact_means: bool = False


_POLICIES: Dict[str, MemoryPolicy] = {}


def register_memory_policy(policy: MemoryPolicy) -> None:
    """Register a policy.

    Args:
        policy: The policy; its name becomes a value of ``--memory-scope``.

    Raises:
        ValueError: There is a policy of this name.
    """
    if policy.name in _POLICIES:
        raise ValueError(f"the memory policy {policy.name} is already registered: choose another name")
    _POLICIES[policy.name] = policy


def memory_policy(name: str) -> MemoryPolicy:
    """Return the policy of a name.

    Args:
        name: Value of ``--memory-scope``.

    Raises:
        ValueError: There is no such policy.
    """
    if str(name) not in _POLICIES:
        raise ValueError(f"--memory-scope {name} is unknown: choose {', '.join(memory_policies())}")
    return _POLICIES[str(name)]


def memory_policies() -> Tuple[str, ...]:
    """Return the names of the registered policies."""
    return tuple(_POLICIES)
