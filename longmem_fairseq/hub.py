"""LongMem from Python, for notebooks and scripts: memorize, generate, score.

>>> from longmem_fairseq.hub import LongMem
>>> model = LongMem.from_pretrained("examples/pretrained/mini")
>>> model.memorize(open("novel.txt").read(), name="novel")
>>> model.generate("The captain said")
"""

import argparse
import json
import math
import os
from types import SimpleNamespace
from typing import List, NamedTuple, Optional, Union

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.dataclass.utils import overwrite_args_by_name
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from .memory.document_memory import DocumentMemory
from .memory.memory_file import load_memory, save_memory
from .models.longmem_config import LongMemConfig
from .models.longmem_lm import LongMemModel
from .models.model_directory import BACKBONE, CONFIG, is_model_directory, read_directory
from .models.reading import DocumentReader
from .models.trace import Trace, trace_reads
from .safe_load import allow_namespaces
from .tasks.checkpoints import read_checkpoint
from .tasks.generator import LongMemGenerator, backbone_identity
from .tasks.longmem_language_modeling import LongMemLanguageModelingTask
from .tasks.options import LongMemLanguageModelingConfig
from .tasks.saved_settings import suggestion
from .text import decode_text, encode_text, find_bpe, token_texts

TASK = "longmem_language_modeling"
CHECKPOINTS = ("checkpoint_best.pt", "checkpoint_last.pt", "model.pt")


class Score(NamedTuple):
    """How likely a text is, given the memory.

    Attributes:
        tokens: Token ids of the text, shape (length,), int64.
        log_probabilities: Log-probability of each token, natural logarithm, shape (length,), float32.
    """

    tokens: Tensor
    log_probabilities: Tensor

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(-float(self.log_probabilities.mean()))


class LongMem:
    """A language model with a long-term memory, usually made by :meth:`from_pretrained`.

    Several memories over one model: ``LongMem(model.model, model.task, model.bpe)`` shares the weights of ``model``
    and has a memory of its own.

    Args:
        model: A ``longmem_lm`` in evaluation mode.
        task: The fairseq task that the model was built for.
        bpe: fairseq's BPE; None where the dictionary has words.
        tokenizer: fairseq's tokenizer, or None.
        use_memory: Whether the model reads and writes a memory; if false, it has its window only.

    Attributes:
        memory: Documents in the memory; None with the memory off.
    """

    def __init__(self, model, task, bpe=None, tokenizer=None, use_memory: bool = True):
        self.model, self.task, self.bpe, self.tokenizer = model, task, bpe, tokenizer
        self.reader = DocumentReader(model.decoder, task.args.tokens_per_sample)
        self.memory: Optional[DocumentMemory] = self.reader.new_memory() if use_memory else None

    @classmethod
    def from_pretrained(
        cls, path: str, data: Optional[str] = None, bpe=None, tokenizer=None, device: Optional[str] = None, **settings
    ) -> "LongMem":
        """Load a checkpoint, or a model directory.

        Args:
            path: Path of a checkpoint, of a directory that contains ``checkpoint_best.pt``, ``checkpoint_last.pt`` or
                ``model.pt``, or of a model directory (``config.json`` and safetensors files).
            data: Directory of ``dict.txt``; by default that of the checkpoint, then the one it was trained on. A
                ``tokenizer.json``, a ``sentencepiece.model``, or GPT-2's ``encoder.json`` and ``vocab.bpe`` in it are
                used for text.
            bpe: fairseq's BPE, in place of the one in ``data``.
            tokenizer: fairseq's tokenizer, or None.
            device: Device to run on, by default a GPU if there is one.
            settings: Settings of the model in place of the checkpoint's, such as ``memory_size=16384`` or
                ``pretrained_model_path="backbone.pt"``; or of the task, such as ``inference_dtype="bfloat16"``.

        Raises:
            ValueError: The checkpoint is of another model, or holds code; a setting does not fit.
            FileNotFoundError: The checkpoint or the dictionary is missing.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if is_model_directory(path):
            data = find_data(data, os.path.join(path, "config.json"), None)
            model, task = _load_directory(path, data, settings)
        else:
            model, task, data = _load_checkpoint(find_checkpoint(path), data, settings)
        return cls(model.to(device).eval(), task, find_bpe(data) if bpe is None else bpe, tokenizer)

    @property
    def documents(self) -> List[str]:
        """Names of the documents with tokens in the memory, oldest first."""
        return [] if self.memory is None else [document.name for document in self.memory.documents]

    def memorize(self, text: str, name: Optional[str] = None) -> None:
        """Encode a text and write it into the memory; a progress bar shows from the first second on.

        Args:
            text: Text of any length; when the memory is full, its oldest tokens are evicted.
            name: Name to forget it by; by default ``text 1``, ``text 2``...

        Raises:
            ValueError: The text is empty, the name is taken, or the memory is off.
        """
        if name is None:
            name = next(f"text {i}" for i in range(1, len(self.documents) + 2) if f"text {i}" not in self.documents)
        self.reader.memorize(self._memory(), name, self.encode(text))

    def forget(self, name: Optional[str] = None) -> None:
        """Forget a text by its name; without one, everything.

        Args:
            name: Name of the text, or None.

        Raises:
            ValueError: There is no text of this name, or the memory is off.
        """
        memory = self._memory()
        if name is not None:
            memory.forget(name)
        else:
            self.memory = self.reader.new_memory()

    def without_memory(self) -> "LongMem":
        """Return a model of the same weights that neither reads nor writes a memory."""
        return LongMem(self.model, self.task, self.bpe, self.tokenizer, use_memory=False)

    def generate(
        self,
        prompt: Union[str, List[str]],
        max_new_tokens: int = 100,
        min_new_tokens: int = 1,
        beam: int = 1,
        sampling: bool = False,
        top_k: int = -1,
        top_p: float = -1.0,
        temperature: float = 1.0,
        no_repeat_ngram_size: int = 0,
        length_penalty: float = 1.0,
    ) -> Union[str, List[str]]:
        """Continue a prompt of any length, or several side by side, behind what was memorized.

        Args:
            prompt: Text to continue, or a list of texts.
            max_new_tokens: Largest number of tokens of a continuation.
            min_new_tokens: Smallest number of tokens of a continuation.
            beam: Number of hypotheses, of which the best is returned.
            sampling: Whether tokens are drawn (seed: ``torch.manual_seed``) instead of searched for.
            top_k: Number of likeliest tokens to draw from; -1 for all.
            top_p: Total probability of the likeliest tokens to draw from; -1 for all.
            temperature: Divisor of the logits: above 1 more even, below 1 sharper.
            no_repeat_ngram_size: Length of n-grams that a continuation may contain only once; 0 for no limit.
            length_penalty: Exponent of the length in a hypothesis's score; above 1 favors longer ones.

        Returns:
            The continuation without the prompt; a list for a list.

        Raises:
            ValueError: An option is not supported.
        """
        options = dict(
            beam=beam,
            max_len_b=max_new_tokens,
            min_len=min_new_tokens,
            sampling=sampling,
            sampling_topk=top_k,
            sampling_topp=top_p,
            temperature=temperature,
            no_repeat_ngram_size=no_repeat_ngram_size,
            lenpen=length_penalty,
        )
        if (top_k > 0 or top_p > 0) and not sampling:
            raise ValueError("top_k and top_p choose among samples: set sampling=True")
        if beam < 1:
            raise ValueError(f"beam={beam} is less than 1: raise it")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        continuations = self._generate(prompts, self._generator(**options))
        return continuations[0] if isinstance(prompt, str) else continuations

    def _generate(self, prompts: List[str], generator: LongMemGenerator) -> List[str]:
        texts = [self.encode(text) if text else torch.zeros(0, dtype=torch.int64) for text in prompts]
        dataset = self.task.build_dataset_for_inference(texts, [len(text) for text in texts])
        sample = dataset.collater([dataset[i] for i in range(len(dataset))])
        sample["net_input"] = {key: x.to(self.model.decoder.device) for key, x in sample["net_input"].items()}
        hypotheses = generator.generate([self.model], sample)
        return [self._continuation(text, best[0]["tokens"].cpu()) for text, best in zip(texts, hypotheses)]

    def score(self, text: str) -> Score:
        """Score a text behind what was memorized, segment by segment as ``fairseq-eval-lm`` does.

        Args:
            text: Text of any length.

        Raises:
            ValueError: The text is empty.
        """
        tokens = self.encode(text)
        return Score(tokens, self.reader.score(tokens, self.memory, use_memory=self.memory is not None))

    def trace(self, text: str, begin: int = 0, tokens: Optional[int] = None, reads: int = 8) -> Trace:
        """Record what was read from the memory for each token of a text, which is read as :meth:`score` reads it.

        Args:
            text: Text of any length.
            begin: Number of the first token that is traced.
            tokens: Number of tokens that are traced; None for all.
            reads: Number of reads that are kept of each token, those with the largest weight.

        Raises:
            ValueError: The text is empty or does not have this part, or the memory is off.
        """
        return trace_reads(self.reader, self.encode(text), self._memory(), begin, tokens, reads)

    def save_memory(self, path: str, dtype: str = "float16") -> None:
        """Write what was memorized to a file.

        Args:
            path: Path of the file.
            dtype: Precision in the file: ``float16``, ``bfloat16`` or ``float32``.

        Raises:
            ValueError: There is nothing to save, it does not fit the precision, or the memory is off.
            OSError: The file cannot be written.
        """
        save_memory(path, self._memory(), *backbone_identity(self.model.decoder), dtype=dtype)

    def load_memory(self, path: str) -> None:
        """Read a file of :meth:`save_memory` in place of what was memorized.

        Args:
            path: Path of the file.

        Raises:
            ValueError: The file is missing, damaged, or of another model, or the memory is off.
        """
        load_memory(path, self._memory(), *backbone_identity(self.model.decoder))

    def encode(self, text: str) -> Tensor:
        """Return the token ids of a text, shape (length,), int64, without an end-of-sentence.

        Args:
            text: Text that is not empty.

        Raises:
            ValueError: The text is empty.
        """
        return encode_text(text, self.task.dictionary, self.bpe, self.tokenizer)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of token ids, shape (length,)."""
        return decode_text(tokens, self.task.dictionary, self.bpe, self.tokenizer)

    def token_texts(self, tokens: Tensor) -> List[str]:
        """Return what each of some token ids, shape (length,), adds to the text."""
        return token_texts(tokens, self.task.dictionary, self.bpe)

    def _memory(self) -> DocumentMemory:
        if self.memory is None:
            raise ValueError("the model's memory is off: load it with use_external_memory=True and memory_size above 0")
        return self.memory

    def _generator(self, **options) -> LongMemGenerator:
        return self.task.build_generator(
            [self.model], SimpleNamespace(**options), extra_gen_cls_kwargs={"document_memories": [self.memory]}
        )

    def _continuation(self, prompt: Tensor, answer: Tensor) -> str:
        # Decoded by itself, an answer would lose the space that it starts with.
        before, whole = self.decode(prompt), self.decode(torch.cat([prompt, answer]))
        return whole[len(before) :] if whole.startswith(before) else self.decode(answer)


def _load_checkpoint(checkpoint: str, data: Optional[str], settings: dict):
    """Return the model of a checkpoint, its task, and the directory of its dictionary."""
    state = read_state(checkpoint)
    cfg, name = state["cfg"], state["cfg"]["model"]["_name"]
    with open_dict(cfg):
        # The task may be another one, as in a released checkpoint, or lack an option that was added later.
        cfg["task"] = _task_settings(cfg["task"])
        cfg["task"]["fp16"] = False  # an option of the training, not of this call
    _check_settings(checkpoint, settings, {*cfg["model"], *cfg["task"]})
    data = find_data(data, checkpoint, cfg["task"].get("data"))
    with open_dict(cfg):
        # Each setting goes wherever the configuration has it, as with --model-overrides.
        overwrite_args_by_name(cfg, {"data": data, **settings})
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], state=state)
    if not isinstance(models[0], LongMemModel):
        raise ValueError(f"{checkpoint} is a {name}, which does not have a memory: name a checkpoint of longmem_lm")
    return models[0], task, data


def _load_directory(directory: str, data: str, settings: dict):
    """Return the model of a model directory and its task."""
    saved, backbone, weights = read_directory(directory)
    task_settings = OmegaConf.structured(LongMemLanguageModelingConfig())
    _check_settings(directory, settings, {*LongMemConfig.__dataclass_fields__, *task_settings})
    values = {
        **_task_settings({}),
        **{key: value for key, value in {**saved, **settings}.items() if key in task_settings},
    }
    task_args = OmegaConf.create({**values, "data": data, "path": directory, "fp16": False})
    task = LongMemLanguageModelingTask(task_args, Dictionary.load(os.path.join(data, "dict.txt")))
    trained_on = saved.pop("backbone_fingerprint", None)
    cfg = argparse.Namespace(
        _name="longmem_lm",
        **{**saved, **settings},
        save_backbone=True,
        backbone_config=json.dumps(backbone),
        reload_ptm_layer=False,
        memory_scope=str(task_args.memory_scope),
    )
    model = task.build_model(cfg, from_checkpoint=True)
    model.load_state_dict(weights)
    fingerprint = model.decoder.backbone.fingerprint
    if trained_on not in (None, fingerprint):
        raise ValueError(
            f"{os.path.join(directory, BACKBONE)} is not the backbone that the model was trained on: it has "
            f"fingerprint {fingerprint[:12]}, and {CONFIG} names {trained_on[:12]}"
        )
    return model, task


def _check_settings(path: str, settings: dict, known: set) -> None:
    for name in settings:
        if name not in known:
            raise ValueError(f"{path} does not have the setting {name}: {suggestion(name, known)}")


def _task_settings(settings) -> dict:
    """Return the settings of a language modeling task as those of this package's task."""
    defaults = OmegaConf.to_container(OmegaConf.structured(LongMemLanguageModelingConfig()), enum_to_str=True)
    shared = {name: value for name, value in settings.items() if name in defaults and name != "data_no_shuffle"}
    return {**defaults, **shared, "_name": TASK}


def read_state(checkpoint: str) -> dict:
    """Return the content of a checkpoint, after a comparison of its checksums.

    Args:
        checkpoint: Path of the checkpoint.

    Raises:
        ValueError: The file is damaged, holds code, or lacks the configuration of its model.
    """
    allow_namespaces()
    read_checkpoint(checkpoint)
    state = checkpoint_utils.load_checkpoint_to_cpu(checkpoint)
    if not state.get("cfg"):
        raise ValueError(f"{checkpoint} is not a checkpoint of fairseq 0.11 or later: it lacks its configuration")
    return state


def find_checkpoint(path: str) -> str:
    """Return the path of a checkpoint.

    Args:
        path: Path of a checkpoint, or of a directory that contains one of :data:`CHECKPOINTS`.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise FileNotFoundError(f"no checkpoint: {path} does not exist")
    for name in CHECKPOINTS:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise FileNotFoundError(f"no checkpoint: {path} has none of {', '.join(CHECKPOINTS)}")


def find_data(data: Optional[str], checkpoint: str, trained_on: Optional[str]) -> str:
    """Return the directory of a model's dictionary.

    Args:
        data: Directory that the user named, or None.
        checkpoint: Path of the checkpoint, whose directory is looked into.
        trained_on: Directory of the data that the model was trained on, which is looked into last.

    Raises:
        FileNotFoundError: No directory contains ``dict.txt``.
    """
    places = [data] if data is not None else [os.path.dirname(os.path.abspath(checkpoint)), trained_on]
    for place in filter(None, places):
        if os.path.isfile(os.path.join(place, "dict.txt")):
            return place
    nowhere = " nor in ".join(filter(None, places))
    raise FileNotFoundError(f"no dictionary: dict.txt is not in {nowhere}: name its directory with data=")
