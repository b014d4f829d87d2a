"""Small tokenizers of each kind that Hugging Face models have, as the bytes of their ``tokenizer.json``."""

import json
from typing import Callable, Dict, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
WORDS = ("<speaker1>", "<mask-2>")
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _train(tokenizer: Tokenizer, trainer, texts: Sequence[str]) -> Tokenizer:
    trainer.show_progress = False
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(texts: Sequence[str], add_prefix_space: bool = False, normalizer=None, words=None) -> bytes:
    """As GPT-2, Llama 3, Qwen and SmolLM have, with added tokens and the settings that are easily overlooked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=words is None)
    split = pre_tokenizers.Split(words, "isolated") if words else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=[MARKERS[2]]),
        texts,
    )
    tokenizer.add_special_tokens(list(MARKERS))
    tokenizer.add_tokens([AddedToken(WORDS[0]), AddedToken(WORDS[1], lstrip=True, rstrip=True, single_word=True)])
    end = (MARKERS[2], tokenizer.token_to_id(MARKERS[2]))
    tokenizer.post_processor = processors.TemplateProcessing(f"{end[0]} $A", special_tokens=[end])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(pad_id=end[1], pad_token=end[0])
    return tokenizer.to_str().encode()


def llama(texts: Sequence[str], legacy: bool = False) -> bytes:
    """As Llama 2 and Mistral have: sentencepiece's BPE with byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>"]
    _train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, limit_alphabet=60),
        texts,
    )
    if legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):  # not as added tokens, which would be recognized in a text
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    content["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken(WORDS[0], normalized=False)])
    return tokenizer.to_str().encode()


def unigram(texts: Sequence[str]) -> bytes:
    """As T5 and XLNet have: sentencepiece's Unigram, whose unknown characters are lost."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    return _train(tokenizer, trainer, texts).to_str().encode()


def word_piece(texts: Sequence[str]) -> bytes:
    """As BERT has: the text of a token depends on the tokens before it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"])
    return _train(tokenizer, trainer, texts).to_str().encode()


KINDS: Dict[str, Callable[[Sequence[str]], bytes]] = {
    "byte level": byte_level,
    "lower case": lambda texts: byte_level(texts, add_prefix_space=True, normalizer=normalizers.Lowercase()),
    "normalized": lambda texts: byte_level(texts, normalizer=normalizers.NFC(), words=LLAMA3_WORDS),
    "llama": llama,
    "legacy llama": lambda texts: llama(texts, legacy=True),
    "unigram": unigram,
    "word piece": word_piece,
}
