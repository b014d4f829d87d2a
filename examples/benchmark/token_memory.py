"""What a token memory wins over a constant weight: fit its learned part alone, and compare on other texts.

    python -m examples.benchmark.token_memory --path CHECKPOINT --fit a.txt b.txt --test c.txt d.txt

The texts are read once, each with a memory of its own. From what was read, the weights of the token memory are trained
on the texts of ``--fit``, nothing else of the model; the weight and theta of a cache that reads the same entries are
chosen there too. All are then compared on the texts of ``--test``.

Legend: T tokens of a segment, D width, V symbols, n entries that are read.
"""

import argparse
import copy
import functools
import math
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.benchmark.command import require_at_least
from longmem_fairseq.evaluation.reporting.bootstrap import bootstrap
from longmem_fairseq.hub import LongMem
from longmem_fairseq.memory.cache import CacheSettings
from longmem_fairseq.modules.token_mixture import TokenMixture, TokenReads
from longmem_fairseq.text import read_text

_THETAS = (8.0, 12.0, 16.0, 20.0, 24.0, 28.0, 32.0, 48.0)
_WEIGHTS = tuple(i / 100 for i in range(1, 60))
_SEGMENTS_AT_ONCE = 4
_LEARNING_RATE, _WARMUP = 3e-4, 20


class ReadSegment(NamedTuple):
    """What was read for one segment.

    Attributes:
        features: Input of the output projection, shape (1, T, D), float16.
        reads: What was found in the token memory, for one row.
        targets: Token ids to predict, shape (T,), int64.
    """

    features: Tensor
    reads: TokenReads
    targets: Tensor


@torch.no_grad()
def read_texts(model: LongMem, paths: Sequence[Path], tokens: int) -> List[ReadSegment]:
    """Read texts, each with an empty memory.

    Args:
        model: Model with a token memory.
        paths: Paths of the texts.
        tokens: Maximum number of tokens of a text.
    """
    decoder, reader, segments = model.model.decoder, model.reader, []
    for path in paths:
        text = model.encode(read_text(str(path)))[:tokens]
        branches = reader.branches(1)
        for segment in tqdm(reader.read(reader.inputs_of(text), branches), desc=path.name, unit="segment", leave=False):
            states = decoder.side_network(segment.encoded, branches.reader(), segment.carried)
            reads = branches.read_segments(decoder.predictor.token_states(segment.encoded, segment.inputs))
            targets = text[segment.begin : segment.begin + segment.inputs.size(1)].to(decoder.device)
            segments.append(ReadSegment(decoder.features(states).half(), reads, targets))
    return segments


def best_of(segment: ReadSegment, k: int) -> ReadSegment:
    """Return a segment for which only the k best of the entries that were read are left."""
    scores, places = segment.reads.scores.topk(min(k, segment.reads.scores.size(-1)), dim=-1)
    reads = segment.reads._replace(scores=scores, followers=segment.reads.followers.gather(-1, places))
    return segment._replace(reads=reads)


class Comparison:
    """Predictions of one model from the same reads.

    Args:
        model: Model with a token memory, whose weights of it are trained in place.
    """

    def __init__(self, model: LongMem):
        self.backbone = model.model.decoder.backbone
        self.mixture: TokenMixture = model.model.decoder.predictor.token_mixture

    def alone(self, segment: ReadSegment) -> Tensor:
        """Return the log-probabilities of a segment's targets by the model without its token memory, shape (T,)."""
        return _of_targets(self._logits(segment).log_softmax(-1), segment)

    def with_cache(self, segment: ReadSegment, setting: CacheSettings) -> Tensor:
        """Return those with a cache of one weight and theta that reads the same entries, shape (T,)."""
        return _with_weight(self.alone(segment).exp(), self.of_entries(segment, setting.theta), setting.weight)

    def of_entries(self, segment: ReadSegment, theta: float) -> Tensor:
        """Return the probabilities of a segment's targets by the entries alone, shape (T,)."""
        masses = torch.softmax(theta * segment.reads.scores[0], dim=-1).nan_to_num(0.0)  # (T, n)
        return (masses * (segment.reads.followers[0] == segment.targets[:, None])).sum(1)

    def with_token_memory(self, segment: ReadSegment) -> Tensor:
        """Return those with the token memory, shape (T,)."""
        return _of_targets(self.mixture(self._logits(segment), segment.reads)[0], segment)

    @torch.no_grad()
    def choose_cache(self, segments: Sequence[ReadSegment]) -> CacheSettings:
        """Return the best constant weight and theta on some segments."""
        alone = torch.cat([self.alone(segment).exp() for segment in segments])
        losses = {}
        for theta in _THETAS:
            entries = torch.cat([self.of_entries(segment, theta) for segment in segments])
            for weight in _WEIGHTS:
                losses[CacheSettings(weight, theta)] = -float(_with_weight(alone, entries, weight).mean())
        return min(losses, key=losses.get)

    def fit(self, segments: Sequence[ReadSegment], epochs: int) -> None:
        """Train the weights of the token memory.

        Args:
            segments: Segments to train on.
            epochs: Number of passes over them.
        """
        generator = torch.Generator().manual_seed(0)
        order = torch.cat([torch.randperm(len(segments), generator=generator) for _ in range(epochs)])
        batches = order.split(_SEGMENTS_AT_ONCE)
        optimizer = torch.optim.Adam(self.mixture.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98))
        for update, batch in enumerate(tqdm(batches, desc="fitting", leave=False)):
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min(1.0, (update + 1) / _WARMUP) * (1 - update / len(batches))
            loss = -torch.cat([self.with_token_memory(segments[i]) for i in batch.tolist()]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _logits(self, segment: ReadSegment) -> Tensor:
        return self.backbone.output(segment.features.to(self.backbone.dtype)).float()  # (1, T, V)


def _of_targets(log_probs: Tensor, segment: ReadSegment) -> Tensor:
    return log_probs[0].gather(1, segment.targets[:, None])[:, 0]


def _with_weight(alone: Tensor, entries: Tensor, weight: float) -> Tensor:
    """Return log((1 - weight) alone + weight entries) of probabilities of the same shape."""
    return ((1 - weight) * alone + weight * entries).log()


@torch.no_grad()
def losses_of(score: Callable[[ReadSegment], Tensor], segments: Sequence[ReadSegment]) -> np.ndarray:
    """Return sums of losses in nats and numbers of tokens of segments, shape (segments, 2), float64."""
    return np.array([(-float(score(segment).sum()), len(segment.targets)) for segment in segments])


def results_table(losses: Dict[str, np.ndarray]) -> str:
    """Format the perplexities by system, and their changes against the first with 95 % intervals over segments."""
    first, rows = next(iter(losses.values())), []

    def change(sums: np.ndarray) -> np.ndarray:
        return 100 * (np.exp((sums[..., 0] - sums[..., 1]) / sums[..., 2]) - 1)

    for name, of_segments in losses.items():
        perplexity = math.exp(of_segments[:, 0].sum() / of_segments[:, 1].sum())
        paired = np.stack([of_segments[:, 0], first[:, 0], first[:, 1]], axis=1)[:, None]  # (segments, 1, 3)
        gain = bootstrap(change, paired)
        shown = "" if of_segments is first else f"{gain.value:+.1f} % ({gain.low:+.1f} to {gain.high:+.1f})"
        rows.append(f"| {name} | {perplexity:.2f} | {shown} |")
    return "\n".join(["| output | perplexity | against the first, 95 % interval |", "| --- | ---: | ---: |", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.token_memory", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--path", required=True, help="checkpoint or model directory of a LongMem")
    parser.add_argument("--fit", type=Path, nargs="+", required=True, help="text files to fit on")
    parser.add_argument("--test", type=Path, nargs="+", required=True, help="text files to compare on")
    parser.add_argument("--tokens", type=int, default=24000, help="number of tokens of each text that are read")
    parser.add_argument("--memory-size", type=int, default=16384, help="number of tokens that both memories hold")
    parser.add_argument(
        "--token-memory-k", type=int, nargs="+", default=[1024], help="numbers of entries that each token reads"
    )
    parser.add_argument("--epochs", type=int, default=3, help="number of passes over the texts to fit on")
    args = parser.parse_args()
    require_at_least(args, 1, "tokens", "memory_size", "token_memory_k", "epochs")
    most = max(args.token_memory_k)
    sizes = {"memory_size": args.memory_size, "token_memory": args.memory_size, "token_memory_k": most}
    model = LongMem.from_pretrained(args.path, **sizes)
    comparison = Comparison(model)
    weights = copy.deepcopy(comparison.mixture.state_dict())
    fit, test = (read_texts(model, paths, args.tokens) for paths in (args.fit, args.test))
    losses: Dict[str, np.ndarray] = {"p_LM alone": losses_of(comparison.alone, test)}
    for k in args.token_memory_k:
        few, few_test = ([best_of(segment, k) for segment in segments] for segments in (fit, test))
        of_k = f", {k:,} entries" if len(args.token_memory_k) > 1 else ""
        setting = comparison.choose_cache(few)
        with_cache = functools.partial(comparison.with_cache, setting=setting)
        name = f"+ cache, one weight ({setting.weight}) and theta ({setting.theta:g}){of_k}"
        losses[name] = losses_of(with_cache, few_test)
        comparison.mixture.load_state_dict(weights)
        losses["+ token memory as it is in the model" + of_k] = losses_of(comparison.with_token_memory, few_test)
        comparison.fit(few, args.epochs)
        losses["+ token memory, fitted" + of_k] = losses_of(comparison.with_token_memory, few_test)
    print(results_table(losses))


if __name__ == "__main__":
    main()
