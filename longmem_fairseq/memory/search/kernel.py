"""The compiled kernel of the native search (native_search.cpp), which setup.py builds beside this file."""

import ctypes
import functools
import platform
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Callable, Iterable, Optional, Tuple

import torch

# Sets of processor instructions that the kernel is compiled for, the fastest first, in the order of native_search.cpp.
INSTRUCTIONS = ("avx512", "avx2")


class KernelUnavailable(ValueError):
    """The kernel was not built or cannot run here; the message is the reason."""


class Kernel:
    """The kernel's functions for one set of processor instructions.

    Args:
        instructions: One of :func:`available_instructions`; None for the fastest.

    Raises:
        KernelUnavailable: The kernel was not built, or the processor lacks the instructions.
    """

    def __init__(self, instructions: Optional[str] = None):
        available = available_instructions()
        if not available:
            raise KernelUnavailable("this processor has neither AVX-512 VNNI nor AVX2")
        if instructions is not None and instructions not in available:
            raise KernelUnavailable(f"this processor has no {instructions}, but it has {' and '.join(available)}")
        version = INSTRUCTIONS.index(instructions or available[0])
        library = _load_library()
        self.search = functools.partial(library.longmem_search, version)
        self.search_lists = functools.partial(library.longmem_search_lists, version)
        self.quantize_tokens = functools.partial(library.longmem_quantize_tokens, version)
        self.search_tokens = functools.partial(library.longmem_search_tokens, version)


@functools.lru_cache(maxsize=None)
def available_instructions() -> Tuple[str, ...]:
    """Return which of ``INSTRUCTIONS`` this processor has, the fastest first.

    Raises:
        KernelUnavailable: The kernel was not built.
    """
    library = _load_library()
    return tuple(name for version, name in enumerate(INSTRUCTIONS) if library.longmem_supported(version))


@functools.lru_cache(maxsize=None)
def _load_library() -> ctypes.CDLL:
    """Load the kernel that was built beside this file when the package was installed."""
    candidates = [Path(__file__).with_name(f"native_kernel{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in candidates if path.exists()), None)
    if path is None and platform.machine() not in ("x86_64", "AMD64"):
        raise KernelUnavailable(f"it is written for x86-64 processors, and this is {platform.machine()}")
    if path is None:
        raise KernelUnavailable("it was not compiled when longmem_fairseq was installed (see docs/install.md)")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailable(f"{path.name} cannot be loaded ({error})") from None
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    signatures = {
        "longmem_supported": "i",
        "longmem_search": "ipipipiip",
        "longmem_search_lists": "ipiipppipiip",
        "longmem_quantize_tokens": "ippiiiippi",
        "longmem_search_tokens": "ipippiipippipp",
    }
    for name, signature in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise KernelUnavailable(f"{path.name} was compiled from earlier sources: install longmem_fairseq again")
        function.argtypes = [types[letter] for letter in signature]
        function.restype = ctypes.c_int if name == "longmem_supported" else None
    return library


def in_threads(run: Callable, pieces: Iterable) -> None:
    """Run a function for each piece, over PyTorch's number of threads; a kernel does not hold Python's lock."""
    threads = torch.get_num_threads()
    if threads == 1:
        for piece in pieces:
            run(piece)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, pieces))  # raises what a piece raised
