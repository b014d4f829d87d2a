"""Answers of any system, by fairseq's generator."""

from typing import Any, Dict, Iterator, List, Sequence

import torch
from fairseq.models import FairseqLanguageModel
from torch import Tensor

from ...tasks.continuation_text import ContinuationText, StopStrings
from ...tasks.generator import LongMemGenerator
from .system_decoder import SystemDecoder
from .text_state import TextState

_TOKENS_AT_ONCE = 16384  # prompts times tokens of a window


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
    generator = _generator(decoder, scorer, beam_size=beam, max_len_b=max_new_tokens, min_len=1)
    return [_without_end(best["tokens"], scorer) for best in _hypotheses(scorer, decoder, generator, prompts, room)]


def generate_texts(
    scorer,
    system: str,
    state: TextState,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    stops: Sequence[str] = (),
    **options,
) -> List[str]:
    """Continue prompts, each behind the same text, up to stop strings.

    Where a prompt and the largest number of new tokens do not fit, half of the window is kept free for new tokens; full
    windows move into the memory, or are forgotten.

    Args:
        scorer: Scorer of the system.
        system: Name of the system.
        state: State of the text before the prompts; only read.
        prompts: Token ids of the prompts, shape (length,), int64, each.
        max_new_tokens: Maximum number of tokens of a continuation.
        stops: Texts at which a continuation ends, none of them empty.
        options: Options of fairseq's generator, such as ``beam_size`` and ``search_strategy``.

    Returns:
        The continuations, cut before a stop string.
    """
    tokenizer = scorer.tokenizer
    decoder = SystemDecoder(scorer, system, state, one_line=False)
    generator = _generator(decoder, scorer, max_len_b=max_new_tokens, min_len=0, **options)
    text = ContinuationText(tokenizer.dictionary, tokenizer.bpe)
    if stops:
        generator.stop_at(StopStrings(stops, text))
    room = min(max_new_tokens + 1, max(1, scorer.size // 2))
    texts = []
    for prompt, best in zip(prompts, _hypotheses(scorer, decoder, generator, prompts, room)):
        if generator.stop_rule is not None:
            generator.stop_rule.cut(prompt, best)
        tokens = _without_end(best["tokens"], scorer)
        texts.append(best["text"] if "text" in best else text(prompt.tolist(), tokens.tolist()))
    return texts


def _generator(decoder: SystemDecoder, scorer, **options) -> LongMemGenerator:
    return LongMemGenerator(
        [FairseqLanguageModel(decoder)], scorer.tokenizer.dictionary, scorer.size, document_memories=[None], **options
    )


@torch.no_grad()
def _hypotheses(
    scorer, decoder: SystemDecoder, generator: LongMemGenerator, prompts: Sequence[Tensor], room: int
) -> Iterator[Dict[str, Any]]:
    """Yield the best hypothesis behind each prompt; ``room`` tokens of the window stay free for it."""
    beam, device = generator.beam_size, decoder.device
    at_once = max(1, _TOKENS_AT_ONCE // (generator.segment * beam))
    for begin in range(0, len(prompts), at_once):
        batch = prompts[begin : begin + at_once]
        last = [int(prompt[-1]) if len(prompt) else decoder.state.last for prompt in batch]
        last = torch.tensor(last, device=device)
        sample = {"net_input": {"src_tokens": last[:, None], "src_lengths": torch.ones_like(last)}}
        with scorer.times.measure(decoder.system):
            generator.model.prefilled = [decoder.prefill(batch, room)]
            best = [hypotheses[0] for hypotheses in generator(sample, bos_token=last.repeat_interleave(beam))]
        scorer.times.count(decoder.system, sum(len(hypothesis["tokens"]) for hypothesis in best))
        yield from best


def _without_end(tokens: Tensor, scorer) -> Tensor:
    tokens, eos = tokens.cpu(), scorer.tokenizer.eos
    return tokens[:-1] if len(tokens) and int(tokens[-1]) == eos else tokens
