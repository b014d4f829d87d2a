"""A document read from start to end by every system, with memories of several sizes side by side.

Legend: T tokens of a segment, D width, n values of theta.
"""

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ...backbones.base import EncodedSegment
from ...memory.cache import CacheSettings, causal_log_sums, log_sums, mix
from ...modules.token_mixture import TokenReads
from .systems import BACKBONE, OFF, ON, with_cache, with_memory, with_sliding_window, with_window
from .text_state import TextState

Scores = Dict[str, Tensor]  # log-probabilities by system


class DocumentStream:
    """Score the tokens of one document in order, segment by segment as ``fairseq-eval-lm`` does.

    Every system sees the segment up to the token before; one with a memory or a cache also sees the document's last
    tokens before the segment, as many as it holds. Where the scorer has cache settings, there is one cache per memory
    size.

    :class:`longmem_fairseq.models.reading.DocumentReader` reads behind one memory, with the same scores; here memories
    of several sizes, caches and the backbone alone share one encoding.

    Args:
        scorer: Scorer whose systems read the document.
        memory_sizes: Sizes of the memories and caches in tokens, above 0.
        windows: Longer windows for the backbone alone in tokens, multiples of T.
        sliding_windows: Windows for the backbone alone in tokens, which move by half of their tokens; even numbers.

    Attributes:
        systems: Names of the systems, in the order of reports.

    Raises:
        ValueError: A window has another size, or is longer than the backbone's positions.
    """

    def __init__(
        self, scorer, memory_sizes: Sequence[int], windows: Sequence[int] = (), sliding_windows: Sequence[int] = ()
    ):
        longest = scorer.backbone.max_positions
        for window in windows:
            if window % scorer.size or window < scorer.size or (longest is not None and window > longest):
                limit = "" if longest is None else f" of at most {longest}"
                raise ValueError(
                    f"--windows {window} is not a multiple{limit} of the segment's {scorer.size} tokens: change it"
                )
        for window in sliding_windows:
            if window % 2 or window < 2 or (longest is not None and window > longest):
                limit = "" if longest is None else f" of at most {longest}"
                raise ValueError(f"--sliding-windows {window} is not an even number of tokens{limit}: change it")
        self.scorer, self.windows, self.sliding_windows = scorer, list(windows), list(sliding_windows)
        self._past = torch.zeros(0, dtype=torch.int64)  # newest inputs, as many as a sliding window reads again
        self.states: Dict[int, TextState] = {size: self.new_state(size) for size in memory_sizes}
        self.text = TextState(scorer.tokenizer.eos)
        self.systems = self._systems()

    def new_state(self, size: int) -> TextState:
        """Return the state at the start of the document of a memory and a cache of ``size`` tokens."""
        return self.scorer.new_state(size)

    def _systems(self) -> List[str]:
        scorer, sizes = self.scorer, list(self.states)
        names = [BACKBONE] + [with_window(window) for window in self.windows]
        names += [with_sliding_window(window) for window in self.sliding_windows]
        names += [OFF] if scorer.decoder is not None else []
        names += [with_memory(size) for size in sizes] if scorer.has_memory else []
        for size in sizes:
            names += [base + with_cache(size) for base, _ in self._cached(size)]
        return [name for name in names if name not in scorer.skipped]

    def _cached(self, size: int) -> List[Tuple[str, CacheSettings]]:
        """Return the systems that are mixed with a cache of this size, with their settings."""
        bases = {BACKBONE: BACKBONE, ON: with_memory(size)}
        return [(bases[name], setting) for name, setting in self.scorer.cache.items() if name in self.scorer.systems]

    @torch.no_grad()
    def replay(self, tokens: Tensor) -> None:
        """Read tokens without scoring them; only those that memories and caches can hold are encoded.

        Args:
            tokens: Token ids, shape (length,), int64.
        """
        for state in self.states.values():
            self.scorer.memorize(state, tokens)
        self._remember(self.text.advance(tokens))

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Scores:
        """Read and score the document's next tokens.

        Args:
            tokens: Token ids, shape (length,), int64: whole segments (whole windows where there are longer ones, and
                whole halves of sliding ones) except at the end of the document.

        Returns:
            Log-probabilities (natural) of the tokens by system, shape (length,), float32, on the CPU.
        """
        scorer, tokens = self.scorer, tokens.to(self.scorer.device)
        inputs = self.text.advance(tokens)
        parts: Dict[str, List[Tensor]] = {}
        for window in self.windows:
            for piece, targets in zip(inputs.split(window), tokens.split(window)):
                _collect(parts, self._read_window(with_window(window), piece, targets))
        for window in self.sliding_windows:
            stream = torch.cat([self._past.to(inputs.device)[-(window // 2) :], inputs])
            begin = len(stream) - len(inputs)  # of the next inputs to read
            for targets in tokens.split(window // 2):
                end = begin + len(targets)
                first = max(0, begin - window // 2)
                _collect(parts, self._read_window(with_sliding_window(window), stream[first:end], targets))
                begin = end
        self._remember(inputs)
        for piece, targets in zip(inputs.split(scorer.size), tokens.split(scorer.size)):
            _collect(parts, self._read_segment(piece, targets))
        names = [name for name in dict.fromkeys([*self.systems, *parts]) if name in parts]
        return {name: torch.cat(parts[name]).cpu() for name in names}

    def _remember(self, inputs: Tensor) -> None:
        """Keep the newest inputs that a sliding window reads again."""
        longest = max(self.sliding_windows, default=0) // 2
        past = torch.cat([self._past.to(inputs.device), inputs])
        self._past = past[max(0, len(past) - longest) :]

    def _read_window(self, system: str, inputs: Tensor, targets: Tensor) -> Scores:
        """Read a window of the backbone alone, and score targets of shape (n,) by its last n inputs."""
        backbone = self.scorer.backbone
        with self.scorer.times.measure(system):
            features = backbone.final_hidden(backbone.encode(inputs[None]))[0, -len(targets) :]
        return self.plain_scores({system: features}, targets)

    def _read_segment(self, inputs: Tensor, targets: Tensor) -> Scores:
        """Score and then write one segment: inputs and targets of shape (T,)."""
        scorer = self.scorer
        readers = {with_memory(size): state for size, state in self.states.items() if scorer.has_memory}
        features, encoded = scorer.features(inputs[None], readers)
        reads = {}
        for name, state in readers.items():
            with scorer.times.measure(name):
                read = self._token_reads(state, encoded, inputs)
            if read is not None:
                reads[name] = read
        scores = self.plain_scores({name: x[0] for name, x in features.items()}, targets, reads)
        scores.update(self.mixed_with_caches(scores, features[BACKBONE][0], targets))
        for size, state in self.states.items():
            cached = [base + with_cache(size) for base, _ in self._cached(size)]
            with scorer.times.measure(*([with_memory(size)] if scorer.has_memory else cached)):
                scorer.write(state, encoded, inputs[None], targets)
            state.advance(targets)
        return scores

    def _token_reads(self, state: TextState, encoded: EncodedSegment, inputs: Tensor) -> Optional[TokenReads]:
        if state.token_bank is None:
            return None
        states = self.scorer.decoder.predictor.token_states(encoded, inputs[None])
        return TokenReads(*(x[0] for x in self.scorer.token_reads(state, states)))

    def plain_scores(
        self, features: Dict[str, Tensor], targets: Tensor, reads: Optional[Dict[str, TokenReads]] = None
    ) -> Scores:
        """Return the scores of the systems without a cache.

        Args:
            features: Input of the output layer by system, shape (T, D).
            targets: Token ids to predict, shape (T,), int64.
            reads: What some systems read from their token memories, with T in place of (B, T).
        """
        return self.scorer.target_log_probs(features, targets, reads)

    def mixed_with_caches(self, scores: Scores, hidden: Tensor, targets: Tensor) -> Scores:
        """Return the scores of the systems that are mixed with a cache.

        Args:
            scores: Log-probabilities of the targets by the plain systems, shape (T,).
            hidden: Final hidden states of the backbone, shape (T, D).
            targets: Token ids to predict, shape (T,), int64.
        """
        mixed: Scores = {}
        thetas = sorted({setting.theta for setting in self.scorer.cache.values()})
        for size, state in self.states.items():
            cached = [base + with_cache(size) for base, _ in self._cached(size)]
            with self.scorer.times.measure(*cached):
                log_probs = dict(zip(thetas, self.cache_log_probs(state, hidden, targets, thetas))) if thetas else {}
                for base, setting in self._cached(size):
                    mixed[base + with_cache(size)] = mix(scores[base], log_probs[setting.theta], setting.weight)
        return mixed

    def cache_log_probs(self, state: TextState, hidden: Tensor, targets: Tensor, thetas: Sequence[float]) -> Tensor:
        """Return log p_cache of targets (T,), given the cache and the segment up to each token, shape (n, T)."""
        cached = log_sums(hidden, targets, state.cache.hidden, state.cache.tokens, thetas)
        sums = torch.logaddexp(cached, causal_log_sums(hidden, targets, thetas))
        return sums[1] - sums[0]


def _collect(parts: Dict[str, List[Tensor]], scores: Scores) -> None:
    for name, log_probs in scores.items():
        parts.setdefault(name, []).append(log_probs)
