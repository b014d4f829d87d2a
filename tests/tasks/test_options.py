import logging

import pytest
from omegaconf import OmegaConf

from longmem_fairseq.tasks.options import LongMemLanguageModelingConfig, check_options


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
    values.update(train_subset="train")
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


def test_options_without_effect_are_explained_in_one_line(caplog):
    with caplog.at_level(logging.INFO):
        check_options(config(sample_break_mode="complete_doc", pad_to_fixed_length=True, max_target_positions=1024))
    (record,) = caplog.records
    for option in ("--sample-break-mode complete_doc", "--pad-to-fixed-length", "--max-target-positions"):
        assert option in record.getMessage()
