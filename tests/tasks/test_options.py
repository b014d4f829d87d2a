import logging
import sys
from typing import Optional

import pytest
from fairseq import options
from omegaconf import OmegaConf

from longmem_fairseq.tasks.option_table import COMMANDS, TABLE, TRAIN
from longmem_fairseq.tasks.options import LongMemLanguageModelingConfig, check_options
from tests.fairseq_runs import TASK

PARSERS = {
    "fairseq-train": "get_training_parser",
    "fairseq-validate": "get_validation_parser",
    "fairseq-eval-lm": "get_eval_lm_parser",
    "fairseq-generate": "get_generation_parser",
    "fairseq-interactive": "get_interactive_generation_parser",
}


def config(**changes):
    """The task's configuration as fairseq-train would make it."""
    values = {
        name: getattr(LongMemLanguageModelingConfig(), name)
        for name in LongMemLanguageModelingConfig.__dataclass_fields__
        if name != "_name"
    }
    values = {name: None if str(value).startswith("${") else value for name, value in values.items()}
    values.update(shorten_method="none", sample_break_mode="none", dataset_impl=None)
    values.update(memory_scope="document", restore_file="checkpoint_last.pt", save_dir="no such directory")
    values.update(train_subset="train", context_window=0)
    return OmegaConf.create({**values, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens_per_sample": 0}, "--tokens-per-sample 0"),
        ({"memory_scope": "documents"}, "--memory-scope documents .* document, stream, shared"),
        ({"output_dictionary_size": 100}, "--output-dictionary-size 100"),
        ({"self_target": True}, "--self-target"),
        ({"past_target": True}, "--past-target"),
        ({"add_bos_token": True}, "--add-bos-token"),
        ({"shorten_method": "truncate"}, "--shorten-method truncate"),
        ({"sample_break_mode": "complete_doc"}, "--sample-break-mode complete_doc is not supported: segments of"),
        ({"pad_to_fixed_length": True}, "--pad-to-fixed-length is not supported: .*leave it out"),
        ({"use_plasma_view": True}, "--use-plasma-view"),
        (
            {"memory_text": ["novel.txt"]},
            "--memory-text novel.txt is not supported by fairseq-train: memories",
        ),
        ({"memory_load": "novel"}, "--memory-load novel is not supported by fairseq-train"),
        ({"memory_save": "novel"}, "--memory-save novel is not supported by fairseq-train"),
        ({"memory_save_dtype": "float32"}, "--memory-save-dtype float32 is not supported by fairseq-train"),
        ({"memory_save_dtype": "float32", "path": "x.pt"}, "--memory-save-dtype float32 has no file"),
        (
            {"memory_snapshot": True, "path": "x.pt", "fairseq_command": "fairseq-eval-lm"},
            "--memory-snapshot .*eval-lm",
        ),
        ({"fp16": True, "cpu": True}, "^--fp16 needs a GPU: leave it out.*--amp.*--inference-dtype bfloat16$"),
        ({"cuda_graphs": "on", "cpu": True}, "^--cuda-graphs on needs a GPU: leave it out$"),
        ({"bf16": True}, "^--bf16 selects a TPU.*train with --train-dtype bfloat16, .*--inference-dtype bfloat16$"),
        (
            {"bf16": True, "memory_efficient_bf16": True, "path": "x.pt"},
            "^--memory-efficient-bf16 selects a TPU.*--inference-dtype bfloat16$",
        ),
        ({"train_dtype": "bfloat16", "amp": True}, "^--train-dtype bfloat16 and --amp are two precisions"),
        ({"dataset_impl": "raw"}, "--dataset-impl raw.*--dataset-impl mmap"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_options(config(**changes))


def test_the_released_scripts_options_pass_silently(caplog):
    with caplog.at_level(logging.INFO):
        check_options(
            config(sample_break_mode="none", tokens_per_sample=1024, data_no_shuffle=True, dataset_impl="mmap")
        )
    assert not caplog.records


def test_every_option_acts_or_is_refused_in_every_command():
    """Whoever adds an option to the task says where it acts; those of other groups are named by interpolations."""
    fields = LongMemLanguageModelingConfig.__dataclass_fields__
    options = {name for name, field in fields.items() if not str(field.default).startswith("${")}
    assert set(TABLE) == options - {"_name", "fairseq_command", "explicit_options"}
    for name, use in TABLE.items():
        assert set(use.commands) <= set(COMMANDS) and bool(use.otherwise) == (set(use.commands) != set(COMMANDS)), name


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_refuse_options_that_do_not_act(command, tmp_path, monkeypatch, capsys):
    """In one sentence, before anything is read; the others are parsed, and known to be the user's."""
    values = {
        "memory_scope": "stream",
        "resume_memory": "replay",
        "inference_dtype": "bfloat16",
        "train_dtype": "bfloat16",
        "cuda_graphs": "off",
    }
    values.update(
        repetition_penalty="2.0", memory_save_dtype="float32", sample_break_mode="eos", shorten_method="truncate"
    )
    for name, use in TABLE.items():
        if name == "data":
            continue
        is_flag = LongMemLanguageModelingConfig.__dataclass_fields__[name].type in (bool, Optional[bool])
        words = ["--" + name.replace("_", "-"), *([] if is_flag else [values.get(name, "7")])]
        arch = ["--arch", "longmem_gpt2_tiny"] if command == TRAIN else []
        line = [command, "data", *TASK, *arch, *words]
        monkeypatch.setattr(sys, "argv", line)
        parser = getattr(options, PARSERS[command])()
        if command in use.commands:
            parsed = options.parse_args_and_arch(parser, line[1:])
            assert parsed.explicit_options == [name] and parsed.fairseq_command == command
            assert str(getattr(parsed, name)) == str(
                ["7"] if name in ("memory_text", "stop") else True if is_flag else words[1]
            )
        else:
            with pytest.raises(SystemExit):
                options.parse_args_and_arch(parser, line[1:])
            assert f"error: {' '.join(words[:1])}" in capsys.readouterr().err
