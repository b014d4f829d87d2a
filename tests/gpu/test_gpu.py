"""On a GPU everything is what it is on the CPU, and keys and values stay where they are."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search.faiss import FaissSearch, has_faiss_gpu
from longmem_fairseq.memory.search.torch import TorchSearch, top_indices
from longmem_fairseq.memory.search.triton import TritonSearch
from longmem_fairseq.modules.memory_attention import (
    has_triton,
    memory_attention,
    naive_memory_attention,
    row_memory_attention,
)
from tests.models.tiny import batches, documents, longmem, read

HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # about four units in the last place of values near 1
TOLERANCE = {torch.float32: 1e-4, **HALF}
SEARCHES = {"torch": TorchSearch(), "faiss": FaissSearch(), "triton": TritonSearch()}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
LENGTHS = (60, 13, 31)


def close(actual, expected, dtype=torch.float32, scale=1.0):
    tolerance = TOLERANCE[dtype] * scale
    torch.testing.assert_close(actual.float().cpu(), expected.float().cpu(), rtol=tolerance, atol=tolerance)


def filled(device, dtype, seed=0):
    """A bank of three lanes: full and wrapped, part-full, empty."""
    bank = MemoryBank(3, 4, 8, 1999 * 3, 3, dtype, torch.device(device))
    generator = torch.Generator().manual_seed(seed)
    for lane, T in enumerate((7001, 100, 0)):
        keys, values = (torch.randn(4, T, 8, generator=generator) for _ in range(2))
        for start in range(0, T, 997):
            bank.append(lane, *(x[:, start : start + 997].to(device) for x in (keys, values)))
    return bank


@each_dtype
def test_bank(dtype):
    cpu, gpu = filled("cpu", dtype), filled("cuda", dtype)
    for name in ("keys", "values"):
        assert torch.equal(getattr(cpu, name), getattr(gpu, name).cpu())
    close(gpu.means, cpu.means)
    for lane in range(3):
        for actual, expected in zip(gpu.contents(lane), cpu.contents(lane)):
            close(actual, expected)


@pytest.mark.parametrize("name", SEARCHES)
@each_dtype
def test_search(name, dtype):
    """The same scores as on the CPU; slots may differ where scores are equal."""
    if name == "faiss" and not has_faiss_gpu():
        pytest.skip("the installed faiss has no GPU support")
    cpu, gpu = filled("cpu", dtype), filled("cuda", dtype)
    queries = torch.randn(3, 4, 33, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    lanes = np.array([1, 2, 0])
    expected = TorchSearch()(cpu, lanes, queries, 16)
    slots = SEARCHES[name](gpu, lanes, queries.cuda(), 16)
    assert slots.is_cuda and torch.equal(slots.cpu() < 0, expected < 0)
    scores = queries.float() @ cpu.means[lanes].transpose(-1, -2)
    close(scores.gather(-1, slots.cpu().clamp(min=0)), scores.gather(-1, expected.clamp(min=0)))


@pytest.mark.parametrize("N", [16384, 16383, 700])
def test_two_levels(N):
    scores = torch.randn(3, 50, N, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    assert torch.equal(scores.gather(-1, top_indices(scores, 16)), scores.topk(16, dim=-1).values)


@pytest.mark.parametrize(
    "L, B, H, T, N, C, d, n",
    [(3, 2, 5, 63, 11, 3, 7, 5), (1, 1, 1, 1, 1, 1, 1, 1), (8, 8, 2, 33, 99, 4, 64, 16), (2, 2, 1, 9, 99, 4, 136, 70)],
)
@pytest.mark.parametrize("q_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bank_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("attend", [memory_attention, row_memory_attention], ids=lambda f: f.__name__)
def test_memory_attention(attend, L, B, H, T, N, C, d, n, q_dtype, bank_dtype):
    """Forward and backward against the plain one in float32, for every mixture of dtypes."""
    generator = torch.Generator().manual_seed(3)
    slots = torch.randint(-1, N, (B, H, T, n), generator=generator)
    slots[:, :, T // 2] = -1  # nothing at all for one query
    lanes = torch.randperm(L, generator=generator)[:B]
    keys, values = (torch.randn(L, H, N, C, d, generator=generator).to(bank_dtype) for _ in range(2))
    q = torch.randn(B, T, H, d, generator=generator).to(q_dtype).transpose(1, 2)  # not contiguous, as a layer's
    upstream = torch.randn(B, H, T, d, generator=generator).to(q_dtype)
    results = []
    for function, device, dtype in ((attend, "cuda", q_dtype), (naive_memory_attention, "cpu", torch.float32)):
        leaf = q.detach().clone().to(device, dtype).requires_grad_()
        z = function(leaf, keys.to(device), values.to(device), lanes.to(device), slots.to(device), d**-0.5)
        z.backward(upstream.to(device, dtype))
        assert z.dtype == dtype and not z[:, :, T // 2].any() and not leaf.grad[:, :, T // 2].any()
        results.append((z.detach(), leaf.grad))
    # Embedding bags round queries and weights to the bank's precision.
    coarsest = max(q_dtype, bank_dtype if attend is row_memory_attention else q_dtype, key=TOLERANCE.get)
    for actual, expected in zip(*results):
        close(actual, expected, coarsest, scale=1 if attend is memory_attention else 4)


def test_triton_is_used_where_it_is_installed():
    pytest.importorskip("triton")
    assert has_triton()


def test_diverged_queries_stay_visible():
    """The kernel hides no query that is not a number, and spreads it to no other."""
    pytest.importorskip("triton")
    bank = filled("cuda", torch.float32)
    q = torch.zeros(1, 4, 3, 8, device="cuda")
    q[0, 2, 1] = float("nan")
    slots = torch.zeros(1, 4, 3, 2, dtype=torch.int64, device="cuda")
    z = memory_attention(q, bank.keys, bank.values, torch.zeros(1, dtype=torch.int64, device="cuda"), slots, 1.0)
    assert z[0, 2, 1].isnan().all() and z.isnan().sum() == 8


def pair(tmp_path, **changes):
    """The same model on the CPU and on the GPU."""
    return longmem(tmp_path, **changes), longmem(tmp_path, **changes).cuda()


def cuda_documents(docs):
    return [doc.cuda() for doc in docs]


@pytest.mark.parametrize("model, search", [("transformer_lm", "torch"), ("alibi_lm", "torch"), ("alibi_lm", "faiss")])
def test_whole_model(tmp_path, model, search):
    if search == "faiss" and not has_faiss_gpu():
        pytest.skip("the installed faiss has no GPU support")
    cpu, gpu = pair(tmp_path, model=model, memory_search=search, memory_size=36)
    docs = documents(LENGTHS)
    for actual, expected in zip(read(gpu, cuda_documents(docs), 7), read(cpu, docs, 7)):
        close(actual, expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_whole_model_in_half_precision(tmp_path, dtype):
    """Logits near those in float32, and so are the losses; which chunks are read may differ in near ties."""
    cpu, gpu = pair(tmp_path, memory_search="torch", memory_size=36)
    docs = documents(LENGTHS)
    for actual, expected, doc in zip(read(gpu.to(dtype), cuda_documents(docs), 7), read(cpu, docs, 7), docs):
        assert actual.dtype == dtype
        losses = [F.cross_entropy(x.float().cpu()[:-1], doc[1:]).item() for x in (actual, expected)]
        assert abs(losses[0] - losses[1]) < 20 * TOLERANCE[dtype]


def step_gradients(model, docs, autocast=None):
    """Gradients of the third segment, which reads what the first was remembered for."""
    model.train()
    for tokens, segments in list(batches(docs, 7))[:3]:
        model.zero_grad()
        device = next(model.parameters()).device.type
        with torch.autocast(device, autocast, enabled=autocast is not None):
            logits, extra = model(tokens, segments=segments)
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), ignore_index=1)
        loss.backward()
    assert extra["memory"].slots is not None
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
def test_training_step(tmp_path, recompute):
    cpu, gpu = pair(tmp_path, memory_search="torch", memory_size=36, checkpoint_activations=recompute)
    docs = documents((40, 35, 30))
    expected, actual = step_gradients(cpu, docs), step_gradients(gpu, cuda_documents(docs))
    assert expected.keys() == actual.keys() and any("gate_bias" in name for name in expected)
    for name in expected:
        close(actual[name], expected[name])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_training_step_under_autocast(tmp_path, dtype):
    cpu, gpu = pair(tmp_path, memory_search="torch", memory_size=36)
    docs = documents((40, 35, 30))
    expected, actual = step_gradients(cpu, docs), step_gradients(gpu, cuda_documents(docs), dtype)
    for name in expected:
        assert actual[name].dtype == torch.float32 and actual[name].isfinite().all()
    all_wanted, all_found = (
        torch.cat([grads[name].flatten().cpu() for name in expected]) for grads in (expected, actual)
    )
    assert F.cosine_similarity(all_wanted, all_found, dim=0) > 0.98


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_keys_and_values_stay_on_the_gpu(tmp_path, mode, monkeypatch):
    """No tensor of more than some KB crosses between host and device in a step, and nothing is read back."""
    _, gpu = pair(tmp_path, memory_search="torch", memory_size=36)
    gpu.train(mode == "train")
    steps = list(batches(cuda_documents(documents((60, 60))), 7))
    for tokens, segments in steps[:5]:
        gpu(tokens, segments=segments)
    torch.cuda.synchronize()
    crossed = []
    original = torch.Tensor.to

    def watched(tensor, *args, **kwargs):
        result = original(tensor, *args, **kwargs)
        if isinstance(result, torch.Tensor) and result.device != tensor.device:
            crossed.append((tensor.numel() * tensor.element_size(), result.device.type))
        return result

    monkeypatch.setattr(torch.Tensor, "to", watched)
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the GPU raises
    try:
        tokens, segments = steps[5]
        logits, _ = gpu(tokens, segments=segments)
        if mode == "train":
            logits.float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(device == "cuda" and size <= 64 for size, device in crossed), crossed


def test_the_profiler_sees_no_large_copies(tmp_path):
    """As above, by what CUPTI counts; a key or a value of a segment would be 1.3 KB a lane, all lanes 8 KB."""
    _, gpu = pair(tmp_path, memory_search="torch", memory_size=36)
    steps = list(batches(cuda_documents(documents((60, 60, 60))), 7))
    with torch.no_grad():
        for tokens, segments in steps[:5]:
            gpu(tokens, segments=segments)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            gpu(*steps[5][:1], segments=steps[5][1])
            torch.cuda.synchronize()
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and ("HtoD" in e["name"] or "DtoH" in e["name"])]
    assert any(e.get("cat") == "kernel" for e in events)  # it saw the GPU at all
    assert sum(e["args"].get("bytes", 0) for e in copies) < 1024, copies
    assert not [e for e in copies if "DtoH" in e["name"]]
