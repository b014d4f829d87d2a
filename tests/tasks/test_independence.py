"""What a document is given depends on itself alone: not on neighbors, lanes, validation or repeated batches."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, optim
from fairseq.data import Dictionary
from hypothesis import given, settings
from hypothesis import strategies as st

import longmem_fairseq  # noqa: F401  (registers the model)
from longmem_fairseq.data.lane_dataset import LaneDataset
from longmem_fairseq.data.lane_iterator import LaneIterator
from tests.conftest import T
from tests.data.test_lane_dataset import Documents
from tests.fairseq_runs import SYMBOLS, random_documents

EOS = Dictionary().eos()
lengths_lists = st.lists(st.integers(1, 6 * T), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def loaded(tiny_longmem):
    """The tiny LongMem with its task, criterion and optimizer, as fairseq's commands load them."""
    torch.set_num_threads(1)
    overrides = {"data": str(tiny_longmem.checkpoint.parents[1] / "data")}
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(tiny_longmem.checkpoint)], overrides)
    model = models[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    return SimpleNamespace(
        model=model,
        task=task,
        criterion=task.build_criterion(cfg.criterion),
        optimizer=optim.build_optimizer(cfg.optimizer, trained),
    )


def logits_of_documents(model, documents, lanes, ranks=1):
    """Logits (tokens, V) of each document, with the memory on, in evaluation."""
    model.eval()
    dataset = LaneDataset(Documents(documents), lanes, ranks, T, EOS, seed=1)
    collected = {}
    for rank in range(ranks):
        for sample in filter(None, LaneIterator(dataset, rank).next_epoch_itr()):
            with torch.no_grad():
                logits = model(**sample["net_input"])[0]
            for row, (piece,) in enumerate(sample["pieces"]):
                collected.setdefault(piece.document, []).append(logits[row, : piece.stop - piece.start])
    return {document: torch.cat(parts) for document, parts in collected.items()}


@settings(max_examples=15)
@given(lengths=lengths_lists, lanes=st.integers(1, 4), data=st.data())
def test_other_documents_do_not_matter_at_all(loaded, lengths, lanes, data):
    """Every symbol of one document changes: the logits of all others are the same, bit by bit."""
    documents = random_documents(lengths)
    changed = data.draw(st.integers(0, len(lengths) - 1))
    before = logits_of_documents(loaded.model, documents, lanes)
    documents[changed] = np.where(
        documents[changed] == EOS, EOS, (documents[changed] - 4 + data.draw(st.integers(1, SYMBOLS - 1))) % SYMBOLS + 4
    )
    after = logits_of_documents(loaded.model, documents, lanes)
    assert before.keys() == after.keys() == set(range(len(lengths)))
    for document in before:
        if document != changed:
            assert torch.equal(before[document], after[document])
    if lengths[changed] > 2:
        assert not torch.equal(before[changed], after[changed])


@settings(max_examples=15)
@given(lengths=lengths_lists, lanes=st.integers(1, 4), ranks=st.integers(1, 2))
def test_lanes_and_ranks_do_not_matter(loaded, lengths, lanes, ranks):
    documents = random_documents(lengths)
    alone = [logits_of_documents(loaded.model, [document], 1)[0] for document in documents]
    together = logits_of_documents(loaded.model, documents, lanes, ranks)
    for i, logits in enumerate(alone):
        torch.testing.assert_close(together[i], logits, rtol=1e-5, atol=1e-5)


@settings(max_examples=10)
@given(data=st.data())
def test_only_training_changes_the_training_memory(loaded, data):
    """Validation, dummy batches and repeated batches leave it as it is, bit by bit."""
    model, task = loaded.model, loaded.task
    if not task.datasets:
        task.load_dataset("train"), task.load_dataset("valid")
    train = list(task.get_batch_iterator(task.dataset("train"), max_sentences=3).next_epoch_itr())
    valid = list(task.get_batch_iterator(task.dataset("valid"), max_sentences=3).next_epoch_itr())
    steps = data.draw(st.integers(1, 6))

    def step(batch, **kwargs):
        torch.manual_seed(0)  # dropout
        return task.train_step(batch, model, loaded.criterion, loaded.optimizer, 0, **kwargs)[0]

    undisturbed = [step(batch) for batch in train[: steps + 1]]
    for batch in train[:steps]:
        step(batch)
    for disturbance in data.draw(st.lists(st.sampled_from(["validate", "dummy", "repeat"]), max_size=4)):
        if disturbance == "validate":
            for batch in valid:
                task.valid_step(batch, model, loaded.criterion)
        elif disturbance == "dummy":
            step(valid[0], ignore_grad=True)
        else:
            assert torch.equal(step(train[steps - 1]), undisturbed[steps - 1])
    with patch.object(model, "memorize", side_effect=AssertionError("the memory had to be rebuilt")):
        assert torch.equal(step(train[steps]), undisturbed[steps])
    model.zero_grad()


def test_batches_that_run_out_of_memory_leave_the_others_as_they_were(loaded):
    """fairseq leaves such a batch out and continues. Whether it fails before its keys are known or after, the next one
    finds them: by replay in the first case."""
    model, task = loaded.model, loaded.task
    if not task.datasets:
        task.load_dataset("train")

    def step(batch):
        torch.manual_seed(0)  # dropout
        return task.train_step(batch, model, loaded.criterion, loaded.optimizer, 0)[0]

    def read(failures):
        losses = []
        epoch = task.get_batch_iterator(task.dataset("train"), max_sentences=3).next_epoch_itr()
        for i, batch in enumerate(epoch):
            if i in failures:
                with patch.object(*failures[i], side_effect=RuntimeError("CUDA out of memory")):
                    with pytest.raises(RuntimeError, match="out of memory"):
                        step(batch)
            else:
                losses.append(step(batch))
        return losses

    model.reset_memory()
    undisturbed = read({})
    before, after = (model.decoder, "side_network"), (loaded.optimizer, "backward")
    failures = {2: before, 3: before, 5: after, 6: before, 8: after}
    assert read(failures) == [loss for i, loss in enumerate(undisturbed) if i not in failures]
    model.zero_grad()


def test_validation_on_what_is_trained_on_is_read_in_lanes_of_its_own(loaded):
    """A training that continues finds its place in its own lanes, not in those of a validation of the same split."""
    model, task = loaded.model, loaded.task
    task.load_dataset("train")

    def lanes(sentences, epoch, training):
        iterator = task.get_batch_iterator(task.dataset("train"), max_sentences=sentences, epoch=epoch)
        return list(iterator.next_epoch_itr(set_dataset_epoch=training))

    def loss(batch):
        torch.manual_seed(0)
        return task.train_step(batch, model, loaded.criterion, loaded.optimizer, 0)[0]

    model.reset_memory()
    train = lanes(3, 2, True)
    expected = [loss(batch) for batch in train]
    model.reset_memory()
    lanes(4, 1, False)  # as fairseq does before the first batch of a training
    assert loss(train[7]) == expected[7]
    model.zero_grad()
