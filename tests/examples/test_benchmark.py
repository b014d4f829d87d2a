"""The benchmarks of throughput and search as whole commands on tiny shapes, their refusals, and the joined report."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.benchmark import gpu_report, throughput
from longmem_fairseq.hub import LongMem
from tests.memory import kernel
from tests.repository import ROOT
from tests.text_models import sentencepiece_model

TINY = "--layers 2 --dim 16 --heads 2 --vocab 50 --retrieval-layer-index 1 --segment 16 --k 8 --steps 2 --threads 1"


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "examples" / "benchmark" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_throughput(tmp_path):
    done = run("throughput.py", *TINY.split(), "--memory-sizes", 0, 64, "--batch", 2, "--full-windows", 32,
               "--memory-search", "torch", "--json", tmp_path / "t.json", "--png", tmp_path / "t.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    off, on = result["rows"]
    assert [off["memory_size"], on["memory_size"]] == [0, 64]
    assert on["tokens_per_second"] == pytest.approx(2 * 16 / on["seconds_per_step"])
    assert on["ratio_to_off"] == pytest.approx(on["tokens_per_second"] / off["tokens_per_second"])
    # 2 lanes, 2 heads, 16 chunks of 4 tokens, width 8: keys and values, means, and one chunk a lane for the tail.
    assert off["bank_bytes"] == 0 and on["bank_bytes"] == 2 * 2 * 16 * (2 * 4 * 8 * 4 + 4 * 8) + 2 * 2 * 2 * 4 * 8 * 4
    assert min(off["peak_memory_bytes"], on["peak_memory_bytes"]) > 2**26  # PyTorch alone takes more
    (full,) = result["full_attention"]
    assert full["speed_of_longmem"] == pytest.approx(on["tokens_per_second"] / full["tokens_per_second"])
    assert on["ratio_to_full"]["32"] == full["speed_of_longmem"] and full["roofline_share"] > 0
    assert "| 64 |" in done.stdout and "full attention" in done.stdout
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Clusters of keys and queries near them, as real_keys.py writes them: 2 heads, 1,024 chunks of width 8."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(2, 16, 8, generator=generator)
    means, queries = (
        centres[:, torch.randint(16, (n,), generator=generator)] + torch.randn(2, n, 8, generator=generator)
        for n in (1024, 64)
    )
    path = tmp_path_factory.mktemp("keys") / "keys.safetensors"
    save_file({"means": means, "queries": queries}, path)
    return path


@pytest.mark.parametrize("mode", ["eval", "train", "generate"])
def test_throughput_with_an_index_on_real_keys(tmp_path, mode, keys):
    """The small memory is searched exactly, the large one by the index, in a file."""
    indexed = "--memory-sizes 0 64 4096 --memory-index IVF32,Flat --memory-index-parameters nprobe=4 --gbps 10"
    arguments = [*TINY.split(), *indexed.split(), "--keys", str(keys), "--memory-map", str(tmp_path), "--mode", mode,
                 "--tflops", "1", "--dtype", "bf16", "--batch", "2"]  # fmt: skip
    options = throughput.parse(arguments)
    speed = throughput.machine_speed(options)
    real, decoder = throughput.real_keys(options), throughput.build_decoder(options)
    streams = [throughput.variant_of(name, decoder, options, real) for name in throughput.names_of(options)]
    for stream in streams:
        stream.fill()
    rows = throughput.measure(streams, options)
    for row, stream in zip(rows, streams):
        row["memory_size"] = stream.memory_size
    throughput.compare(rows, [], options, speed)
    assert [stream.decoder.cfg.memory_index for stream in streams[1:]] == ["flat", "IVF32,Flat"]
    assert streams[0].tokens == 2 * (4 if mode == "generate" else 16)
    assert rows[2]["cost_of_smallest"] == pytest.approx(rows[2]["seconds_per_step"] / rows[1]["seconds_per_step"])
    assert rows[2]["roofline_share"] > 0
    memories = (
        list(streams[2]._window.branches.banks) if mode == "generate"
        else [memory.bank for memory in streams[2].decoder.memories]
    )  # fmt: skip
    assert all(bank.placement.directory == str(tmp_path) and bank.held.tolist() == [1024] * bank.lanes
               and bank.indices for bank in memories)  # fmt: skip
    if mode != "generate":
        assert 0.5 < rows[2]["recall"] < 1 and rows[1]["recall"] is None


def test_search(tmp_path, keys):
    done = run("search.py", "--tokens", 1024, 4096, "--heads", 3, "--queries", 16, "--width", 8, "--steps", 3, "--keys",
               keys, "--indices", "IVF16,Flat:nprobe=16", "IVF16,Flat:nprobe=1", "IVF300,Flat", "HNSW8:efSearch=99",
               "--json", tmp_path / "s.json", "--png", tmp_path / "s.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    exact = ["torch product alone", "torch topk", "torch two-level", "faiss knn"] + ["native"] * (not kernel.reason)
    indices = []
    for name in ("IVF16,Flat (nprobe=16)", "IVF16,Flat (nprobe=1)", "IVF300,Flat (nprobe=18)"):
        indices += [name] if kernel.reason else [name, f"{name}, native"]
    indices.append("HNSW8 (efSearch=99)")
    small = [name for name in indices if "IVF300" not in name]  # too few chunks to train it
    assert [row["backend"] for row in rows] == [*exact, *small, *exact, *indices]
    assert all(row["milliseconds"] >= row["fastest"] > 0 for row in rows)
    assert all((row["worst"] is None) == (row["backend"] == "torch product alone") for row in rows if "worst" in row)
    recall = {row["backend"]: row["recall"] for row in rows if row["tokens"] == 4096}
    assert recall["IVF16,Flat (nprobe=16)"] == recall["faiss knn"] == 1.0 > recall["IVF16,Flat (nprobe=1)"] > 0.2
    assert all(row["made_s"] > 0 and row["add_ms"] > 0 for row in rows if "made_s" in row)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG") and "| HNSW8 (efSearch=99) |" in done.stdout


def test_real_keys(tmp_path):
    directory = sentencepiece_model(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / name).write_text(f"The text {name} that is memorised and asked.\n" * 9)
    done = run("real_keys.py", "--path", directory, "--text", tmp_path / "texts", "--tokens", 90, "--queries", 20,
               "--chunk-size", 3, "--output", tmp_path / "keys.safetensors")  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = LongMem.from_pretrained(str(directory), memory_size=90, chunk_size=3, k=48, device="cpu")
    tensors, eos = load_file(tmp_path / "keys.safetensors"), torch.tensor([model.task.dictionary.eos()])
    texts = [model.encode((tmp_path / "texts" / name).read_text()) for name in "ab"]
    tokens = torch.cat([eos, texts[0], eos, texts[1]])
    keys = model.model.decoder.backbone.encode_for_memory(tokens[: model.task.args.tokens_per_sample][None]).keys[0]
    chunks = keys.size(1) // 3
    means = keys[:, : 3 * chunks].unflatten(1, (chunks, 3)).mean(dim=2)
    assert tensors["means"].shape == (keys.size(0), 30, keys.size(2)) and tensors["queries"].shape[1] == 20
    torch.testing.assert_close(tensors["means"][:, :chunks], means)
    done = run("real_keys.py", "--path", directory, "--text", tmp_path / "texts" / "a", "--tokens", 9000, "--output",
               tmp_path / "no")  # fmt: skip
    assert done.returncode == 1 and "but 10,024 are needed: name more with --text" in done.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--memory-sizes", "8"], "--memory-sizes 8 is smaller than one segment of 16 tokens"),
        (["--mode", "train", "--full-windows", "32"], "leave it out with --mode train"),
        (["--memory-sizes", "64", "--memory-index", "IVF99,Flat"], "IVF99,Flat is trained on 99 chunks or more"),
        (["--memory-index-parameters", "x=1", "--memory-index", "IVF4,Flat"], "x=1 cannot be set for IVF4,Flat"),
        (["--memory-device", "cuda"], "--memory-device cuda: the model is on cpu"),
        (["--heads", "3"], "--dim must be a multiple of --heads"),
        (["--steps", "0"], "--steps 0 is less than 1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(SystemExit, match=message):
        throughput.parse([*TINY.split(), *changes])


def test_the_work_of_search_and_reading():
    work = throughput.memory_work(throughput.parse([*TINY.split(), "--batch", "3", "--dtype", "float16"]), 64)
    queries = 3 * 2 * 16
    assert work["search_operations"] == queries * 16 * 8 * 2  # 16 chunks, width 8
    assert work["read_operations"] == queries * 8 * 8 * 4
    assert work["search_bytes"] == 4 * (3 * 2 * 16 * 8 + queries * 8)
    assert work["read_bytes"] == queries * 8 * 8 * 2 * 2
    half = throughput.memory_work(throughput.parse([*TINY.split(), "--batch", "3", "--dtype", "bfloat16"]), 64)
    assert half == {**work, "read_bytes": 2 * work["read_bytes"]}, "its memory is float32"


def test_the_report_of_all_parts_shows_what_failed(tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    printed = "noise\n## Table\n\n| a |\n| --: |\n| 1 |\n"
    for name, status, log in (("good", "0 3 60", printed), ("bad", "124 9 9", "why\n")):
        (work / f"{name}.status").write_text(status)
        (work / f"{name}.log").write_text(log)
    (work / "good.json").write_text('{"rows": [1]}')
    assert gpu_report.main(str(work), str(tmp_path)) == 1
    text = (tmp_path / "report.md").read_text()
    assert "| good | passed | 3 | 60 |" in text and "## Table" in text and "noise" not in text
    assert "## bad: too long" in text and "why" in text
    parts = {part["part"]: part for part in json.loads((tmp_path / "report.json").read_text())["parts"]}
    assert parts["good"]["result"] == {"rows": [1]} and parts["bad"]["result"] is None
    (work / "bad.status").write_text("0 9 9")
    assert gpu_report.main(str(work), str(tmp_path)) == 0
