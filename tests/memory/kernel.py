"""Whether the native search can run on this machine."""

import pytest

from longmem_fairseq.memory.search.native import Unavailable, load_kernel

try:
    load_kernel()
    reason = ""
except Unavailable as error:
    reason = str(error)

needs_kernel = pytest.mark.skipif(bool(reason), reason=reason)
