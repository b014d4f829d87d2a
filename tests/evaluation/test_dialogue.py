"""Dialogue: true responses against plain scores, BLEU against sacrebleu's command, and the layouts of files."""

import json
import math
import subprocess
import sys

import pytest
import torch

from longmem_fairseq.evaluation.bleu import Bleu
from longmem_fairseq.evaluation.command import main, run
from longmem_fairseq.evaluation.command_line import parser_of
from longmem_fairseq.evaluation.conversations import read_conversations
from longmem_fairseq.evaluation.dialogue import Dialogue
from longmem_fairseq.evaluation.judged_pairs import JUDGED, JUDGED_KEY, read_pairs
from longmem_fairseq.evaluation.scoring.generate import generate

T = 64
SESSIONS = [
    [("Ann", "Hello Ben , I got a dog ."), ("Ben", "What is its name ?"), ("Ann", "It is Rex .")],
    [("Ben", "How is Rex ?"), ("Ann", "Rex is fine , he likes the park .")],
    [("Ann", "Rex ran away today ."), ("Ben", "Is he back ?"), ("Ann", "Yes , he came back .")],
]
WHEN = [None, "2 days", "1 week"]


def conversation(name="c1"):
    return {
        "id": name,
        "sessions": [
            {"session": i + 1, "since_previous": when, "turns": [{"speaker": s, "text": t} for s, t in turns]}
            for i, (turns, when) in enumerate(zip(SESSIONS, WHEN))
        ],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("dialogue") / "test.jsonl"
    path.write_text("".join(json.dumps(conversation(name)) + "\n" for name in ("c1", "c2")))
    return path


def arguments(files, data, directory, *more):
    return [
        str(x)
        for x in (
            "--path",
            files.longmem,
            "--tokenizer",
            files.directory,
            "--data",
            data,
            "--results-path",
            directory,
            *f"--cpu --tokens-per-sample {T} --max-new-tokens 8 --cache-lambda 0.2 --cache-theta 0.1".split(),
            *more,
        )
    ]


def evaluate(files, data, directory, *more):
    evaluation = Dialogue()
    return evaluation, run(evaluation, parser_of(evaluation).parse_args(arguments(files, data, directory, *more)))


def items_of(directory):
    rows = [json.loads(line) for line in (directory / "items.jsonl").open()]
    return {row["item"]: row["result"] for row in rows if "item" in row}


@pytest.fixture(scope="module")
def outcome(files, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    return directory, *evaluate(files, data, directory, "--limit", 1)


def test_true_responses(outcome):
    """The text up to each response written out: memorized up to its session, then in the window."""
    directory, evaluation, _ = outcome
    scorer, items = evaluation.scorer, items_of(directory)
    encode = scorer.tokenizer.encode
    headings = ["[Session 1]\n", "\n[Session 2, 2 days]\n", "\n[Session 3, 1 week]\n"]
    texts = [h + "".join(f"{s}: {t}\n" for s, t in turns) for h, turns in zip(headings, SESSIONS)]
    for number, turns in enumerate(SESSIONS):
        result = items[f"c1 session {number}"]
        assert result["earlier_sessions"] == number and len(result["turns"]) == len(turns)
        state = scorer.new_state()
        for text in texts[:number]:
            scorer.memorize(state, encode(text))
        for i, (speaker, text) in enumerate(turns):
            before = headings[number] + "".join(f"{s}: {t}\n" for s, t in turns[:i]) + f"{speaker}:"
            response = encode(f"{before} {text}\n")[len(encode(before)) :]
            (scores,) = scorer.window(state, encode(before), len(response)).score([response])
            assert result["turns"][i]["tokens"] == len(response)
            for system in scorer.systems:
                assert result["turns"][i]["loss"][system] == pytest.approx(-float(scores[system].sum()), abs=5e-3)
            if number == 2:
                (answer,) = generate(scorer, system, state, [encode(before)], 8)
                assert result["turns"][i]["answers"][system] == scorer.tokenizer.decode(answer).strip()
    assert "answers" not in items["c1 session 1"]["turns"][0], "only the last session's are generated"


def test_figures(outcome):
    directory, _, finished = outcome
    items = items_of(directory)
    turns = [turn for item in items.values() for turn in item["turns"]]
    assert finished.report["items"] == 3 and len(turns) == 8
    table, by_distance, by_text = finished.tables
    value = table.columns["perplexity of the true response"]["memory on"].interval().value
    loss = sum(turn["loss"]["memory on"] for turn in turns) / sum(turn["tokens"] for turn in turns)
    assert value == pytest.approx(math.exp(loss))
    # A response is " text\n".
    nats, words = sum(turn["loss"]["memory on"] for turn in turns), sum(len(t["reference"].split()) for t in turns)
    size = sum(len(turn["reference"].encode()) + 2 for turn in turns)
    figures = {column: rows["memory on"].interval().value for column, rows in by_text.columns.items()}
    assert figures == {
        "perplexity per word": pytest.approx(math.exp(nats / words)),
        "bits per byte": pytest.approx(nats / math.log(2) / size),
    }
    assert list(by_distance.columns) == ["0", "1", "2"] and len(by_distance.columns["2"]["memory on"]) == 3
    title = finished.tables[0].title
    assert "BLEU-4: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp" in title and "SmoothingFunction().method1" in title
    sentences = [turn["sentence_bleu"]["memory on"] for turn in turns if "answers" in turn]
    value = table.columns["sentence BLEU-4"]["memory on"].interval().value
    assert len(sentences) == 3 and value == pytest.approx(sum(sentences) / 3, abs=1e-4)
    assert finished.report["examples"][0]["reference"] == "Rex ran away today ."


def test_responses_for_a_judge(outcome):
    """Those that were generated, with all that was said before, and the key to their order."""
    directory, _, _ = outcome
    turns = items_of(directory)["c1 session 2"]["turns"]
    pairs = read_pairs(str(directory / JUDGED), str(directory / JUDGED_KEY))
    assert [pair.id for pair in pairs] == [f"c1 session 2 response {i}" for i in range(3)]
    for i, pair in enumerate(pairs):
        assert pair.responses == {system: turns[i]["answers"][system] for system in ("memory off", "memory on")}
        assert (pair.speaker, pair.reference) == SESSIONS[2][i]
    assert pairs[1].dialogue.startswith("[Session 1]\nAnn: Hello Ben , I got a dog .\n")
    assert pairs[1].dialogue.endswith("\n[Session 3, 1 week]\nAnn: Rex ran away today .")


def test_sentence_bleu():
    """Three of four words match, two of three pairs, one of two triples, and 0.1 in place of no quadruple."""
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert Bleu().of_sentence("the dog ran away", "the dog ran home") == pytest.approx(expected)
    assert Bleu().of_sentence("", "the dog ran home") == 0
    assert Bleu().of_sentence("he came, yes.", "he came, yes.") == pytest.approx(100)


def test_bleu_is_that_of_the_sacrebleu_command(tmp_path):
    answers = ["he came back home , yes he did", "the dog ran away", "", "It is a fine day in the park ."]
    references = ["yes , he came back home today", "the dog ran away", "Is he back ?", "It was a fine day in the park."]
    (tmp_path / "answers").write_text("\n".join(answers) + "\n")
    (tmp_path / "references").write_text("\n".join(references) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "references", "-i", "answers", "-w", "6", "--format", "json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    reported, bleu = json.loads(done.stdout), Bleu()
    sums = torch.tensor([bleu.counts(a, r) for a, r in zip(answers, references)]).sum(0).numpy()
    assert float(bleu.statistic.compute(sums)) == pytest.approx(reported["score"], abs=1e-5) and reported["score"] > 20
    assert all(part in bleu.signature for part in reported["signature"].split("|"))
    assert bleu.statistic.compute(torch.stack([torch.tensor(sums)] * 6).view(2, 3, 10).numpy()).shape == (2, 3)


def test_it_goes_on_amid_a_conversation(outcome, files, data, tmp_path):
    directory, _, finished = outcome
    lines = (directory / "items.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "items.jsonl").write_text("".join(lines[:3]))  # two of the three sessions
    evaluate(files, data, tmp_path, "--limit", 1)
    for item, result in items_of(directory).items():
        again = items_of(tmp_path)[item]
        for turn, other in zip(result["turns"], again["turns"]):
            assert turn["loss"] == pytest.approx(other["loss"], abs=1e-3)
            assert turn.get("answers") == other.get("answers")


def test_layouts(tmp_path):
    lines = [[{"id": s, "text": t} for s, t in turns] for turns in SESSIONS]
    msc = {
        "dialog": lines[2],
        "metadata": {"initial_data_id": "c1"},
        "personas": [],
        "previous_dialogs": [
            {"dialog": [{"text": x["text"]} for x in lines[0]], "time_num": 2, "time_unit": "days"},
            {"dialog": [{"text": x["text"]} for x in lines[1]], "time_num": 1, "time_unit": "week"},
        ],
    }
    locomo = {"sample_id": "c1", "conversation": {"speaker_a": "Ann", "speaker_b": "Ben"}}
    chronicles = {"dataID": "c1", "time_interval": ["Start", "2 days", "1 week"]}
    misc = {"dataID": "c1", "main_speaker": "Ann", "speaker_list": ["Ann", "Ben"]}
    for i, (turns, ordinal) in enumerate(zip(SESSIONS, ("first", "second", "third"))):
        locomo["conversation"][f"session_{i + 1}_date_time"] = f"day {i}"
        locomo["conversation"][f"session_{i + 1}"] = [{"speaker": s, "dia_id": "x", "text": t} for s, t in turns]
        chronicles[f"{ordinal}_session_dialogue"] = [t for _, t in turns]
        chronicles[f"{ordinal}_session_speakers"] = [s for s, _ in turns]
        misc[f"{ordinal}_session_dialogue"] = [[s for s, _ in turns], [t for _, t in turns]]
    locomo["conversation"]["session_4_date_time"] = "day 4"  # as there, sessions that were not held
    locomo["conversation"]["session_3"][0]["blip_caption"] = "a photo\nof Rex"
    for name, content in (("conversation", conversation()), ("msc", msc), ("chronicles", chronicles), ("misc", misc)):
        (tmp_path / name).write_text(json.dumps(content) + "\n")
    (tmp_path / "locomo").write_text(json.dumps([locomo], indent=1))
    expected = read_conversations(str(tmp_path / "conversation"))
    assert [[tuple(turn) for turn in session.turns] for session in expected[0].sessions] == SESSIONS
    assert read_conversations(str(tmp_path / "chronicles")) == expected
    (parsed,) = read_conversations(str(tmp_path / "misc"))
    assert [session.turns for session in parsed.sessions] == [session.turns for session in expected[0].sessions]
    (parsed,) = read_conversations(str(tmp_path / "msc"))
    assert [s.when for s in parsed.sessions] == [None, "2 days later", "1 week later"]
    assert [t.speaker for t in parsed.sessions[1].turns] == ["Speaker 1", "Speaker 2"]
    assert parsed.sessions[2] == expected[0].sessions[2]._replace(when="1 week later")
    (parsed,) = read_conversations(str(tmp_path / "locomo"))
    assert parsed.sessions[1].turns == expected[0].sessions[1].turns and parsed.sessions[1].when == "day 1"
    assert (
        parsed.sessions[2].turns[0].text == "Rex ran away today . (shows a photo of Rex)" and len(parsed.sessions) == 3
    )


def test_errors(files, data, tmp_path):
    def refuses(sentence, *more):
        with pytest.raises(SystemExit, match=sentence):
            main(Dialogue(), arguments(files, data, tmp_path / "report", *more))

    (tmp_path / "other").write_text('{"text": 1}\n')
    refuses("conversation 1, has no known layout", "--data", tmp_path / "other")
    (tmp_path / "twice").write_text((json.dumps(conversation()) + "\n") * 2)
    refuses("two conversations of the name c1", "--data", tmp_path / "twice")
    refuses("32 leaves less than half of the window of 64 tokens: lower it to 31", "--max-new-tokens", 32)
    refuses("--beam 0 is less than 1", "--beam", 0)
