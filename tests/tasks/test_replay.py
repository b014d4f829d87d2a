"""Replay: a model that starts within an epoch gets the past that it would have; one that has it encodes nothing."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from longmem_fairseq.data.lane_dataset import LaneDataset
from longmem_fairseq.tasks.replay import replay_past
from tests.data.test_lane_dataset import SCOPES, Documents, batches_of
from tests.fairseq_runs import random_documents


class Model:
    """Hold the source tokens of each lane's stream, by the contract of a model with a memory."""

    def __init__(self, memory_tokens):
        self.memory_tokens = memory_tokens
        self.streams, self.ends, self.tokens = {}, {}, {}
        self.memorized = 0

    def needs_replay(self, segments):
        in_place = [
            self.streams.get(lane) == stream and self.ends.get(lane) == start
            for lane, stream, start in zip(segments.lanes, segments.streams, segments.starts)
        ]
        return (segments.starts > 0) & ~np.array(in_place)

    def memorize(self, src_tokens, segments, restart=False):
        assert restart or not self.needs_replay(segments).any(), "segments must come in order"
        self.memorized += 1
        for row, lane in enumerate(segments.lanes.tolist()):
            if restart or segments.starts[row] == 0:
                self.tokens[lane] = []
            self.tokens[lane] += src_tokens[row, : segments.lengths[row]].tolist()
            self.streams[lane], self.ends[lane] = segments.streams[row], segments.ends[row]

    def memory(self, segments):
        """Return the tokens that each row of a batch reads: the last of its stream."""
        return [
            self.tokens[lane][-self.memory_tokens :] if start and self.memory_tokens else []
            for lane, start in zip(segments.lanes.tolist(), segments.starts)
        ]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    T=st.integers(1, 9),
    lanes=st.integers(1, 3),
    ranks=st.integers(1, 2),
    scope=st.sampled_from(["document", "stream"]),
    memory_tokens=st.integers(0, 50),
    data=st.data(),
)
def test_memory_is_as_if_never_stopped(lengths, T, lanes, ranks, scope, memory_tokens, data):
    dataset = LaneDataset(Documents(random_documents(lengths)), lanes, ranks, T, 2, seed=1, **SCOPES[scope])
    rank = data.draw(st.integers(0, ranks - 1))
    batches = [batch for batch in batches_of(dataset, rank) if batch]
    if not batches:
        return
    stop = data.draw(st.integers(0, len(batches) - 1))
    never_stopped, resumed = Model(memory_tokens), Model(memory_tokens)
    for batch in batches[:stop]:
        replay_past(batch, never_stopped, dataset)
        never_stopped.memorize(batch["net_input"]["src_tokens"], batch["net_input"]["segments"])
    assert never_stopped.memorized == stop, "an iteration in order needs no replay"
    replay_past(batches[stop], resumed, dataset)
    segments = batches[stop]["net_input"]["segments"]
    assert resumed.memory(segments) == never_stopped.memory(segments)
    for batch in batches[stop:]:  # and it continues in order
        before = resumed.memorized
        if memory_tokens:
            replay_past(batch, resumed, dataset)
            assert resumed.memorized == before
        resumed.memorize(batch["net_input"]["src_tokens"], batch["net_input"]["segments"], restart=not memory_tokens)


def test_no_gradients(monkeypatch):
    dataset = LaneDataset(Documents(random_documents([40])), 1, 1, 5, 2)
    model = Model(20)
    seen = []
    monkeypatch.setattr(model, "memorize", lambda *args, **kwargs: seen.append(torch.is_grad_enabled()))
    replay_past(dataset.collater([dataset[6]]), model, dataset)
    assert seen == [False] * 4
