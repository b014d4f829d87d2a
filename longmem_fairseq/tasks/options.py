"""Options of the task: the stock language modeling ones that have a meaning here, and those of the memory."""

import os
from argparse import SUPPRESS
from dataclasses import dataclass, field
from typing import Any, List, Optional

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import II

from ..memory.memory_file import DTYPES
from ..memory.policies import memory_policy
from ..models.step_graphs import MODES
from .generation_options import check_stops, check_values
from .option_table import INTERACTIVE, TRAIN, check_use


@dataclass
class LongMemLanguageModelingConfig(LanguageModelingConfig):
    """Options of ``longmem_language_modeling``; see each option's help."""

    tokens_per_sample: int = field(
        default=1024,
        metadata={"help": "tokens of a segment, the span of local attention (default in evaluation: the checkpoint's)"},
    )
    data_no_shuffle: bool = field(
        default=False, metadata={"help": "read documents in the data's order instead of shuffling them every epoch"}
    )
    memory_scope: str = field(
        default="document",
        metadata={
            "help": "what one memory may hold: document, each document by itself; stream, all documents of a lane (as "
            "in the published training); shared, one memory for the streams of all lanes (as in the released code); "
            "default in evaluation: the checkpoint's"
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
        metadata={
            "help": "generation: memorize a document before the first prompt; fairseq-eval-lm: before each document of "
            "the split (repeatable; - is standard input)"
        },
    )
    memory_load: Optional[str] = field(
        default=None,
        metadata={"help": "generation and fairseq-eval-lm: start with a memory written by --memory-save"},
    )
    memory_save: Optional[str] = field(
        default=None,
        metadata={
            "help": "generation and fairseq-eval-lm: write what was memorized to a file, after each turn with "
            "--memorize-turns"
        },
    )
    memory_save_dtype: Optional[ChoiceEnum(list(DTYPES))] = field(
        default=None, metadata={"help": "precision of keys and values in the file of --memory-save (default: float16)"}
    )
    memorize_turns: bool = field(
        default=False,
        metadata={"help": "generation: memorize each prompt and its best answer, so that later prompts can read them"},
    )
    prompt_tokens: Optional[int] = field(
        default=None,
        metadata={"help": "fairseq-generate: continue the first tokens, this many, of each document of --gen-subset"},
    )
    stop: Optional[List[str]] = field(
        default=None,
        metadata={
            "help": "generation: end an answer at this text and cut it before (repeatable; a newline is written <0x0A>)"
        },
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata={
            "help": "generation: divide positive and multiply negative logits of the tokens in prompt and answer by "
            "this; above 1 against repetition"
        },
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
            "twice as fast on CPUs that support it, least where a single row is generated; the rest stays in float32, "
            "on GPUs but for attention"
        },
    )
    cuda_graphs: ChoiceEnum(list(MODES)) = field(
        default="auto",
        metadata={
            "help": "evaluation: launch backbone, search and side network at once, as a CUDA graph; training: the "
            "frozen backbone; auto: on GPUs, where the step has fixed sizes; on: fail where it has not"
        },
    )

    # Set by the parser of a command line, see ExplicitOptions: the command, and which options the user gave.
    fairseq_command: Optional[str] = field(default=None, metadata={"help": SUPPRESS})
    explicit_options: Optional[List[str]] = field(default=None, metadata={"help": SUPPRESS})

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
    model_overrides: str = II("common_eval.model_overrides")
    context_window: int = II("eval_lm.context_window")
    bpe_settings: Any = II("bpe")  # what --bpe and its options select
    tokenizer_settings: Any = II("tokenizer")
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
    amp: bool = II("common.amp")
    bf16: bool = II("common.bf16")
    memory_efficient_bf16: bool = II("common.memory_efficient_bf16")
    cpu: bool = II("common.cpu")
    log_format: Optional[str] = II("common.log_format")
    log_interval: int = II("common.log_interval")
    no_progress_bar: bool = II("common.no_progress_bar")
    post_process: Optional[str] = II("common_eval.post_process")


def check_options(cfg: LongMemLanguageModelingConfig, from_checkpoint: bool = False) -> None:
    """Refuse options that contradict the task or each other.

    Args:
        cfg: Configuration of the task.
        from_checkpoint: Whether the configuration was made by the training of a checkpoint, so that options that are
            not supported are not the user's.

    Raises:
        ValueError: An option is not supported.
        FileNotFoundError: A file or directory that an option names does not exist.
    """
    if not from_checkpoint:
        command = cfg.fairseq_command or (TRAIN if cfg.path is None else None)  # fairseq-hydra-train has no parser
        check_use(cfg, LongMemLanguageModelingConfig, command)
        if cfg.use_plasma_view:
            raise ValueError("--use-plasma-view is not supported: data is memory-mapped; leave it out")
        _check_precision(cfg)
        if str(cfg.cuda_graphs) == "on" and (cfg.cpu or not torch.cuda.is_available()):
            raise ValueError("--cuda-graphs on needs a GPU: leave it out")
    memory_policy(cfg.memory_scope)
    if cfg.tokens_per_sample < 1:
        raise ValueError(f"--tokens-per-sample {cfg.tokens_per_sample} is less than one token: raise it")
    if cfg.dataset_impl is not None and str(cfg.dataset_impl) != "mmap":
        raise ValueError(
            f"--dataset-impl {cfg.dataset_impl} cannot be read by slices: write the data with --dataset-impl mmap"
        )
    _check_memory_files(cfg)
    if cfg.prompt_tokens is not None and cfg.prompt_tokens < 0:
        raise ValueError(f"--prompt-tokens {cfg.prompt_tokens} is negative: set it to 0 or more")
    check_stops(cfg.stop or [], "--stop")
    check_values({"repetition_penalty": cfg.repetition_penalty})


def _check_precision(cfg: LongMemLanguageModelingConfig) -> None:
    if cfg.bf16 or cfg.memory_efficient_bf16:
        option = "--memory-efficient-bf16" if cfg.memory_efficient_bf16 else "--bf16"
        raise ValueError(
            f"{option} selects a TPU in fairseq and computes on no GPU or CPU: train with --train-dtype bfloat16, and "
            "evaluate and generate with --inference-dtype bfloat16"
        )
    for name in ("train_dtype", "inference_dtype"):
        for other in ("fp16", "amp"):
            if str(getattr(cfg, name)) != "float32" and getattr(cfg, other):
                option = f"--{name.replace('_', '-')} {getattr(cfg, name)}"
                raise ValueError(f"{option} and --{other} are two precisions: leave one out")
    if cfg.fp16 and not cfg.memory_efficient_fp16 and (cfg.cpu or not torch.cuda.is_available()):
        raise ValueError(
            "--fp16 needs a GPU: leave it out, and for half precision on a CPU train with --amp, or evaluate and "
            "generate with --inference-dtype bfloat16"
        )


def _check_memory_files(cfg: LongMemLanguageModelingConfig) -> None:
    for path in [*(cfg.memory_text or []), *filter(None, [cfg.memory_load])]:
        if path != "-" and not os.path.isfile(path):
            option = "--memory-load" if path == cfg.memory_load else "--memory-text"
            raise FileNotFoundError(f"{option} {path} does not exist, or is not a file")
    if "-" in (cfg.memory_text or []) and cfg.fairseq_command == INTERACTIVE and cfg.input == "-":
        raise ValueError(
            "--memory-text - reads the standard input to its end, so no prompt is left in it: name a file of prompts "
            "with --input"
        )
    if cfg.memory_save and not os.path.isdir(os.path.dirname(os.path.abspath(cfg.memory_save))):
        raise FileNotFoundError(f"--memory-save {cfg.memory_save} cannot be written: its directory does not exist")
    if cfg.memory_save_dtype is not None and not cfg.memory_save:
        raise ValueError(
            f"--memory-save-dtype {cfg.memory_save_dtype} has no file to set the precision of: name one with "
            "--memory-save"
        )
