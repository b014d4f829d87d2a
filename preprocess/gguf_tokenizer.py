"""The content of a tokenizer.json from the metadata of a GGUF file.

llama.cpp has two kinds of tokenizers for the Llama family: ``gpt2``, a BPE of bytes, whose way to cut text into words
it knows by a name, and ``llama``, a BPE of sentencepiece, of which it has the scores of the pieces and not the merges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from preprocess.errors import InputError, require_package
from preprocess.gguf_metadata import GgufMetadata

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # gguf.TokenType
_LOWER_BLOCK = "\u2581"  # stands for a space in sentencepiece

# Words of Llama 3, and of Qwen2 with its digits one by one; and llama.cpp's for models of which it knows no others.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS, _QWEN2_WORDS = _WORDS.format(digits=r"\p{N}{1,3}"), _WORDS.format(digits=r"\p{N}")
_DEFAULT_WORDS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def tokenizer_json(metadata: GgufMetadata, vocabulary: int) -> str:
    """Translate a GGUF's tokenizer to one of the ``tokenizers`` library with the same ids.

    Args:
        metadata: Metadata of the file.
        vocabulary: Number of rows of the model's embedding.

    Returns:
        The content of a tokenizer.json.

    Raises:
        InputError: The tokenizer is incomplete, of an unknown kind, or has more tokens than the embedding has rows.
    """
    tokenizers = require_package("tokenizers", str(metadata.path))
    kind = metadata.require("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise metadata.refuse("tokenizer.ggml.model", _KINDS)
    tokens, types = _tokens(metadata)
    if len(tokens) > vocabulary:
        raise InputError(
            f"{metadata.path}: the tokenizer has {len(tokens):,} tokens and the embedding {vocabulary:,} rows, so the "
            "two do not belong together"
        )
    build, adds_start = _KINDS[kind]
    try:
        tokenizer = build(metadata, tokens, types, tokenizers)
    except InputError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise InputError(f"{metadata.path}: the tokenizer's tokens and merges do not fit: {error}") from None
    added = [
        tokenizers.AddedToken(token, normalized=False, special=number != _USER_DEFINED)
        for token, number in zip(tokens, types)
        if number in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    template = _template(metadata, tokens, adds_start(metadata))
    if template is not None:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**template)
    return tokenizer.to_str()


def _tokens(metadata: GgufMetadata) -> tuple[list[str], list[int]]:
    """Return the tokens and their types, without unused ones at the end, which fill the embedding up."""
    tokens, types = metadata.require("tokenizer.ggml.tokens"), metadata.require("tokenizer.ggml.token_type")
    different = len(set(tokens))
    if not len(tokens) == len(types) == different:
        raise InputError(
            f"{metadata.path}: tokenizer.ggml.tokens has {len(tokens):,} tokens, {different:,} of them different, and "
            f"tokenizer.ggml.token_type {len(types):,} types: these numbers must be the same"
        )
    count = max((i + 1 for i, number in enumerate(types) if number != _UNUSED), default=0)
    return tokens[:count], types[:count]


def _template(metadata: GgufMetadata, tokens: Sequence[str], adds_start: bool) -> dict[str, Any] | None:
    """Return the arguments of the post-processor that adds the start and the end of a text, None if it adds none."""
    ends = {}
    for name, default in (("bos", adds_start), ("eos", False)):
        if metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            number = metadata.require(f"tokenizer.ggml.{name}_token_id")
            if not 0 <= number < len(tokens):
                raise InputError(
                    f"{metadata.path}: tokenizer.ggml.{name}_token_id={number} is not one of the {len(tokens):,} tokens"
                )
            ends[name] = tokens[number], number
    if not ends:
        return None
    start, end = ([ends[name][0]] if name in ends else [] for name in ("bos", "eos"))
    return {
        "single": [*start, "$A", *end],
        "pair": [*start, "$A", *end, *(f"{token}:1" for token in start), "$B:1", *(f"{token}:1" for token in end)],
        "special_tokens": list(dict(ends.values()).items()),
    }


def _byte_level(metadata: GgufMetadata, tokens: Sequence[str], types: Sequence[int], tokenizers: Any) -> Any:
    """Build a BPE of bytes."""
    name = metadata.require("tokenizer.ggml.pre")
    if name not in _PRE_TOKENIZERS:
        raise metadata.refuse("tokenizer.ggml.pre", _PRE_TOKENIZERS)
    merges = [tuple(merge.split(" ")) for merge in metadata.require("tokenizer.ggml.merges")]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong is not None:
        raise InputError(f"{metadata.path}: {' '.join(wrong)!r} in tokenizer.ggml.merges is not two tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name in _LLAMA3)
    tokenizer = tokenizers.Tokenizer(model)
    if name == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name](tokenizers)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: GgufMetadata, tokens: Sequence[str], types: Sequence[int], tokenizers: Any) -> Any:
    """Build a BPE of sentencepiece, whose merges are made from the scores."""
    scores = metadata.require("tokenizer.ggml.scores")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    normal = {token: scores[number] for token, number in vocabulary.items() if types[number] == _NORMAL}
    model = tokenizers.models.BPE(
        vocab=vocabulary,
        merges=_merges(normal, vocabulary),
        unk_token=next((token for token, number in zip(tokens, types) if number == _UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    tokenizer = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    spaces = normalizers.Replace(" ", _LOWER_BLOCK)
    steps = [decoders.Replace(_LOWER_BLOCK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        # as in the tokenizer.json of Llama 2; a Metaspace would add no space before one that is there
        spaces = normalizers.Sequence([normalizers.Prepend(_LOWER_BLOCK), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = spaces, decoders.Sequence(steps)
    return tokenizer


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that form another one, best first, in the order of transformers' conversion."""
    merges = []
    for piece, score in scores.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(score, pair) for pair in pairs]
    merges.sort(key=lambda merge: (merge[0], len(merge[1][0]), len(merge[1][1])), reverse=True)
    return [pair for _, pair in merges]


def _cut(*expressions: str) -> Callable[[Any], Any]:
    """Return a builder of a pre-tokenizer that cuts text at what the expressions match, one after another."""

    def build(tokenizers: Any) -> Any:
        pre_tokenizers = tokenizers.pre_tokenizers
        cuts = [pre_tokenizers.Split(tokenizers.Regex(expression), "isolated") for expression in expressions]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


def _gpt2(tokenizers: Any) -> Any:
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm(tokenizers: Any) -> Any:
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    return tokenizers.pre_tokenizers.Sequence([digits, _gpt2(tokenizers)])


# Names of llama.cpp for ways to cut text into words; each value builds the way from the library.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_PRE_TOKENIZERS: dict[str, Callable[[Any], Any]] = {
    "smollm": _smollm,
    **dict.fromkeys(_LLAMA3, _cut(_LLAMA3_WORDS)),
    "qwen2": _cut(_QWEN2_WORDS),
    "gpt-2": _gpt2,
    "default": _cut(*_DEFAULT_WORDS),
}
# Kinds of tokenizers: how each is built, and whether it starts texts with the start symbol unless the file says.
_KINDS: dict[str, tuple[Callable[..., Any], Callable[[GgufMetadata], bool]]] = {
    "gpt2": (_byte_level, lambda metadata: metadata.get("tokenizer.ggml.pre") in _LLAMA3),
    "llama": (_sentencepiece, lambda metadata: True),
}
