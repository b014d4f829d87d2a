"""The local window: what a number of continuations share is encoded once, then each of them is read behind it.

Legend: B rows, S tokens that all rows share, R tokens of a row, D width, V symbols.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from ...memory.cache import causal_log_sums, distribution, log_sums, mix
from .past import Past
from .systems import BACKBONE, ON, WITH_CACHE

_TOKENS_AT_ONCE = 16384  # rows times tokens of the window
_SYMBOLS_AT_ONCE = 1 << 23  # rows times symbols of the dictionary


class Continuation(NamedTuple):
    """What is scored, and what stands between it and the tokens that all share.

    Attributes:
        tokens: to score, shape (length,), int64.
        prompt: its own beginning, which is read and not scored, shape (length,).
    """

    tokens: Tensor
    prompt: Optional[Tensor] = None

    @property
    def length(self) -> int:
        return len(self.tokens) + (0 if self.prompt is None else len(self.prompt))


class Window:
    """The last tokens before some continuations, in the caches of all systems.

    The window holds T inputs, of which the continuations take ``room``. What of the prefix does not fit any more goes
    into a copy of the past: those that have a memory read it there, the others do not see it.

    Args:
        scorer: whose systems.
        past: only read.
        prefix: shape (length,), int64, or None.
        room: tokens that a continuation may have, with its own prompt.

    Attributes:
        shared: S, tokens of the prefix that all systems see in the window.

    Raises:
        ValueError: the window has no such room.
    """

    @torch.no_grad()
    def __init__(self, scorer, past: Past, prefix: Optional[Tensor], room: int):
        if room > scorer.size:
            raise ValueError(
                f"a continuation of {room} tokens does not fit into a window of {scorer.size}: raise "
                "--tokens-per-sample, or shorten it"
            )
        self.scorer, self.room = scorer, room
        prefix = torch.zeros(0, dtype=torch.int64) if prefix is None else prefix
        beyond = max(0, len(prefix) + room - scorer.size)
        if beyond:
            past = past.copy()
            scorer.memorize(past, prefix[:beyond])
        self.past = past
        stream = torch.cat([torch.tensor([past.last]), prefix[beyond:].cpu()]).to(scorer.device)
        inputs, self.last = stream[:-1], stream[-1:]  # the last one is each row's first input
        self.shared = len(inputs)
        self._pasts = {name: past for name in scorer.systems if name == ON}
        self._states: Dict[str, dict] = {name: {} for name in scorer.systems}
        self._hidden = self._followers = None
        if len(inputs):
            features, _ = scorer.features(inputs[None], self._pasts, self._states)
            self._hidden, self._followers = features[BACKBONE][0], stream[1:]  # (S, D), (S,)

    @torch.no_grad()
    def score(self, continuations: Sequence[Union[Tensor, Continuation]]) -> List[Dict[str, Tensor]]:
        """Log-probabilities (natural) of each token of each continuation by each system, shape (length,), float32, CPU.

        Every continuation is read for itself behind the window, and none is remembered.

        Raises:
            ValueError: one is empty, or longer than the room.
        """
        rows = [c if isinstance(c, Continuation) else Continuation(c) for c in continuations]
        for row in rows:
            if not len(row.tokens):
                raise ValueError("a continuation without tokens cannot be scored")
            if row.length > self.room:
                raise ValueError(f"a continuation of {row.length} tokens is longer than the room of {self.room}")
        found: List[Optional[Dict[str, Tensor]]] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -rows[i].length)
        while order:
            at_once = max(1, _TOKENS_AT_ONCE // (self.shared + rows[order[0]].length))
            batch, order = order[:at_once], order[at_once:]
            for i, scores in zip(batch, self._score([rows[i] for i in batch])):
                found[i] = scores
        return found

    @torch.no_grad()
    def likeliest(self, prompts: Sequence[Tensor]) -> Dict[str, Tensor]:
        """The likeliest symbol behind each prompt, by each system: shape (prompts,), int64, on the CPU.

        Raises:
            ValueError: a prompt leaves no room for a symbol.
        """
        found: Dict[str, List[Tensor]] = {name: [] for name in self.scorer.systems}
        for prompt in prompts:
            if len(prompt) >= self.room:
                raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room of {self.room} for a symbol")
        longest = self.shared + max(map(len, prompts), default=0) + 1
        at_once = max(1, min(_TOKENS_AT_ONCE // longest, _SYMBOLS_AT_ONCE // len(self.scorer.tokenizer.dictionary)))
        for begin in range(0, len(prompts), at_once):
            for name, log_probs in self._next_symbols(prompts[begin : begin + at_once]).items():
                found[name].append(log_probs.argmax(1).cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _next_symbols(self, prompts: Sequence[Tensor]) -> Dict[str, Tensor]:
        """Log-probabilities (B, V) of what follows each prompt."""
        scorer, device = self.scorer, self.scorer.device
        rows = [torch.cat([self.last, prompt.to(device)]) for prompt in prompts]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)  # (B, R)
        states = {name: _expand(state, len(rows)) for name, state in self._states.items()}
        features, _ = scorer.features(padded.clamp(min=0), self._pasts, states, self.shared)
        ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        each = torch.arange(len(rows), device=device)
        found = {name: scorer.log_probs(x[each, ends]) for name, x in features.items()}
        for name, setting in scorer.cache.items():
            if name not in found:
                continue
            hidden, cache = features[BACKBONE], self.past.cache
            parts = [] if cache is None else [(cache.hidden, cache.tokens)]
            parts += [] if self._hidden is None else [(self._hidden, self._followers)]
            parts += [(hidden[:, :-1], padded[:, 1:])]  # each row's own; what is padding follows nothing
            cached = distribution(hidden[each, ends], parts, setting.theta, found[name].size(1))
            cached = cached.log().masked_fill(~cached.any(dim=1, keepdim=True), float("nan"))
            found[name + WITH_CACHE] = mix(found[name], cached, setting.weight)
        return found

    def _score(self, rows: List[Continuation]) -> List[Dict[str, Tensor]]:
        scorer, device = self.scorer, self.scorer.device
        streams, wanted = [], []
        for row in rows:
            parts = [self.last] + ([] if row.prompt is None else [row.prompt.to(device)]) + [row.tokens.to(device)]
            streams.append(torch.cat(parts))
            wanted.append(slice(row.length - len(row.tokens), row.length))
        # Answers of one token to the same prompt differ in their target alone: they are one row.
        numbers: Dict[tuple, int] = {}
        of = [numbers.setdefault(tuple(stream[:-1].tolist()), len(numbers)) for stream in streams]
        inputs = [torch.tensor(tokens, device=device) for tokens in numbers]
        pad = scorer.tokenizer.dictionary.pad()
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=pad)  # (B, R)
        states = {name: _expand(state, len(inputs)) for name, state in self._states.items()}
        features, _ = scorer.features(padded, self._pasts, states, self.shared)  # (B, R, D) each
        targets = torch.cat([stream[1:][part] for stream, part in zip(streams, wanted)])  # (n,)
        picked = {name: torch.cat([x[i, part] for i, part in zip(of, wanted)]) for name, x in features.items()}
        found = scorer.target_log_probs(picked, targets)
        if scorer.cache:
            hidden = [features[BACKBONE][i, : part.stop] for i, part in zip(of, wanted)]
            found.update(self._with_cache(found, picked[BACKBONE], targets, hidden, streams, wanted))
        lengths = [part.stop - part.start for part in wanted]
        parts = {name: found[name].cpu().split(lengths) for name in scorer.systems}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(rows))]

    def _with_cache(self, found, queries: Tensor, targets: Tensor, hidden, streams, wanted) -> Dict[str, Tensor]:
        """The same mixed with a neural cache: of the past, of what the rows share, and of each row's own tokens.

        Queries (n, D) predict the targets (n,); hidden (R, D) are those of each row's inputs.
        """
        settings = self.scorer.cache
        thetas = sorted({setting.theta for setting in settings.values()})
        own = [
            causal_log_sums(states, stream[1:], thetas)[:, :, part]
            for states, stream, part in zip(hidden, streams, wanted)
        ]
        sums = torch.cat(own, dim=2)  # (2, thetas, n)
        cache = self.past.cache
        held = [] if cache is None else [(cache.hidden, cache.tokens)]
        held += [] if self._hidden is None else [(self._hidden, self._followers)]
        for keys, tokens in held:
            sums = torch.logaddexp(sums, log_sums(queries, targets, keys, tokens, thetas))
        log_probs = dict(zip(thetas, sums[1] - sums[0]))
        return {
            name + WITH_CACHE: mix(found[name], log_probs[setting.theta], setting.weight)
            for name, setting in settings.items()
            if name in found
        }


def _expand(state: dict, rows: int) -> dict:
    """The incremental state of one row as that of several; nothing is copied until they go on."""
    return {
        key: {name: x if x is None else x.expand(rows, *x.shape[1:]) for name, x in entry.items()}
        for key, entry in state.items()
    }
