"""The local window: the text that continuations share is encoded once, then each continuation is read behind it.

Legend: B rows, S tokens that all rows share, R tokens of a row, D width, V symbols, n scored tokens.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...backbones.base import EncodedSegment
from ...memory.cache import Part, causal_log_sums, log_distribution, log_sums, mix
from ...memory.token_bank import TokenStates
from ...modules.token_mixture import TokenReads
from .systems import BACKBONE, ON, WITH_CACHE
from .text_state import TextState

_TOKENS_AT_ONCE = 16384  # rows times tokens of the window
_SYMBOLS_AT_ONCE = 1 << 23  # rows times symbols of the dictionary


class Continuation(NamedTuple):
    """A text to score, behind a prompt that belongs to it alone.

    Attributes:
        tokens: Token ids to score, shape (length,), int64.
        prompt: Token ids that are read before them and not scored, shape (length,), int64, or None.
    """

    tokens: Tensor
    prompt: Optional[Tensor] = None

    @property
    def length(self) -> int:
        """Number of tokens with the prompt."""
        return len(self.tokens) + (0 if self.prompt is None else len(self.prompt))


class ComparedTokens(NamedTuple):
    """The tokens of a continuation, compared with the likeliest ones.

    Attributes:
        log_probs: Log-probability of each token, natural logarithm, shape (length,), float32.
        likeliest: Whether each token is the likeliest symbol, shape (length,), bool.
    """

    log_probs: Tensor
    likeliest: Tensor


class Window:
    """The last tokens before some continuations, in the attention caches of all systems.

    The window holds T inputs, ``room`` of them for the continuations. The start of a prefix that does not fit is
    memorized in a copy of the state: systems with a memory read it there, the others do not see it.

    Args:
        scorer: Scorer whose systems read the window.
        state: State of the text before the prefix; only read.
        prefix: Token ids that all continuations share, shape (length,), int64, or None.
        room: Maximum number of tokens of a continuation with its prompt.

    Attributes:
        shared: Number S of tokens of the prefix in the window.

    Raises:
        ValueError: The room is larger than the window.
    """

    @torch.no_grad()
    def __init__(self, scorer, state: TextState, prefix: Optional[Tensor], room: int):
        if room > scorer.size:
            raise ValueError(
                f"a continuation of {room} tokens does not fit into a window of {scorer.size}: raise "
                "--tokens-per-sample, or shorten it"
            )
        self.scorer, self.room = scorer, room
        prefix = torch.zeros(0, dtype=torch.int64) if prefix is None else prefix
        beyond = max(0, len(prefix) + room - scorer.size)
        if beyond:
            state = state.copy()
            scorer.memorize(state, prefix[:beyond])
        stream = torch.cat([torch.tensor([state.last]), prefix[beyond:].cpu()]).to(scorer.device)
        inputs, self.last = stream[:-1], stream[-1:]  # the last token is each row's first input
        self.shared = len(inputs)
        self._readers = {name: state for name in scorer.systems if name == ON}
        self._incremental: Dict[str, dict] = {name: {} for name in (BACKBONE, *scorer.systems)}
        self._cached: List[Part] = [] if state.cache is None else [(state.cache.hidden, state.cache.tokens)]
        self._state, self._prefix = state, None  # hidden states and tokens of the prefix, for the token memory
        if len(inputs):
            features, encoded = scorer.features(inputs[None], self._readers, self._incremental)
            if state.token_bank is not None:
                self._prefix = TokenStates(
                    *(x[0] for x in scorer.decoder.predictor.token_states(encoded, inputs[None]))
                )
            self._cached.append((features[BACKBONE][0], stream[1:]))  # (S, D), (S,)

    @torch.no_grad()
    def score(self, continuations: Sequence[Union[Tensor, Continuation]]) -> List[Dict[str, Tensor]]:
        """Score continuations, each read by itself behind the window; nothing is written.

        Args:
            continuations: Continuations, or their token ids, shape (length,), int64.

        Returns:
            For each continuation the log-probabilities (natural) of its tokens by system, shape (length,), float32, on
            the CPU.

        Raises:
            ValueError: A continuation is empty, or longer than the room.
        """
        return self._score_in_batches(continuations)

    @torch.no_grad()
    def compare(self, continuations: Sequence[Union[Tensor, Continuation]]) -> List[Dict[str, ComparedTokens]]:
        """Score continuations as :meth:`score` does, and find out which of their tokens are the likeliest.

        Args:
            continuations: Continuations, or their token ids, shape (length,), int64.

        Returns:
            For each continuation its tokens by system; those mixed with a cache are left out.

        Raises:
            ValueError: A continuation is empty, or longer than the room.
        """
        return self._score_in_batches(continuations, compared=True)

    def _score_in_batches(self, continuations: Sequence[Union[Tensor, Continuation]], compared: bool = False) -> List:
        rows = [c if isinstance(c, Continuation) else Continuation(c) for c in continuations]
        for row in rows:
            if not len(row.tokens):
                raise ValueError("a continuation without tokens cannot be scored")
            if row.length > self.room:
                raise ValueError(f"a continuation of {row.length} tokens is longer than the room of {self.room}")
        scores: List[Optional[Dict]] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -rows[i].length)
        while order:
            at_once = max(1, _TOKENS_AT_ONCE // (self.shared + rows[order[0]].length))
            batch, order = order[:at_once], order[at_once:]
            for i, row_scores in zip(batch, self._score([rows[i] for i in batch], compared)):
                scores[i] = row_scores
        return scores

    @torch.no_grad()
    def likeliest(self, prompts: Sequence[Tensor]) -> Dict[str, Tensor]:
        """Return the likeliest symbol behind each prompt.

        Args:
            prompts: Token ids, shape (length,), int64, each.

        Returns:
            Token ids by system, shape (prompts,), int64, on the CPU.

        Raises:
            ValueError: A prompt leaves no room for a symbol.
        """
        symbols: Dict[str, List[Tensor]] = {name: [] for name in self.scorer.systems}
        for prompt in prompts:
            if len(prompt) >= self.room:
                raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room of {self.room} for a symbol")
        longest = self.shared + max(map(len, prompts), default=0) + 1
        at_once = max(1, min(_TOKENS_AT_ONCE // longest, _SYMBOLS_AT_ONCE // len(self.scorer.tokenizer.dictionary)))
        for begin in range(0, len(prompts), at_once):
            for name, log_probs in self.next_symbols(prompts[begin : begin + at_once]).items():
                symbols[name].append(log_probs.argmax(1).cpu())
        return {name: torch.cat(parts) for name, parts in symbols.items()}

    @torch.no_grad()
    def next_symbols(self, prompts: Sequence[Tensor]) -> Dict[str, Tensor]:
        """Return the log-probabilities of every symbol behind each of B prompts by system, shape (B, V), float32."""
        scorer, device = self.scorer, self.scorer.device
        rows = [torch.cat([self.last, prompt.to(device)]) for prompt in prompts]
        padded = pad_sequence(rows, batch_first=True, padding_value=-1)  # (B, R)
        inputs = padded.clamp(min=0)
        features, encoded = scorer.features(inputs, self._readers, self._incremental_of_rows(len(rows)), self.shared)
        ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        index = torch.arange(len(rows), device=device)
        reads = self._token_reads(encoded, inputs)
        scores = {}
        for name, x in features.items():
            if name in scorer.skipped:
                continue
            read = TokenReads(*(r[index, ends] for r in reads[name])) if name in reads else None
            with scorer.times.measure(name):
                scores[name] = scorer.log_probs(x[index, ends], read)
            scorer.times.count(name, len(prompts))
        for name, setting in scorer.cache.items():
            if name not in scores:
                continue
            hidden = features[BACKBONE]
            parts = [*self._cached, (hidden[:, :-1], padded[:, 1:])]  # padding follows nothing
            with scorer.times.measure(name + WITH_CACHE):
                cached = log_distribution(hidden[index, ends], parts, setting.theta, scores[name].size(1))
                scores[name + WITH_CACHE] = mix(scores[name], cached, setting.weight)
        return scores

    def _score(self, rows: List[Continuation], compared: bool = False) -> List[Dict]:
        scorer, device = self.scorer, self.scorer.device
        streams, scored = [], []  # the tokens of each row, and which of its predictions are scored
        for row in rows:
            prompt = [] if row.prompt is None else [row.prompt.to(device)]
            streams.append(torch.cat([self.last, *prompt, row.tokens.to(device)]))
            scored.append(slice(row.length - len(row.tokens), row.length))
        # Answers of one token to the same prompt differ in their target alone: they share one row of the batch.
        distinct: Dict[tuple, int] = {}
        batch_rows = [distinct.setdefault(tuple(stream[:-1].tolist()), len(distinct)) for stream in streams]
        inputs = [torch.tensor(tokens, device=device) for tokens in distinct]
        padded = pad_sequence(inputs, batch_first=True, padding_value=scorer.tokenizer.dictionary.pad())  # (B, R)
        features, encoded = scorer.features(
            padded, self._readers, self._incremental_of_rows(len(inputs)), self.shared
        )  # (B, R, D) each
        targets = torch.cat([stream[1:][part] for stream, part in zip(streams, scored)])  # (n,)
        picked = {
            name: torch.cat([x[i, part] for i, part in zip(batch_rows, scored)]) for name, x in features.items()
        }  # (n, D) each
        reads = {
            name: TokenReads(*(torch.cat([x[i, part] for i, part in zip(batch_rows, scored)]) for x in read))
            for name, read in self._token_reads(encoded, padded).items()
        }
        likeliest: Optional[Dict[str, Tensor]] = {} if compared else None
        scores = scorer.target_log_probs(picked, targets, reads, likeliest=likeliest)
        lengths = [part.stop - part.start for part in scored]
        if compared:
            hits = {name: (symbols == targets).cpu().split(lengths) for name, symbols in likeliest.items()}
            parts = {name: x.cpu().split(lengths) for name, x in scores.items()}
            return [{name: ComparedTokens(parts[name][i], hits[name][i]) for name in parts} for i in range(len(rows))]
        if scorer.cache:
            hidden = [features[BACKBONE][i, : part.stop] for i, part in zip(batch_rows, scored)]
            with scorer.times.measure(*(name + WITH_CACHE for name in scorer.cache)):
                scores.update(self._mixed_with_cache(scores, picked[BACKBONE], targets, hidden, streams, scored))
        parts = {name: scores[name].cpu().split(lengths) for name in scorer.systems}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(rows))]

    def _mixed_with_cache(self, scores, queries: Tensor, targets: Tensor, hidden, streams, scored) -> Dict[str, Tensor]:
        """Mix scores with a cache over the text before the window, the shared prefix, and each row's tokens.

        Args:
            scores: Log-probabilities of the targets by the plain systems, shape (n,).
            queries: Hidden states that predict the targets, shape (n, D).
            targets: Token ids to predict, shape (n,), int64.
            hidden: Hidden states of each row's inputs, shape (R, D).
            streams: Token ids of each row, shape (R + 1,), int64.
            scored: Slice of each row's predictions that are scored.
        """
        settings = self.scorer.cache
        thetas = sorted({setting.theta for setting in settings.values()})
        row_sums = [
            causal_log_sums(states, stream[1:], thetas)[:, :, part]
            for states, stream, part in zip(hidden, streams, scored)
        ]
        sums = torch.cat(row_sums, dim=2)  # (2, thetas, n)
        for keys, tokens in self._cached:
            sums = torch.logaddexp(sums, log_sums(queries, targets, keys, tokens, thetas))
        log_probs = dict(zip(thetas, sums[1] - sums[0]))
        return {
            name + WITH_CACHE: mix(scores[name], log_probs[setting.theta], setting.weight)
            for name, setting in settings.items()
            if name in scores
        }

    def _token_reads(self, encoded: EncodedSegment, inputs: Tensor) -> Dict[str, TokenReads]:
        """Return what each system with a token memory reads for rows (B, R), by system."""
        if self._state.token_bank is None:
            return {}
        with self.scorer.times.measure(*self._readers):
            states = self.scorer.decoder.predictor.token_states(encoded, inputs)
            return dict.fromkeys(self._readers, self.scorer.token_reads(self._state, states, self._prefix))

    def _incremental_of_rows(self, rows: int) -> Dict[str, dict]:
        """Return the window's incremental states expanded to some rows; nothing is copied until a row is read."""
        return {name: _expand(state, rows) for name, state in self._incremental.items()}


def _expand(incremental_state: dict, rows: int) -> dict:
    expanded = {}
    for key, entry in incremental_state.items():
        expanded[key] = {name: x if x is None else x.expand(rows, *x.shape[1:]) for name, x in entry.items()}
    return expanded
