"""Generation with a memory: the generator of fairseq-interactive and fairseq-generate, and of the hub.

Legend: B prompts of a batch, R rows (hypotheses), V symbols.
"""

import math
import sys
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor, nn

from ..memory.document_memory import DocumentMemory
from ..models.live_window import expand_state, prefill
from ..models.memory_layers import memory_layers_setting
from ..models.reading import DocumentReader
from .continuation_text import StopStrings
from .no_repeated_ngrams import NoRepeatedNgrams
from .repetition_penalty import RepetitionPenalty
from .stop_rule import NextTokenRules, StopRule


class LongMemEnsemble(EnsembleModel):
    """Models that continue behind prompts that were read at once, instead of token by token.

    Args:
        models: ``longmem_lm`` models.

    Attributes:
        prefilled: Incremental state of each model, one row per prompt, for the next generation; None once it was used.
        penalty: Penalty of repeated tokens, which was started with the prompts; None for none.
    """

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__(models)
        self.prefilled: Optional[List[Dict[str, Any]]] = None
        self.penalty: Optional[RepetitionPenalty] = None

    def max_decoder_positions(self) -> int:
        """Set no limit: full windows move into the memory."""
        return sys.maxsize

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature: float = 1.0):
        """Compute the next token's log-probabilities as fairseq does, in the first step from the prefilled states."""
        if self.prefilled is not None:
            for model, state, prefilled in zip(self.models, incremental_states, self.prefilled):
                state.update(prefilled)
                expand_state(model.decoder, state, tokens.size(0))
            self.prefilled = None
        if self.penalty is None:
            return super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)
        log_probs = []
        for model, state in zip(self.models, incremental_states):
            logits, extra = model.decoder.forward(tokens, encoder_out=None, incremental_state=state)
            logits = self.penalty(logits[:, -1], tokens[:, 1:]) / temperature  # (R, V)
            log_probs.append(model.get_normalized_probs((logits[:, None], extra), log_probs=True)[:, -1])
        return torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs)), None

    def reorder_incremental_state(self, incremental_states, new_order: Tensor) -> None:
        """Make row i what row ``new_order[i]`` was."""
        super().reorder_incremental_state(incremental_states, new_order)
        if self.penalty is not None:
            self.penalty.reorder(new_order)


class LongMemGenerator(SequenceGenerator):
    """fairseq's generator behind prompts that were read into memory and window.

    Lengths, repeated n-grams, scores and hypotheses are those of new tokens.

    Args:
        models: ``longmem_lm`` models.
        dictionary: Dictionary of the tokens.
        segment: Number of tokens of a segment.
        document_memories: Memory of each model, which all prompts read, None for a model whose memory is off; by
            default an empty one for each.
        repetition_penalty: Penalty of tokens that the prompt or the hypothesis contains; 1 for none.
        options: Options of :class:`SequenceGenerator`.

    Attributes:
        document_memories: As above.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        dictionary,
        segment: int,
        document_memories: Optional[List[Optional[DocumentMemory]]] = None,
        repetition_penalty: float = 1.0,
        **options,
    ):
        super().__init__(LongMemEnsemble(models), dictionary, **options)
        if self.repeat_ngram_blocker is not None:
            self.repeat_ngram_blocker = NoRepeatedNgrams(self.repeat_ngram_blocker.no_repeat_ngram_size)
        if document_memories is None:
            document_memories = [DocumentReader(model.decoder, segment).new_memory() for model in models]
        self.segment, self.document_memories = segment, document_memories
        if repetition_penalty != 1:
            self.model.penalty = RepetitionPenalty(repetition_penalty, self.vocab_size)
        self.stop_rule: Optional[StopRule] = None

    def stop_at(self, stops: StopStrings) -> None:
        """Let hypotheses end at stop strings; those that do are cut before them, and have a ``text``."""
        self.stop_rule = StopRule(stops, self.eos)
        rules = [rule for rule in (self.repeat_ngram_blocker, self.stop_rule) if rule is not None]
        self.repeat_ngram_blocker = NextTokenRules(rules)

    @torch.no_grad()
    def generate(self, models, sample, prefix_tokens=None, constraints=None, bos_token=None):
        """Continue prompts.

        Args:
            models: Ignored, as by :class:`SequenceGenerator`.
            sample: Collated batch, whose ``net_input`` has ``src_tokens`` (B, longest) and ``src_lengths`` (B,).
            prefix_tokens: See :class:`SequenceGenerator`.
            constraints: See :class:`SequenceGenerator`.
            bos_token: Ignored; a hypothesis starts behind its prompt.

        Returns:
            Hypotheses of each prompt, best first.
        """
        net_input = sample["net_input"]
        prompts = [
            tokens[:length] for tokens, length in zip(net_input["src_tokens"], net_input["src_lengths"].tolist())
        ]
        self._prefill(prompts, self.beam_size)
        last = torch.stack([prompt[-1] for prompt in prompts]).repeat_interleave(self.beam_size)
        finalized = self._generate(sample, prefix_tokens, constraints, bos_token=last)
        if self.stop_rule is not None:
            for prompt, hypotheses in zip(prompts, finalized):
                for hypothesis in hypotheses:
                    self.stop_rule.cut(prompt, hypothesis)
        return finalized

    @torch.no_grad()
    def stream(self, prompt: Tensor) -> Iterator[int]:
        """Continue one prompt by one hypothesis, token by token: the tokens of :meth:`generate` with a beam of 1.

        Args:
            prompt: Token ids behind an end-of-sentence, shape (length,), int64.

        Yields:
            Token ids, without the end-of-sentence at the end.
        """
        self._prefill([prompt], 1)
        states: List[Dict[str, Any]] = [{} for _ in self.model.models]
        tokens = prompt.new_full((1, self.max_len_b + 2), self.pad)
        tokens[:, 0] = prompt[-1]
        scores = torch.zeros(1, 1, self.max_len_b + 1, device=prompt.device)
        for step in range(self.max_len_b):
            log_probs, _ = self.model.forward_decoder(tokens[:, : step + 1], None, states, self.temperature)
            log_probs = self._restricted(log_probs, tokens, step)
            candidates, symbols, _ = self.search.step(
                step, log_probs[None], scores[:, :, :step], tokens[:, : step + 1], torch.zeros(1, dtype=torch.int64)
            )
            tokens[0, step + 1], scores[0, 0, step] = symbols[0, 0], candidates[0, 0]
            token = int(symbols[0, 0])
            if token == self.eos:
                return
            yield token

    def _restricted(self, log_probs: Tensor, tokens: Tensor, step: int) -> Tensor:
        """Apply the rules for the next token as :meth:`SequenceGenerator._generate` does; shape (R, V)."""
        log_probs[log_probs != log_probs] = float("-inf")
        log_probs[:, self.pad] = float("-inf")
        log_probs[:, self.unk] -= self.unk_penalty
        if step < self.min_len:
            log_probs[:, self.eos] = float("-inf")
        if self.repeat_ngram_blocker is None:
            return log_probs
        return self.repeat_ngram_blocker(tokens, log_probs, 1, 1, step)

    def _prefill(self, prompts: Sequence[Tensor], beam: int) -> None:
        """Read prompts behind an end-of-sentence, all but the last token of each, for the next generation."""
        pasts = [prompt[:-1] for prompt in prompts]
        self.model.prefilled = [
            prefill(model.decoder, pasts, self.segment, memory and memory.bank, use_memory=memory is not None)
            for model, memory in zip(self.model.models, self.document_memories)
        ]
        if self.model.penalty is not None:
            self.model.penalty.start([prompt[1:] for prompt in prompts], beam)

    def memorize(self, name: str, tokens: Tensor) -> None:
        """Write a document into the memory of every model.

        Args:
            name: Name of the document.
            tokens: Token ids without end-of-sentence, shape (length,), int64.

        Raises:
            ValueError: A model's memory is off, or it has a document of this name.
        """
        if None in self.document_memories:
            raise ValueError(f"{name} cannot be memorized: the model's memory is off")
        for model, memory in zip(self.model.models, self.document_memories):
            DocumentReader(model.decoder, self.segment).memorize(memory, name, tokens)


def backbone_identity(decoder) -> tuple:
    """Identify the source of a model's remembered keys and values.

    Args:
        decoder: Decoder of the model.

    Returns:
        Fingerprint of the backbone in hexadecimal, and the memory layers as in ``--retrieval-layer-index``.
    """
    return decoder.backbone.fingerprint, memory_layers_setting(decoder.backbone.memory_layers)
