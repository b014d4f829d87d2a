"""Whether the native search can run on this machine, and with which instructions."""

import pytest

from longmem_fairseq.memory.search.kernel import INSTRUCTIONS, Kernel, KernelUnavailable


def missing(instructions=None) -> str:
    """The reason why the kernel cannot run here; empty if it can."""
    try:
        Kernel(instructions)
    except KernelUnavailable as error:
        return str(error)
    return ""


reason = missing()
needs_kernel = pytest.mark.skipif(bool(reason), reason=reason)
each_instructions = pytest.mark.parametrize(
    "instructions",
    [pytest.param(x, marks=pytest.mark.skipif(bool(missing(x)), reason=missing(x))) for x in INSTRUCTIONS],
)
