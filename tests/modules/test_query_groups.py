"""Query heads grouped by KV head, against a loop over the query heads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longmem_fairseq.modules.query_groups import group_queries, ungroup


@given(B=st.integers(1, 3), kv_heads=st.integers(1, 4), G=st.integers(1, 3), T=st.integers(1, 5), d=st.integers(1, 4))
def test_query_head_h_is_in_the_group_of_kv_head_h_over_g(B, kv_heads, G, T, d):
    q = torch.randn(B, kv_heads * G, T, d)
    grouped = group_queries(q, kv_heads)
    assert grouped.shape == (B, kv_heads, G * T, d)
    for head in range(kv_heads * G):
        first = head % G * T
        assert torch.equal(grouped[:, head // G, first : first + T], q[:, head])
    assert torch.equal(ungroup(grouped, kv_heads * G), q)


def test_without_groups_nothing_is_copied():
    q = torch.randn(2, 5, 3, 4).transpose(1, 2)  # not contiguous, as attention makes it
    assert group_queries(q, 3).data_ptr() == q.data_ptr() == ungroup(q, 3).data_ptr()


def test_any_last_size():
    slots = torch.arange(2 * 3 * 6).view(2, 3, 6, 1)
    assert ungroup(slots, 9).tolist() == slots.view(2, 9, 2, 1).tolist()


def test_heads_that_are_not_a_multiple():
    with pytest.raises(ValueError, match="8 query heads are not a multiple of 3 KV heads"):
        group_queries(torch.zeros(1, 8, 2, 4), 3)
