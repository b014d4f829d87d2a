"""CUDA graphs: what is replayed is what is computed without them."""

import pytest
import torch

from tests.models.test_step_graphs import LENGTHS, MODELS, T, graphs, steps
from tests.models.tiny import batches, documents, longmem


def on_gpu(tmp_path, mode, **changes):
    model = longmem(tmp_path, memory_search="torch", **changes).cuda()
    graphs(model).mode = mode
    return model


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_gives_what_the_step_gives(name, training, tmp_path):
    plain, replayed = (on_gpu(tmp_path, mode, **MODELS[name]).train(training) for mode in ("off", "on"))
    for seed in range(2):
        docs = [doc.cuda() for doc in documents(LENGTHS, seed)]
        for actual, expected in zip(steps(replayed, docs), steps(plain, docs)):
            if training:  # a GPU does not sum gradients in the same order twice
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(actual, expected)
    assert graphs(replayed).replays > 5 and not graphs(plain).replays


def test_a_replay_under_autocast_follows_weights(tmp_path):
    """Weights that were converted for the recording are converted again after they changed."""
    plain, replayed = (on_gpu(tmp_path, mode) for mode in ("off", "on"))
    docs = [doc.cuda() for doc in documents(LENGTHS)]
    for factor in (1.0, 1.25):
        for model in (plain, replayed):
            model.autocast_dtype = torch.bfloat16
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(factor if weight.requires_grad else 1.0)
        assert all(map(torch.equal, steps(replayed, docs), steps(plain, docs)))
    assert graphs(replayed).replays


def test_a_replay_waits_for_nothing(tmp_path):
    model, waits = on_gpu(tmp_path, "on"), []
    with torch.no_grad():
        for tokens, segments in batches([doc.cuda() for doc in documents((9 * T, 9 * T))], T):
            before = graphs(model).replays
            torch.cuda.set_sync_debug_mode("error" if before else "default")  # whatever waits for the GPU raises
            try:
                model(tokens, segments=segments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            waits.append(graphs(model).replays > before)
    assert waits[-3:] == [True, True, True]
