"""A Hugging Face ``tokenizer.json``, for the Python API, fairseq's commands and preprocessing.

The library ``tokenizers`` reads it, which transformers uses too, so that a text has the same ids here and there. This
module needs neither torch nor fairseq, so that the worker processes of preprocessing start at once.
"""

import json
import re
from functools import cached_property
from typing import Any, Callable, Dict, List, Sequence, Union

# fairseq's special symbols, with which every dictionary begins. The ids of a tokenizer that has the same four first,
# such as OPT's, are those of the dictionary.
_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

Step = Dict[str, Any]


class JsonTokenizer:
    """The tokenizer of a ``tokenizer.json``, and the symbols of its ids in a fairseq dictionary.

    The symbol of a token is its id in decimal, as in GPT-2's dictionaries, since a token may contain whitespace. Only
    the text is encoded. Tokens that transformers adds with ``add_special_tokens=True``, such as one at the beginning,
    are left to fairseq's end-of-sentence.

    Args:
        content: Bytes of the file.

    Attributes:
        size: Number of ids, from 0 to the largest.

    Raises:
        ImportError: The library is not installed.
        ValueError: The content is not a tokenizer, or encodes at random.
    """

    def __init__(self, content: bytes):
        try:
            import tokenizers
        except ImportError:
            raise ImportError(
                "a tokenizer.json needs the Python package tokenizers: pip install 'longmem_fairseq[preprocess]'"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"it is not a tokenizer.json: {error}") from None
        if getattr(self._tokenizer.model, "dropout", None):
            raise ValueError(f"it encodes at random (dropout {self._tokenizer.model.dropout}): set dropout to null")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocabulary: Dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = 1 + max(self.vocabulary.values(), default=-1)
        self._first = len(_SPECIALS) if all(self.vocabulary.get(s) == i for i, s in enumerate(_SPECIALS)) else 0

    def symbols(self, vocab_size: int) -> List[str]:
        """Return the symbols of a dictionary for a model, in the order of the ids and without the special ones.

        Every row of the model's embedding has one, also those that the tokenizer does not use.

        Args:
            vocab_size: Number of rows of the model's embedding.

        Raises:
            ValueError: The tokenizer has more ids.
        """
        if vocab_size < self.size:
            raise ValueError(
                f"the tokenizer has ids up to {self.size - 1}, but the model's vocabulary (vocab_size) ends at "
                f"{vocab_size - 1}"
            )
        return [str(number) for number in range(self._first, vocab_size)]

    def symbol(self, number: int) -> str:
        """Return the symbol of an id in the dictionary.

        Args:
            number: Id of a token.
        """
        return _SPECIALS[number] if number < self._first else str(number)

    def encode(self, text: str) -> List[int]:
        """Encode a text.

        Args:
            text: Text of any length.

        Returns:
            Ids of the tokens.
        """
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> List[List[int]]:
        """Encode several texts, faster than one by one.

        Args:
            texts: Texts of any length.

        Returns:
            Ids of the tokens of each text.
        """
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, numbers: Sequence[int]) -> str:
        """Decode ids.

        Args:
            numbers: Ids of the tokens; those that the tokenizer does not use have no text.

        Returns:
            The text, added tokens included.
        """
        if not self.has_token_bytes:
            return self._tokenizer.decode(numbers, skip_special_tokens=False)
        # The library's own Metaspace would remove all spaces that a text begins with.
        text = b"".join(self.token_bytes.get(number, b"") for number in numbers).decode("utf-8", "replace")
        return text[1:] if self.removes_space and text.startswith(" ") else text

    @property
    def adds_space(self) -> bool:
        """Return whether the tokenizer puts a space before every text; false where that is not defined."""
        numbers = self.encode("x") if self.has_token_bytes else []
        return bool(numbers) and self.token_bytes[numbers[0]].startswith(b" ")

    @property
    def starts_texts(self) -> bool:
        """Return whether transformers, which adds special tokens, puts one before every text."""
        plain, special = self.encode("x"), self._tokenizer.encode("x").ids
        return len(special) > len(plain) and special[: len(plain)] != plain

    @property
    def removes_space(self) -> bool:
        """Return whether decoding removes a space at the beginning of a text."""
        return any(step["type"] == "Strip" or _prepends(step) for step in self._decoder_steps)

    @property
    def has_token_bytes(self) -> bool:
        """Return whether :attr:`token_bytes` is defined."""
        return bool(self._decoder_steps) and all(_is_supported(step) for step in self._decoder_steps)

    @cached_property
    def token_bytes(self) -> Dict[int, bytes]:
        """Bytes of text that each id stands for (UTF-8, perhaps a part of a character).

        Raises:
            ValueError: The tokenizer's decoder does not define them.
        """
        steps = self._decoder_steps
        if not self.has_token_bytes:
            names = ", ".join(step["type"] for step in steps) or "none"
            raise ValueError(
                f"the tokenizer.json does not define the text of single tokens (decoder: {names}): supported are "
                "byte-level BPE, and BPE or Unigram of sentencepiece"
            )
        return {number: _token_bytes(token, steps) for token, number in self.vocabulary.items()}

    @cached_property
    def _decoder_steps(self) -> List[Step]:
        """Steps of the decoder as in the file, in order."""
        decoder = self._tokenizer.decoder
        if decoder is None:
            return []
        state = json.loads(decoder.__getstate__())
        return state["decoders"] if state["type"] == "Sequence" else [state]


def _prepends(step: Step) -> bool:
    """Return whether a decoder's step removes the space that a Metaspace puts before a text."""
    return step["type"] == "Metaspace" and step.get("prepend_scheme") != "never"


def _is_supported(step: Step) -> bool:
    """Return whether the text of a token after a decoder's step depends on this token alone, but for a first space."""
    if step["type"] == "Strip":
        return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in {*_STEPS, "Fuse"}


def _token_bytes(token: str, steps: Sequence[Step]) -> bytes:
    """Decode one token."""
    text: Union[str, bytes] = token
    for step in steps:
        if isinstance(text, str) and step["type"] in _STEPS:
            text = _STEPS[step["type"]](text, step)
    return text.encode() if isinstance(text, str) else text


def _byte_fallback(token: str, step: Step) -> Union[str, bytes]:
    byte = _BYTE.fullmatch(token)
    return bytes.fromhex(byte.group(1)) if byte else token


def _byte_level(token: str, step: Step) -> bytes:
    # As the library: an added token with characters outside of the alphabet is its own text.
    if all(char in _BYTE_LEVEL for char in token):
        return bytes(_BYTE_LEVEL[char] for char in token)
    return token.encode()


def _byte_alphabet() -> Dict[str, int]:
    """Return the byte of each character by which GPT-2's byte-level BPE writes it."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {**{chr(byte): byte for byte in visible}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_LEVEL = _byte_alphabet()
# What each step of a decoder makes of one token.
_STEPS: Dict[str, Callable[[str, Step], Union[str, bytes]]] = {
    "ByteFallback": _byte_fallback,
    "ByteLevel": _byte_level,
    "Metaspace": lambda token, step: token.replace(step["replacement"], " "),
    "Replace": lambda token, step: token.replace(step["pattern"]["String"], step["content"]),
}
