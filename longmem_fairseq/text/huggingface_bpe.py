"""fairseq's ``--bpe hf_tokenizer --tokenizer-json FILE``: any tokenizer that is stored as a ``tokenizer.json``."""

from dataclasses import dataclass, field

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

from .json_tokenizer import JsonTokenizer


@dataclass
class HuggingFaceBPEConfig(FairseqDataclass):
    """The options of :class:`HuggingFaceBPE`."""

    tokenizer_json: str = field(
        default="", metadata={"help": "path to a Hugging Face tokenizer.json, for --bpe hf_tokenizer"}
    )


@register_bpe("hf_tokenizer", dataclass=HuggingFaceBPEConfig)
class HuggingFaceBPE:
    """A Hugging Face tokenizer; its symbols are the ids in decimal.

    Args:
        cfg: Configuration with ``tokenizer_json``, the path of the file.

    Raises:
        ImportError: The library ``tokenizers`` is not installed.
        ValueError: The file cannot be read or is not a tokenizer.
    """

    def __init__(self, cfg):
        path = cfg.tokenizer_json
        if not path:
            raise ValueError("--bpe hf_tokenizer needs a file: name it with --tokenizer-json")
        try:
            with open(path, "rb") as file:
                self.tokenizer = JsonTokenizer(file.read())
        except OSError as error:
            raise ValueError(f"--tokenizer-json {path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"--tokenizer-json {path} cannot be used: {error}") from None

    def encode(self, x: str) -> str:
        """Return the symbols of a text between spaces."""
        return " ".join(map(self.tokenizer.symbol, self.tokenizer.encode(x)))

    def decode(self, x: str) -> str:
        """Return the text of symbols between spaces."""
        return self.tokenizer.decode([int(symbol) for symbol in x.split() if symbol.isdigit()])
