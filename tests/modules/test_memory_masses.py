"""Scores and masses of chunks, against plain sums over what was gathered."""

import pytest
import torch

from longmem_fairseq.modules.memory_attention import naive_memory_attention
from longmem_fairseq.modules.memory_masses import chunk_masses, chunk_scores


@pytest.mark.parametrize("B, H, T, N, C, n, d", [(1, 2, 5, 7, 3, 4, 8), (3, 1, 1, 4, 1, 4, 5), (2, 3, 4, 9, 2, 1, 6)])
def test_masses_and_scores(B, H, T, N, C, n, d):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, B + 1, H, N, C, d, generator=generator)
    q = torch.randn(B, H, T, d, generator=generator)
    lanes = torch.arange(B) + 1
    slots = torch.stack([torch.randperm(N, generator=generator)[:n] for _ in range(B * H * T)]).view(B, H, T, n)
    slots[0, 0, 0] = -1  # reads nothing
    slots[-1, -1, -1, n // 2 :] = -1
    masses, scores = chunk_masses(q, keys, lanes, slots, 0.3), chunk_scores(q, keys.mean(3), lanes, slots)
    reads = (slots >= 0).any(-1)
    torch.testing.assert_close(masses.sum(-1), reads.float())
    assert (masses[slots < 0] == 0).all() and (scores[slots < 0] == 0).all()
    for b, h, t, i in (slots >= 0).nonzero().tolist():
        chunk = keys[lanes[b], h, slots[b, h, t, i]]  # (C, d)
        torch.testing.assert_close(scores[b, h, t, i], q[b, h, t] @ chunk.mean(0))
    # Values that say which chunk they are of make attention give the masses.
    marks = torch.eye(N)[:, None, :].expand(N, C, N).expand(B + 1, H, N, C, N)
    wide = torch.zeros(B, H, T, N).scatter_add(3, slots.clamp(min=0), masses)
    actual = naive_memory_attention(q, keys, marks, lanes, slots, 0.3)
    torch.testing.assert_close(wide, actual)
