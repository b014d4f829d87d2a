"""Answers of any system, by fairseq's generator.

Legend: B rows (hypotheses), S tokens of a prompt in the window, T tokens of a full window, D width, V symbols.
"""

from typing import Dict, List, Optional, Sequence

import torch
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel
from torch import Tensor

from ...backbones.base import EncodedSegment
from ...memory.cache import distribution, mix
from ...models.live_window import WINDOW, LiveWindow
from ...tasks.generator import LongMemGenerator
from .past import Past
from .systems import BACKBONE, ON, WITH_CACHE

_CACHE = "longmem.neural_cache"  # entry of an incremental state
_TOKENS_AT_ONCE = 16384  # prompts times tokens of a window


class SystemDecoder(FairseqIncrementalDecoder):
    """One of a scorer's systems as a decoder that fairseq's generator can drive, token by token.

    Args:
        scorer: whose system.
        system: its name.
        past: only read.
        one_line: a newline ends the answer, as end-of-sentence does.
    """

    def __init__(self, scorer, system: str, past: Past, one_line: bool = True):
        super().__init__(scorer.tokenizer.dictionary)
        self.base = system[: -len(WITH_CACHE)] if system.endswith(WITH_CACHE) else system
        self.setting = scorer.cache[self.base] if system != self.base else None
        self.has_memory = self.base == ON and past.bank is not None
        self.past, self.pasts = past, [past]
        self.backbone = scorer.backbone
        if self.base != BACKBONE:
            self.side_layers = scorer.decoder.layers  # so that their caches are found and reordered
        self._scorer = [scorer]  # in a list, as its decoder is no part of this one
        ends = scorer.tokenizer.line_ends() if one_line else torch.zeros(0, dtype=torch.int64)
        self._ends = torch.cat([ends, torch.tensor([scorer.tokenizer.eos])]).to(scorer.device)
        self._silent = scorer.tokenizer.silent().to(scorer.device)
        self._hidden: Optional[Tensor] = None

    @property
    def device(self) -> torch.device:
        return self._scorer[0].device

    def memory_branches(self, rows: int, base):
        """See :meth:`longmem_fairseq.models.longmem_decoder.LongMemDecoder.memory_branches`."""
        return self._scorer[0].branches(base, rows)

    def side_network(self, encoded: EncodedSegment, reader, state=None) -> List[Tensor]:
        """What the output layer is given, (B, T, D), in a list; the backbone's own hidden states are kept."""
        scorer = self._scorer[0]
        self._hidden = scorer.final_hidden(encoded)
        if self.base == BACKBONE:
            return [self._hidden]
        return [scorer.decoder.features(scorer.decoder.side_network(encoded, reader, state))]

    @torch.no_grad()
    def begin(self, prompts: Sequence[Tensor], room: int) -> Dict[str, dict]:
        """Read all of the prompts (length,) but their last token: an incremental state to go on from.

        Of a prompt that does not leave ``room`` tokens in the window the beginning is memorised, for its row only.
        """
        scorer, self.pasts, of, pieces = self._scorer[0], [self.past], [], []
        for prompt in prompts:
            beyond, past = max(0, len(prompt) + room - scorer.size), self.past
            of.append(len(self.pasts) if beyond else 0)
            if beyond:
                past = self.past.copy()
                scorer.memorize(past, prompt[:beyond])
                self.pasts.append(past)
            stream = torch.cat([torch.tensor([past.last]), prompt[beyond:].cpu()])
            pieces.append(stream[:-1].to(scorer.device))
        window = LiveWindow(self, scorer.size, len(prompts), self.past.bank)
        if window.branches is not None:
            window.branches.banks = [self.pasts[number].bank for number in of]
        state: Dict[str, dict] = {WINDOW: {"window": window}}
        window.fill(pieces, state)
        if self.setting is not None:
            state[_CACHE] = {"past": torch.tensor(of, device=scorer.device), **self._cached(pieces)}
        return state

    def _cached(self, pieces: Sequence[Tensor]) -> Dict[str, Tensor]:
        """Entries of the prompts in the window: hidden (B, S, D), tokens (B, S), and the last hidden state of each row.

        What followed the last one is not known yet; ``waits`` says where there is one.
        """
        lengths = torch.tensor([len(piece) for piece in pieces], device=self.device)
        D = self.backbone.width
        S = int(lengths.max())
        hidden = self._hidden if S else torch.zeros(len(pieces), 1, D, device=self.device)
        tokens = torch.full((len(pieces), S), -1, device=self.device)
        for row, piece in enumerate(pieces):
            tokens[row, : max(0, len(piece) - 1)] = piece[1:]
        last = hidden[torch.arange(len(pieces), device=self.device), (lengths - 1).clamp(min=0)]
        return {"hidden": hidden[:, :S], "tokens": tokens, "last": last, "waits": lengths > 0}

    @torch.no_grad()
    def forward(self, prev_output_tokens: Tensor, encoder_out=None, incremental_state=None, **unused):
        """Log-probabilities (B, 1, V) behind one more token of each row; only the last column is read."""
        scorer, tokens = self._scorer[0], prev_output_tokens[:, -1:]
        (features,) = incremental_state[WINDOW]["window"].step(tokens, incremental_state)
        log_probs = scorer.log_probs(features[:, -1])  # (B, V)
        if self.setting is not None:
            log_probs = self._mixed(log_probs, tokens, incremental_state[_CACHE])
        ended = log_probs[:, self._ends].logsumexp(1)
        log_probs[:, self._ends] = log_probs[:, self._silent] = float("-inf")
        log_probs[:, scorer.tokenizer.eos] = ended
        return log_probs[:, None], {"attn": None}

    def _mixed(self, log_probs: Tensor, tokens: Tensor, entry: Dict[str, Tensor]) -> Tensor:
        follower = torch.where(entry["waits"][:, None], tokens, -torch.ones_like(tokens))
        entry["hidden"] = torch.cat([entry["hidden"], entry["last"][:, None]], dim=1)
        entry["tokens"] = torch.cat([entry["tokens"], follower], dim=1)
        entry["last"], entry["waits"] = self._hidden[:, -1], torch.ones_like(entry["waits"])
        mixed = torch.empty_like(log_probs)
        for number in entry["past"].unique().tolist():
            rows = entry["past"] == number
            cache = self.pasts[number].cache
            held = [] if cache is None else [(cache.hidden, cache.tokens)]
            parts = [*held, (entry["hidden"][rows], entry["tokens"][rows])]
            found = distribution(entry["last"][rows], parts, self.setting.theta, log_probs.size(1))
            empty = ~found.any(dim=1, keepdim=True)
            mixed[rows] = mix(log_probs[rows], found.log().masked_fill(empty, float("nan")), self.setting.weight)
        return mixed

    def reorder_incremental_state(self, incremental_state, new_order: Tensor) -> None:
        """Row i goes on as row ``new_order[i]``; the attention modules reorder their caches themselves."""
        incremental_state[WINDOW]["window"].reorder(new_order)
        if _CACHE in incremental_state:
            incremental_state[_CACHE] = {
                name: x.index_select(0, new_order) for name, x in incremental_state[_CACHE].items()
            }


@torch.no_grad()
def generate(
    scorer,
    system: str,
    past: Past,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    beam: int = 1,
    one_line: bool = True,
) -> List[Tensor]:
    """Continue prompts, each behind the same past, which is only read.

    Args:
        scorer: whose system.
        system: its name.
        past: what was memorised.
        prompts: shape (length,) each, int64.
        max_new_tokens: of an answer, which has at least one.
        beam: hypotheses; the best is given.
        one_line: the answer ends before a newline.

    Returns:
        New tokens of each, without end-of-sentence, on the CPU.

    Raises:
        ValueError: the window has no room for the answers.
    """
    room = max_new_tokens + 1
    if room > scorer.size:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} does not fit into the window of {scorer.size} tokens: lower it"
        )
    decoder, found = SystemDecoder(scorer, system, past, one_line), []
    generator = LongMemGenerator(
        [FairseqLanguageModel(decoder)],
        scorer.tokenizer.dictionary,
        scorer.size,
        document_memories=[None],
        beam_size=beam,
        max_len_b=max_new_tokens,
        min_len=1,
    )
    at_once = max(1, _TOKENS_AT_ONCE // (scorer.size * beam))
    for begin in range(0, len(prompts), at_once):
        batch = prompts[begin : begin + at_once]
        generator.model.prefilled = [decoder.begin(batch, room)]
        last = torch.tensor([int(prompt[-1]) if len(prompt) else past.last for prompt in batch], device=scorer.device)
        sample = {"net_input": {"src_tokens": last[:, None], "src_lengths": torch.ones_like(last)}}
        best = generator._generate(sample, bos_token=last.repeat_interleave(beam))
        found += [rows[0]["tokens"].cpu() for rows in best]
    return [tokens[:-1] if len(tokens) and int(tokens[-1]) == scorer.tokenizer.eos else tokens for tokens in found]
