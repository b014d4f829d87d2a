"""One system of a scorer as a decoder for fairseq's generator.

Legend: B rows (hypotheses), S tokens of a prompt in the window, T tokens of a full window, D width, V symbols.
"""

from typing import Dict, List, Optional, Sequence

import torch
from fairseq.models import FairseqIncrementalDecoder
from torch import Tensor

from ...backbones.base import EncodedSegment
from ...memory.cache import log_distribution, mix
from ...memory.reader import BatchReader
from ...models.live_window import WINDOW, LiveWindow
from ...models.predictor import Predictor
from ...modules.token_mixture import TokenReads
from .systems import BACKBONE, ON, without_cache
from .text_state import TextState

_CACHE = "longmem.neural_cache"  # entry of an incremental state


class SystemDecoder(FairseqIncrementalDecoder):
    """One system of a scorer as a decoder that fairseq's generator drives token by token.

    Args:
        scorer: Scorer of the system.
        system: Name of the system.
        state: State of the text before the prompts; only read.
        one_line: If true, a newline ends the answer as end-of-sentence does.
    """

    def __init__(self, scorer, system: str, state: TextState, one_line: bool = True):
        super().__init__(scorer.tokenizer.dictionary)
        self.system, self.base = system, without_cache(system)
        self.setting = scorer.cache[self.base] if system != self.base else None
        self.state, self.states = state, [state]
        self.backbone = scorer.backbone
        if self.base != BACKBONE:
            self.side_layers = scorer.decoder.layers  # so that their caches are found and reordered
        self._scorer = [scorer]  # in a list, so that the scorer's decoder is not registered as a part of this one
        self.predictor = Predictor(scorer.backbone) if scorer.decoder is None else scorer.decoder.predictor
        ends = scorer.tokenizer.line_ends() if one_line else torch.zeros(0, dtype=torch.int64)
        added = scorer.added_symbols
        self._ends = torch.cat([ends, added.ends, torch.tensor([scorer.tokenizer.eos])]).to(scorer.device)
        self._silent = torch.cat([scorer.tokenizer.silent(), added.symbols]).to(scorer.device)
        self._hidden: Optional[Tensor] = None

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._scorer[0].device

    def side_network(
        self, encoded: EncodedSegment, reader: Optional[BatchReader], incremental_state=None
    ) -> List[Tensor]:
        """Return the input of the output layer, (B, T, D), in a list; keeps the backbone's final hidden states."""
        scorer = self._scorer[0]
        self._hidden = self.backbone.final_hidden(encoded)
        if self.base == BACKBONE:
            return [self._hidden]
        return [scorer.decoder.features(scorer.decoder.side_network(encoded, reader, incremental_state))]

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor], room: int) -> Dict[str, dict]:
        """Read all tokens of the prompts but the last.

        The start of a prompt that does not leave ``room`` tokens in the window is memorized, for its row only.

        Args:
            prompts: Token ids of the prompts, shape (length,), int64, each.
            room: Number of tokens of the window that stay free.

        Returns:
            Incremental state to continue from.
        """
        scorer, pieces = self._scorer[0], []
        self.states, numbers = [self.state], []  # numbers: the state behind which each row is read
        for prompt in prompts:
            beyond, state = max(0, len(prompt) + room - scorer.size), self.state
            numbers.append(len(self.states) if beyond else 0)
            if beyond:
                state = self.state.copy()
                scorer.memorize(state, prompt[:beyond])
                self.states.append(state)
            stream = torch.cat([torch.tensor([state.last]), prompt[beyond:].cpu()])
            pieces.append(stream[:-1].to(scorer.device))
        branches = scorer.branches(self.state, len(prompts)) if self.base == ON else None
        if branches is not None:
            branches.banks = [self.states[number].bank for number in numbers]
        window = LiveWindow(self, scorer.size, len(prompts), branches)
        incremental_state: Dict[str, dict] = {WINDOW: {"window": window}}
        window.fill(pieces, incremental_state)
        if self.setting is not None:
            entry = {"state": torch.tensor(numbers, device=scorer.device), **self._cache_entries(pieces)}
            incremental_state[_CACHE] = entry
        return incremental_state

    def _cache_entries(self, pieces: Sequence[Tensor]) -> Dict[str, Tensor]:
        """Return the cache entries of the prompts in the window.

        These are ``hidden`` (B, S, D) and ``tokens`` (B, S), and the ``last`` hidden state of each row (B, D), whose
        token is not known yet; ``waits`` (B,) tells which rows have one.
        """
        lengths = torch.tensor([len(piece) for piece in pieces], device=self.device)
        S = int(lengths.max())
        hidden = self._hidden
        if not S:
            hidden = torch.zeros(len(pieces), 1, self.backbone.width, device=self.device)
        tokens = torch.full((len(pieces), S), -1, device=self.device)
        for row, piece in enumerate(pieces):
            tokens[row, : max(0, len(piece) - 1)] = piece[1:]
        last = hidden[torch.arange(len(pieces), device=self.device), (lengths - 1).clamp(min=0)]
        return {"hidden": hidden[:, :S], "tokens": tokens, "last": last, "waits": lengths > 0}

    @torch.no_grad()
    def forward(self, prev_output_tokens: Tensor, encoder_out=None, incremental_state=None, **unused):
        """Return log-probabilities (B, 1, V) behind one more token of each row; only the last column is read."""
        scorer, tokens = self._scorer[0], prev_output_tokens[:, -1:]
        window = incremental_state[WINDOW]["window"]
        (features,) = window.step(tokens, incremental_state)
        reads = window.read_tokens()
        last = None if reads is None else TokenReads(*(x[:, -1] for x in reads))
        log_probs = scorer.log_probs(features[:, -1], last)  # (B, V)
        if self.setting is not None:
            log_probs = self._mixed_with_cache(log_probs, tokens, incremental_state[_CACHE])
        ended = log_probs[:, self._ends].logsumexp(1)
        log_probs[:, self._ends] = log_probs[:, self._silent] = float("-inf")
        log_probs[:, scorer.tokenizer.eos] = ended
        return log_probs[:, None], {"attn": None}

    def _mixed_with_cache(self, log_probs: Tensor, tokens: Tensor, entry: Dict[str, Tensor]) -> Tensor:
        follower = torch.where(entry["waits"][:, None], tokens, -torch.ones_like(tokens))
        entry["hidden"] = torch.cat([entry["hidden"], entry["last"][:, None]], dim=1)
        entry["tokens"] = torch.cat([entry["tokens"], follower], dim=1)
        entry["last"], entry["waits"] = self._hidden[:, -1], torch.ones_like(entry["waits"])
        mixed = torch.empty_like(log_probs)
        for number in entry["state"].unique().tolist():
            rows, cache = entry["state"] == number, self.states[number].cache
            parts = [] if cache is None else [(cache.hidden, cache.tokens)]
            parts.append((entry["hidden"][rows], entry["tokens"][rows]))
            cached = log_distribution(entry["last"][rows], parts, self.setting.theta, log_probs.size(1))
            mixed[rows] = mix(log_probs[rows], cached, self.setting.weight)
        return mixed

    def reorder_incremental_state(self, incremental_state, new_order: Tensor) -> None:
        """Let row i continue row ``new_order[i]``; the attention modules reorder their caches themselves."""
        incremental_state[WINDOW]["window"].reorder(new_order)
        if _CACHE in incremental_state:
            entry = incremental_state[_CACHE]
            incremental_state[_CACHE] = {name: x.index_select(0, new_order) for name, x in entry.items()}
