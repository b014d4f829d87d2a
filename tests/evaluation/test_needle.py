"""The needle test: haystacks hold their facts, and right answers are those of a direct reading."""

import json

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary

from examples.recall.needle import make_haystack
from longmem_fairseq.evaluation.command import main, run
from longmem_fairseq.evaluation.command_line import parser_of
from longmem_fairseq.evaluation.needle import Needle
from longmem_fairseq.evaluation.scoring.systems import BACKBONE, ON
from longmem_fairseq.memory.cache import CacheSettings
from tests.evaluation.test_scorer import close, tokens_of


def test_haystack(files):
    dictionary = Dictionary.load(str(files.directory / "dict.txt"))
    haystack = make_haystack(dictionary, 20, 300, 7)
    assert len(haystack.tokens) == 300 and len(set(haystack.names.tolist())) == 20
    for name, value, place in zip(haystack.names, haystack.values, haystack.places):
        assert (haystack.tokens[place], haystack.tokens[place + 1]) == (name, value)
        assert (haystack.tokens == name).sum() == 1
    again, other = (make_haystack(dictionary, 20, 300, seed) for seed in (7, 8))
    assert (again.tokens == haystack.tokens).all() and not (other.tokens == haystack.tokens).all()


@pytest.mark.parametrize("prefix", [0, 9])
def test_the_likeliest_symbol(scorer, prefix):
    """Against scores of every symbol."""
    scorer.cache = {BACKBONE: CacheSettings(0.6, 0.5), ON: CacheSettings(0.6, 0.5)}
    state = scorer.new_state()
    scorer.memorize(state, tokens_of(70))
    window = scorer.window(state, tokens_of(prefix, 1), room=5)
    prompts = [tokens_of(n, n) for n in (3, 1, 4, 0)]
    likeliest = window.likeliest(prompts)
    every = window.next_symbols(prompts)
    targets = torch.tensor([5, 900, 4000, int(likeliest[ON][0])])
    for i, prompt in enumerate(prompts):
        (scores, *_) = scorer.window(state, torch.cat([tokens_of(prefix, 1), prompt]), room=1).score([targets[:1]])
        for name in scorer.systems:
            assert int(every[name][i].argmax()) == int(likeliest[name][i])
            close(every[name][i, targets[:1]], scores[name])
            close(every[name][i].exp().sum(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="a prompt of 5 tokens leaves no room of 5"):
        window.likeliest([tokens_of(5)])


class Recalling:
    """Stand in for a scorer's window: know what is in reach of a memory or of the window, and nothing else."""

    def __init__(self, state, prefix, systems):
        self.held, self.systems = {**state, **dict(zip(prefix[:-1].tolist(), prefix[1:].tolist()))}, systems
        self.window = dict(zip(prefix[:-1].tolist(), prefix[1:].tolist()))

    def likeliest(self, questions):
        known = {"memory on": self.held}
        return {
            system: torch.tensor([known.get(system, self.window).get(int(q), 0) for q in questions])
            for system in self.systems
        }


def test_distances_and_sizes(files, scorer, monkeypatch):
    """A perfect memory of N tokens recalls all facts up to N tokens before the window, and none farther back."""
    evaluation = Needle(make_haystack)
    line = [
        *"--path x --results-path y --facts 60 --length 1000 --distances 32 200 500 --memory-sizes 100 400".split(),
        *"--documents 2".split(),
    ]
    monkeypatch.setattr(scorer, "new_state", lambda size, at_most: {"size": size})

    def memorize(state, tokens):
        kept = tokens[-state.pop("size") :].tolist()
        state.update(zip(kept[:-1], kept[1:]))

    monkeypatch.setattr(scorer, "memorize", memorize)
    monkeypatch.setattr(scorer, "window", lambda state, prefix, room: Recalling(state, prefix, scorer.systems))
    kept = scorer.memory_size
    evaluation.prepare(parser_of(evaluation).parse_args(line), scorer)
    results = {item: evaluation.score(item) for item in evaluation.items()}
    scorer.memory_size = kept
    for result in results.values():
        distances = np.array(result["distances"])
        for size in (100, 400):
            reach = (distances <= size + 30) & ((distances <= 30) | (distances > 31))
            assert (np.array(result["right"][f"memory {size}"]) == reach).all()
        assert (np.array(result["right"]["memory off"]) == (distances <= 30)).all()
    (table,) = evaluation.tables(results)
    assert list(table.columns) == ["to 32", "to 200", "to 500", "above 500"]
    assert sum(len(rows["memory 100"]) for rows in table.columns.values()) == 120
    assert table.columns["above 500"]["memory 400"].interval().value == 0.0
    assert table.columns["to 200"]["memory 400"].interval().value > 90.0


def test_command(files, tmp_path):
    evaluation = Needle(make_haystack)
    line = [
        "--path",
        files.longmem,
        "--tokenizer",
        files.directory,
        "--results-path",
        tmp_path,
        *"--cpu --facts 4 9 --length 300 --distances 100 --memory-sizes 64 128 --documents 1".split(),
        *"--tuning-tokens 100".split(),
    ]
    finished = run(evaluation, parser_of(evaluation).parse_args([str(x) for x in line]))
    assert list(finished.tables[0].columns["to 100"]) == [
        "backbone",
        "memory off",
        "memory 64",
        "memory 128",
        "backbone + cache 64",
        "backbone + cache 128",
        "memory 64 + cache 64",
        "memory 128 + cache 128",
    ]
    items = [json.loads(text)["result"] for text in (tmp_path / "items.jsonl").open() if "right" in text]
    assert [len(item["distances"]) for item in items] == [4, 9]
    assert (tmp_path / "report.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="--facts 200 do not fit into --length 300"):
        main(Needle(make_haystack), [str(x) for x in [*line[:-12], "--facts", 200, "--length", 300]])
