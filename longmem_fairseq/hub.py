"""LongMem from Python, for notebooks and scripts: memorise, generate, score.

>>> from longmem_fairseq.hub import LongMem
>>> model = LongMem.from_pretrained("checkpoints", data="data")
>>> model.memorize(open("novel.txt").read(), name="novel")
>>> model.generate("The captain said")
"""

import math
import os
import pickle
from types import SimpleNamespace
from typing import List, NamedTuple, Optional, Union

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.utils import overwrite_args_by_name
from omegaconf import OmegaConf, open_dict
from torch import Tensor

import longmem_fairseq  # noqa: F401  (registers task and model)

from .memory.document_memory import DocumentMemory
from .memory.memory_file import load_memory, save_memory
from .models.trace import Trace, trace_reads
from .safe_load import why_unreadable
from .tasks.generator import LongMemGenerator, backbone_identity, new_document_memory
from .tasks.options import LongMemLanguageModelingConfig
from .text import decode_text, encode_text, find_bpe, token_texts

TASK = "longmem_language_modeling"
CHECKPOINTS = ("checkpoint_best.pt", "checkpoint_last.pt", "model.pt")


class Score(NamedTuple):
    """How likely a text is, given the memory.

    Attributes:
        tokens: of the text, shape (length,), int64.
        log_probabilities: of each token, natural logarithm, shape (length,), float32.
    """

    tokens: Tensor
    log_probabilities: Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.log_probabilities.mean()))


class LongMem:
    """A language model with a long-term memory. Made by :meth:`from_pretrained`.

    Args:
        model: a ``longmem_lm``, in evaluation mode.
        task: of which it is.
        bpe, tokenizer: fairseq's, or None where the dictionary has words.
    """

    def __init__(self, model, task, bpe=None, tokenizer=None):
        self.model, self.task, self.bpe, self.tokenizer = model, task, bpe, tokenizer
        self.document_memory: Optional[DocumentMemory] = new_document_memory(model.decoder)

    @classmethod
    def from_pretrained(
        cls, path: str, data: Optional[str] = None, bpe=None, tokenizer=None, device: Optional[str] = None, **settings
    ) -> "LongMem":
        """Load a checkpoint.

        Args:
            path: of the checkpoint, or of a directory with ``checkpoint_best.pt``, ``checkpoint_last.pt`` or
                ``model.pt``.
            data: directory of ``dict.txt``; by default that of the checkpoint, then the one it was trained on. A
                ``sentencepiece.model``, or ``encoder.json`` and ``vocab.bpe`` of GPT-2, in it are used for text.
            bpe, tokenizer: fairseq's, in place of what ``data`` has.
            device: where to run, by default a GPU if there is one.
            settings: of the model in place of the checkpoint's, such as ``memory_size=16384`` or
                ``pretrained_model_path="backbone.pt"``; or of the task, such as ``inference_dtype="bfloat16"``.

        Raises:
            ValueError: the checkpoint is of another model, or holds code; a setting does not fit.
            FileNotFoundError: the checkpoint or the dictionary is missing.
        """
        checkpoint = find_checkpoint(path)
        try:
            state = checkpoint_utils.load_checkpoint_to_cpu(checkpoint)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{checkpoint} cannot be read: {why_unreadable(error)}") from error
        if not state.get("cfg"):
            raise ValueError(f"{checkpoint} is no checkpoint of fairseq 0.11 or later: it lacks its configuration")
        cfg, name = state["cfg"], state["cfg"]["model"]["_name"]
        with open_dict(cfg):
            # Of another task, as in a checkpoint of the released LongMem, or from before the task had some option.
            cfg["task"] = _own_task(cfg["task"])
            cfg["task"]["fp16"] = False  # it was trained so, which is no wish for today
        unknown = [key for key in settings if key not in cfg["model"] and key not in cfg["task"]]
        if unknown:
            raise ValueError(f"{checkpoint} has no setting {unknown[0]}: leave it out")
        data = _find_data(data, checkpoint, cfg["task"].get("data"))
        with open_dict(cfg):
            # Each setting goes wherever the configuration has it, as with --model-overrides.
            overwrite_args_by_name(cfg, {"data": data, **settings})
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], state=state)
        if not hasattr(models[0], "memorize"):
            raise ValueError(f"{checkpoint} is a {name}, which has no memory: name a checkpoint of longmem_lm")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = models[0].to(device).eval()
        return cls(model, task, find_bpe(data) if bpe is None else bpe, tokenizer)

    @property
    def documents(self) -> List[str]:
        """Names of what the memory has something left of, oldest first."""
        return [] if self.document_memory is None else [document.name for document in self.document_memory.documents]

    def memorize(self, text: str, name: Optional[str] = None) -> None:
        """Remember a text; a progress bar shows from the first second on.

        Args:
            text: of any length; what the memory cannot hold any more gives way, the oldest first.
            name: to forget it by; by default ``text 1``, ``text 2``...

        Raises:
            ValueError: the text is empty, the name is taken, or the memory is off.
        """
        if name is None:
            name = next(f"text {i}" for i in range(1, len(self.documents) + 2) if f"text {i}" not in self.documents)
        self._library()
        self._generator().memorize(name, self.encode(text))

    def forget(self, name: Optional[str] = None) -> None:
        """Forget a text by its name; without one, everything.

        Raises:
            ValueError: there is no text of this name, or the memory is off.
        """
        document_memory = self._library()
        if name is not None:
            document_memory.forget(name)
        else:
            self.document_memory = new_document_memory(self.model.decoder)

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
        """Continue a prompt of any length, or several side by side, with what was memorised.

        Args:
            prompt: a text, or a list of texts.
            max_new_tokens, min_new_tokens: limits of the continuation.
            beam: hypotheses; the best is returned.
            sampling: draw tokens (seed: ``torch.manual_seed``), of the ``top_k`` likeliest or the likeliest that make
                up ``top_p``, instead of searching.
            temperature: above 1 more even, below 1 sharper.
            no_repeat_ngram_size: n-grams that the continuation may have only once; 0 for no limit.
            length_penalty: above 1 favours longer hypotheses.

        Returns:
            The continuation, without the prompt; a list for a list.

        Raises:
            ValueError: an option cannot be honoured.
        """
        if isinstance(prompt, str):
            prompt = [prompt]
            return self.generate(
                prompt,
                max_new_tokens,
                min_new_tokens,
                beam,
                sampling,
                top_k,
                top_p,
                temperature,
                no_repeat_ngram_size,
                length_penalty,
            )[0]
        if (top_k > 0 or top_p > 0) and not sampling:
            raise ValueError("top_k and top_p choose among samples: set sampling=True")
        if beam < 1:
            raise ValueError(f"beam={beam} is less than one hypothesis")
        generator = self._generator(
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
        texts = [self.encode(text) if text else torch.zeros(0, dtype=torch.int64) for text in prompt]
        dataset = self.task.build_dataset_for_inference(texts, [len(text) for text in texts])
        sample = dataset.collater([dataset[i] for i in range(len(dataset))])
        sample["net_input"] = {key: x.to(self.model.decoder.device) for key, x in sample["net_input"].items()}
        found = generator.generate([self.model], sample)
        return [self._continuation(text, best[0]["tokens"].cpu()) for text, best in zip(texts, found)]

    @torch.no_grad()
    def score(self, text: str) -> Score:
        """Score a text behind what was memorised, segment by segment as ``fairseq-eval-lm`` does.

        Raises:
            ValueError: the text is empty.
        """
        decoder, size = self.model.decoder, self.task.args.tokens_per_sample
        tokens = self.encode(text).to(decoder.device)
        inputs = torch.cat([tokens.new_tensor([self.task.dictionary.eos()]), tokens[:-1]])
        base = self.document_memory and self.document_memory.bank
        branches = decoder.memory_branches(1, base) if decoder.has_memory else None
        parts = []
        for piece, target in zip(inputs[None].split(size, dim=1), tokens.split(size)):
            encoded = decoder.backbone(piece)
            states = decoder.side_network(encoded, branches and branches.reader())
            logits = decoder.output_layer(decoder.features(states))[0]  # (T, V)
            parts.append(logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0])
            if branches is not None:
                branches.write([0], piece, encoded.keys, encoded.values)
        return Score(tokens.cpu(), torch.cat(parts).cpu())

    def trace(self, text: str, begin: int = 0, tokens: Optional[int] = None, reads: int = 8) -> Trace:
        """See what the memory gave to a text, token by token; the text is read as :meth:`score` reads it.

        Args:
            text: of any length.
            begin, tokens: which of its tokens are looked at, by default all.
            reads: how many are kept of each token, those that weigh most.

        Raises:
            ValueError: the text is empty or has no such part, or the memory is off.
        """
        size, document_memory = self.task.args.tokens_per_sample, self._library()
        return trace_reads(self.model.decoder, self.encode(text), size, document_memory, begin, tokens, reads)

    def save_memory(self, path: str, dtype: str = "float16") -> None:
        """Write what was memorised to a file, in ``float16``, ``bfloat16`` or ``float32``.

        Raises:
            ValueError: there is nothing to save, it does not fit the precision, or the memory is off.
            OSError: the file cannot be written.
        """
        save_memory(path, self._library(), *backbone_identity(self.model.decoder), dtype=dtype)

    def load_memory(self, path: str) -> None:
        """Read a file of :meth:`save_memory` in place of what was memorised.

        Raises:
            ValueError: the file is missing, damaged, or of another model, or the memory is off.
        """
        load_memory(path, self._library(), *backbone_identity(self.model.decoder))

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, shape (length,), int64, without an end-of-sentence.

        Raises:
            ValueError: the text is empty.
        """
        return encode_text(text, self.task.dictionary, self.bpe, self.tokenizer)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens, shape (length,)."""
        return decode_text(tokens, self.task.dictionary, self.bpe, self.tokenizer)

    def token_texts(self, tokens: Tensor) -> List[str]:
        """What each token, shape (length,), adds to the text."""
        return token_texts(tokens, self.task.dictionary, self.bpe)

    def _library(self) -> DocumentMemory:
        if self.document_memory is None:
            raise ValueError("the model's memory is off: load it with use_external_memory=True and memory_size above 0")
        return self.document_memory

    def _generator(self, **options) -> LongMemGenerator:
        return self.task.build_generator(
            [self.model], SimpleNamespace(**options), extra_gen_cls_kwargs={"document_memories": [self.document_memory]}
        )

    def _continuation(self, prompt: Tensor, answer: Tensor) -> str:
        # Decoded by itself, an answer would lose the space that it begins with.
        before, whole = self.decode(prompt), self.decode(torch.cat([prompt, answer]))
        return whole[len(before) :] if whole.startswith(before) else self.decode(answer)


def _own_task(settings):
    """The settings of a language modelling task in those of ours."""
    ours = OmegaConf.to_container(OmegaConf.structured(LongMemLanguageModelingConfig()), enum_to_str=True)
    shared = {name: value for name, value in settings.items() if name in ours and name != "data_no_shuffle"}
    return {**ours, **shared, "_name": TASK}


def find_checkpoint(path: str) -> str:
    """The checkpoint that a path names, itself or by its directory.

    Raises:
        FileNotFoundError: there is none.
    """
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise FileNotFoundError(f"no checkpoint: {path} does not exist")
    for name in CHECKPOINTS:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise FileNotFoundError(f"no checkpoint: {path} has none of {', '.join(CHECKPOINTS)}")


def _find_data(data: Optional[str], checkpoint: str, trained_on: Optional[str]) -> str:
    places = [data] if data is not None else [os.path.dirname(os.path.abspath(checkpoint)), trained_on]
    for place in filter(None, places):
        if os.path.isfile(os.path.join(place, "dict.txt")):
            return place
    nowhere = " nor in ".join(filter(None, places))
    raise FileNotFoundError(f"no dictionary: dict.txt is not in {nowhere}: name its directory with data=")
