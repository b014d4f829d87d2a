"""Tokenizers in GGUF files give the ids of the tokenizers that they were written from."""

import json

import gguf
import pytest
import sentencepiece
import tokenizers
import torch
from fairseq.data import Dictionary
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longmem_fairseq.backbones.loading import load_backbone
from preprocess.convert_huggingface import main
from preprocess.errors import InputError
from preprocess.gguf_model import read_gguf
from tests.preprocess.gguf_files import F32, metadata_of, tensors_of, tiny, write

ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WHOLE = "zqxjzq"  # a token that no merges make: Llama 3 takes a whole word before it merges
# The regular expressions in the tokenizer.json of Llama 3 and of Qwen2.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
ALPHABET = "ab'sTRE  \n\r\t0123456789.,!-_()\u00e9e\u0301\u4e2d\u6587\u0661\U0001f600\u2581<|>"
WORDS = [*ADDED, "the ", WHOLE, "<caf\u00e9>", "<cafe\u0301>"]
PARTS = (st.text(st.sampled_from(ALPHABET), max_size=12), st.text(max_size=5), st.sampled_from(WORDS))
TEXTS = st.lists(st.one_of(*PARTS), max_size=8).map("".join)


def original_tokenizer(name, texts):
    """A tokenizer in the form of the tokenizer.json that models of a kind are published with."""
    pre_tokenizers = tokenizers.pre_tokenizers
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def words(expression):
        cut = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
        return pre_tokenizers.Sequence([cut, bytes_only])

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = {
        "gpt-2": words(GPT2_WORDS),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words(GPT2_WORDS)]),
        "llama-bpe": words(LLAMA3_WORDS),
        "qwen2": words(QWEN2_WORDS),
    }[name]
    if name == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=ADDED if name == "smollm" else [],  # its first tokens; those of others follow
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"][WHOLE] = len(content["model"]["vocab"])
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in ADDED])
    tokenizer.add_tokens([tokenizers.AddedToken("<caf\u00e9>", normalized=False)])
    return tokenizer


def read_tokenizer(tmp_path, metadata, vocabulary=800):
    """Write a GGUF that holds a tokenizer, and return it as it is read."""
    model = tiny("llama", vocab_size=vocabulary, num_hidden_layers=1)
    path = write(tmp_path / "model.gguf", metadata_of(model, **metadata), tensors_of(model, F32))
    return tokenizers.Tokenizer.from_str(read_gguf(path).tokenizer_json())


def bpe_metadata(tokenizer, name, unused=0):
    """What llama.cpp's converter writes of a byte-level BPE, with some unused tokens at the end."""
    content = json.loads(tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    types = [gguf.TokenType.NORMAL] * size + [gguf.TokenType.UNUSED] * unused
    for token in content["added_tokens"]:
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [tokenizer.id_to_token(i) for i in range(size)] + [f"[PAD{i}]" for i in range(unused)],
        "tokenizer.ggml.token_type": [int(number) for number in types],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_ids_of_a_byte_level_bpe(tmp_path, sources, name):
    original = original_tokenizer(name, sources[:20])
    read = read_tokenizer(tmp_path, bpe_metadata(original, name, unused=3))
    assert read.get_vocab() == original.get_vocab()

    @settings(max_examples=200)
    @given(TEXTS)
    def check(text):
        assert read.encode(text).ids == original.encode(text).ids
        ids = original.encode(text).ids
        assert read.decode(ids) == original.decode(ids)
        assert read.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)

    check()
    for text in sources[20:24]:
        assert read.encode(text).ids == original.encode(text).ids


@torch.no_grad()
def test_conversion_by_the_command(tmp_path, sources):
    """A GGUF becomes a backbone with its tokenizer: text gives the ids and the logits of the original."""
    original = original_tokenizer("smollm", sources[:5])
    model = tiny("llama", vocab_size=800, num_hidden_layers=1, bos_token_id=1, eos_token_id=2)
    metadata = metadata_of(model, **bpe_metadata(original, "smollm", unused=3))
    main([str(write(tmp_path / "m.gguf", metadata, tensors_of(model, F32))), str(tmp_path / "backbone")])
    dictionary = Dictionary.load(str(tmp_path / "backbone" / "dict.txt"))
    decoder = load_backbone(str(tmp_path / "backbone" / "checkpoint.pt"), dictionary).decoder
    read = tokenizers.Tokenizer.from_file(str(tmp_path / "backbone" / "tokenizer.json"))
    numbers = original.encode("<|im_start|>def f(x): return 12<|im_end|>").ids
    assert read.encode("<|im_start|>def f(x): return 12<|im_end|>").ids == numbers
    ids = torch.tensor([[dictionary.index(str(number)) for number in numbers]])
    index = [dictionary.index(str(number)) for number in range(800)]
    expected = model(torch.tensor([numbers])).logits
    torch.testing.assert_close(decoder(ids)[0][..., index], expected, rtol=0, atol=1e-4)


def test_words_of_llama_cpp_by_default(tmp_path, sources):
    read = read_tokenizer(tmp_path, bpe_metadata(original_tokenizer("gpt-2", sources[:5]), "default"))
    words = [word for word, _ in read.pre_tokenizer.pre_tokenize_str("it's a+b, 12345  x \n\n!")]
    assert words == ["it", "'", "s", "\u0120a", "+", "b", ",", "\u0120", "123", "45", "\u0120", "\u0120x"] + [
        "\u0120\u010a\u010a",
        "!",
    ]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None}, [5, "x"]),
        ({"tokenizer.ggml.add_bos_token": None}, ["x"]),
        ({"tokenizer.ggml.add_eos_token": True}, ["x", 6]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, [5, "x", 6]),
    ],
    ids=str,
)
def test_start_and_end_of_a_text(tmp_path, sources, changes, expected):
    metadata = bpe_metadata(original_tokenizer("gpt-2", sources[:5]), "gpt-2")
    ends = {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 6}
    read = read_tokenizer(tmp_path, {**metadata, **ends, **changes})
    ids = {"x": read.token_to_id("x")}
    assert read.encode("x").ids == [ids.get(item, item) for item in expected]
    assert read.encode("x", add_special_tokens=False).ids == [ids["x"]]


@pytest.fixture(scope="module", params=[True, False], ids=["space before", "no space before"])
def sentencepiece_model(request, sources, tmp_path_factory):
    """A sentencepiece BPE like Llama 2's, and whether it puts a space before every text."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in sources[:20] for line in text.splitlines() if line),
        model_prefix=str(prefix),
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        split_digits=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model"), request.param


def test_ids_of_a_sentencepiece_bpe(tmp_path, sources, sentencepiece_model):
    original, prefix = sentencepiece_model
    size = original.get_piece_size()
    types = [2 if original.is_unknown(i) else 3 if original.is_control(i) else 1 for i in range(size)]
    types = [6 if original.is_byte(i) else number for i, number in enumerate(types)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in range(size)] + ["<|im_start|>"],
        "tokenizer.ggml.scores": [original.get_score(i) for i in range(size)] + [-1000.0],
        "tokenizer.ggml.token_type": types + [int(gguf.TokenType.CONTROL)],
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    read = read_tokenizer(tmp_path, metadata)

    @settings(max_examples=200)
    @given(TEXTS)
    def check(text):
        # sentencepiece spells control tokens out, where transformers takes them for the tokens that they name.
        assume(not any(part in text for part in ("<|im_start|>", "<s>", "</s>", "<unk>", "\0")))
        ids = original.encode(text)
        assert read.encode(text).ids == [1, *ids]
        assert read.decode(ids) == original.decode(ids)

    check()
    for text in sources[20:24]:
        assert read.encode(text).ids == [1, *original.encode(text)]
    assert read.encode("<|im_start|>").ids == [1, size]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"tokenizer.ggml.pre": "tekken"},
            "pre=tekken is not supported; supported are smollm, llama-bpe, .*qwen2",
        ),
        ({"tokenizer.ggml.pre": None}, "lacks tokenizer.ggml.pre in its metadata"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model=t5 is not supported; supported are gpt2, llama"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "'a b c' in tokenizer.ggml.merges is not two tokens"),
        ({"tokenizer.ggml.merges": ["qqq zzz"]}, "the tokenizer's tokens and merges do not fit: "),
        ({"tokenizer.ggml.token_type": [1, 1]}, "has 705 tokens, 705 of them different, and .* 2 types"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 999},
            "bos_token_id=999 is not one of the 705 tokens",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_tokenizers_are_refused(tmp_path, sources, changes, message):
    metadata = bpe_metadata(original_tokenizer("gpt-2", sources[:5]), "gpt-2")
    with pytest.raises(InputError, match=message):
        read_tokenizer(tmp_path, {**metadata, **changes})


def test_tokenizer_longer_than_the_embedding_is_refused(tmp_path, sources):
    metadata = bpe_metadata(original_tokenizer("gpt-2", sources[:5]), "gpt-2")
    with pytest.raises(InputError, match="has 705 tokens and the embedding 704 rows"):
        read_tokenizer(tmp_path, metadata, vocabulary=704)
