"""What a trace says was read is what the model read."""

import pytest
import torch

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.models.reading import DocumentReader
from longmem_fairseq.models.trace import trace_reads
from longmem_fairseq.modules.joint_attention import GATE_PACE
from tests.models.tiny import VOCABULARY, documents, longmem, read

T = 7  # tokens of a segment; the tiny memory holds 5 chunks of 3, of which a query reads 2
EOS = torch.tensor([VOCABULARY.eos()])
(TEXT,) = documents([6 * T + 3], seed=3)
EARLIER = documents([9, 5], seed=4)


@pytest.fixture(scope="module", params=[1, "1,3"])
def model(request, tmp_path_factory):
    model = longmem(tmp_path_factory.mktemp("trace"), memory_size=60, retrieval_layer_index=request.param)
    for s in model.decoder.reading_layers:
        model.decoder.layers[s].self_attn.gate_bias.data = torch.tensor([0.5, -1.0, 2.0]) * (1 - 2 * s) / GATE_PACE
    return model


def memory_of(model, *texts):
    reader = DocumentReader(model.decoder, T)
    memory = reader.new_memory()
    for i, text in enumerate(texts):
        reader.memorize(memory, f"document {i}", text)
    return memory


def test_scores_are_those_of_the_forward_pass(model):
    reads = trace_reads(DocumentReader(model.decoder, T), TEXT, memory_of(model))
    (logits,) = read(model, [torch.cat([EOS, TEXT[:-1]])], T)
    expected = logits.log_softmax(-1).gather(1, TEXT[:, None])[:, 0]
    torch.testing.assert_close(reads.log_probabilities, expected, atol=1e-5, rtol=1e-5)
    assert (reads.log_probabilities - reads.without_memory).abs()[T:].min() > 0
    torch.testing.assert_close(reads.log_probabilities[:T], reads.without_memory[:T])
    assert reads.position == 0 and reads.documents == []


def test_reads_make_up_what_the_memory_gave(model):
    """All reads of a query, weighted with their masses and with the values that lie at their places, give Z."""
    layers = model.decoder.reading_layers
    heads = 3 * len(layers)
    kept = 2 * heads  # two chunks a head: all
    reads = trace_reads(DocumentReader(model.decoder, T), TEXT, memory_of(model), kept=kept)
    assert reads.layers == model.decoder.backbone.memory_layers and (reads.gates == model.decoder.gates).all()
    inputs = torch.cat([EOS, TEXT[:-1]])
    keys, values = [], []
    with torch.no_grad():
        for piece in inputs.split(T):
            encoded = model.decoder.backbone(piece[None])
            keys.append(encoded.keys[0])
            values.append(encoded.values[0])
    keys, values = torch.cat(keys, dim=1), torch.cat(values, dim=1)  # (heads of all layers, length, d)
    queries, answers = ({s: [] for s in layers} for _ in range(2))
    for i, piece in enumerate(inputs.split(T)):
        segments = Segments([0], [0], [i * T], [len(piece)], 1)
        attentions = {s: model.decoder.layers[s].self_attn for s in layers}
        for s, attention in attentions.items():

            def reading(reader, hold=attention.reading, s=s):
                def watched(q, scaling):
                    z, present = reader(q, scaling)
                    queries[s].append(q[0] * scaling)
                    answers[s].append(z[0])
                    return z, present

                return hold(watched)

            attention.reading = reading
        try:
            with torch.no_grad():
                model(piece[None], segments=segments)
        finally:
            for attention in attentions.values():
                del attention.reading
    q, z = (torch.cat([torch.cat(x[s], dim=1) for s in layers]) for x in (queries, answers))
    assert (reads.heads[:T] == -1).all() and (reads.heads[T:] >= 0).all()
    for t in (T, 3 * T - 1, len(TEXT) - 1):
        for head in range(heads):
            reading = reads.heads[t] == head
            places = (reads.chunks[t, reading][:, None] + torch.arange(3)).flatten()
            assert len(places) == 6 and places.max() < t // T * T
            weights = (keys[head, places] @ q[head, t]).softmax(0)
            torch.testing.assert_close(weights @ values[head, places], z[head, t], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(weights.view(2, 3).sum(1), reads.masses[t, reading], atol=1e-5, rtol=1e-4)
            share = reads.masses[t, reading].max() * reads.gates[t, head]
            torch.testing.assert_close(reads.by_head[t, head], share)
    shares = reads.masses * reads.gates.gather(1, reads.heads.clamp(min=0)) * (reads.heads >= 0)
    assert (shares.diff(dim=1) <= 1e-6).all(), "the most read come first"
    strongest = []
    for i in range(len(layers)):
        of_layer = shares * (reads.heads // 3 == i) / 3
        strongest.append(torch.zeros(len(TEXT), len(TEXT)).scatter_add(1, reads.chunks.clamp(min=0), of_layer).amax(1))
    torch.testing.assert_close(reads.strongest, torch.stack(strongest).amax(0))


def test_earlier_documents_are_read_and_named(model):
    memory = memory_of(model, *EARLIER)
    reads = trace_reads(DocumentReader(model.decoder, T), TEXT, memory)
    assert reads.position == 16 and [document.name for document in reads.documents] == ["document 0", "document 1"]
    places = {reads.where(int(place))[0] for place in reads.chunks[reads.heads >= 0]}
    assert places == {"document 0", "document 1", None}
    assert reads.where(0) == ("document 0", -1) and reads.where(15) == ("document 1", 4)
    assert reads.where(16) == (None, -1) and reads.where(20) == (None, 3)
    assert memory.end == 16, "the library is only read"
    assert (reads.heads[0] >= 0).any(), "the first segment reads them already"


@pytest.mark.parametrize("begin, length", [(0, 5), (3, 9), (T, T), (2 * T - 1, 2), (30, None), (44, 10)])
def test_a_part_is_what_it_is_in_the_whole(model, begin, length):
    memory = memory_of(model, *EARLIER)
    whole = trace_reads(DocumentReader(model.decoder, T), TEXT, memory, kept=4)
    part = trace_reads(DocumentReader(model.decoder, T), TEXT, memory, begin, length, kept=4)
    end = len(TEXT) if length is None else min(begin + length, len(TEXT))
    for name in ("tokens", "log_probabilities", "without_memory", "strongest", "by_head", "heads", "chunks", "masses"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[begin:end], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_traced(model):
    for options, sentence in (
        (dict(begin=45), "tokens 0 to 44, none of them between 45 and 45"),
        (dict(begin=-1), "none of them between -1"),
        (dict(length=0), "none of them between 0 and 0"),
        (dict(kept=0), "keeping 0 reads of each token shows nothing"),
    ):
        with pytest.raises(ValueError, match=sentence):
            trace_reads(DocumentReader(model.decoder, T), TEXT, memory_of(model), **options)
