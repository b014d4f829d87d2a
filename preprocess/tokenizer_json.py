"""The ``tokenizer.json`` of a Hugging Face directory, complete: with what stands in the files beside it.

transformers changes the tokenizer that it reads from ``tokenizer.json`` by ``tokenizer_config.json`` and, in older
directories, ``special_tokens_map.json`` and ``added_tokens.json``. Directories of GPT-2's kind may hold ``vocab.json``
and ``merges.txt`` instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preprocess.errors import InputError, require_package
from preprocess.package_modules import files

TOKENIZER = "tokenizer.json"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_END_OF_TEXT = "<|endoftext|>"  # of GPT-2, whose directories may leave out what transformers knows


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a tokenizer that :func:`read_tokenizer_json` reads.

    Args:
        directory: Path of the directory.
    """
    return (directory / TOKENIZER).is_file() or all((directory / name).is_file() for name in (_VOCABULARY, _MERGES))


def read_tokenizer_json(path: Path) -> bytes:
    """Read the tokenizer of a Hugging Face directory.

    Args:
        path: Path of the directory, or of a ``tokenizer.json``.

    Returns:
        Content of a ``tokenizer.json`` that alone gives the ids of transformers; if possible that of the file.

    Raises:
        InputError: A file cannot be read, or another one contradicts ``tokenizer.json``.
    """
    directory = path if path.is_dir() else path.parent
    file = directory / TOKENIZER if path.is_dir() else path
    config = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    library = require_package("tokenizers", f"--tokenizer {path}")
    if path.is_dir() and not file.is_file():
        content = _from_two_files(directory, config, library)
    else:
        content = _read_bytes(file)
    try:
        tokenizer = library.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises Exception itself
        raise InputError(f"{file} is not a tokenizer.json: {error}") from None
    _check_settings(config, tokenizer, directory)
    before = _added_tokens(tokenizer)
    _add_tokens(config, tokenizer, directory, library)
    return content if _added_tokens(tokenizer) == before else tokenizer.to_str().encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: Path of the file.

    Raises:
        InputError: The file cannot be read or holds something else.
    """
    try:
        content = files.parse_json(_read_bytes(path))
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def from_vocabulary(vocabulary: dict[str, int], merges: list[tuple[str, str]], add_prefix_space: bool = False) -> bytes:
    """Make the ``tokenizer.json`` of GPT-2's byte-level BPE.

    Args:
        vocabulary: Id of each token.
        merges: Pairs of tokens to join, best first.
        add_prefix_space: Whether a space is put before a text that does not begin with one.

    Returns:
        Content of the file.
    """
    library = require_package("tokenizers", "a byte-level BPE")
    tokenizer = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = library.decoders.ByteLevel()
    if _END_OF_TEXT in vocabulary:
        tokenizer.add_special_tokens([_END_OF_TEXT])
    return tokenizer.to_str().encode()


def _from_two_files(directory: Path, config: dict[str, Any], library) -> bytes:
    """Make the ``tokenizer.json`` of a directory that holds GPT-2's two files."""
    lines = _read_bytes(directory / _MERGES).decode("utf-8", "replace").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    merges = [tuple(line.split(" ")) for line in lines if line]
    try:
        return from_vocabulary(read_json(directory / _VOCABULARY), merges, bool(config.get("add_prefix_space")))
    except InputError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise InputError(f"{directory / _VOCABULARY} and {_MERGES} do not belong together: {error}") from None


def _read_bytes(path: Path) -> bytes:
    """Read a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _check_settings(config: dict[str, Any], tokenizer, directory: Path) -> None:
    """Refuse settings of ``tokenizer_config.json`` by which versions of transformers encode in different ways."""
    if config.get("split_special_tokens"):
        raise InputError(
            f"{directory}/tokenizer_config.json has split_special_tokens=true, which {TOKENIZER} cannot express: give "
            "a tokenizer that recognizes its special tokens"
        )
    setting = config.get("add_prefix_space")
    if not isinstance(setting, bool) or tokenizer.pre_tokenizer is None:
        return
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    for step in state.get("pretokenizers", [state]):
        if step["type"] == "ByteLevel" and step["add_prefix_space"] != setting:
            raise InputError(
                f"{directory}/tokenizer_config.json has add_prefix_space={json.dumps(setting)}, but {TOKENIZER} "
                f"{json.dumps(step['add_prefix_space'])}: make them equal, as the model was trained"
            )


def _added_tokens(tokenizer) -> dict[int, str]:
    """Describe the added tokens of a tokenizer with all their properties."""
    return {number: repr(token) for number, token in tokenizer.get_added_tokens_decoder().items()}


def _add_tokens(config: dict[str, Any], tokenizer, directory: Path, library) -> None:
    """Add the tokens that the files beside ``tokenizer.json`` name, as transformers does."""
    numbered = {int(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()}
    special = {**_read_optional(directory / "special_tokens_map.json"), **config}
    names = [special.get(name) for name in _NAMED]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = special.get(name) or []
        names += more.values() if isinstance(more, dict) else more
    named = {name["content"] if isinstance(name, dict) else name: name for name in names if name}
    if not numbered:
        for content, number in _read_optional(directory / "added_tokens.json").items():
            numbered[number] = {"content": content, "special": content in named}
    for number, token in sorted(numbered.items()):
        properties = {key: value for key, value in token.items() if key != "__type"}
        tokenizer.add_tokens([library.AddedToken(**properties)])
        if tokenizer.token_to_id(token["content"]) != number:
            raise InputError(
                f"{directory} gives the added token {token['content']} the id {number}, but with {TOKENIZER} it gets "
                f"{tokenizer.token_to_id(token['content'])}: save the tokenizer again with transformers"
            )
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for content in named:
        if content not in added:
            tokenizer.add_special_tokens([content])


def _read_optional(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no file."""
    return read_json(path) if path.is_file() else {}
