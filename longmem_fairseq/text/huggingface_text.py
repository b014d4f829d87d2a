"""Text in the ids of a Hugging Face tokenizer."""

from functools import cached_property
from typing import Dict, List, Sequence

from .text_codec import TextCodec


class HuggingFaceText(TextCodec):
    """Text in the ids of a ``tokenizer.json``, the same as transformers gives.

    Args:
        bpe: A :class:`~longmem_fairseq.text.huggingface_bpe.HuggingFaceBPE`.
    """

    complete = True

    @property
    def adds_space(self) -> bool:
        return self.bpe.tokenizer.adds_space

    @property
    def starts_texts(self) -> bool:
        return self.bpe.tokenizer.starts_texts

    @property
    def has_token_bytes(self) -> bool:
        return self.bpe.tokenizer.has_token_bytes

    def encode(self, text: str) -> List[str]:
        return list(map(self.bpe.tokenizer.symbol, self.bpe.tokenizer.encode(text)))

    def decode(self, symbols: Sequence[str]) -> str:
        if not self.has_token_bytes:
            return self.bpe.decode(" ".join(symbols))
        text = "".join(self.texts(symbols))
        return text[1:] if self.bpe.tokenizer.removes_space and text.startswith(" ") else text

    @cached_property
    def symbol_bytes(self) -> Dict[str, bytes]:
        tokenizer = self.bpe.tokenizer
        return {tokenizer.symbol(number): text for number, text in tokenizer.token_bytes.items()}
