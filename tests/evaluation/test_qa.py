"""Question answering: normalization, exact match and F1 worked out by hand; answers and losses against direct calls."""

import json

import pytest

from longmem_fairseq.evaluation.command import main, run
from longmem_fairseq.evaluation.command_line import parser_of
from longmem_fairseq.evaluation.qa import MEMORY, WINDOW, QuestionAnswering, exact_match, f1, normalize, read_articles
from longmem_fairseq.evaluation.scoring.generate import generate

T = 64
ROWS = [
    {
        "id": "q1",
        "title": "Old_Ships",
        "context": "The Argo was a ship .",
        "question": "What was it ?",
        "answers": ["a ship", "ship"],
    },
    {"id": "q2", "title": "Old_Ships", "context": "It sank .", "question": "What did it do ?", "answers": ["sank"]},
    {"id": "q3", "title": "Dogs", "context": "Rex is a dog .", "question": "Who is Rex ?", "answers": ["a dog"]},
]


def test_normalization():
    assert normalize("The  U.S. Navy's 'An-Apple', a the") == "us navys anapple"
    assert exact_match("the Argo!", "Argo") == 1.0 and exact_match("Argos", "Argo") == 0.0


@pytest.mark.parametrize(
    "answer, truth, expected",
    [
        ("the cat sat", "cat sat down", 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("dog", "cat", 0.0),
        ("cat cat cat", "cat cat", 2 * (2 / 3) / (2 / 3 + 1)),  # a word counts as often as both have it
        ("", "the", 0.0),  # as in the evaluation of SQuAD 1.1, though it is an exact match
        ("", "cat", 0.0),
        ("a b c d", "d x", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # "a" is an article
    ],
)
def test_f1(answer, truth, expected):
    assert f1(answer, truth) == pytest.approx(expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("squad")
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    articles = {}
    for row in ROWS:
        qa = {"id": row["id"], "question": row["question"], "answers": [{"text": a} for a in row["answers"]]}
        articles.setdefault(row["title"], []).append({"context": row["context"], "qas": [qa]})
    official = {"version": "1.1", "data": [{"title": t, "paragraphs": p} for t, p in articles.items()]}
    (directory / "official.json").write_text(json.dumps(official))
    return directory


def arguments(files, data, directory, *more):
    return [
        str(x)
        for x in (
            "--path",
            files.longmem,
            "--tokenizer",
            files.directory,
            "--data",
            data / "test.jsonl",
            "--train",
            data / "official.json",
            "--results-path",
            directory,
            *f"--cpu --tokens-per-sample {T} --demonstrations 1 --max-new-tokens 6 --cache-lambda 0.2".split(),
            *"--cache-theta 0.1".split(),
            *more,
        )
    ]


@pytest.fixture(scope="module")
def outcome(files, data, tmp_path_factory):
    directory, evaluation = tmp_path_factory.mktemp("report"), QuestionAnswering()
    args = parser_of(evaluation).parse_args(arguments(files, data, directory, "--seed", 1))
    finished = run(evaluation, args)
    items = [json.loads(line) for line in (directory / "items.jsonl").open()][1:]
    return evaluation, finished, {row["item"]: row["result"] for row in items}


def test_answers(outcome):
    """Prompts written out; passages memorized, or before the demonstrations."""
    evaluation, _, items = outcome
    scorer = evaluation.scorer
    encode = scorer.tokenizer.encode
    assert evaluation.demonstrations in {f"Question: {r['question']}\nAnswer: {r['answers'][0]}\n\n" for r in ROWS}
    memories = {
        "Old Ships": "Old Ships\n\nThe Argo was a ship .\n\nIt sank .\n\n",
        "Dogs": "Dogs\n\nRex is a dog .\n\n",
    }
    assert list(items) == ["Old Ships: 0-1", "Dogs: 0-0"]
    rows = {row["name"]: row for result in items.values() for row in result["questions"]}
    for row in ROWS:
        question = f"{evaluation.demonstrations}Question: {row['question']}\nAnswer:"
        state = scorer.new_state()
        scorer.memorize(state, encode(memories[row["title"].replace("_", " ")]))
        truth = encode(f"{question} {row['answers'][0]}\n")[len(encode(question)) :]
        assert rows[row["id"]]["tokens"] == len(truth)
        for place, behind, prompt in (
            (MEMORY, state, question),
            (WINDOW, scorer.new_state(), f"{row['context']}\n\n{question}"),
        ):
            (scores,) = scorer.window(behind, encode(prompt), len(truth)).score([truth])
            for system in scorer.systems:
                (answer,) = generate(scorer, system, behind, [encode(prompt)], 6)
                assert rows[row["id"]]["answers"][place][system] == scorer.tokenizer.decode(answer).strip()
                loss = -float(scores[system].sum())
                assert rows[row["id"]]["loss"][place][system] == pytest.approx(loss, abs=5e-3)


def test_figures(outcome):
    """The best over the right answers, averaged over questions."""
    evaluation, finished, items = outcome
    rows = [row for result in items.values() for row in result["questions"]]
    made_up = json.loads(json.dumps(items))
    replies = {"q1": "The ship", "q2": "it sank fast", "q3": "cat"}
    for row in (row for result in made_up.values() for row in result["questions"]):
        row["answers"][MEMORY]["memory on"] = replies[row["name"]]
    table = evaluation.tables(made_up)[0]
    assert table.columns[f"exact match, {MEMORY}"]["memory on"].interval().value == pytest.approx(100 / 3)
    assert table.columns[f"F1, {MEMORY}"]["memory on"].interval().value == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert len(rows) == 3 and finished.report["examples"][0]["right"] == ["a ship", "ship"]


def test_layouts(data, tmp_path):
    from_lines, official = (read_articles(str(data / name)) for name in ("test.jsonl", "official.json"))
    assert from_lines == official and [article.title for article in from_lines] == ["Old Ships", "Dogs"]
    assert from_lines[0].passages == ["The Argo was a ship .", "It sank ."]
    paragraph = {"context": "c", "qas": [{"id": "q", "question": "?", "answers": []}]}
    (tmp_path / "squad2.json").write_text(json.dumps({"data": [{"title": "x", "paragraphs": [paragraph]}]}))
    with pytest.raises(ValueError, match="question q has no answer: give SQuAD 1.1"):
        read_articles(str(tmp_path / "squad2.json"))


def test_limit_and_errors(files, data, tmp_path):
    evaluation = QuestionAnswering()
    args = parser_of(evaluation).parse_args(arguments(files, data, tmp_path / "limited", "--limit", 1))
    assert run(evaluation, args).report["items"] == 1 and sum(map(len, evaluation.groups.values())) == 1

    def refuses(sentence, *more):
        with pytest.raises(SystemExit, match=sentence):
            main(QuestionAnswering(), arguments(files, data, tmp_path / "report", *more))

    (tmp_path / "other.json").write_text("[]")
    refuses("has neither SQuAD's layout", "--data", tmp_path / "other.json")
    refuses("has 3 questions, not --demonstrations 9", "--demonstrations", 9)
    refuses("--max-new-tokens 40 leaves less than half", "--max-new-tokens", 40)
