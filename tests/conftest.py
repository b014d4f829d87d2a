"""Fixtures that several tests share: tiny data, a backbone, and a LongMem model trained on it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

# Machines that run the tests may be busy: an example that takes long is no failure.
settings.register_profile("longmem", deadline=None)
settings.load_profile("longmem")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors are slower on several threads
if not os.path.exists("/dev/nvidiactl"):  # before Triton: without a GPU, its kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.fairseq_runs import TASK, random_documents, run, write_data  # noqa: E402

# Files that take longest, which start first, so that no process is left alone with one of them at the end.
LONGEST = (
    *("tasks/test_training.py", "examples/test_gpu_check.py", "tasks/test_evaluation_batches.py"),
    *("examples/test_recall.py", "test_hub.py", "examples/test_quickstart.py", "examples/test_smollm2.py"),
)

T = 16  # tokens of a segment
TRAIN_LENGTHS = [1, T - 1, T, T + 1, 100, 333, 4 * T, 5, 70, 200]
VALID_LENGTHS = [50, 2 * T + 1, 1, 90]


def pytest_collection_modifyitems(items):
    """Order the files of tests (see ``LONGEST``)."""
    places = {str(Path(__file__).parent / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data directory with 10 documents to train on, 4 to validate, and one more."""
    return write_data(
        tmp_path_factory.mktemp("tiny") / "data",
        train=random_documents(TRAIN_LENGTHS),
        valid=random_documents(VALID_LENGTHS, seed=1),
        single=random_documents([2 * T + 3], seed=2),  # leaves all ranks but one without a batch
    )


@pytest.fixture(scope="session")
def tiny_backbone(tiny_data) -> Path:
    """A stock transformer_lm of two layers, trained for one epoch by fairseq-train."""
    checkpoint = tiny_data.parent / "backbone" / "checkpoint_last.pt"
    run(
        "train",
        tiny_data,
        *TASK,
        *"--arch transformer_lm --decoder-layers 2 --decoder-embed-dim 16 --decoder-input-dim 16".split(),
        *"--decoder-output-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2".split(),
        *f"--decoder-normalize-before --share-decoder-input-output-embed --tokens-per-sample {T}".split(),
        *"--batch-size 4 --max-epoch 1 --optimizer adam --lr 0.01 --cpu".split(),
        "--save-dir",
        checkpoint.parent,
        *"--no-epoch-checkpoints --num-workers 0 --log-format simple".split(),
        cwd=tiny_data.parent,
    )
    return checkpoint


@pytest.fixture(scope="session")
def tiny_options(tiny_data, tiny_backbone) -> list:
    """Arguments of a fairseq-train that adapts the tiny backbone for two epochs (21 updates each with 4 lanes)."""
    return [
        tiny_data,
        *TASK,
        "--arch",
        "longmem_gpt2_tiny",
        "--pretrained-model-path",
        tiny_backbone,
        *"--criterion longmem_cross_entropy --memory-size 64 --k 8 --chunk-size 4".split(),
        *f"--retrieval-layer-index 1 --tokens-per-sample {T} --max-epoch 2 --optimizer adam --lr 0.01".split(),
        *"--dropout 0.1 --cpu --no-epoch-checkpoints --log-format json --log-interval 1".split(),
    ]


@pytest.fixture(scope="session")
def tiny_longmem(tiny_data, tiny_options) -> SimpleNamespace:
    """The tiny backbone with a memory, adapted without interruption on four lanes: its checkpoint and its log."""
    directory = tiny_data.parent / "longmem"
    output = run(
        "train", *tiny_options, "--batch-size", 4, "--num-workers", 0, "--save-dir", directory, cwd=tiny_data.parent
    )
    return SimpleNamespace(checkpoint=directory / "checkpoint_last.pt", log=output)
