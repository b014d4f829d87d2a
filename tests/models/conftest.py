"""What fairseq's commands parse and build, in this process."""

import copy
import functools
import warnings
from types import SimpleNamespace

import pytest
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from tests.models.tiny import LONGMEM, VOCABULARY, stock_config, stock_model, write_checkpoint

TASK = "longmem_language_modeling"


@pytest.fixture(scope="session")
def parse(tmp_path_factory):
    """fairseq-train's configuration from its command line: parse("--k", 8, arch="longmem_gpt2_tiny")."""
    data = tmp_path_factory.mktemp("dictionary")
    VOCABULARY.save(str(data / "dict.txt"))

    @functools.lru_cache(maxsize=None)  # hydra takes its time
    def parse(*arguments, arch, task):
        line = [data, "--task", task, "--arch", arch, "--save-dir", data / "checkpoints", "--cpu", *arguments]
        parsed = options.parse_args_and_arch(options.get_training_parser(), [str(x) for x in line])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fairseq uses hydra as of old
            return convert_namespace_to_omegaconf(parsed)

    def copied(*arguments, arch="longmem_gpt2_tiny", task=TASK):
        return copy.deepcopy(parse(*arguments, arch=arch, task=task))

    return copied


@pytest.fixture
def write_backbone(tmp_path):
    """Write a checkpoint of a backbone with random weights: write_backbone(name, model, **configuration) -> path."""

    def write_backbone(name="backbone.pt", model="transformer_lm", seed=0, **config):
        return write_checkpoint(tmp_path / name, stock_model(model, seed=seed, **config), stock_config(model, **config))

    return write_backbone


@pytest.fixture
def train(parse):
    """What fairseq-train builds on a backbone's path, with tiny sizes: train(path, "--k", 9).model, .cfg and .task."""
    sizes = {name: value for name, value in LONGMEM.items() if name != "retrieval_layer_index"}
    fewer = [x for name, value in sizes.items() for x in ("--" + name.replace("_", "-"), value)]
    tiny = [x for name, value in LONGMEM.items() for x in ("--" + name.replace("_", "-"), value)]

    def train(path, *arguments, default_layer=False, **named):
        cfg = parse(*(fewer if default_layer else tiny), *arguments, **named)
        cfg.model.pretrained_model_path = path and str(path)
        task = tasks.setup_task(cfg.task)
        return SimpleNamespace(cfg=cfg, task=task, model=task.build_model(cfg.model))

    return train
