"""Settings of checkpoints in evaluation: what the user gave, by an option or an override, and what is refused."""

import pytest
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from longmem_fairseq.tasks.saved_settings import parse_overrides
from tests.conftest import VALID_LENGTHS, T
from tests.fairseq_runs import TASK, figures, finish, random_documents, start
from tests.tasks.test_evaluation_batches import load_language_model, mean_loss


@pytest.fixture
def load(tiny_data, tiny_longmem, tiny_backbone, monkeypatch):
    """The task and the models that fairseq-eval-lm and fairseq-interactive build for a command line."""

    def load(*arguments, paths=(tiny_longmem.checkpoint,)):
        line = [str(x) for x in (tiny_data, *TASK, "--path", ":".join(map(str, paths)), "--cpu", *arguments)]
        monkeypatch.setattr("sys.argv", ["fairseq-eval-lm", *line])
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_eval_lm_parser(), line))
        task = tasks.setup_task(cfg.task)
        overrides = parse_overrides(cfg.common_eval.model_overrides)
        return task, checkpoint_utils.load_model_ensemble(list(map(str, paths)), overrides, task=task)[0]

    return load


@pytest.mark.parametrize(
    "arguments, segment, scope",
    [
        ([], T, "document"),
        (["--tokens-per-sample", 8, "--memory-scope", "stream"], 8, "stream"),
        (["--memory-scope", "document"], T, "document"),  # a default, which is also the user's
        (["--model-overrides", "{'tokens_per_sample': 8, 'memory_scope': 'stream'}"], 8, "stream"),
        (["--model-overrides", "{'tokens_per_sample': 8}", "--tokens-per-sample", 8], 8, "document"),
    ],
)
def test_what_the_user_gives_wins(load, arguments, segment, scope):
    task, (model,) = load(*arguments)
    assert (task.args.tokens_per_sample, str(task.args.memory_scope)) == (segment, scope)
    assert (model.cfg.tokens_per_sample, model.decoder.memory_factory.settings.scope) == (segment, scope)


def test_the_default_of_an_option_can_be_given(load, tiny_longmem, tmp_path):
    """1024, in place of the checkpoint's 16; the memory of 64 tokens is then too small."""
    with pytest.raises(ValueError, match="--memory-size 64 is smaller than one segment of --tokens-per-sample 1024"):
        load("--tokens-per-sample", 1024)


def test_an_ensemble_has_one_window(load, tiny_longmem, tiny_backbone):
    task, (model, backbone) = load("--tokens-per-sample", 8, paths=(tiny_longmem.checkpoint, tiny_backbone))
    assert task.args.tokens_per_sample == model.cfg.tokens_per_sample == 8 and backbone.max_positions() == T


def test_checkpoints_of_different_windows_need_the_option(load, tiny_longmem, tmp_path):
    state = torch.load(tiny_longmem.checkpoint, weights_only=False)
    state["cfg"]["model"]["tokens_per_sample"] = 8
    torch.save(state, tmp_path / "8.pt")
    paths = (tiny_longmem.checkpoint, tmp_path / "8.pt")
    with pytest.raises(ValueError, match=r"--path differ in --tokens-per-sample \(16 and 8\): give the option"):
        load(paths=paths)
    assert [model.cfg.tokens_per_sample for model in load("--tokens-per-sample", 4, paths=paths)[1]] == [4, 4]


def test_settings_that_came_later_can_be_overridden(load, tiny_longmem, tmp_path):
    """fairseq itself skips names that a checkpoint does not have."""
    state = torch.load(tiny_longmem.checkpoint, weights_only=False)
    del state["cfg"]["model"]["memory_search"]
    torch.save(state, tmp_path / "old.pt")
    _, (model,) = load("--model-overrides", "{'memory_search': 'torch'}", paths=[tmp_path / "old.pt"])
    assert model.cfg.memory_search == "torch"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["--model-overrides", "{'memory_sise': 64}"],
            "--model-overrides has memory_sise, which is not a setting of the model: did you mean memory_size?",
        ),
        (["--model-overrides", "{'xyzzy': 1}"], "--model-overrides has xyzzy, .*: leave it out"),
        (
            ["--model-overrides", "{'memory_text': 'x'}"],
            "which is not a setting of the model: give it as --memory-text",
        ),
        (["--model-overrides", "memory_size=64"], "--model-overrides memory_size=64 is not a Python dictionary"),
        (
            ["--model-overrides", "{'tokens_per_sample': 8}", "--tokens-per-sample", 4],
            "--tokens-per-sample 4 contradicts --model-overrides, which has 8: leave one of them out",
        ),
    ],
)
def test_settings_that_do_not_exist_are_refused(load, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(*arguments)


def test_fairseq_validate(tiny_data, tiny_longmem, tiny_backbone, tmp_path):
    """It takes task and options from the checkpoint; here too, what the user gives wins, or is refused."""
    options = [tiny_data, *TASK, *"--valid-subset valid --batch-size 2 --cpu --log-format json --path".split()]
    commands = {
        "backbone": [tiny_backbone, "--tokens-per-sample", 8],
        "stream": [tiny_longmem.checkpoint, "--memory-scope", "stream"],
        "misspelt": [tiny_longmem.checkpoint, "--model-overrides", "{'memory_sise': 64}"],
        "memory": [tiny_longmem.checkpoint, "--memory-load", "x"],
    }
    processes = {name: start("validate", *options, *arguments, cwd=tmp_path) for name, arguments in commands.items()}
    expected = mean_loss(load_language_model(tiny_backbone, tiny_data), random_documents(VALID_LENGTHS, seed=1), 8)
    losses = {name: figures(finish(processes[name]), "valid", "loss") for name in ("backbone", "stream")}
    assert losses["backbone"] == [pytest.approx(expected, abs=2e-3)]
    assert losses["stream"] != figures(tiny_longmem.log, "valid", "loss")[-1:]
    assert "did you mean memory_size?" in finish(processes["misspelt"], succeeds=False).splitlines()[-1]
    refusal = "error: --memory-load x is not supported by fairseq-validate: memories start empty; "
    assert refusal in finish(processes["memory"], succeeds=False).splitlines()[-1]
