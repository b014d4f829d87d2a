"""Generation with a memory: what fairseq-interactive and fairseq-generate run (DESIGN: "Generation")."""

import logging
import os
import sys
import time
from typing import Any, Dict, List, Optional, Sequence

import torch
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor, nn

from ..memory.document_memory import DocumentMemory
from ..memory.memory_file import load_memory, save_memory
from ..models.live_window import expand_state, prefill
from ..models.reading import DocumentReader
from ..text import read_text

logger = logging.getLogger(__name__)


class LongMemEnsemble(EnsembleModel):
    """Models that begin where a prompt was read to, instead of being given it token by token.

    Attributes:
        prefilled: incremental state of each model, one row a prompt, for the next generation.
    """

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__(models)
        self.prefilled: Optional[List[Dict[str, Any]]] = None

    def max_decoder_positions(self) -> int:
        """No limit: full windows move into the memory."""
        return sys.maxsize

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature: float = 1.0):
        if self.prefilled is not None:
            for model, state, prefilled in zip(self.models, incremental_states, self.prefilled):
                state.update(prefilled)
                expand_state(model.decoder, state, tokens.size(0))
            self.prefilled = None
        return super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)


class NoRepeatedNgrams(nn.Module):
    """Forbids a hypothesis to say an n-gram twice, counting what it has said itself and not the prompt.

    fairseq's own block compares with the end of its buffer instead of the end of the hypothesis, so it forbids nothing
    until the buffer is full.

    Args:
        size: n.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int) -> Tensor:
        """Log probabilities (rows, V), -inf for what would repeat; tokens (rows, > step), the first the prompt's."""
        n, said = self.size, tokens[:, 1 : step + 1]  # (rows, step)
        if step >= n:
            ngrams = said.unfold(1, n, 1)  # (rows, step - n + 1, n)
            again = (ngrams[..., :-1] == said[:, None, step - n + 1 :]).all(dim=-1)
            rows, places = again.nonzero(as_tuple=True)
            lprobs[rows, ngrams[rows, places, -1]] = float("-inf")
        return lprobs


class LongMemGenerator(SequenceGenerator):
    """fairseq's generator behind prompts that were read into memory and window.

    Lengths, repeated n-grams and scores are those of new tokens, and so are the hypotheses.

    Args:
        models: ``longmem_lm`` models.
        dictionary: of the tokens.
        segment: tokens of a segment.
        document_memories: what each model remembers besides the prompts; by default nothing yet.
        options: those of :class:`SequenceGenerator`.

    Attributes:
        document_memories: what each model remembers besides the prompts; None with the memory off.
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
        self.segment = segment
        self.document_memories = (
            [DocumentReader(model.decoder, segment).new_memory() for model in models]
            if document_memories is None
            else document_memories
        )

    @torch.no_grad()
    def generate(self, models, sample, prefix_tokens=None, constraints=None, bos_token=None):
        """Continue prompts: ``src_tokens`` (B, longest) and ``src_lengths`` (B,) of ``sample["net_input"]``.

        Returns for each prompt its hypotheses, best first; arguments are those of :class:`SequenceGenerator`.
        """
        net_input = sample["net_input"]
        prompts = [
            tokens[:length] for tokens, length in zip(net_input["src_tokens"], net_input["src_lengths"].tolist())
        ]
        self.model.prefilled = [
            prefill(
                model.decoder,
                [prompt[:-1] for prompt in prompts],
                self.segment,
                document_memory and document_memory.bank,
                use_memory=document_memory is not None,
            )
            for model, document_memory in zip(self.model.models, self.document_memories)
        ]
        last = torch.stack([prompt[-1] for prompt in prompts]).repeat_interleave(self.beam_size)
        return self._generate(sample, prefix_tokens, constraints, bos_token=last)

    @torch.no_grad()
    def memorize(self, name: str, tokens: Tensor) -> None:
        """Have all models remember a document, tokens (length,) without end-of-sentence.

        Raises:
            ValueError: a model's memory is off, or it has a document of this name.
        """
        for model, document_memory in zip(self.model.models, self.document_memories):
            if document_memory is None:
                raise ValueError(f"{name} cannot be memorized: the model's memory is off")
            DocumentReader(model.decoder, self.segment).memorize(document_memory, name, tokens)


def check_generation(args, models) -> None:
    """Refuse what cannot be had of generation without an encoder.

    Raises:
        ValueError: an option cannot be honoured.
    """
    refused = {
        "match_source_len": "there is no source whose length could be matched",
        "constraints": "prompts are continued freely",
        "print_alignment": "there is no source to align with",
        "score_reference": "fairseq-eval-lm scores documents",
    }
    for option, reason in refused.items():
        if getattr(args, option, None):
            raise ValueError(f"--{option.replace('_', '-')} cannot be had of a language model: {reason}")
    if getattr(args, "lm_path", None):
        raise ValueError("--lm-path cannot be had: the other model would not see the prompts; name both in --path a:b")
    if getattr(args, "temperature", 1.0) <= 0:
        raise ValueError(f"--temperature {args.temperature} is not above 0: for the likeliest token use --beam 1")
    beam, nbest = getattr(args, "beam", 5), getattr(args, "nbest", 1)
    if beam < 1:
        raise ValueError(f"--beam {beam} is less than one hypothesis")
    if nbest > beam:
        raise ValueError(f"--nbest {nbest} is more than the {beam} hypotheses of --beam: raise that")
    longest, shortest = getattr(args, "max_len_b", 200), getattr(args, "min_len", 1)
    if not getattr(args, "max_len_a", 0) and shortest > longest:
        raise ValueError(f"--min-len {shortest} is more than --max-len-b {longest} new tokens: raise that")
    lacking = [type(model).__name__ for model in models if not hasattr(model, "memorize")]
    if lacking:
        raise ValueError(f"--path names models with a memory and without ({lacking[0]}): generate with one kind")


class Conversation:
    """What the task's options ask of the memory before, between and after prompts.

    Args:
        generator: generates.
        cfg: the task's configuration: ``memory_text``, ``memory_load``, ``memory_save``, ``memorize_turns``.
        encode: gives the tokens (length,) of a text.

    Raises:
        ValueError: an option cannot be honoured.
    """

    def __init__(self, generator: LongMemGenerator, cfg, encode):
        self.generator, self.cfg, self.encode = generator, cfg, encode
        self.turns = 0
        wanted = cfg.memory_text or cfg.memory_load or cfg.memory_save or cfg.memorize_turns
        if wanted and None in generator.document_memories:
            raise ValueError(
                "--memory-text, --memory-load, --memory-save and --memorize-turns need a memory, but the model's is "
                "off (--no-use-external-memory, or --memory-size 0)"
            )
        if (cfg.memory_load or cfg.memory_save) and len(generator.document_memories) > 1:
            raise ValueError("--memory-load and --memory-save are of one model: name one in --path")

    def begin(self) -> None:
        """Read the memory and the documents that the options name; save the memory where that is asked for.

        Raises:
            ValueError: a document or a memory cannot be read.
            OSError: likewise, or the memory cannot be saved.
        """
        cfg, document_memory = self.cfg, self.generator.document_memories[0]
        if cfg.memory_load:
            began = time.time()
            load_memory(cfg.memory_load, document_memory, *self._identity())
            names = ", ".join(document.name for document in document_memory.documents)
            logger.info("loaded %s tokens (%s) in %.1f s", f"{document_memory.tokens:,}", names, time.time() - began)
        for path in cfg.memory_text or []:
            began = time.time()
            try:
                tokens = self.encode(read_text(path))
            except ValueError as error:
                raise ValueError(f"--memory-text {path} cannot be memorised: {error}") from error
            self.generator.memorize("standard input" if path == "-" else path, tokens)
            logger.info(
                "memorised %s: %s tokens in %.1f s; the memory has %s of at most %s",
                path,
                f"{len(tokens):,}",
                time.time() - began,
                f"{document_memory.tokens:,}",
                f"{document_memory.bank.chunks * document_memory.bank.chunk_size:,}",
            )
        if cfg.memory_save and document_memory.tokens:
            self._save()
        elif cfg.memory_save and not cfg.memorize_turns:
            raise ValueError(
                f"--memory-save {cfg.memory_save} has nothing to save: name documents with --memory-text, or keep the "
                "conversation with --memorize-turns"
            )

    def remember(self, sample: Dict[str, Any], hypotheses: Sequence[Sequence[Dict[str, Tensor]]]) -> None:
        """Remember a prompt and its best answer, if that is asked for.

        Raises:
            ValueError: there are several prompts.
        """
        if not self.cfg.memorize_turns:
            return
        prompts, lengths = sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"]
        if len(prompts) > 1:
            raise ValueError(
                f"--memorize-turns answers one prompt after the other, not {len(prompts)} at once: set --batch-size 1"
            )
        answer = hypotheses[0][0]["tokens"].to(prompts)
        answer = answer[:-1] if len(answer) and answer[-1] == self.generator.eos else answer
        names = {
            document.name
            for document_memory in self.generator.document_memories
            for document in document_memory.documents
        }
        self.turns += 1
        while f"turn {self.turns}" in names:
            self.turns += 1
        self.generator.memorize(f"turn {self.turns}", torch.cat([prompts[0, 1 : int(lengths[0])], answer]))
        if self.cfg.memory_save:
            self._save()

    def _identity(self):
        decoder = self.generator.model.single_model.decoder
        return backbone_identity(decoder)

    def _save(self) -> None:
        began, document_memory = time.time(), self.generator.document_memories[0]
        save_memory(self.cfg.memory_save, document_memory, *self._identity(), dtype=str(self.cfg.memory_save_dtype))
        size = os.path.getsize(self.cfg.memory_save) / 2**20
        logger.info(
            "saved %s tokens in %s (%.1f MiB) in %.1f s",
            f"{document_memory.tokens:,}",
            self.cfg.memory_save,
            size,
            time.time() - began,
        )


def backbone_identity(decoder) -> tuple:
    """Fingerprint of a model's backbone and the layer whose keys and values it writes."""
    return bytes(decoder.backbone_fingerprint.cpu().tolist()).hex(), decoder.backbone.memory_layer
