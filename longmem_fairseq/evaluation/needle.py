"""The needle test: recall of facts far back in filler, by distance, memory size and number of facts."""

from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary
from torch import Tensor

from .base import Evaluation
from .command_line import add_memory_sizes, memory_sizes
from .reporting.statistic import ACCURACY
from .reporting.system_scores import SystemScores
from .reporting.table import Table
from .scoring.systems import BACKBONE, OFF, ON, with_cache, with_memory, without_cache

_TUNING_DOCUMENTS = 4
_TUNING_SEED = 1_000_000  # seed of the first document that is not tested


class Haystack(NamedTuple):
    """Filler with facts, each a name followed by its value, one token each.

    Attributes:
        tokens: Token ids of the document, shape (length,), int64.
        names: Token ids of the names, shape (facts,), int64.
        values: Token ids of the values, shape (facts,), int64.
        places: Positions of the names, shape (facts,), int64.
    """

    tokens: np.ndarray
    names: np.ndarray
    values: np.ndarray
    places: np.ndarray


MakeHaystack = Callable[[Dictionary, int, int, int], Haystack]  # dictionary, facts, length, seed


class Needle(Evaluation):
    """Query every fact of a haystack at its end.

    Args:
        make_haystack: Function that makes a haystack from a dictionary, a number of facts, a length and a seed.
    """

    name, title = "needle", "Facts recalled over distance, memory size and number of facts"
    script = "examples.recall.needle"

    def __init__(self, make_haystack: MakeHaystack):
        self.make_haystack = make_haystack

    def add_arguments(self, parser) -> None:
        parser.add_argument(
            "--facts",
            nargs="+",
            type=int,
            default=[30, 120, 470],
            metavar="N",
            help="facts of a document (30 120 470)",
        )
        parser.add_argument("--length", type=int, default=60_000, metavar="N", help="tokens of a document (60000)")
        parser.add_argument(
            "--distances",
            nargs="+",
            type=int,
            default=[1024, 4096, 16384, 32768],
            metavar="N",
            help="upper ends of the buckets of distances, in tokens (1024 4096 16384 32768)",
        )
        add_memory_sizes(parser)
        parser.add_argument(
            "--documents", type=int, default=4, metavar="N", help="documents for each number of facts (4)"
        )

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        for option, least in (("facts", 1), ("distances", 1), ("length", 2), ("documents", 1)):
            value = getattr(args, option)
            if (min(value) if isinstance(value, list) else value) < least:
                raise ValueError(f"--{option} {value} must be at least {least}: raise it")
        self.sizes = memory_sizes(args, scorer)
        if max(args.facts) * 2 > args.length:
            raise ValueError(f"--facts {max(args.facts)} do not fit into --length {args.length}: two tokens each")
        scorer.memory_size = self.sizes[-1]
        inner = sorted(set(args.distances))
        self.buckets = [f"to {end:,}" for end in inner] + [f"above {inner[-1]:,}"]
        self.ends = np.array(inner)

    def describe(self) -> Dict[str, Any]:
        return {"length": self.args.length, "distances": sorted(set(self.args.distances)), "memory_sizes": self.sizes}

    def tuning_documents(self) -> List[Tensor]:
        """Return haystacks that end with all facts again, in another order."""
        documents = []
        for seed in range(_TUNING_DOCUMENTS):
            haystack = self._haystack(max(self.args.facts), _TUNING_SEED + seed)
            order = np.random.default_rng(seed).permutation(len(haystack.names))
            facts = np.stack([haystack.names, haystack.values], axis=1)[order].reshape(-1)
            documents.append(torch.from_numpy(np.concatenate([haystack.tokens, facts])))
        return documents

    def _haystack(self, facts: int, seed: int) -> Haystack:
        return self.make_haystack(self.scorer.tokenizer.dictionary, facts, self.args.length, seed)

    def items(self) -> List[str]:
        documents = range(self.args.documents)[: self.args.limit]
        return [f"{facts} facts, document {seed}" for facts in sorted(set(self.args.facts)) for seed in documents]

    def score(self, item: str) -> Dict[str, Any]:
        facts, seed = _parse(item)
        haystack, scorer = self._haystack(facts, seed), self.scorer
        tokens, answers = torch.from_numpy(haystack.tokens), torch.from_numpy(haystack.values)
        questions = [torch.tensor([name]) for name in haystack.names.tolist()]
        memorized = len(tokens) - min(len(tokens), scorer.size - 2)  # the rest is in the window
        right: Dict[str, List[int]] = {}
        for size in self.sizes:
            state = scorer.new_state(size, at_most=memorized)
            scorer.memorize(state, tokens[:memorized])
            likeliest = scorer.window(state, tokens[memorized:], room=2).likeliest(questions)
            for system, symbols in likeliest.items():
                right[_with_size(system, size)] = (symbols == answers).int().tolist()
        return {"distances": (len(tokens) - haystack.places).tolist(), "right": right}

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        tables, systems = [], self._systems()
        last = self.sizes[-1]
        on, cache = with_memory(last), BACKBONE + with_cache(last)
        pairs = [(on, OFF), (cache, BACKBONE), (on, cache), (on + with_cache(last), cache)]
        for facts in sorted(set(self.args.facts)):
            columns = {bucket: {system: SystemScores({}, ACCURACY) for system in systems} for bucket in self.buckets}
            for item, result in results.items():
                if _parse(item)[0] != facts:
                    continue
                bucket_of = np.searchsorted(self.ends, result["distances"])
                for system, flags in result["right"].items():
                    for i, (bucket, flag) in enumerate(zip(bucket_of, flags)):
                        columns[self.buckets[bucket]][system].items[f"{item}, fact {i}"] = (flag, 1)
            columns = {bucket: rows for bucket, rows in columns.items() if all(map(len, rows.values()))}
            tables.append(Table(f"Right answers by tokens back, {facts:,} facts a document", columns, "heat", pairs))
        return tables

    def _systems(self) -> List[str]:
        """Return all systems with their sizes, those of a kind together."""
        return list(dict.fromkeys(_with_size(system, size) for system in self.scorer.systems for size in self.sizes))

    def notes(self) -> List[str]:
        return [
            f"{len(range(self.args.documents)[: self.args.limit])} documents of {self.args.length:,} tokens for each "
            "number of facts; a fact is a name and a value, one token each, at a random place in filler.",
            "At a document's end each name is queried by itself, right behind the document; an answer is right if it "
            "is the likeliest of all symbols.",
            f"The window of {self.scorer.size} tokens holds the document's end; memory and cache of N tokens hold the "
            "N tokens before it, and facts farther back are out of reach.",
        ]


def _with_size(system: str, size: int) -> str:
    """Return a system's name with the size of its memory and cache, if it has one."""
    base = without_cache(system)
    named = with_memory(size) if base == ON else base
    return named if base == system else named + with_cache(size)


def _parse(item: str) -> Tuple[int, int]:
    """Return the number of facts and the seed of the document of an item."""
    facts, _, _, seed = item.split()
    return int(facts), int(seed)
