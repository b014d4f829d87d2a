"""Hugging Face models converted to fairseq and back compute the same."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from fairseq.data import Dictionary
from safetensors.torch import load_file

from longmem_fairseq.backbones.loading import load_backbone
from longmem_fairseq.text import find_bpe
from preprocess.convert_huggingface import from_huggingface, main, to_huggingface
from preprocess.errors import InputError
from preprocess.tokenization import load_tokenizer
from tests.fairseq_runs import TASK, run, write_split
from tests.huggingface_tokenizers import byte_level
from tests.models import checkpoints
from tests.models.tiny import VOCABULARY, stock_config, stock_model, write_checkpoint

POSITIONS = 24


def test_models_of_transformers_can_be_imported_beside_fairseq():
    """fairseq requires torchaudio, which does not load beside every torch, and transformers imports it."""
    assert sys.modules.get("torchaudio", torch) is not None, "a test hides torchaudio"
    assert issubclass(transformers.GPT2LMHeadModel, torch.nn.Module)


def randomize(model, seed=0):
    """Random values everywhere, biases and LayerNorms too, so that none can be forgotten; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", "layer_norm.weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + float(scale))
    return model.eval()


def tiny_gpt2(vocab_size=97, heads=2, width=24, layers=2, **config):
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_head=heads,
        n_layer=layers,
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
        **{"n_positions": POSITIONS, **config},
    )
    return randomize(transformers.GPT2LMHeadModel(config))


def tiny_opt(**config):
    config = transformers.OPTConfig(
        **{
            **dict(
                vocab_size=61,
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=3,
                ffn_dim=40,
                word_embed_proj_dim=24,
                max_position_embeddings=POSITIONS,
            ),
            **config,
        }
    )
    return randomize(transformers.OPTForCausalLM(config))


def load_stock(directory):
    """The model as stock fairseq reads it, and its dictionary."""
    dictionary = Dictionary.load(str(directory / "dict.txt"))
    return checkpoints.load_stock(directory / "checkpoint.pt", dictionary), dictionary


def numbers_of(dictionary):
    """For each GPT-2 number its index in the dictionary."""
    index = {int(symbol): i for i, symbol in enumerate(dictionary.symbols) if symbol.isdigit()}
    return torch.tensor([index[number] for number in range(len(index))])


@torch.no_grad()
def difference(gpt2, directory):
    """Largest difference between logits of a GPT-2 and of the converted model, over the whole window."""
    model, dictionary = load_stock(directory)
    index = numbers_of(dictionary)
    numbers = torch.randint(len(index), (3, gpt2.config.n_positions), generator=torch.Generator().manual_seed(1))
    expected = gpt2(numbers).logits[..., : len(index)]
    assert expected.std() > 0.5  # or the comparison would say nothing
    return (model(index[numbers])[0][..., index] - expected).abs().max().item()


@pytest.mark.parametrize(
    "config",
    [
        dict(heads=2),
        dict(heads=12, width=48, vocab_size=103),
        dict(heads=16, width=32, layers=3, vocab_size=131),
        dict(n_inner=20),
        dict(n_positions=1024),
        dict(activation_function="relu"),
        dict(activation_function="gelu"),
        dict(activation_function="gelu_pytorch_tanh"),
        dict(tie_word_embeddings=False),
    ],
    ids=str,
)
def test_logits_of_gpt2(tmp_path, config):
    model = tiny_gpt2(**config)
    model.save_pretrained(tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "fs")
    assert difference(model, tmp_path / "fs") < 1e-5
    size = len(Dictionary.load(str(tmp_path / "fs" / "dict.txt")))
    assert size % 8 == 0 and size >= model.config.vocab_size + 4

    to_huggingface(tmp_path / "fs" / "checkpoint.pt", tmp_path / "back")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
    ids = torch.randint(model.config.vocab_size, (2, POSITIONS))
    with torch.no_grad():
        assert back(ids).logits.shape[-1] >= model.config.vocab_size
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert back.config.eos_token_id == model.config.eos_token_id
    assert back.config.vocab_size == model.config.vocab_size


@torch.no_grad()
def test_symbols_that_gpt2_lacks_take_little(tmp_path):
    model = tiny_gpt2(vocab_size=200)
    model.save_pretrained(tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "fs")
    converted, dictionary = load_stock(tmp_path / "fs")
    probabilities = converted(torch.randint(4, 200, (4, POSITIONS)))[0].softmax(dim=-1)
    known = numbers_of(dictionary).tolist()
    for symbol in set(range(len(dictionary))) - {dictionary.eos(), *known}:
        assert (probabilities[..., symbol] <= probabilities[..., known].mean(dim=-1) * (1 + 1e-5)).all()
    # The end of a document is GPT-2's <|endoftext|>.
    torch.testing.assert_close(probabilities[..., dictionary.eos()], probabilities[..., known[-1]])


def test_order_of_a_given_dictionary(tmp_path):
    model = tiny_gpt2(vocab_size=97)
    model.save_pretrained(tmp_path / "hf")
    order = np.random.default_rng(0).permutation(97)
    lines = [f"{number} {1000 - i}\n" for i, number in enumerate(order)]
    lines.insert(40, "madeupword0000 0\n")
    (tmp_path / "dict.txt").write_text("".join(lines))
    from_huggingface(tmp_path / "hf", tmp_path / "fs", tmp_path / "dict.txt")
    assert Dictionary.load(str(tmp_path / "fs" / "dict.txt")).symbols[4:7] == [str(number) for number in order[:3]]
    assert difference(model, tmp_path / "fs") < 1e-5
    to_huggingface(tmp_path / "fs" / "checkpoint.pt", tmp_path / "back", tmp_path / "dict.txt")
    expected, exported = model.state_dict(), load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.items())

    (tmp_path / "dict.txt").write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=f"lacks 1 of the model's 97 tokens, such as {order[-1]}: give a dictionary"):
        from_huggingface(tmp_path / "hf", tmp_path / "fs", tmp_path / "dict.txt")


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards", "half", "without prefix"])
def test_forms_of_the_weights(tmp_path, form):
    model = tiny_gpt2()
    directory = tmp_path / "hf"
    if form == "shards":
        model.save_pretrained(directory, max_shard_size="20KB")
        assert (directory / "model.safetensors.index.json").exists()
    elif form == "half":
        model.half().save_pretrained(directory)
        model.float()
    elif form == "without prefix":
        model.transformer.save_pretrained(directory)
    else:
        model.save_pretrained(directory)
    if form == "bin":
        (directory / "model.safetensors").unlink()
        attention = torch.ones(1, 1, POSITIONS, POSITIONS, dtype=torch.uint8)  # a buffer of older versions
        torch.save({**model.state_dict(), "transformer.h.0.attn.bias": attention}, directory / "pytorch_model.bin")
    from_huggingface(directory, tmp_path / "fs")
    assert difference(model, tmp_path / "fs") < 1e-5


@pytest.mark.parametrize("config", [{}, {"word_embed_proj_dim": 10}, {"activation_function": "gelu"}], ids=str)
@torch.no_grad()
def test_logits_of_opt(tmp_path, config):
    model = tiny_opt(**config)
    model.save_pretrained(tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "fs")
    converted, dictionary = load_stock(tmp_path / "fs")
    assert len(dictionary) == 61
    tokens = torch.randint(4, 61, (3, POSITIONS))
    tokens[:, 0] = dictionary.eos()
    expected = model(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(converted(tokens)[0], expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=["two files", "tokenizer.json"])
def model_with_tokenizer(request, gpt2_files, tmp_path_factory):
    """A GPT-2 with a tokenizer trained on the standard library, in both of its forms."""
    directory = tmp_path_factory.mktemp("hf")
    encoder, merges = gpt2_files
    vocabulary = json.loads(encoder.read_text())
    vocabulary.setdefault("<|endoftext|>", len(vocabulary))
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text(merges.read_text())
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(directory)
    if request.param == "tokenizer.json":
        (directory / "vocab.json").unlink()
        (directory / "merges.txt").unlink()
        tokenizer.save_pretrained(directory)
        assert not (directory / "vocab.json").exists()
    model = tiny_gpt2(vocab_size=len(vocabulary) + 5)  # padded, as trained models often are
    model.save_pretrained(directory)
    return SimpleNamespace(directory=directory, tokenizer=tokenizer, model=model)


@torch.no_grad()
def test_text_in_text_out(model_with_tokenizer, sources, tmp_path):
    source, destination = model_with_tokenizer, tmp_path / "fs"
    from_huggingface(source.directory, destination)
    tokenizer, bpe = load_tokenizer(destination), find_bpe(str(destination))
    model, dictionary = load_stock(destination)
    for text in [*(text[:3000] for text in sources[:20]), "Caf\u00e9 \u4e2d\u6587\n\n\ttab 123", "A<|endoftext|>B"]:
        numbers = source.tokenizer(text)["input_ids"]
        ids = tokenizer.encode(text)
        assert [int(dictionary[i]) for i in ids] == numbers == [int(number) for number in bpe.encode(text).split()]
        assert tokenizer.decode(ids) == source.tokenizer.decode(numbers) == text
        window = slice(0, POSITIONS)
        likeliest = source.model(torch.tensor([numbers[window]])).logits[0].argmax(dim=-1)
        converted = model(torch.tensor([ids[window]]))[0][0, :, numbers_of(dictionary)].argmax(dim=-1)
        assert torch.equal(likeliest, converted)
    to_huggingface(destination / "checkpoint.pt", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back(sources[0])["input_ids"] == source.tokenizer(sources[0])["input_ids"]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["eos_token_id"] == source.model.config.eos_token_id


@torch.no_grad()
def test_text_of_opt(gpt2_files, sources, tmp_path):
    """Its tokenizer is GPT-2's with fairseq's special symbols first."""
    encoder, merges = gpt2_files
    tokens = sorted(json.loads(encoder.read_text()).items(), key=lambda item: item[1])
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *(token for token, _ in tokens)])}
    directory, destination = tmp_path / "hf", tmp_path / "fs"
    model = tiny_opt(vocab_size=len(vocabulary) + 3)
    model.save_pretrained(directory)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text(merges.read_text())
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "unk_token": "<unk>"}))
    from_huggingface(directory, destination)
    huggingface_tokenizer = transformers.GPT2TokenizerFast.from_pretrained(directory)
    tokenizer = load_tokenizer(destination)
    converted, _ = load_stock(destination)
    for source in [*sources[:5], f"one</s>two{sources[5]}"]:
        numbers, ids = huggingface_tokenizer(source[:2000])["input_ids"], tokenizer.encode(source[:2000])
        assert ids == numbers
        assert tokenizer.decode(ids) == source[:2000].replace("</s>", "")  # which ends documents
        window = torch.tensor([[2, *ids[: POSITIONS - 1]]])
        torch.testing.assert_close(converted(window)[0], model(window).logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted GPT-2 with documents in its dictionary to evaluate and train on."""
    directory = tmp_path_factory.mktemp("converted")
    tiny_gpt2(layers=4).save_pretrained(directory / "hf")
    main([str(directory / "hf"), str(directory / "fs")])
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(4, 100, length), 2) for length in (50, 31, 90)]
    for split in ("train", "valid"):
        write_split(directory / "fs" / split, documents)
    return SimpleNamespace(data=directory / "fs", documents=documents, checkpoint=directory / "fs" / "checkpoint.pt")


def test_stock_evaluation(converted, tmp_path):
    """fairseq-eval-lm without this package reads the checkpoint, and its scores are the model's."""
    output = run(
        "eval_lm",
        converted.data,
        "--path",
        converted.checkpoint,
        *"--task language_modeling --gen-subset valid --sample-break-mode none".split(),
        "--tokens-per-sample",
        POSITIONS,
        *"--max-sentences 1 --cpu".split(),
        cwd=tmp_path,
    )
    stream = torch.from_numpy(np.concatenate(converted.documents))
    model, _ = load_stock(converted.data)
    losses = []
    for begin in range(0, len(stream), POSITIONS):
        target = stream[begin : begin + POSITIONS]
        source = torch.cat([stream[begin - 1 : begin] if begin else torch.tensor([2]), target[:-1]])
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model(source[None])[0][0], target, reduction="none"))
    expected = torch.cat(losses).mean().item() / np.log(2)
    assert f"Evaluated {len(stream):,} tokens".replace(",", "") in output
    assert f"Loss (base 2): {expected:.2f}" in output


def test_training_with_a_memory_and_export(converted, tmp_path):
    """A LongMem model trains on the converted backbone, and gives it back."""
    checkpoints = tmp_path / "checkpoints"
    run(
        "train",
        converted.data,
        *TASK,
        "--arch",
        "longmem_gpt2_tiny",
        "--pretrained-model-path",
        converted.checkpoint,
        *"--criterion longmem_cross_entropy --memory-size 64 --k 8 --tokens-per-sample 16 --batch-size 2".split(),
        *"--max-update 3 --optimizer adam --lr 0.01 --cpu --save-backbone".split(),
        "--save-dir",
        checkpoints,
        "--no-epoch-checkpoints",
        cwd=tmp_path,
    )
    main(
        [
            "--export",
            str(checkpoints / "checkpoint_last.pt"),
            str(tmp_path / "hf"),
            "--dict",
            str(converted.data / "dict.txt"),
        ]
    )
    expected = load_file(converted.data.parent / "hf" / "model.safetensors")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def test_checkpoint_says_which_dictionary(converted, tmp_path):
    """The data's dictionary in another order is noticed."""
    lines = (converted.data / "dict.txt").read_text().splitlines(keepends=True)
    (tmp_path / "dict.txt").write_text("".join(reversed(lines)))
    with pytest.raises(ValueError, match="another dictionary"):
        load_backbone(converted.checkpoint, Dictionary.load(str(tmp_path / "dict.txt")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "falcon"}, "model_type=falcon in config.json is not supported; supported are gpt2 .*qwen3"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True in config.json cannot"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 in config.json cannot .* which has 1e-05"),
        ({"activation_function": "silu"}, "activation_function=silu in config.json is not supported"),
        ({"quantization_config": {"bits": 4}}, "the gpt2 is quantized"),
        ({"n_layer": 3}, "the weights lack h.2.ln_1.weight, which config.json requires"),
        ({"n_layer": 1}, "12 of the weights are not in config.json, such as h.1"),
        ({"eos_token_id": 50300}, "eos_token_id=50300 in config.json is not a token of the vocabulary of 97"),
        ({"eos_token_id": None}, "eos_token_id=None in config.json is not a token"),
        ({"n_inner": 7}, r"h.0.mlp.c_fc.weight has shape \(24, 96\), but config.json requires \(24, 7\)"),
    ],
)
def test_refused_gpt2(tmp_path, change, message):
    tiny_gpt2().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        from_huggingface(tmp_path / "hf", tmp_path / "fs")
    assert not (tmp_path / "fs").exists()


def test_refused_tokenizers(tmp_path, sources):
    directory = tmp_path / "hf"
    tiny_gpt2().save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(byte_level(sources[:2]))
    with pytest.raises(InputError, match="the tokenizer has ids up to 603, but the model's vocabulary .* at 96"):
        from_huggingface(directory, tmp_path / "fs")
    tiny_opt(vocab_size=700).save_pretrained(directory)
    with pytest.raises(InputError, match="the tokenizer of an OPT begins with <s>, <pad>, </s>, <unk>, but this one"):
        from_huggingface(directory, tmp_path / "fs")
    assert not (tmp_path / "fs").exists()


def test_refused_opt(tmp_path):
    tiny_opt(do_layer_norm_before=False).save_pretrained(tmp_path / "hf")
    with pytest.raises(InputError, match="do_layer_norm_before=False .* which has True; supported are opt"):
        from_huggingface(tmp_path / "hf", tmp_path / "fs")


def test_refused_files(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "created"),)

    directory = tmp_path / "hf"
    tiny_gpt2().save_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        from_huggingface(directory, tmp_path / "fs")
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds neither model.safetensors nor pytorch_model.bin"):
        from_huggingface(directory, tmp_path / "fs")
    torch.save({"transformer.wte.weight": Payload()}, directory / "pytorch_model.bin")
    with pytest.raises(InputError, match="it asks for posix.mkdir, which may run code"):
        from_huggingface(directory, tmp_path / "fs")
    assert not (tmp_path / "created").exists()
    with pytest.raises(
        SystemExit, match="preprocess.convert_huggingface: error: .*nowhere.*config.json cannot be read"
    ):
        main([str(tmp_path / "nowhere"), str(tmp_path / "fs")])


def test_refused_export(tmp_path):
    config = {"decoder_learned_pos": False}
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pt", stock_model(**config), stock_config(**config))
    VOCABULARY.save(str(tmp_path / "dict.txt"))
    with pytest.raises(InputError, match="a GPT-2 has decoder_learned_pos=True, this model False"):
        to_huggingface(checkpoint, tmp_path / "hf")
    (tmp_path / "dict.txt").write_text("a 1\n")
    with pytest.raises(
        InputError, match="the dictionary has 5 symbols and the model 34: give the model's dict.txt with"
    ):
        to_huggingface(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
