"""A memory policy in one class, registered by a user directory; it is compared with an independent reference."""

import numpy as np
import pytest
import torch

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.reader import MemoryReader
from longmem_fairseq.memory.stream_memory import StreamMemory, StreamReader
from tests.extending.commands import ADAPT, Commands, check_answers, check_perplexities, stock_backbone, stock_reference
from tests.models.reference import Reference


class SparseReader(StreamReader):
    """A reader that does not know distances, because the bank numbers only the tokens that were stored."""

    def distance(self):
        return MemoryReader.distance(self)


class EverySecondSegment(StreamMemory):
    """A memory that stores the segments 0, 2, 4... of each stream, so that it reaches back twice as far."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.segments_read = np.zeros(self.bank.lanes, dtype=np.int64)

    def reader(self, segments, layer):
        return SparseReader(self.bank, self.chunk_reader, segments, layer=layer)

    def start_stream(self, lane, stream, position):
        super().start_stream(lane, stream, position)
        self.segments_read[lane] = 0

    def store(self, segments, written, rows):
        lanes = segments.lanes
        super().store(segments, written, [row for row in rows if self.segments_read[lanes[row]] % 2 == 0])
        self.segments_read[lanes[rows]] += 1

    def state(self):
        tensors, places = super().state()
        return tensors, {**places, "segments_read": self.segments_read.tolist()}

    def restore(self, tensors, places):
        super().restore(tensors, places)
        self.segments_read = np.array(places["segments_read"], dtype=np.int64)


REGISTRATION = """
import longmem_fairseq
from longmem_fairseq.memory.policies import MemoryPolicy, register_memory_policy
from tests.extending.test_memory_policy import EverySecondSegment

register_memory_policy(MemoryPolicy("every_second", EverySecondSegment))
"""


class EverySecondReference(Reference):
    """The reference, which forgets the segments 1, 3, 5... as soon as they were read."""

    count = 0

    def read(self, tokens):
        before = {layer: [list(past) for past in heads] for layer, heads in self.past.items()}
        logits = super().read(tokens)
        if self.count % 2:
            self.past = before
        self.count += 1
        return logits


@pytest.fixture(scope="module")
def commands(tiny_data, tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("policy"), tiny_data, "every_second_policy", REGISTRATION)


@pytest.fixture(scope="module")
def checkpoint(commands):
    backbone = stock_backbone(commands.directory / "backbone.pt")
    options = ["--memory-scope", "every_second", "--pretrained-model-path", backbone, "--save-backbone"]
    return commands.train("adapted", *ADAPT, *options)


def test_evaluates_as_the_reference(commands, checkpoint):
    """The policy comes from the checkpoint."""
    perplexities = commands.evaluate(checkpoint, "results")
    check_perplexities(perplexities, lambda: stock_reference(checkpoint, EverySecondReference))
    with pytest.raises(AssertionError):
        check_perplexities(perplexities, lambda: stock_reference(checkpoint))


def test_generates_from_all_of_a_document(commands, checkpoint):
    """A document that is memorized for generation is stored as a whole, whatever the policy of the streams is."""
    check_answers(commands.generate(checkpoint), lambda: stock_reference(checkpoint))


def test_snapshots_hold_its_state():
    """A memory that is restored continues with the same segments as the one that was saved."""

    def new():
        return EverySecondSegment(MemoryBank(lanes=1, heads=1, head_dim=2, memory_size=16, chunk_size=2), None)

    def segment(start):
        return Segments([0], [7], [start], [2], 1)

    def write(memory, starts):
        for start in starts:
            memory.open(segment(start))
            keys = torch.arange(start, start + 2.0).view(1, 1, 2, 1).expand(-1, -1, -1, 2)
            memory.write(segment(start), keys, keys)

    uninterrupted, saved, restored = new(), new(), new()
    write(uninterrupted, range(0, 20, 2))
    write(saved, range(0, 10, 2))
    restored.restore(*saved.state())
    write(restored, range(10, 20, 2))
    for memory in (uninterrupted, restored):
        memory.flush()
        keys, _, _ = memory.bank.contents(0)
        assert keys[0, :, :, 0].flatten().tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17]
