"""Memory policies by the name of ``--memory-scope``."""

from typing import NamedTuple


class _MemoryPolicy(NamedTuple):
    name: str
    joins_documents: bool
    shares_memory: bool


_POLICIES = {
    "document": _MemoryPolicy("document", False, False),
    "stream": _MemoryPolicy("stream", True, False),
    "shared": _MemoryPolicy("shared", True, True),
}


def memory_policy(name: str) -> _MemoryPolicy:
    """Return the policy of a memory scope.

    Args:
        name: Name of the scope, ``--memory-scope``.

    Raises:
        ValueError: There is no such scope.
    """
    if name not in _POLICIES:
        raise ValueError(f"--memory-scope {name} is not known: choose one of {', '.join(_POLICIES)}")
    return _POLICIES[name]
