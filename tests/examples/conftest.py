"""Fixtures that the tests of the examples share."""

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """Clusters of keys and queries near them, as real_keys.py writes them: 2 heads, 1,024 chunks of width 8."""
    generator = torch.Generator().manual_seed(0)
    centers = 4 * torch.randn(2, 16, 8, generator=generator)
    means, queries = (
        centers[:, torch.randint(16, (n,), generator=generator)] + torch.randn(2, n, 8, generator=generator)
        for n in (1024, 64)
    )
    path = tmp_path_factory.mktemp("keys") / "keys.safetensors"
    save_file({"means": means, "queries": queries}, path)
    return path
