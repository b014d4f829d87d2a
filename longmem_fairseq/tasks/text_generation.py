"""Generation of text from text, for the Python API."""

from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from ..memory.document_memory import DocumentMemory, Loan
from ..text import encode_text
from .continuation_text import ContinuationText, StopStrings, TextStream
from .generation_options import check_stops, check_values, fairseq_options, in_python
from .generator import LongMemGenerator


class GeneratedText(NamedTuple):
    """One of several continuations of a prompt.

    Attributes:
        text: Text of the continuation without the prompt, cut before a stop string.
        score: Sum of the log-probabilities, natural logarithm, of the tokens and the end, divided by their number to
            the power of ``length_penalty``; an end by a stop string has probability 1.
        tokens: Token ids, shape (length,), int64, up to the one in which a stop string begins.
    """

    text: str
    score: float
    tokens: Tensor


class TextGeneration:
    """Continues texts by one model.

    Args:
        model: A ``longmem_lm`` in evaluation mode.
        task: The fairseq task that the model was built for.
        bpe: fairseq's BPE; None where the dictionary has words.
        tokenizer: fairseq's tokenizer, or None.
    """

    def __init__(self, model, task, bpe=None, tokenizer=None):
        self.model, self.task, self.bpe, self.tokenizer = model, task, bpe, tokenizer
        self.text = ContinuationText(task.dictionary, bpe, tokenizer)

    def continuations(
        self, prompts: Sequence[str], memory: Optional[DocumentMemory], stops: Sequence[str], options: Dict[str, Any]
    ) -> List[List[GeneratedText]]:
        """Continue several prompts side by side.

        Args:
            prompts: Texts to continue.
            memory: Memory that all of them read; None for none.
            stops: Texts at which a continuation ends.
            options: Other options by their names in ``LongMem.generate``.

        Returns:
            The ``n_best`` continuations of each prompt, best first.
        """
        generator = self._generator(memory, stops, options)
        tokens = [self._encode(prompt) for prompt in prompts]
        if not tokens:
            return []
        dataset = self.task.build_dataset_for_inference(tokens, [len(prompt) for prompt in tokens])
        sample = dataset.collater([dataset[i] for i in range(len(dataset))])
        sample["net_input"] = {key: x.to(self.model.decoder.device) for key, x in sample["net_input"].items()}
        hypotheses = generator.generate([self.model], sample)
        return [
            [self._continuation(prompt, hypothesis) for hypothesis in best[: options["n_best"]]]
            for prompt, best in zip(tokens, hypotheses)
        ]

    def stream(
        self, prompt: str, memory: Optional[Loan], stops: Sequence[str], options: Dict[str, Any]
    ) -> Iterator[str]:
        """Continue a prompt piece by piece, see ``LongMem.stream``; options are checked before the first piece.

        Args:
            prompt: Text to continue.
            memory: Loan of the memory; None for none.
            stops: Texts at which the continuation ends.
            options: Other options by their names in ``LongMem.generate``.

        Raises:
            ValueError: An option is not supported, or the BPE does not define the text of single tokens.
        """
        if not self.text.local:
            raise ValueError(
                "stream needs a BPE that defines the text of single tokens, as sentencepiece: use generate"
            )
        generator = self._generator(memory, stops, {**options, "beam": 1})
        tokens = self._encode(prompt)
        inputs = torch.cat([tokens.new_tensor([self.task.dictionary.eos()]), tokens]).to(self.model.decoder.device)
        return TextStream(self.text, tokens.tolist(), StopStrings(stops, self.text)).pieces(generator.stream(inputs))

    def _encode(self, prompt: str) -> Tensor:
        if not prompt:
            return torch.zeros(0, dtype=torch.int64)
        return encode_text(prompt, self.task.dictionary, self.bpe, self.tokenizer)

    def _generator(
        self, memory: Union[DocumentMemory, Loan, None], stops: Sequence[str], options: Dict[str, Any]
    ) -> LongMemGenerator:
        check_stops(stops, "stop")
        options = fairseq_options(options)
        check_values(options, len(self.task.dictionary), spelled=in_python)
        extra = {"document_memories": [memory], "repetition_penalty": options["repetition_penalty"]}
        generator = self.task.build_generator([self.model], SimpleNamespace(**options), extra_gen_cls_kwargs=extra)
        if stops:
            generator.stop_at(StopStrings(stops, self.text))
        return generator

    def _continuation(self, prompt: Tensor, hypothesis: Dict[str, Any]) -> GeneratedText:
        tokens = hypothesis["tokens"].cpu()
        if len(tokens) and tokens[-1] == self.task.dictionary.eos():
            tokens = tokens[:-1]
        text = hypothesis.get("text")
        if text is None:
            text = self.text(prompt.tolist(), tokens.tolist())
        return GeneratedText(text, float(hypothesis["score"]), tokens)
