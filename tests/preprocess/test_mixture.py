"""Mixtures have the requested proportions and size; shards divide a collection without overlap or coordination."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.data.manifest import read_manifest, verify_shards
from preprocess.binarize_documents import main
from preprocess.blocks import ParsedBlock
from preprocess.document_source import DocumentSource
from preprocess.errors import InputError
from preprocess.mixture import parse_weights, plan, threshold_for
from preprocess.selection import draw
from preprocess.shards import LARGEST_EXCESS, shard
from preprocess.survey import BINS, Survey, SurveyPart
from preprocess.text_document import TextDocument
from preprocess.tokenization import load_tokenizer

SUBSETS = {"Books3": 200, "Pile-CC": 1200, "PubMed": 800}
FILES = 6


@pytest.fixture(scope="module")
def pile(tmp_path_factory, sources):
    """Six JSON-lines files like the Pile's: 2,200 documents of three subsets, mixed.

    The files are of the same sizes whatever the Python whose library the text is, since sizes decide about shards: of
    its lines only those that JSON writes as they are, made 40 characters long.
    """
    directory = tmp_path_factory.mktemp("pile")
    choose, sizes = random.Random(5), random.Random(6)
    lines = [line for text in sources for line in text.split("\n") if line.strip()]
    lines = [f"{line:40.40}" for line in lines if json.dumps(line) == f'"{line}"']
    names = [name for name, count in SUBSETS.items() for _ in range(count)]
    sizes.shuffle(names)
    for number in range(FILES):
        with open(directory / f"0{number}.jsonl", "w") as stream:
            for i, name in enumerate(names[number::FILES]):
                length = sizes.randint(1, 60 if name == "Books3" else 4)
                start = choose.randrange(len(lines) - length)
                text = "\n".join(lines[start : start + length])
                record = {"text": text, "name": f"{name} {number}.{i}", "meta": {"pile_set_name": name}}
                stream.write(json.dumps(record) + "\n")
    return directory


@pytest.fixture(scope="module")
def run(pile, model_file, tmp_path_factory):
    def run(*more) -> Path:
        made = tmp_path_factory.mktemp("made")
        main(["--train", str(pile), "--tokenizer", str(model_file), "--destdir", str(made), *map(str, more)])
        return made

    return run


def names(made) -> list[str]:
    return [json.loads(line)["name"] for line in (made / "train.documents.jsonl").read_text().splitlines()]


def test_mixture_has_the_size_and_the_shares(run, pile):
    everything = read_manifest(run())["splits"]["train"]
    assert {name: counts["documents"] for name, counts in everything["subsets"].items()} == SUBSETS
    weights = ["--subset-weights", "Books3=3", "PubMed=1", "--token-budget", 20_000]
    made = run(*weights)
    manifest = read_manifest(made)
    train = manifest["splits"]["train"]
    assert set(train["subsets"]) == {"Books3", "PubMed"}
    assert train["tokens"] == pytest.approx(20_000, rel=0.03)
    assert train["subsets"]["Books3"]["tokens"] == pytest.approx(15_000, rel=0.04)  # by a document of about 400 tokens
    assert train["subsets"]["PubMed"]["tokens"] == pytest.approx(5_000, rel=0.04)
    assert train["documents"] + train["left_out"] == sum(SUBSETS.values())
    for name, expected in manifest["mixture"]["subsets"].items():
        assert expected["available_tokens"] == pytest.approx(everything["subsets"][name]["tokens"], rel=0.001)
    assert names(run(*weights, "--workers", 2)) == names(made)
    other = names(run(*weights, "--seed", 2))
    assert len(set(other) & set(names(made))) < 0.7 * len(other)


def test_budget_alone_keeps_the_proportions(run):
    everything = read_manifest(run())["splits"]["train"]
    half = read_manifest(run("--token-budget", everything["tokens"] // 2))["splits"]["train"]
    for name, counts in everything["subsets"].items():
        assert half["subsets"][name]["tokens"] == pytest.approx(counts["tokens"] / 2, rel=0.03)


def test_weights_alone_take_all_that_the_scarcest_subset_allows(run):
    made = read_manifest(run("--subset-weights", "Pile-CC=1", "PubMed=1"))["splits"]["train"]
    assert made["subsets"]["PubMed"]["documents"] == SUBSETS["PubMed"]
    assert made["subsets"]["Pile-CC"]["tokens"] == pytest.approx(made["subsets"]["PubMed"]["tokens"], rel=0.05)


def test_input_paths_are_subsets_too(tmp_path, model_file, sources):
    for name, part in (("code", sources[:30]), ("more.code", sources[30:60])):
        (tmp_path / name).mkdir()
        for number, text in enumerate(part):
            (tmp_path / name / f"{number}.py").write_text(text)
    given = ["--train", str(tmp_path / "code"), str(tmp_path / "more.code"), "--tokenizer", str(model_file)]
    main([*given, "--subset-weights", "more.code=1", "--destdir", str(tmp_path / "made")])
    assert set(read_manifest(tmp_path / "made")["splits"]["train"]["subsets"]) == {"more.code"}


@pytest.mark.parametrize(
    "shards, divided", [(3, "files"), (FILES, "files"), (4, "documents"), (FILES + 1, "documents")]
)
def test_shards_divide_the_collection(run, shards, divided):
    whole = names(run())
    parts = [run("--shard-id", i, "--num-shards", shards) for i in range(shards)]
    assert Counter(name for part in parts for name in names(part)) == Counter(whole)
    assert [read_manifest(part)["shard"] for part in parts] == [
        {"id": i, "of": shards, "divided_by": divided} for i in range(shards)
    ]
    tokens = [read_manifest(part)["splits"]["train"]["tokens"] for part in parts]
    assert max(tokens) < 1.4 * sum(tokens) / shards
    verify_shards(parts, "train", full=True)


@pytest.mark.parametrize("files, shards", [(2, 2), (3, 2), (1, 2)])
def test_a_file_that_is_named_twice_is_written_twice(pile, model_file, tmp_path, caplog, files, shards):
    """By one run and by shards, whether these are whole files or not."""
    given = ["--train", *[str(pile / "00.jsonl")] * files, "--tokenizer", str(model_file)]
    main([*given, "--destdir", str(tmp_path / "whole")])
    assert ("is named" in caplog.text) == (files > 1)
    parts = []
    for i in range(shards):
        main([*given, "--shard-id", str(i), "--num-shards", str(shards), "--destdir", str(tmp_path / str(i))])
        parts += names(tmp_path / str(i))
    whole = Counter(names(tmp_path / "whole"))
    assert Counter(parts) == whole and set(whole.values()) == {files}


def test_shards_of_a_mixture_share_one_survey(run, tmp_path):
    weights = ["--subset-weights", "Books3=3", "PubMed=1", "--token-budget", 20_000]
    whole = names(run(*weights))
    survey = tmp_path / "survey.json"
    parts = []
    for i in range(3):
        parts += names(run(*weights, "--survey", survey, "--shard-id", i, "--num-shards", 3))
        if i == 0:
            made = survey.stat().st_mtime_ns
    assert Counter(parts) == Counter(whole) and survey.stat().st_mtime_ns == made
    with pytest.raises(SystemExit, match="was made from other --train files, tokenizer or --seed"):
        run(*weights, "--survey", survey, "--seed", 9)
    survey.write_text("{")
    with pytest.raises(SystemExit, match="--survey .* cannot be read .*: delete it"):
        run(*weights, "--survey", survey)


def test_validation_data_goes_into_shard_0(run, pile):
    for i, expected in ((0, {"train", "valid"}), (1, {"train"})):
        made = run("--valid", pile / "00.jsonl", "--shard-id", i, "--num-shards", 2)
        assert set(read_manifest(made)["splits"]) == expected


def test_stock_fairseq_reads_shards_in_turn(run, pile):
    from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

    shards = [run("--valid", pile / "00.jsonl", "--shard-id", i, "--num-shards", 2) for i in range(2)]
    config = LanguageModelingConfig(data=":".join(map(str, shards)), sample_break_mode="none", tokens_per_sample=128)
    config.seed, config.dataset_impl, config.train_subset, config.use_plasma_view = 1, None, "train", False
    task = LanguageModelingTask.setup_task(config)
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch)
        seen = sum(len(task.dataset("train")[i]["target"]) for i in range(len(task.dataset("train"))))
        assert seen == read_manifest(shards[(epoch - 1) % 2])["splits"]["train"]["tokens"]
    task.load_dataset("valid")


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 1000), max_size=40), shards=st.integers(1, 8))
def test_every_file_has_one_owner(sizes, shards):
    files = [DocumentSource(Path(str(i)), str(i), "", size) for i, size in enumerate(sizes)]
    parts = [shard(files, i, shards) for i in range(shards)]
    (divided,) = {divided for _, _, divided in parts}
    if divided == "documents":
        assert all(part == files and stripe == (i, shards) for i, (part, stripe, _) in enumerate(parts))
        return
    assert sorted(file.name for part, _, _ in parts for file in part) == sorted(file.name for file in files)
    assert all(stripe == (0, 1) for _, stripe, _ in parts)
    assert all(part == sorted(part, key=files.index) for part, _, _ in parts)  # in input order
    loads = [sum(file.size for file in part) for part, _, _ in parts]
    assert shards == 1 or max(loads) * shards <= LARGEST_EXCESS * sum(loads)


@settings(deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(0, BINS - 1), st.integers(1, 500)), min_size=1, max_size=50),
    part=st.floats(0.001, 1),
)
def test_threshold_is_right_within_a_bin(documents, part):
    histogram = np.zeros(BINS, np.int64)
    for place, size in documents:
        histogram[place] += size
    characters = part * histogram.sum()
    threshold = threshold_for(histogram, characters)
    assert 0 < threshold <= 1
    whole = int(threshold * BINS)
    assert histogram[:whole].sum() <= characters + 1e-6
    assert histogram[: whole + 1].sum() >= characters - 1e-6


def test_draws_are_uniform_and_independent():
    keep = np.array([draw(1, f"file:{i}", "keep") for i in range(20_000)])
    other = np.array([draw(2, f"file:{i}", "keep") for i in range(20_000)])
    assert abs(np.histogram(keep, 10, (0, 1))[0] - 2000).max() < 200
    assert abs(np.corrcoef(keep, other)[0, 1]) < 0.03


class Letters:
    """A tokenizer of pairs of letters."""

    def encode_arrays(self, texts):
        return [text[::2] for text in texts]


def survey_of(texts_by_subset, rate):
    survey = Survey()
    for block in range(3):
        parsed = ParsedBlock()
        for subset, texts in texts_by_subset.items():
            for number, text in enumerate(texts):
                parsed.documents.append(TextDocument("", text, subset))
                parsed.keys.append(f"{block}:{subset}:{number}")
        survey.add(SurveyPart.of(parsed, Letters(), 1, rate))
    return survey


def test_survey_counts_everything_and_survives_its_file():
    survey = survey_of({"even": ["ab" * n for n in (1, 3, 5)], "other": ["abcd"]}, 1.0)
    assert survey.subsets["even"].characters == 3 * (2 + 6 + 10) == survey.subsets["even"].histogram.sum()
    assert survey.subsets["even"].tokens == 3 * (1 + 3 + 5) + 9  # and an end for each document
    again = Survey.from_json(json.loads(json.dumps(survey.to_json())))
    assert again.to_json() == survey.to_json()
    assert plan(survey, {}, 10, 1)[0] == plan(again, {}, 10, 1)[0]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30_000), min_size=1, max_size=20), rate=st.floats(0.001, 0.99))
def test_sample_of_a_survey(lengths, rate):
    subset = survey_of({"s": ["ab" * length for length in lengths]}, rate).subsets["s"]
    assert 0 < subset.sampled_characters <= 3 * max(2048, 2 * rate * sum(lengths))


def test_sample_estimates_the_tokens(sources, model_file):
    tokenizer = load_tokenizer(model_file)
    parsed = ParsedBlock(
        [TextDocument(str(i), text) for i, text in enumerate(sources)], [str(i) for i in range(len(sources))]
    )
    survey = Survey()
    survey.add(SurveyPart.of(parsed, tokenizer, 1, 0.1))
    exact = sum(len(tokenizer.encode_array(text)) + 1 for text in sources)
    assert survey.subsets[""].sampled_characters < 0.2 * sum(map(len, sources))
    assert survey.subsets[""].tokens == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("argument", ["a", "a=", "=1", "a=0", "a=-1", "a=nan", "a=inf"])
def test_bad_weights(argument):
    with pytest.raises(InputError, match="is not NAME=W with a positive number"):
        parse_weights([argument])
    with pytest.raises(InputError, match="names a twice"):
        parse_weights(["a=1", "a=2"])
    assert parse_weights(["a=b=0.5"]) == {"a=b": 0.5}
