"""A document read from beginning to end by every system, with memories of several sizes side by side.

Legend: T tokens of a segment, D width.
"""

from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from ...memory.cache import CacheSettings, causal_log_sums, log_sums, mix
from .past import Past
from .systems import BACKBONE, OFF, ON, WITH_CACHE


def with_memory(size: int) -> str:
    """The name of LongMem with a memory of so many tokens."""
    return f"memory {size:,}"


def with_cache(size: int) -> str:
    """What a cache of so many tokens adds to a system's name."""
    return f"{WITH_CACHE} {size:,}"


def with_window(size: int) -> str:
    """The name of the backbone alone with a window of so many tokens."""
    return f"backbone, window {size:,}"


class Stream:
    """Scores the tokens of one document in order, segment by segment as ``fairseq-eval-lm`` does.

    Every system sees the segment up to the token before; those with a memory or a cache also the document's last tokens
    before the segment, as many as it holds. With a cache of the scorer's settings, there is one for each memory size.

    Args:
        scorer: whose systems.
        memory_sizes: tokens of each memory and cache, above 0.
        windows: longer windows for the backbone alone, multiples of T.

    Attributes:
        systems: names of what is compared, in the order of reports.

    Raises:
        ValueError: a window is no multiple of T or longer than the backbone's positions.
    """

    def __init__(self, scorer, memory_sizes: Sequence[int], windows: Sequence[int] = ()):
        longest = scorer.backbone.max_positions
        for window in windows:
            if window % scorer.size or window < scorer.size or (longest is not None and window > longest):
                limit = "" if longest is None else f" of at most {longest}"
                raise ValueError(
                    f"--windows {window} is no multiple{limit} of the segment's {scorer.size} tokens: change it"
                )
        self.scorer, self.windows = scorer, list(windows)
        self.pasts: Dict[int, Past] = {size: self._new_past(size) for size in memory_sizes}
        self.last = scorer.tokenizer.eos
        self.systems = self._systems()

    def _new_past(self, size: int) -> Past:
        return self.scorer.new_past(size)

    def _systems(self) -> List[str]:
        scorer, sizes = self.scorer, list(self.pasts)
        names = [BACKBONE] + [with_window(window) for window in self.windows]
        names += [OFF] if scorer.decoder is not None else []
        names += [with_memory(size) for size in sizes] if scorer.has_memory else []
        for size in sizes:
            names += [base + with_cache(size) for base, _ in self._cached(size)]
        return names

    def _cached(self, size: int) -> List[Tuple[str, CacheSettings]]:
        """Systems that are mixed with a cache of this size, and how."""
        bases = {BACKBONE: BACKBONE, ON: with_memory(size)}
        return [(bases[name], setting) for name, setting in self.scorer.cache.items() if name in self.scorer.systems]

    @torch.no_grad()
    def replay(self, tokens: Tensor) -> None:
        """Go on behind tokens (length,) without scoring them; only what memories and caches can hold is read."""
        for past in self.pasts.values():
            self.scorer.memorize(past, tokens)
        self.last = int(tokens[-1]) if len(tokens) else self.last

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Dict[str, Tensor]:
        """Log-probabilities (natural) of the document's next tokens (n,) by each system, each (n,) float32, on the CPU.

        All pieces but a document's last must be whole segments, and whole windows where there are longer ones.
        """
        scorer, tokens = self.scorer, tokens.to(self.scorer.device)
        inputs = torch.cat([tokens.new_tensor([self.last]), tokens[:-1]])
        self.last = int(tokens[-1])
        parts: Dict[str, List[Tensor]] = {}
        for window in self.windows:
            for piece, targets in zip(inputs.split(window), tokens.split(window)):
                features = {with_window(window): scorer.final_hidden(scorer.backbone(piece[None]))[0]}
                _collect(parts, scorer.target_log_probs(features, targets))
        for piece, targets in zip(inputs.split(scorer.size), tokens.split(scorer.size)):
            _collect(parts, self._segment(piece, targets))
        return {name: torch.cat(parts[name]).cpu() for name in dict.fromkeys([*self.systems, *parts]) if name in parts}

    def _segment(self, inputs: Tensor, targets: Tensor) -> Dict[str, Tensor]:
        scorer = self.scorer
        named = {with_memory(size): past for size, past in self.pasts.items() if scorer.has_memory}
        features, encoded = scorer.features(inputs[None], named)
        found = scorer.target_log_probs({name: x[0] for name, x in features.items()}, targets)
        found.update(self._with_caches(found, features[BACKBONE][0], targets))
        for past in self.pasts.values():
            scorer.remember(past, encoded, targets)
            past.last, past.tokens = int(targets[-1]), past.tokens + len(targets)
        return found

    def _with_caches(self, found: Dict[str, Tensor], hidden: Tensor, targets: Tensor) -> Dict[str, Tensor]:
        """Those of ``found`` that are mixed with a cache; hidden (T, D), targets (T,)."""
        mixed: Dict[str, Tensor] = {}
        thetas = sorted({setting.theta for setting in self.scorer.cache.values()})
        for size, past in self.pasts.items():
            log_probs = dict(zip(thetas, self._cache_log_probs(past, hidden, targets, thetas))) if thetas else {}
            for base, setting in self._cached(size):
                mixed[base + with_cache(size)] = mix(found[base], log_probs[setting.theta], setting.weight)
        return mixed

    def _cache_log_probs(self, past: Past, hidden: Tensor, targets: Tensor, thetas: Sequence[float]) -> Tensor:
        """log p_cache of targets (T,), given what a past holds and the segment up to each token: (n, T)."""
        held = log_sums(hidden, targets, past.cache.hidden, past.cache.tokens, thetas)
        sums = torch.logaddexp(held, causal_log_sums(hidden, targets, thetas))
        return sums[1] - sums[0]


def _collect(parts: Dict[str, List[Tensor]], found: Dict[str, Tensor]) -> None:
    for name, log_probs in found.items():
        parts.setdefault(name, []).append(log_probs)
