"""Test the benchmark of throughput as a whole command on tiny shapes, with an index on real keys, and its refusals."""

import json
from types import SimpleNamespace

import pytest
import torch

from examples.benchmark import profile_step, throughput
from examples.benchmark.full_attention import random_tokens
from tests.examples.commands import run_example
from tests.models.tiny import HEADS, LAYERS, VOCABULARY, WIDTH, stock_config, stock_model, write_checkpoint

TINY = "--layers 2 --dim 16 --heads 2 --vocab 50 --retrieval-layer-index 1 --segment 16 --k 8 --steps 2 --threads 1"


def test_throughput(tmp_path):
    done = run_example(
        "benchmark.throughput",
        *TINY.split(),
        "--reduction",
        1,
        "--retrieval-layer-index",
        "0,1",
        "--memory-sizes",
        64,
        "--batch",
        2,
        *"--full-windows 32 --cuda-graphs auto off --noise --tflops 1 --gbps 10".split(),
        "--memory-search",
        "torch",
        "--token-memory-sizes",
        48,
        "--token-memory-k",
        5,
        "--json",
        tmp_path / "t.json",
        "--png",
        tmp_path / "t.png",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    rows = {(row["token_memory"], row["cuda_graphs"]): row for row in result["rows"]}
    assert list(rows) == [(0, "auto"), (0, "off"), (48, "auto"), (48, "off")]
    assert {row["memory_size"] for row in result["rows"]} == {64}
    on, both = rows[0, "off"], rows[48, "off"]
    assert both["tokens_operations"] == 2 * (2 * 16) * 48 * 16 and on["tokens_operations"] == 0
    assert on["tokens_per_second"] == pytest.approx(2 * 16 / on["seconds_per_step"])
    # 2 lanes, 2 layers of 2 heads, 16 chunks of 4 tokens, width 8: keys and values, means, and a chunk a lane as tail.
    assert on["bank_bytes"] == 2 * 4 * 16 * (2 * 4 * 8 * 4 + 4 * 8) + 2 * 2 * 4 * 4 * 8 * 4
    assert both["bank_bytes"] - on["bank_bytes"] == 2 * 48 * (2 * 16 + 8)
    assert min(on["peak_memory_bytes"], both["peak_memory_bytes"]) > 2**26  # PyTorch alone takes more
    (full,) = result["full_attention"]
    assert full["speed_of_longmem"] == pytest.approx(both["tokens_per_second"] / full["tokens_per_second"])
    assert both["ratio_to_full"]["window:32"] == full["speed_of_longmem"] and full["roofline_share"] > 0
    assert "| 64 | 48 |" in done.stdout and "full attention" in done.stdout
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", ["eval", "train", "generate"])
def test_throughput_with_an_index_on_real_keys(tmp_path, mode, keys):
    """The small memory is searched exactly, the large one by the index, in a file; a token memory beside it."""
    sizes = "--memory-sizes 0 64 4096 --token-memory-sizes 40 --batch 2 --processor-time"
    indexed = "--memory-index IVF32,Flat:nprobe=4 --tflops 1 --gbps 10 --dtype bf16"
    paths = ["--keys", str(keys), "--memory-map", str(tmp_path)]
    arguments = [*TINY.split(), *sizes.split(), *indexed.split(), *paths, "--mode", mode]
    options = throughput.parse(arguments)
    speed = throughput.machine_speed(options)
    real, decoder = throughput.load_real_keys(options), throughput.build_decoder(options)
    variants = [throughput.build_variant(name, decoder, options, real) for name in throughput.names_of(options)]
    for variant in variants:
        variant.fill()
    rows = throughput.measure(variants, options)
    for row, variant in zip(rows, variants):
        row.update(memory_size=variant.memory_size, token_memory=variant.token_memory, cuda_graphs="auto")
    throughput.compare(rows, [], options, speed)
    indices = [variant.decoder.memory_factory.settings.index for variant in variants[1:]]
    assert indices == ["flat", "IVF32,Flat", "IVF32,Flat"]
    if mode == "generate":
        token_banks = [bank.token_bank for bank in variants[3].banks]
    else:
        token_banks = [memory.token_streams.bank for memory in variants[3].decoder.lane_state.memories]
    assert [held for bank in token_banks for held in bank.held] == [40, 40]
    assert variants[2].decoder.predictor.token_mixture is None, "without a token memory nothing is computed for one"
    assert variants[0].tokens == 2 * (4 if mode == "generate" else 16)
    for row in rows:
        assert row["ratio_to_off"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])
    assert variants[0].bank_bytes == 0
    assert rows[2]["cost_of_smallest"] == pytest.approx(rows[2]["seconds_per_step"] / rows[1]["seconds_per_step"])
    assert rows[2]["roofline_share"] > 0
    assert variants[2].banks
    for bank in variants[2].banks:
        assert bank.placement.directory == str(tmp_path) and bank.held.tolist() == [1024] * bank.lanes and bank.indices
    if mode != "generate":
        assert 0.5 < rows[2]["recall"] < 1 and rows[1]["recall"] is None


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--memory-sizes", "8"], "--memory-sizes 8 is smaller than one segment of 16 tokens"),
        (
            ["--mode", "train", "--full-windows", "32"],
            "--full-windows needs --mode eval: leave it out",
        ),
        (["--memory-sizes", "64", "--memory-index", "IVF99,Flat"], "IVF99,Flat is trained on 99 chunks or more"),
        (["--memory-index", "IVF4,Flat:x=1"], "IVF4,Flat:x=1 has search parameters that cannot be set for IVF4,Flat"),
        (["--memory-index-parameters", "x=1", "--memory-index", "IVF4,Flat"], "IVF4,Flat:x=1 has search parameters"),
        (["--memory-device", "cuda"], "--memory-device cuda: the model is on cpu"),
        (["--cuda-graphs", "on"], "--cuda-graphs on needs --device cuda"),
        (
            ["--cuda-graphs", "off", "--mode", "generate"],
            "--cuda-graphs off has no effect in --mode generate",
        ),
        (["--noise", "--memory-index", "IVF4,Flat"], "--noise is for exact search without --keys: leave it out"),
        (["--full-contexts", "64"], "--full-contexts needs --mode eval, --positions learned"),
        (["--heads", "3"], "--dim must be a multiple of --heads"),
        (["--token-memory-sizes", "0"], "--token-memory-sizes 0 is less than 1"),
        (["--token-memory-sizes", "9", "--memory-sizes", "0"], "--token-memory-sizes need a memory: add a size"),
        (["--processor-time", "--threads", "2"], "--processor-time needs --threads 1 and --device cpu"),
        (["--steps", "0"], "--steps 0 is less than 1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(SystemExit, match=message):
        throughput.parse([*TINY.split(), *changes])


def test_throughput_of_a_backbone(tmp_path):
    """Sizes and weights are those of the checkpoint: grouped queries, heads of another width than D / H, SwiGLU."""
    path = write_checkpoint(tmp_path / "backbone.pt", stock_model("llama_lm"), stock_config("llama_lm"))
    VOCABULARY.save(str(tmp_path / "dict.txt"))
    tiny = "--segment 12 --k 8 --steps 1 --memory-sizes 0 64 --memory-search torch --tflops 1 --gbps 10".split()
    for dtype in ("float32", "bf16"):
        options = throughput.parse([*tiny, "--backbone", path, "--dtype", dtype])
        assert (options.layers, options.dim, options.heads, options.kv_heads) == (LAYERS, WIDTH, HEADS, 1)
        assert (options.vocab, options.head_dim, options.retrieval_layer_index) == (len(VOCABULARY), 6, 3)
        assert options.layer_weights == WIDTH * 6 * (2 * HEADS + 2 * 1) + 3 * WIDTH * 20
        decoder = throughput.build_decoder(options)
        weight = decoder.backbone.layers[1].self_attn.q_proj.weight
        assert weight.dtype == throughput.DTYPES[dtype]
        expected = stock_model("llama_lm").decoder.layers[1].self_attn.q_proj.weight
        assert torch.equal(weight, expected.to(weight.dtype))
        variants = [throughput.build_variant(name, decoder, options) for name in throughput.names_of(options)]
        for variant in variants:
            variant.fill()
        off, on = throughput.measure(variants, options)
        assert off["tokens_per_second"] > 0 and variants[1].bank_bytes > 0
        work = throughput.memory_work(options, 64)
        assert work["search_bytes"] == 4 * (1 * 16 * 6 + HEADS * 12 * 6)
        assert work["read_operations"] == 4 * HEADS * 12 * 8 * 6
    (tmp_path / "dict.txt").unlink()
    with pytest.raises(SystemExit, match="dict.txt does not exist: put the backbone's dict.txt beside its checkpoint"):
        throughput.parse(["--backbone", path])


def test_full_attention_to_a_context_is_what_the_backbone_computes():
    """The same keys and values in a cache of fairseq's kind; and the work of the shapes."""
    options = throughput.parse([*TINY.split(), *"--positions learned --full-contexts 48 --batch 2".split()])
    backbone = throughput.build_decoder(options).backbone
    variant = throughput.build_variant("context:48", SimpleNamespace(backbone=backbone), options)
    state, tokens = {}, random_tokens(options, 16)
    for layer, cache in zip(backbone.layers, variant.caches):
        keys, values = (x[:, :, :48].clone() for x in cache)
        layer.self_attn.set_cache(state, {"prev_key": keys, "prev_value": values})
    with torch.no_grad():
        expected = backbone.output(backbone.final_hidden(backbone.encode(tokens, state, 48)))
    torch.testing.assert_close(variant.read(tokens), expected, rtol=1e-4, atol=1e-4)
    assert variant.tokens == 2 * 16 and variant.bank_bytes == 2 * 2 * 2 * 2 * (48 + 16) * 8 * 4
    work = [throughput.full_attention_work(options, kind, 48) for kind in ("window", "context")]
    weights = 2 * 2 * 12 * 16**2 + 2 * 16 * 50  # operations of a token: both layers and the output projection
    scores = [x["model_operations"] / 2 - n * weights for x, n in zip(work, (48, 16))]
    assert scores == [48 * 24 * 4 * 16 * 2, 16 * (48 + 8) * 4 * 16 * 2]


def test_profile_of_a_step(capsys, tmp_path):
    path = tmp_path / "profile.json"
    profile_step.main([*TINY.split(), *"--memory-sizes 0 64 --noise --memory-search torch --json".split(), str(path)])
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    assert "## Profile, eval: 1 lanes, memory of 64 tokens" in printed and "without CUDA graphs" in printed
    assert sum(row["share"] for row in result["kernels"]) == pytest.approx(1) and result["busy"] > 0
    assert {"aten::topk", "aten::addmm"} <= {row["kernel"] for row in result["kernels"]}
    assert "others" in printed and " kernels." in printed


def test_the_work_of_search_and_reading():
    work = throughput.memory_work(throughput.parse([*TINY.split(), "--batch", "3", "--dtype", "float16"]), 64)
    queries = 3 * 2 * 16
    assert work["search_operations"] == queries * 16 * 8 * 2  # 16 chunks, width 8
    assert work["read_operations"] == queries * 8 * 8 * 4
    assert work["search_bytes"] == 4 * (3 * 2 * 16 * 8 + queries * 8)
    assert work["read_bytes"] == queries * 8 * 8 * 2 * 2
    half = throughput.memory_work(throughput.parse([*TINY.split(), "--batch", "3", "--dtype", "bfloat16"]), 64)
    assert half == {**work, "read_bytes": 2 * work["read_bytes"]}, "its memory is float32"
