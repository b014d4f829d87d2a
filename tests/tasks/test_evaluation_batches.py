"""fairseq-eval-lm as users run it: every token, per document, the same however it is run."""

import csv
import json
import logging
import math
import os
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils, tasks
from fairseq.data import Dictionary
from omegaconf import OmegaConf

from longmem_fairseq.data.lane_dataset import LaneDataset
from longmem_fairseq.data.lane_iterator import LaneIterator
from longmem_fairseq.hub import LongMem
from longmem_fairseq.tasks.evaluation_batches import EvaluationBatches
from longmem_fairseq.text import encode_text, find_bpe
from tests.conftest import VALID_LENGTHS
from tests.data.test_lane_dataset import Documents
from tests.fairseq_runs import TASK, finish, random_documents, run, run_ranks, start, write_data, write_split
from tests.text_models import sentencepiece_model

TOKENS = sum(VALID_LENGTHS)


@pytest.fixture(scope="module")
def options(tiny_data, tiny_longmem):
    return [tiny_data, *TASK, "--path", tiny_longmem.checkpoint, "--gen-subset", "valid", "--cpu"]


@pytest.fixture(scope="module")
def reference(options, tmp_path_factory):
    """Evaluated with the defaults: all documents side by side."""
    results = tmp_path_factory.mktemp("reference")
    return run("eval_lm", *options, "--results-path", results, cwd=results), documents(results)


def documents(results):
    return {row["name"]: row for row in map(json.loads, (results / "documents.jsonl").read_text().splitlines())}


def reported(output):
    """The number of tokens and the base-2 loss of fairseq's last lines, which must be there once."""
    (tokens,) = re.findall(r"Evaluated ([\d,]+) tokens", output)
    (loss,) = re.findall(r"Loss \(base 2\): ([\d.]+)", output)
    return int(tokens.replace(",", "")), float(loss)


def same_documents(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for figure in ("tokens", "perplexity", "perplexity_without_memory"):
            assert a[name][figure] == pytest.approx(b[name][figure], rel=1e-5)
    return True


def test_documents(reference, options, tmp_path):
    output, rows = reference
    assert [row["tokens"] for row in rows.values()] == VALID_LENGTHS
    tokens, loss = reported(output)
    assert tokens == TOKENS
    total = sum(row["tokens"] * math.log2(row["perplexity"]) for row in rows.values())
    assert loss == pytest.approx(total / TOKENS, abs=1e-4)
    # A document of a single token has no past; some of the others must gain or lose by reading it.
    single = rows["valid:2"]
    assert single["perplexity"] == pytest.approx(single["perplexity_without_memory"])
    assert rows["valid:3"]["perplexity"] != pytest.approx(rows["valid:3"]["perplexity_without_memory"], rel=1e-6)


def test_order_lanes_and_workers_do_not_matter(reference, options, tmp_path):
    """Nor does it matter which of the two files one reads."""
    data = write_data(tmp_path / "data", valid=random_documents(VALID_LENGTHS, seed=1)[::-1])
    options = [data, *options[1:], "--batch-size", 1, "--num-workers", 3, "--results-path", tmp_path / "new"]
    run("eval_lm", *options, cwd=tmp_path)
    with open(tmp_path / "new" / "documents.csv", newline="") as f:
        table = [{k: v if k == "name" or not v else float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    assert same_documents({f"valid:{i}": row for i, row in enumerate(table[::-1])}, reference[1])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["documents.csv", "documents.jsonl"]


def test_two_ranks_report_one_result(reference, options, tmp_path):
    first, second = run_ranks("eval_lm", *options, "--results-path", tmp_path, cwd=tmp_path)
    assert reported(first) == reported(reference[0])
    assert same_documents(documents(tmp_path), reference[1])


def test_two_ranks_without_files(reference, options, tmp_path):
    first, _ = run_ranks("eval_lm", *options, "--batch-size", 1, cwd=tmp_path)
    assert reported(first) == reported(reference[0])


def test_shards_that_run_apart_are_put_together(reference, options, tmp_path):
    shards = ["--num-shards", 2, "--results-path", tmp_path, "--shard-id"]
    processes = [start("eval_lm", *options, *shards, shard, cwd=tmp_path) for shard in range(2)]
    outputs = [finish(process) for process in processes]
    assert same_documents(documents(tmp_path), reference[1])
    assert sum(reported(output)[0] for output in outputs) == TOKENS
    results = [re.search(r"Loss \(base 2\): .*", output)[0] for output in outputs]
    whole = re.search(r"Loss \(base 2\): .*", reference[0])[0]
    assert whole in results
    for shard, result in enumerate(results):
        assert result == whole or result.endswith(f"(shard {shard} of 2)")


def test_segments_and_memory_come_from_the_checkpoint(reference, options, tmp_path):
    assert "--tokens-per-sample: 16, from the checkpoint" in reference[0]
    overrides = "{'memory_size': 0, 'tokens_per_sample': 8}"
    output = run("eval_lm", *options, "--model-overrides", overrides, "--results-path", tmp_path, cwd=tmp_path)
    assert "--tokens-per-sample: 8, from --model-overrides" in output
    assert reported(output)[0] == TOKENS
    for row in documents(tmp_path).values():
        assert row["perplexity"] == row["perplexity_without_memory"]


def test_memory_off_is_what_is_reported_as_without_memory(reference, options, tmp_path):
    overrides = "{'use_external_memory': False}"
    run("eval_lm", *options, "--model-overrides", overrides, "--results-path", tmp_path, cwd=tmp_path)
    for name, row in documents(tmp_path).items():
        assert row["perplexity"] == pytest.approx(reference[1][name]["perplexity_without_memory"], rel=1e-5)


def test_the_window_that_the_user_gives_wins_for_a_backbone_too(options, tiny_backbone, tmp_path):
    """As an option or in --model-overrides; its positions stay those that it was trained with."""
    backbone = [tiny_backbone if x == options[options.index("--path") + 1] else x for x in options]
    given = start("eval_lm", *backbone, "--tokens-per-sample", 8, cwd=tmp_path)
    overridden = start("eval_lm", *backbone, "--model-overrides", "{'tokens_per_sample': 8}", cwd=tmp_path)
    model = load_language_model(tiny_backbone, options[0])
    expected = mean_loss(model, random_documents(VALID_LENGTHS, seed=1), 8)
    for process in (given, overridden):
        assert reported(finish(process)) == (TOKENS, pytest.approx(expected, abs=1e-4))


def load_language_model(path, data):
    task = tasks.setup_task(OmegaConf.create({"_name": "language_modeling", "data": str(data)}))
    return checkpoint_utils.load_model_ensemble([str(path)], task=task)[0][0].eval()


@torch.no_grad()
def mean_loss(model, documents, segment):
    """Loss in bits of a stock language model that reads each segment by itself."""
    total = 0.0
    for document in map(torch.from_numpy, documents):
        source = torch.cat([document.new_tensor([2]), document[:-1]])
        for inputs, targets in zip(source.split(segment), document.split(segment)):
            total += F.cross_entropy(model(inputs[None])[0][0], targets, reduction="sum").item() / math.log(2)
    return total / sum(map(len, documents))


def test_documents_behind_a_given_memory(reference, options, tiny_data, tiny_longmem, tmp_path):
    """Each starts with it, in whichever lane and after whichever document; it is the memory of the Python API."""
    book = " ".join(f"w{i * i % 60}" for i in range(50))
    (tmp_path / "book").write_text(book)
    text = ["--memory-text", "book", "--memory-save", "memory", "--memory-save-dtype", "float32", "--batch-size", 2]
    output = run("eval_lm", *options, *text, "--results-path", "text", cwd=tmp_path)
    assert "memorized book: 50 tokens" in output
    loading = [*options, "--memory-load", "memory", "--results-path", "loaded"]
    processes = [start("eval_lm", *loading, "--num-shards", 2, "--shard-id", shard, cwd=tmp_path) for shard in (0, 1)]
    model = LongMem.from_pretrained(str(tiny_longmem.checkpoint), data=str(tiny_data), device="cpu")
    model.memorize(book)
    rows = documents(tmp_path / "text")
    for row, document in zip(rows.values(), random_documents(VALID_LENGTHS, seed=1)):
        scores = model.reader.score(torch.from_numpy(document), model.memory)
        assert row["perplexity"] == pytest.approx(math.exp(-scores.mean()), rel=1e-5)
        assert row["perplexity_without_memory"] == reference[1][row["name"]]["perplexity_without_memory"]
        assert row["perplexity"] != pytest.approx(reference[1][row["name"]]["perplexity"], rel=1e-6)
    list(map(finish, processes))
    assert same_documents(documents(tmp_path / "loaded"), rows)


def test_the_backbone_alone(reference, options, tiny_backbone, tmp_path):
    options = [*options]
    options[options.index("--path") + 1] = tiny_backbone
    output = run("eval_lm", *options, "--tokens-per-sample", 16, "--results-path", tmp_path, cwd=tmp_path)
    assert reported(output)[0] == TOKENS
    assert [row["tokens"] for row in documents(tmp_path).values()] == VALID_LENGTHS


def test_per_word_and_byte_with_names_that_are_not_utf_8(tmp_path):
    texts = {
        os.fsdecode(b"caf\xe9.txt"): "It was a dark night.\n\n  déjà vu 🎉\n" * 3,
        "\ud800": "x",
        "plain": "two words " * 20,
    }
    data = sentencepiece_model(tmp_path)
    dictionary, bpe = Dictionary.load(str(data / "dict.txt")), find_bpe(str(data))
    ids = [encode_text(text, dictionary, bpe).tolist() + [dictionary.eos()] for text in texts.values()]
    write_split(data / "test", ids)
    (data / "test.documents.jsonl").write_text("".join(json.dumps({"name": name}) + "\n" for name in texts))
    options = [data, *TASK, "--path", data / "model.pt", "--gen-subset", "test", "--cpu", "--results-path"]
    output = run("eval_lm", *options, tmp_path / os.fsdecode(b"r\xe9sults"), cwd=tmp_path)
    rows = documents(tmp_path / os.fsdecode(b"r\xe9sults"))
    assert list(rows) == list(texts)
    total = 0.0
    for row, text in zip(rows.values(), texts.values()):
        nats = row["tokens"] * math.log(row["perplexity"])
        total += nats
        assert (row["words"], row["bytes"]) == (len(text.split()), len(text.encode()))
        assert row["perplexity_per_word"] == pytest.approx(math.exp(nats / len(text.split())))
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()))
    joined = " ".join(texts.values())
    per_word, per_byte = re.search(r"Perplexity per word: ([\d.]+), Bits per byte: ([\d.]+)$", output, re.M).groups()
    assert float(per_word) == pytest.approx(math.exp(total / len(joined.split())), abs=6e-3)
    assert float(per_byte) == pytest.approx(total / math.log(2) / (len(joined.encode()) - 2), abs=6e-5)
    assert "r\\udce9sults" in output and "Logging error" not in output
    assert f"Perplexity per word: {per_word}, Bits per byte: {per_byte}" in run("eval_lm", *options[:-1], cwd=tmp_path)


def test_a_damaged_checkpoint_is_refused(options, tiny_longmem, tmp_path):
    (tmp_path / "cut.pt").write_bytes(tiny_longmem.checkpoint.read_bytes()[:5000])
    options = [*options]
    options[options.index("--path") + 1] = tmp_path / "cut.pt"
    output = run("eval_lm", *options, cwd=tmp_path, succeeds=False)
    assert re.search(r"checkpoint .*cut.pt cannot be read \(.+\)", output)


@torch.no_grad()
def test_a_sliding_window_of_a_backbone(options, tiny_backbone, tmp_path):
    """Each token is scored once, in windows that overlap, as a plain loop does; positions start with each window."""
    backbone = [tiny_backbone if x == options[options.index("--path") + 1] else x for x in options]
    slide = ["--context-window", 5, "--batch-size", 3]
    processes = [
        start("eval_lm", *backbone, *slide, "--tokens-per-sample", 16, "--results-path", tmp_path, cwd=tmp_path),
        start("eval_lm", *options, "--context-window", 4, cwd=tmp_path),
        start("eval_lm", *backbone, *slide, "--memory-scope", "stream", cwd=tmp_path),
        start("eval_lm", *backbone, "--context-window", 16, "--tokens-per-sample", 16, cwd=tmp_path),
    ]
    model, losses = load_language_model(tiny_backbone, options[0]), []
    for document in map(torch.from_numpy, random_documents(VALID_LENGTHS, seed=1)):
        source = torch.cat([document.new_tensor([2]), document[:-1]])
        for begin in range(0, len(document), 11):
            first = max(0, begin - 5)
            logits = model(source[None, first : begin + 11])[0][0, begin - first :]
            losses.append(F.cross_entropy(logits, document[begin : begin + 11], reduction="none"))
    expected = torch.cat(losses).mean().item() / math.log(2)
    assert reported(finish(processes[0])) == (TOKENS, pytest.approx(expected, abs=1e-4))
    assert [row["tokens"] for row in documents(tmp_path).values()] == VALID_LENGTHS
    assert "--context-window 4 is not supported by a model with a memory" in finish(processes[1], succeeds=False)
    assert "which --memory-scope stream joins with others" in finish(processes[2], succeeds=False)
    assert "--context-window 16 leaves no new token in the window" in finish(processes[3], succeeds=False)


def test_without_our_task_there_is_an_error(tiny_data, tiny_longmem, tmp_path):
    output = run(
        "eval_lm",
        tiny_data,
        *TASK[:2],
        "--path",
        tiny_longmem.checkpoint,
        *"--gen-subset valid --cpu --tokens-per-sample 16".split(),
        cwd=tmp_path,
        succeeds=False,
    )
    assert "--task longmem_language_modeling" in output


def evaluation(**options):
    dataset = LaneDataset(Documents(random_documents(VALID_LENGTHS)), 2, 1, 16, 2)
    return EvaluationBatches(LaneIterator(dataset, 0).next_epoch_itr(), dataset, torch.nn.Identity(), **options)


def test_speed_is_logged_where_there_is_no_terminal(caplog):
    with caplog.at_level(logging.INFO):
        steps = len(list(evaluation(log_interval=2)))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == steps // 2
    assert all(re.fullmatch(rf"\d+ of {TOKENS} tokens, [\d,]+ tokens/s", line) for line in lines)


def test_speed_is_shown_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(evaluation())
    assert re.search(rf"/{TOKENS} \[.* tokens/s\]", capsys.readouterr().err)


def test_a_results_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(OSError, match="--results-path .*results cannot be made a directory"):
        evaluation(results_path=str(tmp_path / "results"))


def test_tokens_that_were_not_scored_are_an_error(tmp_path):
    """If a batch is lost on its way through fairseq, no results are written."""
    with pytest.raises(RuntimeError, match="0 of the 50 tokens of document 0 were scored"):
        list(evaluation(results_path=str(tmp_path)))
    assert not list(tmp_path.iterdir())
