"""LongMem from Python, for notebooks and scripts: memorize, generate, score.

>>> from longmem_fairseq.hub import LongMem
>>> model = LongMem.from_pretrained("examples/pretrained/mini")
>>> model.memorize(open("novel.txt").read(), name="novel")
>>> model.generate("The captain said")
"""

import math
import threading
import weakref
from typing import Iterator, List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from .arguments import require_number, require_path, require_text, require_texts
from .memory.document_memory import DocumentMemory
from .memory.memory_file import DTYPES, load_memory, save_memory
from .models.longmem_config import plain
from .models.reading import DocumentReader
from .models.trace import Trace, trace_reads
from .tasks.generator import backbone_identity
from .tasks.longmem_language_modeling import LongMemLanguageModelingTask
from .tasks.pretrained import load_pretrained
from .tasks.text_generation import GeneratedText, TextGeneration
from .text import decode_text, encode_text, find_bpe, text_codec, token_texts

_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()

_OFF = "the model's memory is off: load it with use_external_memory=True and memory_size above 0"


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

    Several threads may use it, and others of the same weights: they take turns. It can be copied and pickled, with its
    weights and its memory.

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
        self._generation = TextGeneration(model, task, bpe, tokenizer)
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
                ``tokenizer.json``, ``sentencepiece.model``, or GPT-2's ``encoder.json`` and ``vocab.bpe`` in it are
                used for text.
            bpe: fairseq's BPE, in place of the one in ``data``.
            tokenizer: fairseq's tokenizer, or None.
            device: Device to run on, by default a GPU if there is one.
            settings: Settings of the model in place of the checkpoint's, such as ``memory_size=16384`` or
                ``pretrained_model_path="backbone.pt"``; or of the task, such as ``inference_dtype="bfloat16"``.

        Raises:
            ValueError: The checkpoint is damaged, of another model, or holds code; a setting does not fit; the device
                is not available.
            FileNotFoundError: The checkpoint or the dictionary is missing.
        """
        path = require_path("from_pretrained", path)
        data = None if data is None else require_path("from_pretrained(data=...)", data)
        model, task, data = load_pretrained(path, data, device, settings)
        return cls(model, task, find_bpe(data) if bpe is None else bpe, tokenizer)

    def __reduce__(self):
        # fairseq's task can be neither copied nor pickled: its options make it again.
        task = (plain(self.task.args), self.task.dictionary)
        return _restored, (self.model, task, text_codec(self.bpe).recipe(), self.tokenizer, self.memory)

    @property
    def documents(self) -> List[str]:
        """Names of the documents with tokens in the memory, oldest first."""
        with self._lock:
            return [] if self.memory is None else [document.name for document in self.memory.documents]

    def memorize(self, text: str, name: Optional[str] = None) -> None:
        """Encode a text and write it into the memory, whole or, if that fails or is interrupted, not at all.

        A progress bar shows from the first second on.

        Args:
            text: Text of any length; when the memory is full, its oldest tokens are evicted.
            name: Name to forget it by; by default ``text 1``, ``text 2``...

        Raises:
            TypeError: The text or the name is not a string.
            ValueError: The text is empty, the name is taken, or the memory is off.
        """
        tokens = self.encode(require_text("memorize", text))
        if name is not None:
            require_text("memorize", name, "a name")
        with self._lock:
            names = self.documents
            if name is None:
                name = next(f"text {i}" for i in range(1, len(names) + 2) if f"text {i}" not in names)
            self.reader.memorize(self._memory(), name, tokens)

    def forget(self, name: Optional[str] = None) -> None:
        """Forget a text by its name; without one, everything.

        Args:
            name: Name of the text, or None.

        Raises:
            TypeError: The name is not a string.
            ValueError: There is no text of this name, or the memory is off.
        """
        with self._lock:
            memory = self._memory()
            if name is not None:
                memory.forget(require_text("forget", name, "a name"))
            else:
                self.memory = self.reader.new_memory()

    def with_new_memory(self) -> "LongMem":
        """Return a model of the same weights with an empty memory of its own.

        Raises:
            ValueError: The model was loaded with its memory off.
        """
        if not self.model.decoder.has_memory:
            raise ValueError(_OFF)
        return LongMem(self.model, self.task, self.bpe, self.tokenizer)

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
        repetition_penalty: float = 1.0,
        stop: Union[str, Sequence[str]] = (),
        n_best: Optional[int] = None,
    ) -> Union[str, List[str], List[GeneratedText], List[List[GeneratedText]]]:
        """Continue a prompt of any length, or several side by side, behind what was memorized.

        Args:
            prompt: Text to continue, or a list of texts.
            max_new_tokens: Largest number of tokens of a continuation.
            min_new_tokens: Smallest number of tokens of a continuation that no stop string ends.
            beam: Number of hypotheses, of which the best is returned.
            sampling: Whether tokens are drawn (seed: ``torch.manual_seed``) instead of searched for.
            top_k: Number of likeliest tokens to draw from; -1 for all.
            top_p: Total probability of the likeliest tokens to draw from; -1 for all.
            temperature: Divisor of the logits: above 1 more even, below 1 sharper.
            no_repeat_ngram_size: Length of n-grams that a continuation may contain only once; 0 for no limit.
            length_penalty: Exponent of the length in a hypothesis's score; above 1 favors longer ones.
            repetition_penalty: Divisor of positive, and factor of negative, logits of all tokens in the prompt and the
                continuation; above 1 discourages repetition.
            stop: Text at which a continuation ends, or several: it ends with the first token by which one is complete,
                and is cut before it.
            n_best: Number of continuations of a prompt to return with their scores, at most ``beam``; None for the text
                of the best.

        Returns:
            The continuation without the prompt; with ``n_best`` a list of them, best first. For a list of prompts, a
            list of these.

        Raises:
            TypeError: An argument does not have its type.
            ValueError: An option is not supported.
        """
        prompts, stops = require_texts("generate", prompt), require_texts("stop", stop)
        options = dict(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            beam=beam,
            sampling=sampling,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            no_repeat_ngram_size=no_repeat_ngram_size,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            n_best=1 if n_best is None else n_best,
        )
        with self._lock:
            continuations = self._generation.continuations(prompts, self.memory, stops, options)
        results = [best[0].text if n_best is None else best for best in continuations]
        return results[0] if isinstance(prompt, str) else results

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        min_new_tokens: int = 1,
        sampling: bool = False,
        top_k: int = -1,
        top_p: float = -1.0,
        temperature: float = 1.0,
        no_repeat_ngram_size: int = 0,
        repetition_penalty: float = 1.0,
        stop: Union[str, Sequence[str]] = (),
    ) -> Iterator[str]:
        """Continue a prompt piece by piece: joined, the pieces are what :meth:`generate` returns with a beam of 1.

        The memory is read as it is at the time of this call, whatever is memorized or forgotten between two pieces.

        Args:
            prompt: Text to continue; the other arguments are those of :meth:`generate`.

        Returns:
            Iterator of pieces of text, none of them empty; a character is never cut.

        Raises:
            TypeError: An argument does not have its type.
            ValueError: An option is not supported, or the BPE does not define the text of single tokens.
        """
        prompt, stops = require_text("stream", prompt), require_texts("stop", stop)
        options = dict(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampling=sampling,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            no_repeat_ngram_size=no_repeat_ngram_size,
            repetition_penalty=repetition_penalty,
        )
        with self._lock:
            loan = None if self.memory is None else self.memory.lend()
            pieces = self._generation.stream(prompt, loan, stops, options)
        return self._in_turns(pieces)

    def score(self, text: Union[str, List[str]]) -> Union[Score, List[Score]]:
        """Score a text behind what was memorized, segment by segment as ``fairseq-eval-lm`` does.

        Args:
            text: Text of any length, or a list of texts, which are scored each by itself.

        Returns:
            The score; a list for a list.

        Raises:
            TypeError: The text is neither a string nor a list of strings.
            ValueError: A text is empty.
        """
        scores = []
        for tokens in map(self.encode, require_texts("score", text)):
            with self._lock:
                scores.append(Score(tokens, self.reader.score(tokens, self.memory, self.memory is not None)))
        return scores[0] if isinstance(text, str) else scores

    def trace(self, text: str, begin: int = 0, tokens: Optional[int] = None, reads: int = 8) -> Trace:
        """Record what was read from the memory for each token of a text, which is read as :meth:`score` reads it.

        Args:
            text: Text of any length.
            begin: Number of the first token that is traced.
            tokens: Number of tokens that are traced; None for all.
            reads: Number of reads that are kept of each token, those with the largest weight.

        Raises:
            TypeError: An argument does not have its type.
            ValueError: The text is empty or does not have this part, or the memory is off.
        """
        for name, number in (("begin", begin), ("tokens", tokens), ("reads", reads)):
            if number is not None or name != "tokens":
                require_number(name, number, int)
        encoded = self.encode(require_text("trace", text))
        with self._lock:
            return trace_reads(self.reader, encoded, self._memory(), begin, tokens, reads)

    def save_memory(self, path: str, dtype: str = "float16") -> None:
        """Write what was memorized to a file.

        Args:
            path: Path of the file.
            dtype: Precision in the file: ``float16``, ``bfloat16`` or ``float32``.

        Raises:
            TypeError: The path is neither a string nor a ``pathlib.Path``.
            ValueError: There is nothing to save, it does not fit the precision, or the memory is off.
            OSError: The file cannot be written.
        """
        path = require_path("save_memory", path)
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown: choose {', '.join(DTYPES)}")
        with self._lock:
            save_memory(path, self._memory(), *backbone_identity(self.model.decoder), dtype=dtype)

    def load_memory(self, path: str) -> None:
        """Read a file of :meth:`save_memory` in place of what was memorized.

        Args:
            path: Path of the file.

        Raises:
            TypeError: The path is neither a string nor a ``pathlib.Path``.
            ValueError: The file is missing, damaged, or of another model, or the memory is off.
        """
        path = require_path("load_memory", path)
        with self._lock:
            load_memory(path, self._memory(), *backbone_identity(self.model.decoder))

    def encode(self, text: str) -> Tensor:
        """Return the token ids of a text, shape (length,), int64, without an end-of-sentence.

        Args:
            text: Text that is not empty.

        Raises:
            TypeError: The text is not a string.
            ValueError: The text is empty.
        """
        return encode_text(require_text("encode", text), self.task.dictionary, self.bpe, self.tokenizer)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of token ids, shape (length,), int64."""
        return decode_text(self._ids("decode", tokens), self.task.dictionary, self.bpe, self.tokenizer)

    def token_texts(self, tokens: Tensor) -> List[str]:
        """Return what each of some token ids, shape (length,), int64, adds to the text."""
        return token_texts(self._ids("token_texts", tokens), self.task.dictionary, self.bpe)

    @property
    def _lock(self) -> threading.RLock:
        """The lock of the model: its modules, search and memories are used by one call at a time."""
        with _LOCKS_LOCK:
            return _LOCKS.setdefault(self.model, threading.RLock())

    def _memory(self) -> DocumentMemory:
        if self.memory is None:
            raise ValueError(_OFF)
        return self.memory

    def _ids(self, function: str, tokens: Tensor) -> Tensor:
        symbols = len(self.task.dictionary)
        if not isinstance(tokens, Tensor) or tokens.dim() != 1 or tokens.dtype != torch.int64:
            raise TypeError(f"{function} takes token ids as encode returns them: a tensor of shape (length,), int64")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < symbols:
            raise ValueError(f"{function} received token ids outside the dictionary's 0 to {symbols - 1}")
        return tokens

    def _in_turns(self, pieces: Iterator[str]) -> Iterator[str]:
        """Let other calls run between two pieces of a stream."""
        while True:
            with self._lock:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece


def _restored(model, task, bpe, tokenizer, memory: Optional[DocumentMemory]) -> LongMem:
    """Return a LongMem that was copied or pickled, from the arguments of its task and the recipe of its BPE."""
    make_bpe, arguments = bpe
    restored = LongMem(model, LongMemLanguageModelingTask(*task), make_bpe(*arguments), tokenizer, use_memory=False)
    restored.memory = memory
    return restored
