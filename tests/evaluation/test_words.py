"""Names and rare words are located where a reader sees them, and their tokens with them."""

import pytest

from longmem_fairseq.evaluation.scoring.text_tokenizer import TextTokenizer
from longmem_fairseq.evaluation.words import (
    NAME,
    NAME_AGAIN,
    OTHER,
    RARE,
    RARE_AGAIN,
    count_words,
    kinds_of_characters,
)
from tests.fairseq_runs import make_dictionary

COMMON = count_words(["the whale and a ship was seen by but he saw it then when one old man now"] * 6)
TEXT = (
    'The whale and Ahab. "Then Starbuck saw the quohog," he saw. Now Ahab was old.\n\n'
    "Quohog and starfish--Queequeg saw the Old man; a QUOHOG was it. Grog was seen."
)


def test_kinds():
    kinds = kinds_of_characters(TEXT, COMMON)
    kinds_of_words = {}
    for word in ("The", "whale", "Ahab", "Then", "Starbuck", "quohog", "Now", "Quohog", "starfish", "Old", "Grog"):
        start = TEXT.index(word)
        kinds_of_words[word] = set(kinds[start : start + len(word)].tolist())
    assert kinds_of_words == {
        "The": {OTHER},
        "whale": {OTHER},
        "Ahab": {NAME},
        "Then": {OTHER},
        "Starbuck": {NAME},
        "quohog": {RARE},
        "Now": {OTHER},
        "Quohog": {RARE_AGAIN},
        "starfish": {RARE},
        "Old": {OTHER},
        "Grog": {RARE},  # at a sentence's start alone: nothing says that it is a name
    }
    assert kinds[TEXT.rindex("Ahab")] == NAME_AGAIN and kinds[TEXT.index("QUOHOG")] == RARE_AGAIN
    assert kinds[TEXT.index("Queequeg")] == RARE, "behind a dash: it may begin a sentence"
    assert kinds[TEXT.index(" and")] == OTHER


def test_five_occurrences_are_rare_and_six_are_not():
    reference = count_words(["grog " * 5, "rum " * 6])
    kinds = kinds_of_characters("grog rum", reference)
    assert (kinds[0], kinds[5]) == (RARE, OTHER)


@pytest.mark.parametrize("text", [TEXT, "na\u00efve \u201cCaf\u00e9\u201d \U0001f433\n\n  x\ty", "a"])
def test_ends_of_sentencepiece_tokens(scorer, text):
    tokens = scorer.tokenizer.encode(text)
    ends = scorer.tokenizer.ends(text, tokens)
    assert ends[-1] == len(text) and (ends[1:] >= ends[:-1]).all() and len(ends) == len(tokens)
    for end, token in zip(ends[:40], range(1, 41)):
        if end > (0 if token == 1 else ends[token - 2]):  # whole characters
            assert scorer.tokenizer.decode(tokens[:token]).rstrip("\ufffd") == text[:end]
    assert scorer.tokenizer.decode(tokens) == text


def test_ends_of_words():
    tokenizer = TextTokenizer(make_dictionary())
    tokens = tokenizer.encode("w3 w15 w2")
    assert tokenizer.ends("w3 w15 w2", tokens).tolist() == [3, 7, 9]
    assert tokenizer.ends("w3  w15 w2", tokens) is None, "the text is not what the tokens say"
    assert not len(tokenizer.encode(" ")) and tokenizer.decode(tokens[:0]) == ""


def test_line_ends(scorer):
    tokenizer = scorer.tokenizer
    ends = set(tokenizer.line_ends().tolist())
    assert ends and all(tokenizer.dictionary[i].startswith("<0x0A>") for i in ends)
    assert set(tokenizer.encode("\n").tolist()) <= ends and not set(tokenizer.encode("end of line").tolist()) & ends


def test_a_continuation_keeps_its_space(scorer):
    tokenizer = scorer.tokenizer
    whole = tokenizer.encode("It was good")
    parts = [tokenizer.encode("It was"), tokenizer.encode_continuation(" good")]
    assert whole.tolist() == [token for part in parts for token in part.tolist()]
