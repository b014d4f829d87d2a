"""Test the benchmark of search as a whole command on tiny shapes."""

import json

from longmem_fairseq.memory.search.kernel import available_instructions
from tests.examples.commands import run_example
from tests.memory import kernel


def test_search(tmp_path, keys):
    done = run_example(
        "benchmark.search_speed",
        "--tokens",
        1024,
        4096,
        "--heads",
        3,
        "--queries",
        16,
        "--width",
        8,
        "--steps",
        3,
        "--keys",
        keys,
        *"--indices IVF16,Flat:nprobe=16 IVF16,Flat:nprobe=1 IVF300,Flat HNSW8:efSearch=99".split(),
        "--json",
        tmp_path / "s.json",
        "--png",
        tmp_path / "s.png",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    natives = [] if kernel.reason else [f"native, {name}" for name in available_instructions()]
    exact = ["torch product alone", "torch topk", "torch two-level", "faiss knn", *natives]
    indices = []
    for name in ("IVF16,Flat:nprobe=16", "IVF16,Flat:nprobe=1", "IVF300,Flat:nprobe=18"):
        indices += [name, *(f"{name}, {native}" for native in natives)]
    indices.append("HNSW8:efSearch=99")
    small = [name for name in indices if "IVF300" not in name]  # too few chunks to train it
    assert [row["backend"] for row in rows] == [*exact, *small, *exact, *indices]
    assert all(row["milliseconds"] >= row["fastest"] > 0 for row in rows)
    assert all((row["worst"] is None) == (row["backend"] == "torch product alone") for row in rows if "worst" in row)
    recall = {row["backend"]: row["recall"] for row in rows if row["tokens"] == 4096}
    assert recall["IVF16,Flat:nprobe=16"] == recall["faiss knn"] == 1.0 > recall["IVF16,Flat:nprobe=1"] > 0.2
    assert all(row["made_s"] > 0 and row["add_ms"] > 0 for row in rows if "made_s" in row)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG") and "| HNSW8:efSearch=99 |" in done.stdout
