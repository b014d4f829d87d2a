"""Test on a GPU: decoding step by step, memories on disk, and the shared memory of released checkpoints."""

import numpy as np
import pytest
import torch

from longmem_fairseq.memory.memory_file import load_memory, save_memory
from longmem_fairseq.models.live_window import prefill
from longmem_fairseq.models.reading import DocumentReader
from longmem_fairseq.released.released_model import load_released
from longmem_fairseq.tasks.generator import backbone_identity
from tests.models.test_live_window import decode
from tests.models.test_released import RECORDED, SEGMENTS
from tests.models.tiny import documents, longmem, read

T = 7


def pair(tmp_path, **changes):
    """Build the same model on the CPU and on the GPU."""
    cpu, gpu = (longmem(tmp_path, memory_search="torch", **changes) for _ in range(2))
    return cpu, gpu.cuda()


@pytest.mark.parametrize("model", ["transformer_lm", "alibi_lm"])
@pytest.mark.parametrize("past", [0, 5, 62])
def test_decoding_over_several_windows(tmp_path, model, past):
    """Decoding gives the logits of the CPU."""
    cpu, gpu = pair(tmp_path, model=model)
    (doc,) = documents([past + 4 * T])
    expected = decode(cpu, prefill(cpu.decoder, [doc[:past]], T), doc[None, past:])
    logits = decode(gpu, prefill(gpu.decoder, [doc[:past].cuda()], T), doc[None, past:].cuda())
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_reordered_rows(tmp_path):
    """Rows that share a memory are reordered as by beam search."""
    cpu, gpu = pair(tmp_path)
    docs = documents([20, 20, 20])
    results = []
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        on_device = [doc.to(device) for doc in docs]
        state = prefill(model.decoder, [doc[:15] for doc in on_device], T)
        order = torch.tensor([2, 0, 0], device=device)
        model.decoder.reorder_incremental_state_scripting(state, order)
        rest = torch.stack([on_device[i][15:] for i in (2, 0, 0)])
        results.append(decode(model, state, rest).cpu())
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_decoding_in_half_precision(tmp_path, dtype):
    """Decoding gives the logits of whole segments in the same precision, within a few units in the last place."""
    _, gpu = pair(tmp_path)
    gpu = gpu.to(dtype)
    doc = documents([4 * T])[0].cuda()
    expected = read(gpu, [doc], T)[0][2 * T : 3 * T]
    logits = decode(gpu, prefill(gpu.decoder, [doc[: 2 * T]], T), doc[None, 2 * T : 3 * T])[0]
    assert logits.dtype == dtype
    tolerance = 0.05 * float(expected.float().abs().max())
    torch.testing.assert_close(logits.float(), expected.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("saved, loaded", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_memories_on_disk_change_devices(tmp_path, saved, loaded):
    """A memory that is saved on one device is loaded on another with the same contents."""
    model, path = longmem(tmp_path, memory_search="torch"), str(tmp_path / "memory")
    reader, memories = DocumentReader(model.decoder, T), {}
    for device in ("cpu", "cuda"):
        model.to(device)
        memories[device] = reader.new_memory()
        reader.memorize(memories[device], "text", *documents([30]))
        if device == saved:
            save_memory(path, memories[device], *backbone_identity(model.decoder), dtype="float32")
    model.to(loaded)
    memory = reader.new_memory()
    load_memory(path, memory, *backbone_identity(model.decoder))
    assert memory.bank.keys.device.type == loaded
    for contents, expected in zip(memory.bank.contents(0), memories["cpu"].bank.contents(0)):
        torch.testing.assert_close(contents.cpu(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False])
def test_released_checkpoint(exact):
    """The logits are those recorded from the released code, with its shared memory in half precision."""
    arrays = np.load(RECORDED / "expected.npz")
    model = load_released(RECORDED / "sidenet.pt", exact=exact, memory_search="torch").cuda()
    for i in range(SEGMENTS):
        tokens = torch.from_numpy(arrays[f"b1_c4/tokens_{i}"].astype(np.int64)).cuda()
        logits = model(tokens)[0].cpu().numpy()
        assert np.abs(logits - arrays[f"b1_c4/logits_{i}"]).max() <= 2e-4
        assert model.memory_contents()[0].is_cuda
