"""What the README says of sizes: parameters to train, and bytes of memory."""

import json
from argparse import Namespace

import pytest
import torch

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.models.backbone import backbone_config
from longmem_fairseq.models.longmem_lm import LongMemModel
from longmem_fairseq.models.released_checkpoint import SIDE_NETWORK
from tests.fairseq_runs import make_dictionary
from tests.models.tiny import stock_config, task_of

# GPT-2's layers, width and heads; parameters of the backbone and of the side network; MiB that 1,024 tokens take in
# the memory of one lane, with chunks of four, in float16 and float32.
SIZES = {
    "small": (12, 768, 12, 124_446_720, 42_528_780, 3.75, 6.75),
    "medium": (24, 1024, 16, 354_832_384, 151_156_752, 5.0, 9.0),
    "large": (36, 1280, 20, 774_041_600, 354_196_500, 6.25, 11.25),
    "xl": (48, 1600, 25, 1_557_625_600, 737_782_425, 7.8125, 14.0625),
}


def build(config, dictionary, **settings):
    """A LongMem model without memory for its weights."""
    cfg = Namespace(
        save_backbone=True, backbone_config=json.dumps(backbone_config(Namespace(**config), len(dictionary))),
        tokens_per_sample=1024, memory_size=65536, reload_ptm_layer=False, **settings,
    )  # fmt: skip
    with torch.device("meta"):
        return LongMemModel.build_model(cfg, task_of(dictionary))


def parameters(module, trained):
    return sum(p.numel() for p in {id(p): p for p in module.parameters()}.values() if p.requires_grad == trained)


@pytest.fixture(scope="module")
def gpt2_dictionary():
    return make_dictionary(50257 + 3)  # filled up to a multiple of eight, with fairseq's four


@pytest.mark.parametrize("name", SIZES)
def test_gpt2(name, gpt2_dictionary):
    layers, width, heads, backbone, side, half, single = SIZES[name]
    config = stock_config(
        decoder_layers=layers, decoder_embed_dim=width, decoder_input_dim=width, decoder_output_dim=width,
        decoder_ffn_embed_dim=4 * width, decoder_attention_heads=heads, max_target_positions=1024,
        activation_fn="gelu_accurate",
    )  # fmt: skip
    model = build(config, gpt2_dictionary, retrieval_layer_index=layers * 2 // 3 + 1)
    assert parameters(model, trained=True) == side
    assert parameters(model, trained=False) == backbone
    for dtype, mebibytes in ((torch.float16, half), (torch.float32, single)):
        banks = [
            MemoryBank(1, heads, width // heads, size, 4, dtype, torch.device("meta")).nbytes for size in (1024, 65536)
        ]
        assert (banks[1] - banks[0]) / 63 / 2**20 == mebibytes  # the rest is for the chunk that is not full yet


def test_released():
    """The published model is called LongMem-558M."""
    config = dict(
        _name="parallel_lm", decoder_layers=24, decoder_embed_dim=1024, decoder_ffn_embed_dim=4096,
        decoder_attention_heads=16, decoder_normalize_before=True, activation_fn="gelu_accurate",
    )  # fmt: skip
    model = build(config, make_dictionary(51200 - 4), retrieval_layer_index=17, **SIDE_NETWORK)
    assert (parameters(model, trained=True), parameters(model, trained=False)) == (151_083_024, 407_072_768)
