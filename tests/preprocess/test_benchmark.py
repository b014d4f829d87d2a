"""The benchmark runs, and its data equals, token by token, the data that fairseq's two tools make of the same text."""

import json

import pytest

from preprocess.benchmark import main


def test_same_data_as_fairseqs_own_tools(source_files, tmp_path, capsys):
    documents = [str(path) for path in source_files[:30]]
    main(["--documents", *documents, "--output", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["documents"] == 30 and report["tokens"] > 50_000
    assert len(report["steps"]) == 5 and all(step["seconds"] > 0 for step in report["steps"].values())
    assert report["times_fairseq_preprocess"] > 0  # how fast is for the benchmark to measure, not for a test
    assert "times the documents/s of fairseq-preprocess" in capsys.readouterr().out


def test_a_tool_that_fails_is_named(tmp_path, source_files):
    with pytest.raises(SystemExit, match="binarize_documents --workers 1 failed: .*dictionary"):
        (tmp_path / "dict.txt").write_text("1 1\n")
        main(["--documents", str(source_files[0]), "--dict", str(tmp_path / "dict.txt")])
