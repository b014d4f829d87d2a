"""Names of the systems that reports compare."""

BACKBONE, OFF, ON = "backbone", "memory off", "memory on"
WITH_CACHE = " + cache"


def with_memory(size: int) -> str:
    """Name LongMem with a memory of ``size`` tokens."""
    return f"memory {size:,}"


def with_cache(size: int) -> str:
    """Return the suffix that a neural cache of ``size`` tokens adds to a system's name."""
    return f"{WITH_CACHE} {size:,}"


def with_window(size: int) -> str:
    """Name the backbone alone with a window of ``size`` tokens."""
    return f"backbone, window {size:,}"


def with_sliding_window(size: int) -> str:
    """Name the backbone alone with a window of ``size`` tokens that moves by half of them."""
    return f"backbone, sliding window {size:,}"


def without_cache(system: str) -> str:
    """Return a system's name without the suffix of its neural cache, if it has one."""
    return system.removesuffix(WITH_CACHE)
