"""Steps that are recorded and replayed give, bit by bit, what steps without a recording give.

A recorder stands for CUDA graphs: it runs the recorded function again, with all that the function knew when it was
recorded, and writes the results where the first run left them.
"""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F

from longmem_fairseq.memory.search import torch as torch_search
from longmem_fairseq.models import step_graphs
from longmem_fairseq.modules.recording import new_recording
from tests.models.tiny import batches, documents, longmem

T = 7
LENGTHS = (33, 26, 17)


class Recorder:
    """Runs the function again; results have no value before that, and are overwritten by it."""

    def suits(self, device):
        return True

    def record(self, function):
        for _ in range(2):
            assert not torch.is_autocast_cache_enabled()
            outputs = tuple(x.clone() for x in function())
        for x in outputs:
            x.fill_(-99)

        def replay():
            for x, new in zip(outputs, function()):
                x.copy_(new)

        return outputs, replay


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Let the search compute what it computes on a GPU."""

    def search(bank, lanes, queries, n):
        return torch_search.search_masked(bank, bank.places(lanes, queries.device), queries, n)

    monkeypatch.setattr(torch_search, "search_filled", search)


def recorded(model):
    model.decoder.lane_state.graphs.recorder = Recorder()
    return model


def graphs(model) -> step_graphs.StepGraphs:
    return model.decoder.lane_state.graphs


def steps(model, docs, lanes=None, without_memory=False):
    """Everything that a run over documents gives, step by step."""
    results = []
    for tokens, segments in batches(docs, T, lanes):
        with torch.set_grad_enabled(model.training):
            logits, extra = model(tokens, segments=segments, without_memory=without_memory)
        results += [logits.detach(), *(x.detach() for x in extra["inner_states"])]
        if without_memory:
            results.append(extra["logits_without_memory"])
        if extra["memory"] is not None and extra["memory"].retrieved is not None:
            results += [extra["memory"].retrieved, *extra["memory"].distance(), model.decoder.gates]
        if model.training:
            model.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=1).backward()
            results += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    if model.decoder.has_memory:
        results += [x for lane in range(len(docs)) for x in model.memory_contents(lane)]
    return results


def check_equal(actual, expected):
    assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))


MODELS = {
    "transformer_lm": {},
    "alibi_lm": {"model": "alibi_lm", "retrieval_layer_index": "1,2"},
    "llama_lm": {"model": "llama_lm"},
    "recompute": {"checkpoint_activations": True},
    "memory off": {"memory_size": 0},
    "token gates": {"gate": "token", "memory_dropout": 0.5},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_gives_what_the_step_gives(name, training, tmp_path):
    """With lanes empty, part-full and full, two documents after one another, and lanes that end."""
    plain, replayed = (longmem(tmp_path, memory_search="torch", **MODELS[name]).train(training) for _ in range(2))
    recorded(replayed)
    for seed in range(2):
        results = []
        for model in (replayed, plain):
            torch.manual_seed(seed)
            results.append(steps(model, documents(LENGTHS, seed), without_memory=not training))
        check_equal(*results)
    assert graphs(replayed).replays > 5 and not graphs(plain).replays


def test_a_replay_follows_what_changes(tmp_path):
    """Other lanes, other weights at the same place and elsewhere, more lanes, autocast, and training between."""
    plain, replayed = (longmem(tmp_path, memory_search="torch") for _ in range(2))
    recorded(replayed)

    def compare(**options):
        check_equal(*(steps(model, documents(LENGTHS), **options) for model in (replayed, plain)))
        assert graphs(replayed).replays > before

    for change in ("lanes", "update", "elsewhere", "more lanes", "autocast", "training", "forget"):
        before, options = graphs(replayed).replays, {}
        for model in (plain, replayed):
            weights = [p for p in model.parameters() if p.requires_grad]
            if change == "update":
                with torch.no_grad():
                    torch._foreach_mul_(weights, 1.25)
            elif change == "elsewhere":
                for weight in weights:
                    weight.data = weight.data * 0.75
            elif change == "autocast":
                model.autocast_dtype = torch.bfloat16
                model.reset_memory()
            elif change == "forget":
                model.reset_memory()
        if change == "lanes":
            options["lanes"] = [2, 0, 1]
        elif change == "more lanes":
            options["lanes"] = [4, 1, 0]
        if change == "training":
            check_equal(*(steps(model.train(), documents(LENGTHS)) for model in (replayed, plain)))
            for model in (plain, replayed):
                model.eval()
        compare(**options)


def test_recordings_are_few_and_are_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(step_graphs, "_MOST", 2)
    model = recorded(longmem(tmp_path, memory_search="torch"))
    for _ in range(3):
        steps(model, documents(LENGTHS))
    assert graphs(model).recordings == 2
    other = copy.deepcopy(model)
    assert not graphs(other).recordings and graphs(other).decoder is other.decoder
    check_equal(steps(other, documents(LENGTHS)), steps(model, documents(LENGTHS)))


def test_what_a_recording_reads_is_not_freed_before_it():
    """Masks and tables are kept by others only for a while; what the function makes itself is not held."""
    mask, x, made = torch.ones(3), torch.ones(3), []

    def function():
        made[:] = [x * mask]
        return (made[0].view(3) + 1,)

    recording = new_recording(Recorder(), function, [x])
    kept = {tensor.data_ptr() for tensor in recording.kept}
    assert mask.data_ptr() in kept and made[0].data_ptr() not in kept
    assert torch.equal(*recording([torch.full((3,), 4.0)]), torch.full((3,), 5.0))


class BrokenRecorder(Recorder):
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def test_what_cannot_be_recorded_is_computed_without(tmp_path, caplog):
    expected = steps(longmem(tmp_path, memory_search="torch"), documents(LENGTHS))
    model = longmem(tmp_path, memory_search="torch")
    graphs(model).recorder = BrokenRecorder()
    with caplog.at_level(logging.INFO):
        check_equal(steps(model, documents(LENGTHS)), expected)
    message = "not a CUDA graph, as PyTorch cannot record it (operation not permitted when stream is capturing)"
    assert sum(message in record.getMessage() for record in caplog.records) == 1
    graphs(model).mode = "on"
    with pytest.raises(ValueError, match="^--cuda-graphs on: the step cannot be a CUDA graph, as PyTorch cannot"):
        steps(model, documents(LENGTHS))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"carry_window": 5}, "--carry-window makes it depend on what lanes carry"),
        ({"memory_search": "faiss"}, "the search by faiss depends on what the memory holds"),
        ({"memory_scope": "shared"}, "--memory-scope shared has no ring for each row"),
    ],
)
def test_on_is_refused_where_no_step_has_fixed_sizes(changes, reason, tmp_path, monkeypatch):
    """Before anything is read; auto computes without, and says why once."""
    model = recorded(longmem(tmp_path, **{"memory_search": "torch", **changes}))
    with torch.no_grad():
        for tokens, segments in batches(documents(LENGTHS), T):
            model(tokens, segments=segments)
    assert not graphs(model).replays
    factory = model.decoder.memory_factory
    monkeypatch.setattr(factory, "why_not_static", lambda _, check=factory.why_not_static: check(torch.device("cpu")))
    with pytest.raises(ValueError, match=f"^--cuda-graphs on: the step cannot be a CUDA graph, as {reason}; leave"):
        graphs(model).choose("on", trains=False)


def test_off_records_nothing(tmp_path):
    model = recorded(longmem(tmp_path, memory_search="torch"))
    graphs(model).choose("off", trains=False)
    steps(model, documents(LENGTHS))
    assert not graphs(model).replays
    graphs(model).choose("on", trains=False)  # is possible here
    steps(model, documents(LENGTHS))
    assert graphs(model).replays
