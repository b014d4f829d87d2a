"""What a kind of Hugging Face model gives to be converted to a model of fairseq."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from preprocess.dictionary import EOS, SPECIALS, filler_symbols, read_dictionary
from preprocess.errors import InputError
from preprocess.huggingface_tokenizer import JsonTokenizer, dictionary_symbols
from preprocess.huggingface_weights import Config, Weights

_MOST = 2**31 - 1  # of a size
_PROBABILITIES = ("resid_pdrop", "attn_pdrop", "dropout", "attention_dropout")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


class Conversion(ABC):
    """One kind of Hugging Face model.

    Attributes:
        model: Name of the fairseq model that it becomes.
        default_vocabulary: Number of rows of the embedding where config.json leaves it out.
        default_end: Number of the token that ends a text where config.json leaves it out; None where it must not.
    """

    model: ClassVar[str]
    default_vocabulary: ClassVar[int]
    default_end: ClassVar[int | None] = None

    @abstractmethod
    def settings(self, config: Config) -> Config:
        """Translate a model's configuration, and refuse what the fairseq model cannot express.

        Args:
            config: Content of config.json.

        Returns:
            Settings of the fairseq model.

        Raises:
            InputError: The model is not supported; the message names the setting.
        """

    @abstractmethod
    def convert(self, weights: Mapping[str, Tensor], settings: Config, rows: Sequence[int], vocabulary: int) -> Weights:
        """Convert the weights.

        Args:
            weights: Tensors by their Hugging Face names.
            settings: Settings of the fairseq model, from :meth:`settings`.
            rows: Row of the embedding for each symbol of the dictionary, special ones included; -1 for one without.
            vocabulary: Number of rows of the embedding, V.

        Returns:
            Tensors by the names of the fairseq model.

        Raises:
            InputError: A tensor is missing, of another shape or unknown.
        """

    def symbols(
        self, config: Config, tokenizer: JsonTokenizer | None, dictionary: str | None
    ) -> tuple[list[str], list[int]]:
        """Choose the symbols of the dictionary, and the row of the embedding for each.

        Args:
            config: Content of config.json.
            tokenizer: Tokenizer of the model, or None.
            dictionary: Path of a dict.txt whose order to use; None for the order of the tokens' numbers.

        Returns:
            Symbols without the special ones, and the row of each symbol, special ones included; -1 for none.

        Raises:
            InputError: The tokenizer or the dictionary does not fit the model.
        """
        vocabulary = self.vocabulary(config)
        symbols = [str(number) for number in range(vocabulary)] + filler_symbols(vocabulary)
        if tokenizer is not None:
            symbols = dictionary_symbols(tokenizer, vocabulary)
        if len(symbols) < vocabulary:
            raise InputError(
                f"the tokenizer begins with fairseq's special symbols, as OPT's; a {config['model_type']}'s does not"
            )
        if dictionary is not None:
            symbols = read_dictionary(dictionary)
            numbers = set(tokenizer.vocabulary.values()) if tokenizer else set(range(vocabulary))
            missing = sorted(numbers - {int(symbol) for symbol in symbols if symbol.isdigit()})
            if missing:
                raise InputError(
                    f"--dict {dictionary} lacks {len(missing)} of the model's {len(numbers)} tokens, such as "
                    f"{missing[0]}: give a dictionary of the tokens' numbers, or leave --dict out"
                )
        rows = [int(symbol) if symbol.isdigit() and int(symbol) < vocabulary else -1 for symbol in symbols]
        special = [-1] * len(SPECIALS)
        special[EOS] = self.end_of_text(config)
        return symbols, [*special, *rows]

    def symbol_settings(self, config: Config, symbols: Sequence[str]) -> Config:
        """Return settings of the fairseq model that depend on the dictionary.

        Args:
            config: Content of config.json.
            symbols: Symbols of the dictionary without the special ones.

        Raises:
            InputError: A symbol that config.json names is not in the dictionary.
        """
        return {}

    def vocabulary(self, config: Config) -> int:
        """Return the number of rows of the embedding, V, from the content of config.json."""
        return config.get("vocab_size") or self.default_vocabulary

    def end_of_text(self, config: Config) -> int:
        """Return the token that ends a text, whose embedding ``</s>`` gets, from the content of config.json.

        Raises:
            InputError: It is not a token of the model.
        """
        end, vocabulary = config.get("eos_token_id", self.default_end), self.vocabulary(config)
        if isinstance(end, list) and end:
            end = end[0]
        if not isinstance(end, int) or not 0 <= end < vocabulary:
            raise InputError(
                f"eos_token_id={end} in config.json is not a token of the vocabulary of {vocabulary:,}: correct it, "
                "since the end of a document gets the embedding of this token"
            )
        return end


def check_settings(config: Config, required: Config, supported: str) -> None:
    """Refuse settings of config.json that fairseq's decoder cannot vary.

    Args:
        config: Content of config.json.
        required: Values that the settings must have where they are given.
        supported: Names of the supported models, for the message.

    Raises:
        InputError: A setting has another value, or the model is quantized.
    """
    if config.get("quantization_config"):
        raise InputError(f"the {config['model_type']} is quantized (quantization_config): give its original weights")
    for name, value in required.items():
        if config.get(name, value) != value:
            raise InputError(
                f"{name}={config[name]} in config.json cannot be expressed by fairseq's decoder, which has {value}; "
                f"supported are {supported}"
            )


def check_numbers(config: Config, sizes: Sequence[str], optional_sizes: Sequence[str] = ()) -> None:
    """Refuse sizes and probabilities that are not numbers in their range.

    Args:
        config: Content of config.json.
        sizes: Names of the sizes that it must have.
        optional_sizes: Names of the sizes that it may leave out.

    Raises:
        InputError: A value is of another type, or outside its range.
    """
    for name in (*sizes, *optional_sizes):
        size = config.get(name)
        if size is None and name in optional_sizes:
            continue
        if type(size) is not int or not 0 < size <= _MOST:
            raise InputError(f"{name}={size!r:.40} in config.json is not a number from 1 to {_MOST}")
    for name in _PROBABILITIES:
        value = config.get(name, 0)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise InputError(f"{name}={value!r:.40} in config.json is not a number from 0 to 1")
    for name in _FLAGS:
        if not isinstance(config.get(name) or False, bool):
            raise InputError(f"{name}={config[name]!r:.40} in config.json is not true or false")
