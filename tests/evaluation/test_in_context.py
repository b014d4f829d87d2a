"""In-context learning, against one prompt at a time written out as a whole, and against figures worked out by hand."""

import json
import math

import numpy as np
import pytest
import torch

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.evaluation.command import main, run
from longmem_fairseq.evaluation.command_line import parser_of
from longmem_fairseq.evaluation.in_context import TASKS, InContext, calibration, find_file, read_sentences

WORDS = ["good film", "bad plot", "a great cast", "dull and long", "fine", "poor jokes , slow", "great", "sad ending"]
T = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("icl")
    for name in ("sst2", "subj"):
        labels = TASKS[name].labels
        for split, texts in (("train", WORDS), ("test", WORDS[2:5])):
            rows = [{"text": text + " .", "label": labels[len(text) % 3 == 0]} for text in texts]
            (directory / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def evaluate(files, data, directory, *more):
    evaluation = InContext()
    arguments = [
        "--path",
        files.longmem,
        "--tokenizer",
        files.directory,
        "--data",
        data,
        "--results-path",
        directory,
        *f"--cpu --sets sst2 subj --demonstrations 1 2 --in-memory 0 4 --seeds 2 --tokens-per-sample {T}".split(),
        *"--tuning-tokens 100".split(),
        *more,
    ]
    return evaluation, run(evaluation, parser_of(evaluation).parse_args([str(x) for x in arguments]))


@pytest.fixture(scope="module")
def outcome(files, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    return directory, *evaluate(files, data, directory)


def items_of(directory):
    rows = [json.loads(line) for line in (directory / "items.jsonl").open()]
    return {row["item"]: row["result"] for row in rows if "item" in row}


@torch.no_grad()
def likelihoods(longmem, tokenizer, remembered, prompt, labels):
    """Return the log-probability of each label after a prompt, its text written out, with a memory of another text."""
    expected = {"on": [], "off": []}
    for label in labels:
        memory, context = tokenizer.encode(remembered), tokenizer.encode(remembered + prompt)
        whole = tokenizer.encode(f"{remembered}{prompt} {label}")
        inputs = torch.cat([torch.tensor([2]), whole[:-1]])
        longmem.reset_memory()
        start, m = 0, len(memory)
        for end in [*range(T, m, T), m] if m else []:
            longmem(inputs[None, start:end], segments=Segments([0], [0], [start], [end - start], 1))
            start = end
        logits, extra = longmem(
            inputs[None, m:], segments=Segments([0], [0], [m], [len(inputs) - m], 1), without_memory=True
        )
        for name, x in (("on", logits), ("off", extra["logits_without_memory"])):
            log_probs = x[0].log_softmax(-1).gather(1, whole[m:, None])[:, 0]
            expected[name].append(float(log_probs[len(context) - m :].sum()))
    return expected


def test_equals_one_prompt_at_a_time(outcome, files, data, loaded):
    """Published templates as plain text, demonstrations drawn the same way, no batches, no shared prefix."""
    directory, evaluation, _ = outcome
    items = items_of(directory)
    longmem = files.models[1]
    for name, template in (("sst2", "Review: {} Sentiment: {}. "), ("subj", "Input: {} Type: {}. ")):
        train, test = (
            [json.loads(line) for line in (data / f"{name}.{split}.jsonl").open()] for split in ("train", "test")
        )
        order = np.random.default_rng(1).permutation(len(train))
        shown, remembered = ([template.format(*train[i].values()) for i in part] for part in (order[:1], order[2:6]))
        for n in (0, 4):
            result = items[f"{name} seed 1 memory {n} window 1 tested 3"]
            assert result["gold"] == [TASKS[name].labels.index(row["label"]) for row in test]
            free = [{"text": text} for text in ("N/A", "[MASK]", "")]
            scores = {key: result["scores"][key] + result["content_free"][key] for key in result["scores"]}
            for i, row in enumerate(test + free):
                question = template.split("{}.")[0].format(row["text"]).rstrip()
                memory = "".join(remembered[:n])[:-1] if n else ""
                prompt = (" " if n else "") + "".join(shown) + question
                expected = likelihoods(longmem, loaded.tokenizer, memory, prompt, TASKS[name].labels)
                if n:
                    assert scores["memory on"][i] == pytest.approx(expected["on"], abs=2e-3)
                assert scores["memory off"][i] == pytest.approx(expected["off"], abs=2e-3)


def test_figures(outcome):
    """Accuracies are recounted from the items; the memory was filled once for each draw and size."""
    directory, evaluation, finished = outcome
    results = items_of(directory)
    averages, *tables = finished.tables
    assert list(averages.columns) == ["1 + 0", "1 + 4", "2 + 0", "2 + 4"] and len(tables) == 4
    by_hand = []
    for seed in range(2):
        shares = []
        for name in ("sst2", "subj"):
            result = results[f"{name} seed {seed} memory 4 window 2 tested 3"]
            shares.append(np.mean([np.argmax(s) == g for s, g in zip(result["scores"]["memory on"], result["gold"])]))
        by_hand.append(100 * np.mean(shares))
    sample = averages.columns["2 + 4"]["memory on"]
    assert sample.interval().value == pytest.approx(np.mean(by_hand))
    assert sample.deviation() == pytest.approx(np.std(by_hand, ddof=1))
    assert {"memory on, calibrated", "majority of the training set"} <= set(tables[0].rows)
    assert (directory / "report.png").stat().st_size > 10_000


def test_calibration():
    """Two content-free inputs with label probabilities (0.8, 0.2) and (0.6, 0.4): the prior is (0.7, 0.3)."""
    free = np.log([[0.08, 0.02], [0.06, 0.04]])
    np.testing.assert_allclose(np.exp(calibration(free)), [0.7, 0.3])
    assert np.argmax([math.log(0.6), math.log(0.4)] - calibration(free)) == 1


def test_memories_are_filled_once(files, data, tmp_path, monkeypatch):
    from longmem_fairseq.evaluation.scoring.scorer import Scorer

    filled = []
    monkeypatch.setattr(Scorer, "memorize", lambda self, state, tokens: filled.append(len(tokens)))
    evaluate(files, data, tmp_path, "--no-cache")
    assert len(filled) == 2 * 2 * 2, "for each set, seed and size of the memory, not for each sentence"


def test_original_files(tmp_path):
    for name in ("SST-2", "mr"):
        (tmp_path / name).mkdir()
    (tmp_path / "SST-2/train.tsv").write_text('sentence\tlabel\na "quoted" film .\t1\nbad\t0\n')
    (tmp_path / "mr/test.csv").write_text('1,"good , ""very"" good"\n0,bad\n')
    sentences = read_sentences(find_file(str(tmp_path), "sst2", "train"), TASKS["sst2"].labels)
    assert sentences == [('a "quoted" film .', 1), ("bad", 0)]
    sentences = read_sentences(find_file(str(tmp_path), "mr", "test"), TASKS["mr"].labels)
    assert sentences == [('good , "very" good', 1), ("bad", 0)]
    (tmp_path / "mr/train.csv").write_text("0,bad\n2,odd\n")
    with pytest.raises(
        ValueError, match=r"train.csv, example 2, is not a sentence with a label \(negative, positive\)"
    ):
        read_sentences(find_file(str(tmp_path), "mr", "train"), TASKS["mr"].labels)
    with pytest.raises(FileNotFoundError, match="neither subj.test.jsonl nor test.csv of subj"):
        find_file(str(tmp_path), "subj", "test")


def test_too_few_examples(files, data, tmp_path):
    with pytest.raises(SystemExit, match="8 training examples, fewer than the 12 of --demonstrations and --in-memory"):
        main(
            InContext(),
            [
                str(x)
                for x in (
                    "--path",
                    files.longmem,
                    "--tokenizer",
                    files.directory,
                    "--data",
                    data,
                    *"--cpu --sets sst2".split(),
                    "--results-path",
                    tmp_path,
                    *"--in-memory 10 --demonstrations 2".split(),
                )
            ],
        )
