"""Judged responses: by a local server that speaks OpenAI's protocol, and by hand."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from examples.dialogue import endpoint, judge
from longmem_fairseq.evaluation.judged_pairs import JUDGED, JUDGED_KEY, JudgedPair, as_lines, read_pairs

GOOD, BAD = "Rex is back .", "I am a duck ."  # responses of memory on and memory off
NUMBERS = {GOOD: (9, 8, 7), BAD: (3, 2, 1)}


@pytest.fixture
def files(tmp_path):
    pairs = [
        JudgedPair(
            f"c{i} response 0", "[Session 1]\nAnn: Rex ran away .", "Ben", {"memory off": BAD, "memory on": GOOD}, "?"
        )
        for i in range(12)
    ]
    for name, content in as_lines(pairs).items():
        (tmp_path / name).write_text(content)
    return tmp_path


class Server(BaseHTTPRequestHandler):
    """A judge that prefers what it finds good, except in the first pair; every third answer is a failure."""

    requests = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, self.headers["Authorization"], body))
        if len(self.requests) % 3 == 0:
            self.send_error(503, "busy")
            return
        question = body["messages"][0]["content"]
        first = question.split("Response A: ")[1].split("\n")[0]
        texts = {"A": first, "B": BAD if first == GOOD else GOOD}
        verdict = {name: dict(zip(judge.CRITERIA, NUMBERS[text])) for name, text in texts.items()}
        verdict["better"] = "tie" if len(self.requests) == 1 else "A" if first == GOOD else "B"
        answer = "I cannot tell." if len(self.requests) == 5 else f"Here it is: {json.dumps(verdict)}"
        content = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "_WAIT", 0.01)
    Server.requests.clear()
    http = HTTPServer(("localhost", 0), Server)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://localhost:{http.server_port}/v1"
    http.shutdown()
    thread.join()
    http.server_close()


def arguments(files, *more):
    return [str(x) for x in ("--judge-file", files / JUDGED, "--results-path", files / "judged", *more)]


def test_the_key_tells_whose_response_is_whose(files):
    rows = [json.loads(line) for line in (files / JUDGED).open()]
    assert {row["responses"][0] for row in rows} == {GOOD, BAD}, "the order is random"
    assert all("memory" not in json.dumps(row) for row in rows)
    for pair in read_pairs(str(files / JUDGED), str(files / JUDGED_KEY)):
        assert pair.responses == {"memory on": GOOD, "memory off": BAD}


def test_by_a_model(files, server, monkeypatch, capsys):
    """A busy server and an answer without a verdict are asked again; what was judged is not judged twice."""
    monkeypatch.setenv("JUDGE_KEY", "secret")
    options = ("--endpoint", server, "--model", "judge-1", "--key-variable", "JUDGE_KEY")
    judge.main(arguments(files, *options))
    path, key, body = Server.requests[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "judge-1", 0)
    question = body["messages"][0]["content"]
    assert (
        "Ann: Rex ran away .\nBen:" in question and "what Ben really said: ?" in question and "memory" not in question
    )
    report = json.loads((files / "judged" / "judged.json").read_text())
    figures = {
        column: {system: round(figure["value"], 2) for system, figure in systems.items()}
        for column, systems in report["table"]["figures"].items()
    }
    assert figures == {
        "coherence": {"memory off": 3, "memory on": 9},
        "consistency": {"memory off": 2, "memory on": 8},
        "engagingness": {"memory off": 1, "memory on": 7},
        "preferred": {"memory off": 4.17, "memory on": 95.83},  # 11 of 12 and a tie
    }
    preferred = report["table"]["figures"]["preferred"]["memory on"]
    assert preferred["low"] < 95.83 < preferred["high"] and "95.8 % [" in capsys.readouterr().out
    asked = len(Server.requests)
    judge.main(arguments(files, *options))
    assert len(Server.requests) == asked


def test_by_hand(files, monkeypatch, capsys):
    """An answer of another form is asked again, and an interrupted run continues."""
    answers = iter(["8", "8 4", "7,3", "6 2", "a"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers, None) or (_ for _ in ()).throw(EOFError))
    with pytest.raises(SystemExit, match="interrupted; the same command continues from"):
        judge.main(arguments(files, "--by-hand", "--limit", 2))
    assert "this is not an answer" in capsys.readouterr().out
    answers = iter(["10 1", "10 1", "10 1", "tie"])
    judge.main(arguments(files, "--by-hand", "--limit", 2))
    lines = (files / "judged" / "items.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["result"] for line in lines[1:])
    assert first == {
        "A": {"coherence": 8, "consistency": 7, "engagingness": 6},
        "B": {"coherence": 4, "consistency": 3, "engagingness": 2},
        "better": "A",
    }
    assert second["better"] == "tie"


def test_errors_are_one_sentence(files, server, tmp_path):
    def refuses(sentence, *more):
        with pytest.raises(SystemExit, match=sentence) as stopped:
            judge.main(arguments(files, *more))
        assert "\n" not in str(stopped.value)

    refuses("a judge is missing: give --endpoint and --model, or --by-hand")
    refuses("--by-hand contradicts --endpoint", "--by-hand", "--endpoint", server)
    refuses("--endpoint localhost is not an address", "--endpoint", "localhost", "--model", "x")
    refuses("--limit 0 is less than 1", "--by-hand", "--limit", 0)
    refuses("does not answer: .*refused", "--endpoint", "http://localhost:9/v1", "--model", "x")
    (tmp_path / "other").write_text('{"id": 1}\n')
    refuses("other, line 1, is not a pair of responses", "--by-hand", "--key-file", tmp_path / "other")
    (tmp_path / "key").write_text('{"id": "x", "systems": ["a", "b"]}\n')
    refuses("key does not have c0 response 0", "--by-hand", "--key-file", tmp_path / "key")
