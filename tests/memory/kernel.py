"""Whether the native search can run on this machine."""

import pytest

from longmem_fairseq.memory.search.native import KernelUnavailable, load_kernel

try:
    load_kernel()
    reason = ""
except KernelUnavailable as error:
    reason = str(error)

needs_kernel = pytest.mark.skipif(bool(reason), reason=reason)
