"""Files that are to be backbones: those that fairseq writes load, all others are refused in one sentence."""

import argparse
import os
import pickle

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary

from longmem_fairseq.backbones.loading import BackboneError, load_backbone
from longmem_fairseq.data.manifest import dictionary_fingerprint
from tests.fairseq_runs import make_dictionary
from tests.models.tiny import LAYERS, VOCABULARY, longmem, stock_config, stock_model, write_checkpoint


def refusal(path, dictionary=VOCABULARY, layer=1) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(BackboneError) as caught:
        load_backbone(str(path), dictionary, [layer])
    message = str(caught.value)
    assert str(path) in message, "the message names the file"
    assert "\n" not in message and len(message) < 400 + len(str(path)), "it is one sentence"
    assert "weights_only" not in message, "nobody is told to trust the file"
    return message


@pytest.fixture
def checkpoint(tmp_path):
    """Write a checkpoint of a stock model: checkpoint(changes of the configuration, **changes of the file)."""

    def checkpoint(config=None, name="backbone.pt", **state):
        config = config or {}
        stock = stock_model(**config)
        return write_checkpoint(tmp_path / name, stock, stock_config(**config), state)

    return checkpoint


def hidden(backbone):
    x = torch.randint(4, len(VOCABULARY), (2, 9), generator=torch.Generator().manual_seed(0))
    return backbone(x).hidden[-1]


# --- what loads


def test_a_checkpoint_of_fairseq_train(tiny_backbone):
    """Its model, loaded by fairseq, gives the same numbers; its sizes come from the file."""
    dictionary = Dictionary.load(str(tiny_backbone.parents[1] / "data" / "dict.txt"))
    backbone = load_backbone(str(tiny_backbone), dictionary, [1])
    overrides = {"data": str(tiny_backbone.parents[1] / "data")}
    stock = checkpoint_utils.load_model_ensemble([str(tiny_backbone)], overrides)[0][0].eval()
    assert backbone.num_layers == 2 and backbone.num_heads == 2 and backbone.head_dim == 8
    x = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x).hidden[-1], stock(x)[1]["inner_states"][-1], rtol=1e-5, atol=1e-5)


def test_named_architectures(checkpoint):
    plain = load_backbone(checkpoint(), VOCABULARY, [1])
    named = {**stock_config(), "_name": "transformer_lm_gpt2_small"}
    loaded = load_backbone(checkpoint(cfg={"_name": None, "model": named}), VOCABULARY, [1])
    assert loaded.fingerprint == plain.fingerprint


def test_options_as_before_fairseq_0_11(checkpoint):
    """A Namespace of all commands' options, with the architecture's name."""
    plain = load_backbone(checkpoint(), VOCABULARY, [1])
    values = {key: value for key, value in stock_config().items() if key != "_name"}
    args = argparse.Namespace(arch="transformer_lm", task="language_modeling", **values)
    loaded = load_backbone(checkpoint(cfg=None, args=args, name="old.pt"), VOCABULARY, [1])
    assert loaded.fingerprint == plain.fingerprint


def test_a_missing_version_does_not_drop_the_final_norm(checkpoint):
    """fairseq takes it for a model of 2018, and drops the norm without a word."""
    path = checkpoint()
    state = torch.load(path)
    assert state["model"].pop("decoder.version") is not None
    torch.save(state, path)
    backbone = load_backbone(path, VOCABULARY, [1])
    stock = stock_model().decoder.layer_norm
    assert torch.equal(backbone.decoder.layer_norm.weight, stock.weight)


def test_half_precision_files(checkpoint):
    path = checkpoint()
    state = torch.load(path)
    state["model"] = {key: value.half() for key, value in state["model"].items()}
    torch.save(state, path)
    weight = load_backbone(path, VOCABULARY, [1]).decoder.layers[0].fc1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, stock_model().decoder.layers[0].fc1.weight.half().float())


def test_a_self_contained_longmem_checkpoint(tmp_path):
    """A LongMem that holds its backbone can give it to another LongMem."""
    model = longmem(tmp_path, save_backbone=True)
    cfg = {key: model.cfg[key] for key in ("backbone_config", "save_backbone")}
    path = write_checkpoint(tmp_path / "longmem.pt", model, {"_name": "longmem_gpt2_tiny", **cfg})
    backbone = load_backbone(path, VOCABULARY, [1])
    assert torch.equal(hidden(backbone), hidden(model.decoder.backbone))
    assert backbone.fingerprint == model.decoder.backbone.fingerprint


# --- what is refused: files


def test_missing(tmp_path):
    assert "does not exist: name its checkpoint with --pretrained-model-path" in refusal(tmp_path / "none.pt")
    assert "is a directory: name its checkpoint with --pretrained-model-path" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no model\n", bytes(range(256)) * 4, pickle.dumps(["model"], protocol=2)])
def test_garbage(tmp_path, content):
    path = tmp_path / "garbage.pt"
    path.write_bytes(content)
    assert "is not a readable fairseq checkpoint: it is damaged, or of another format" in refusal(path)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.99])
def test_truncated(checkpoint, share):
    path = checkpoint()
    os.truncate(path, int(os.path.getsize(path) * share))
    assert "is damaged" in refusal(path)


@pytest.mark.parametrize("where", ["model", "extra_state"])
def test_a_malicious_pickle_does_not_run(checkpoint, tmp_path, where):
    trap = tmp_path / "trap"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {trap}",)

    path = checkpoint(**{where: {"decoder.x": Malicious()}})
    assert "it asks for posix.system, which may run code" in refusal(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert trap.exists()


@pytest.mark.parametrize(
    "state", [[1, 2], {"weight": torch.ones(2)}, {"model": {}}, {"model": {}, "cfg": None, "args": None}]
)
def test_files_of_tensors_that_are_no_checkpoint(tmp_path, state):
    path = tmp_path / "state.pt"
    torch.save(state, path)
    assert "is not a fairseq checkpoint: it lacks the weights (model) or their configuration (cfg)" in refusal(path)


# --- what is refused: models


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"decoder_normalize_before": False}, "post-norm (decoder_normalize_before=False): the side network"),
        ({"adaptive_softmax_cutoff": "10,20"}, "an adaptive softmax (adaptive_softmax_cutoff=10,20)"),
        ({"adaptive_input": True}, "adaptive inputs (adaptive_input=True)"),
        ({"character_embeddings": True}, "character embeddings"),
        ({"decoder_layers_to_keep": "0,2"}, "layers pruned away"),
        ({"decoder_layerdrop": 0.1}, "LayerDrop (decoder_layerdrop=0.1)"),
        ({"base_layers": 1}, "BASE layers"),
        ({"quant_noise_pq": 0.1}, "product quantization"),
        ({"quant_noise_scalar": 0.1}, "scalar quantization"),
        ({"_name": "transformer"}, "the model is a transformer: a backbone must be a decoder-only transformer_lm"),
        ({"_name": "transformer_iwslt_de_en"}, "the model is a transformer_iwslt_de_en"),
        ({"_name": "lstm_lm"}, "the model is a lstm_lm"),
        ({"_name": "from_another_plugin"}, "the model is a from_another_plugin"),
        ({"_name": None}, "the model is a None"),
    ],
)
def test_models_that_cannot_be_a_backbone(checkpoint, changes, reason):
    path = checkpoint(cfg={"_name": None, "model": {**stock_config(), **changes}})
    message = refusal(path)
    assert "cannot be the backbone" in message and reason in message


def test_quantised_weights(checkpoint):
    """Copied into the model they would pass for weights that are 100 times as large."""
    path = checkpoint()
    state = torch.load(path)
    weight = state["model"]["decoder.layers.1.fc1.weight"]
    state["model"]["decoder.layers.1.fc1.weight"] = (weight * 100).round().to(torch.int8)
    torch.save(state, path)
    assert "quantized (decoder.layers.1.fc1.weight is torch.int8): give its original weights" in refusal(path)


def test_a_longmem_without_its_backbone(tmp_path):
    model = longmem(tmp_path)
    path = write_checkpoint(
        tmp_path / "longmem.pt", model, {"_name": "longmem_lm", "backbone_config": model.cfg.backbone_config}
    )
    assert "saved without --save-backbone: name the checkpoint of its backbone" in refusal(path)


def test_weights_that_do_not_fit(checkpoint):
    path = checkpoint()
    state = torch.load(path)
    weights = dict(state["model"])
    for change, reason in (
        ({"decoder.layers.1.fc1.bias": None}, "1 are missing, such as decoder.layers.1.fc1.bias"),
        ({"decoder.layers.9.fc1.bias": torch.ones(3)}, "1 are left over, such as decoder.layers.9.fc1.bias"),
        ({"decoder.layers.1.fc1.bias": torch.ones(3)}, "size mismatch for decoder.layers.1.fc1.bias"),
    ):
        changed = {key: value for key, value in {**weights, **change}.items() if value is not None}
        torch.save({**state, "model": changed}, path)
        assert f"weights do not fit its configuration: {reason}" in refusal(path)


def test_another_number_of_symbols(checkpoint):
    message = refusal(checkpoint(), make_dictionary(31))
    assert "has 34 symbols and the dictionary of the data has 35: preprocess the data with the backbone's" in message


def test_another_dictionary_of_the_same_size(checkpoint):
    """Known where the checkpoint names its dictionary, as those of longmem_language_modeling do."""
    other = Dictionary()
    for i in range(30):
        other.add_symbol(f"v{i}")
    path = checkpoint(task_state={"dictionary_sha256": dictionary_fingerprint(VOCABULARY.symbols)})
    load_backbone(path, VOCABULARY, [1])
    message = refusal(path, other)
    assert "trained with another dictionary of 34 symbols" in message and "the backbone's dict.txt" in message


@pytest.mark.parametrize("layer", [-1, LAYERS, 17])
def test_a_memory_layer_outside_the_backbone(checkpoint, layer):
    message = refusal(checkpoint(), layer=layer)
    assert f"--retrieval-layer-index {layer} is outside the backbone, whose layers are 0 to {LAYERS - 1}" in message
