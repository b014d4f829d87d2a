"""Options of the task: the stock language modeling ones that have a meaning here, and those of the memory."""

import logging
import os
from dataclasses import dataclass, field
from typing import List, Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import II

from ..memory.memory_file import DTYPES
from ..memory.policies import memory_policy

logger = logging.getLogger(__name__)


@dataclass
class LongMemLanguageModelingConfig(LanguageModelingConfig):
    """Options of ``longmem_language_modeling``; see each option's help."""

    tokens_per_sample: int = field(
        default=1024,
        metadata={"help": "tokens of a segment, the span of local attention (evaluation takes the checkpoint's)"},
    )
    data_no_shuffle: bool = field(
        default=False, metadata={"help": "read documents in the data's order instead of shuffling them every epoch"}
    )
    memory_scope: str = field(
        default="document",
        metadata={
            "help": "what one memory may hold: document, each document by itself; stream, all documents of a lane (as "
            "in the published training); shared, one memory for the streams of all lanes (as in the released code)"
        },
    )
    memory_snapshot: bool = field(
        default=False,
        metadata={
            "help": "training: save the memory beside every checkpoint within an epoch, and continue from it instead "
            "of encoding the tokens before again"
        },
    )
    resume_memory: Optional[ChoiceEnum(["snapshot", "replay"])] = field(
        default=None,
        metadata={
            "help": "training: continue with the memory of a snapshot, or encode the tokens before again (default: "
            "snapshot with --memory-snapshot, otherwise replay)"
        },
    )

    memory_text: Optional[List[str]] = field(
        default=None,
        metadata={"help": "generation: memorize a document before the first prompt (repeatable; - is standard input)"},
    )
    memory_load: Optional[str] = field(
        default=None, metadata={"help": "generation: start with a memory written by --memory-save"}
    )
    memory_save: Optional[str] = field(
        default=None,
        metadata={"help": "generation: write what was memorized to a file, after each turn with --memorize-turns"},
    )
    memory_save_dtype: ChoiceEnum(list(DTYPES)) = field(
        default="float16", metadata={"help": "precision of keys and values in the file of --memory-save"}
    )
    memorize_turns: bool = field(
        default=False,
        metadata={"help": "generation: memorize each prompt and its best answer, so that later prompts can read them"},
    )
    prompt_tokens: Optional[int] = field(
        default=None,
        metadata={"help": "fairseq-generate: continue the first tokens, this many, of each document of --gen-subset"},
    )
    train_dtype: ChoiceEnum(["float32", "bfloat16"]) = field(
        default="float32",
        metadata={
            "help": "training and its validation: precision of products; bfloat16 computes under autocast with float32 "
            "parameters and without scaling the loss, on GPUs and on CPUs that multiply in it"
        },
    )
    inference_dtype: ChoiceEnum(["float32", "bfloat16"]) = field(
        default="float32",
        metadata={
            "help": "evaluation and generation: precision in which weights are held and multiplied; bfloat16 is up to "
            "twice as fast on CPUs that support it, least where a single row is generated; the rest stays in float32"
        },
    )

    # Options of other groups that the task needs.
    train_subset: str = II("dataset.train_subset")
    restore_file: str = II("checkpoint.restore_file")
    finetune_from_model: Optional[str] = II("checkpoint.finetune_from_model")
    save_dir: str = II("checkpoint.save_dir")
    reset_dataloader: bool = II("checkpoint.reset_dataloader")
    no_save_optimizer_state: bool = II("checkpoint.no_save_optimizer_state")
    ddp_backend: str = II("distributed_training.ddp_backend")
    path: Optional[str] = II("common_eval.path")
    input: str = II("interactive.input")
    results_path: Optional[str] = II("common_eval.results_path")
    fp16: bool = II("common.fp16")
    log_format: Optional[str] = II("common.log_format")
    log_interval: int = II("common.log_interval")
    no_progress_bar: bool = II("common.no_progress_bar")


def check_options(cfg: LongMemLanguageModelingConfig) -> None:
    """Refuse options that contradict the task or each other; log in one line which others have no effect.

    Args:
        cfg: Configuration of the task.

    Raises:
        ValueError: An option is not supported.
        FileNotFoundError: A file or directory that an option names does not exist.
    """
    memory_policy(cfg.memory_scope)
    if cfg.tokens_per_sample < 1:
        raise ValueError(f"--tokens-per-sample {cfg.tokens_per_sample} is less than one token: raise it")
    if cfg.output_dictionary_size >= 0:
        raise ValueError(
            f"--output-dictionary-size {cfg.output_dictionary_size} is not supported: the frozen backbone's "
            "output projection covers its whole dictionary; leave it out"
        )
    if cfg.self_target or cfg.past_target:
        raise ValueError("--self-target and --past-target are not supported: the target is always the next token")
    if cfg.add_bos_token:
        raise ValueError(
            "--add-bos-token is not supported: a document's first token is predicted from end-of-sentence, as in the "
            "backbone's training"
        )
    if str(cfg.shorten_method) != "none":
        raise ValueError(
            f"--shorten-method {cfg.shorten_method} would drop tokens, but every token of a document is read: "
            "leave it out"
        )
    if cfg.dataset_impl is not None and str(cfg.dataset_impl) != "mmap":
        raise ValueError(
            f"--dataset-impl {cfg.dataset_impl} cannot be read by slices: write the data with --dataset-impl mmap"
        )
    if str(cfg.train_dtype) != "float32" and cfg.fp16:
        raise ValueError(f"--train-dtype {cfg.train_dtype} and --fp16 are two precisions: leave one out")
    if str(cfg.inference_dtype) != "float32" and cfg.fp16:
        raise ValueError(f"--inference-dtype {cfg.inference_dtype} and --fp16 are two precisions: leave one out")
    for path in [*(cfg.memory_text or []), *filter(None, [cfg.memory_load])]:
        if path != "-" and not os.path.isfile(path):
            option = "--memory-load" if path == cfg.memory_load else "--memory-text"
            raise FileNotFoundError(f"{option} {path} does not exist, or is not a file")
    # fairseq-generate takes its prompts from the data.
    if "-" in (cfg.memory_text or []) and cfg.prompt_tokens is None and cfg.input == "-":
        raise ValueError(
            "--memory-text - reads the standard input to its end, so no prompt is left in it: name a file of prompts "
            "with --input"
        )
    if cfg.memory_save and not os.path.isdir(os.path.dirname(os.path.abspath(cfg.memory_save))):
        raise FileNotFoundError(f"--memory-save {cfg.memory_save} cannot be written: its directory does not exist")
    if cfg.prompt_tokens is not None and cfg.prompt_tokens < 0:
        raise ValueError(f"--prompt-tokens {cfg.prompt_tokens} is negative: set it to 0 or more")

    no_effect = {
        f"--sample-break-mode {cfg.sample_break_mode}": str(cfg.sample_break_mode) != "none",
        "--max-target-positions": cfg.max_target_positions is not None,
        "--pad-to-fixed-length": cfg.pad_to_fixed_length,
        "--pad-to-fixed-bsz": cfg.pad_to_fixed_bsz,
        "--use-plasma-view": cfg.use_plasma_view,
    }
    given = [option for option, is_set in no_effect.items() if is_set]
    if given:
        logger.info(
            "%s: no effect; segments of --tokens-per-sample tokens are cut from whole documents (or, with "
            "--memory-scope stream, from all documents of a lane) and padded only at a document's end",
            ", ".join(given),
        )
