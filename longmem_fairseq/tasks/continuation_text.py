"""The text of a continuation: what its tokens add to the text of the prompt, at once or piece by piece."""

from typing import Iterator, List, Optional, Sequence, Tuple

from fairseq.data import Dictionary

from ..text import text_codec

_UNFINISHED = "\ufffd"  # decoded from the first bytes of a character, of which UTF-8 has at most three before the last
_CONTEXT, _WINDOW = 8, 32  # numbers of tokens


class ContinuationText:
    """Decodes continuations.

    Args:
        dictionary: Dictionary of the tokens.
        bpe: fairseq's BPE, or None for a dictionary of words.
        tokenizer: fairseq's tokenizer, or None.

    Attributes:
        local: Whether the text of a token depends on nothing but the tokens beside it.
    """

    def __init__(self, dictionary: Dictionary, bpe=None, tokenizer=None):
        self.dictionary, self.tokenizer = dictionary, tokenizer
        self._codec = text_codec(bpe)
        self.local = tokenizer is None and (bpe is None or self._codec.has_token_bytes)

    def __call__(self, prompt: Sequence[int], continuation: Sequence[int]) -> str:
        """Return the text of a continuation.

        Args:
            prompt: Token ids before it.
            continuation: Its token ids; end-of-sentence and padding are left out.
        """
        # Decoded by itself, a continuation would lose the space that it starts with.
        before, whole = self._decode(prompt), self._decode([*prompt, *continuation])
        return whole[len(before) :] if whole.startswith(before) else self._decode(continuation)

    def _decode(self, tokens: Sequence[int]) -> str:
        left_out = (self.dictionary.eos(), self.dictionary.pad())
        text = self._codec.decode([self.dictionary[token] for token in tokens if token not in left_out])
        return text if self.tokenizer is None else self.tokenizer.decode(text)


class StopStrings:
    """Texts at which a continuation ends; it is cut before the first of them, also within a token.

    Args:
        stops: The texts, none of them empty.
        text: Decoder of continuations.
    """

    def __init__(self, stops: Sequence[str], text: ContinuationText):
        self.stops, self.text = tuple(stops), text
        # Number of the newest tokens that a stop can reach into: each token but an empty first one has a byte.
        self._newest = 1 + max((len(stop.encode()) for stop in stops), default=0)

    def find(self, text: str) -> Optional[int]:
        """Return the number of characters before the first stop in a text, or None."""
        places = [text.find(stop) for stop in self.stops]
        return min((place for place in places if place >= 0), default=None)

    def completed_by(self, last: int, generated: Sequence[int]) -> bool:
        """Return whether the newest token of a continuation completes a stop.

        Args:
            last: Last token of the prompt.
            generated: Token ids of the continuation so far.
        """
        begin = max(0, len(generated) - self._newest) if self.text.local else 0
        context = [last, *generated[max(0, begin - _CONTEXT) : begin]]
        return self.find(self.text(context, generated[begin:])) is not None

    def cut(self, prompt: Sequence[int], generated: Sequence[int]) -> Optional[Tuple[int, str]]:
        """Cut a continuation before its first stop.

        Args:
            prompt: Token ids of the prompt.
            generated: Token ids of the continuation.

        Returns:
            Number of its tokens up to the one in which the stop begins, and the text before the stop; None without one.
        """
        text = self.text(prompt, generated)
        place = self.find(text)
        if place is None:
            return None
        n = len(generated)
        while n and len(self.text(prompt, generated[: n - 1])) >= place:
            n -= 1
        return n, text[:place]

    def held_back(self, text: str) -> int:
        """Return the number of characters at a text's end with which a stop may begin."""
        longest = max(map(len, self.stops), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self.stops):
                return n
        return 0


class TextStream:
    """Turns the tokens of a continuation into pieces of text, which joined are the whole text up to a stop.

    Characters are never cut: the bytes of one wait until it is whole.

    Args:
        text: Decoder of continuations that is local.
        prompt: Token ids of the prompt.
        stops: Texts at which the continuation ends.

    Attributes:
        stopped: Whether a stop was found.
    """

    def __init__(self, text: ContinuationText, prompt: Sequence[int], stops: StopStrings):
        self.text, self.stops, self.stopped = text, stops, False
        self._prompt: List[int] = list(prompt)
        self._tokens: List[int] = []  # newest tokens of the continuation; those before are part of the prompt by now
        self._sent = 0  # number of characters of their text that were returned

    def pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        """Yield pieces of text, none of them empty.

        Args:
            tokens: Token ids of the continuation, which are taken one by one until a stop.
        """
        for token in tokens:
            self._tokens.append(token)
            piece = self._next(whole=False)
            if piece:
                yield piece
            if self.stopped:
                return
        piece = self._next(whole=True)
        if piece:
            yield piece

    def _next(self, whole: bool) -> str:
        """Return the text that is certain and was not returned before; all of it at the end."""
        text = self.text(self._prompt, self._tokens)
        unfinished = 0 if whole else min(3, len(text) - len(text.rstrip(_UNFINISHED)))
        new = text[self._sent : len(text) - unfinished]
        place = self.stops.find(new)
        self.stopped = place is not None
        if not self.stopped:
            place = len(new) - (0 if whole else self.stops.held_back(new))
        self._sent += place
        if self._sent == len(text) and len(self._tokens) >= _WINDOW:
            self._prompt, self._tokens, self._sent = self._tokens[-_CONTEXT:], [], 0
        return new[:place]
