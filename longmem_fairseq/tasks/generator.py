"""Generation with a memory: the generator of fairseq-interactive and fairseq-generate, and of the hub.

Legend: B prompts of a batch.
"""

import sys
from typing import Any, Dict, List, Optional, Sequence

import torch
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor, nn

from ..memory.document_memory import DocumentMemory
from ..models.live_window import expand_state, prefill
from ..models.reading import DocumentReader
from .no_repeated_ngrams import NoRepeatedNgrams


class LongMemEnsemble(EnsembleModel):
    """Models that continue behind prompts that were read at once, instead of token by token.

    Args:
        models: ``longmem_lm`` models.

    Attributes:
        prefilled: Incremental state of each model, one row per prompt, for the next generation; None once it was used.
    """

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__(models)
        self.prefilled: Optional[List[Dict[str, Any]]] = None

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
        return super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)


class LongMemGenerator(SequenceGenerator):
    """fairseq's generator behind prompts that were read into memory and window.

    Lengths, repeated n-grams, scores and hypotheses are those of new tokens.

    Args:
        models: ``longmem_lm`` models.
        dictionary: Dictionary of the tokens.
        segment: Number of tokens of a segment.
        document_memories: Memory of each model, which all prompts read, None for a model whose memory is off; by
            default an empty one for each.
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
        **options,
    ):
        super().__init__(LongMemEnsemble(models), dictionary, **options)
        if self.repeat_ngram_blocker is not None:
            self.repeat_ngram_blocker = NoRepeatedNgrams(self.repeat_ngram_blocker.no_repeat_ngram_size)
        if document_memories is None:
            document_memories = [DocumentReader(model.decoder, segment).new_memory() for model in models]
        self.segment, self.document_memories = segment, document_memories

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
        pasts = [prompt[:-1] for prompt in prompts]
        self.model.prefilled = [
            prefill(model.decoder, pasts, self.segment, memory and memory.bank, use_memory=memory is not None)
            for model, memory in zip(self.model.models, self.document_memories)
        ]
        last = torch.stack([prompt[-1] for prompt in prompts]).repeat_interleave(self.beam_size)
        return self._generate(sample, prefix_tokens, constraints, bos_token=last)

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
        Fingerprint of the backbone in hexadecimal, and number of the memory layer.
    """
    return decoder.backbone.fingerprint, decoder.backbone.memory_layer
