"""No step waits for the device: nothing is read back, and no size depends on what a tensor holds.

On a GPU each of these would stop the host until everything before it was computed, and a CUDA graph could not contain
the step. Here the CPU stands for the GPU: operators and methods that would wait raise.
"""

import contextlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longmem_fairseq.criterions.longmem_cross_entropy import LongMemCrossEntropyCriterion
from longmem_fairseq.memory.search import torch as torch_search
from longmem_fairseq.models.live_window import prefill
from longmem_fairseq.modules import staging
from tests.models.tiny import VOCABULARY, batches, documents, longmem

T = 7
# Operators whose result the host needs, or whose result has a size that only the device knows.
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave.Tensor",
    "unique_consecutive",
    "unique_dim",
}
READING = ("__array__", "__bool__", "__float__", "__int__", "cpu", "item", "numpy", "tolist")


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().split("::")[-1]
        assert not {name, name.split(".")[0]} & WAITING, f"{name} waits for the device"
        if name.startswith(("index.Tensor", "index_put")):
            assert all(x is None or x.dtype == torch.int64 for x in args[1]), f"{name} with a mask waits for the device"
        return operator(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(monkeypatch):
    """Raise at whatever would wait for a GPU; :mod:`staging` may copy small arrays to it."""
    from_numpy = torch.from_numpy

    def refuse(name):
        def call(*arguments, **options):
            raise AssertionError(f"{name} waits for the device")

        return call

    def of_staging(array):
        assert inspect.stack(0)[1].filename == staging.__file__, "from_numpy waits for the device"
        return from_numpy(array)

    def indexed(method):
        def call(tensor, index, *value):
            entries = index if isinstance(index, tuple) else (index,)
            assert not any(isinstance(x, (list, np.ndarray)) for x in entries), "an index of the host is copied"
            return method(tensor, index, *value)

        return call

    with monkeypatch.context() as patch, NoWaiting():
        for name in READING:
            patch.setattr(torch.Tensor, name, refuse(name))
        for name in ("as_tensor", "tensor"):
            patch.setattr(torch, name, refuse(name))
        for name in ("__getitem__", "__setitem__"):
            patch.setattr(torch.Tensor, name, indexed(getattr(torch.Tensor, name)))
        patch.setattr(torch, "from_numpy", of_staging)
        yield


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let the search compute what it computes on a GPU."""

    def search(bank, lanes, queries, n):
        return torch_search.search_masked(bank, bank.places(lanes, queries.device), queries, n)

    monkeypatch.setattr(torch_search, "search_filled", search)


MODELS = {
    "transformer_lm": {},
    "sinusoidal": {"backbone": {"decoder_learned_pos": False}},
    "alibi_lm": {"model": "alibi_lm"},
    "llama_lm": {"model": "llama_lm", "memory_query_distance": 5},
    "layers": {"model": "alibi_lm", "retrieval_layer_index": "1,2"},
    "carried keys": {"model": "alibi_lm", "carry_window": 5},
    "carried tokens": {"carry_window": 5},
    "recompute": {"checkpoint_activations": True},
    "token gates": {"gate": "token", "memory_dropout": 0.5},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_for_nothing(name, tmp_path, monkeypatch, as_on_a_gpu):
    """Evaluation, and training with its figures; lanes full and part-full, rows that end, and new documents."""
    model = longmem(tmp_path, memory_search="torch", **MODELS[name])
    criterion = LongMemCrossEntropyCriterion(SimpleNamespace(target_dictionary=VOCABULARY), False)
    steps = list(batches(documents((45, 37, 30)), T))
    for training in (False, True):
        model.train(training)
        for i, (tokens, segments) in enumerate(steps):
            sample = {
                "net_input": {"src_tokens": tokens, "segments": segments},
                "target": tokens,
                "ntokens": int(segments.lengths.sum()),
            }
            with no_waiting(monkeypatch) if i > 0 else contextlib.nullcontext(), torch.set_grad_enabled(training):
                loss, _, figures = criterion(model, sample)
                if training:
                    loss.backward()
        assert figures["memory_reads"] > 0 and loss.isfinite()


@pytest.mark.parametrize("name", ["transformer_lm", "sinusoidal", "alibi_lm", "llama_lm", "carried keys"])
def test_generation_waits_for_nothing(name, tmp_path, monkeypatch, as_on_a_gpu):
    """One more token of each row, between two moves into the memory, which the host counts."""
    decoder = longmem(tmp_path, memory_search="torch", **MODELS[name]).decoder
    state = prefill(decoder, documents((2 * T + 1, 3 * T + 2)), T)
    token = torch.full((2, 1), 7)
    with torch.no_grad():
        decoder(token, incremental_state=state)
        with no_waiting(monkeypatch):
            for _ in range(3):
                logits, _ = decoder(token, incremental_state=state)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x[[0, 1]],
        lambda x: torch.tensor([1.0]),
        lambda x: torch.from_numpy(np.zeros(2)),
        lambda x: x.tolist(),
    ],
)
def test_what_waits_is_refused_here(wait, monkeypatch):
    """The tests above could fail."""
    with pytest.raises(AssertionError, match="waits for the device|index of the host"), no_waiting(monkeypatch):
        wait(torch.ones(3))
