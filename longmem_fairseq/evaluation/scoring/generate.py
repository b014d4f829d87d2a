"""Answers of any system, by fairseq's generator."""

from typing import List, Sequence

import torch
from fairseq.models import FairseqLanguageModel
from torch import Tensor

from ...tasks.generator import LongMemGenerator
from .system_decoder import SystemDecoder
from .text_state import TextState

_TOKENS_AT_ONCE = 16384  # prompts times tokens of a window


@torch.no_grad()
def generate(
    scorer,
    system: str,
    state: TextState,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    beam: int = 1,
    one_line: bool = True,
) -> List[Tensor]:
    """Continue prompts, each behind the same text.

    Args:
        scorer: Scorer of the system.
        system: Name of the system.
        state: State of the text before the prompts; only read.
        prompts: Token ids of the prompts, shape (length,), int64, each.
        max_new_tokens: Maximum number of tokens of an answer; the minimum is 1.
        beam: Number of hypotheses; the best one is returned.
        one_line: If true, an answer ends before the first newline.

    Returns:
        Token ids of each answer, shape (length,), int64, without end-of-sentence, on the CPU.

    Raises:
        ValueError: The window has no room for the answers.
    """
    room = max_new_tokens + 1
    if room > scorer.size:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} does not fit into the window of {scorer.size} tokens: lower it"
        )
    decoder = SystemDecoder(scorer, system, state, one_line)
    generator = LongMemGenerator(
        [FairseqLanguageModel(decoder)],
        scorer.tokenizer.dictionary,
        scorer.size,
        document_memories=[None],
        beam_size=beam,
        max_len_b=max_new_tokens,
        min_len=1,
    )
    answers: List[Tensor] = []
    at_once = max(1, _TOKENS_AT_ONCE // (scorer.size * beam))
    for begin in range(0, len(prompts), at_once):
        batch = prompts[begin : begin + at_once]
        generator.model.prefilled = [decoder.prefill(batch, room)]
        last = torch.tensor([int(prompt[-1]) if len(prompt) else state.last for prompt in batch], device=scorer.device)
        sample = {"net_input": {"src_tokens": last[:, None], "src_lengths": torch.ones_like(last)}}
        hypotheses = generator(sample, bos_token=last.repeat_interleave(beam))
        answers += [row[0]["tokens"].cpu() for row in hypotheses]
    eos = scorer.tokenizer.eos
    return [tokens[:-1] if len(tokens) and int(tokens[-1]) == eos else tokens for tokens in answers]
