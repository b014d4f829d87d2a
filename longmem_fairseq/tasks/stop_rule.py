"""``--stop``: hypotheses end with the token that completes a stop string.

Legend: R rows (hypotheses), V symbols.
"""

from typing import Any, Callable, Dict, Sequence

import torch
from torch import Tensor, nn

from ..text import in_line, of_line, one_line
from .continuation_text import ContinuationText, StopStrings

_TEXTS_KEPT = 2**16  # texts of cut hypotheses that are kept until they are printed


class StopRule(nn.Module):
    """Let an end-of-sentence with probability 1 follow a stop string, whatever the smallest length is.

    Args:
        stops: Texts at which a hypothesis ends.
        eos: Id of end-of-sentence.

    Attributes:
        on_cut: Function that is called with each hypothesis that was cut.
    """

    def __init__(self, stops: StopStrings, eos: int):
        super().__init__()
        self.stops, self.eos = stops, eos
        self.on_cut: Callable[[Dict[str, Any]], None] = lambda hypothesis: None

    def forward(self, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int) -> Tensor:
        """Change the log-probabilities of the next token; arguments are those of :class:`.NoRepeatedNgrams`."""
        for row, (last, *generated) in enumerate(tokens[:, : step + 1].tolist()):
            if generated and self.stops.completed_by(last, generated):
                lprobs[row] = float("-inf")
                lprobs[row, self.eos] = 0.0
        return lprobs

    def cut(self, prompt: Tensor, hypothesis: Dict[str, Any]) -> None:
        """Cut a hypothesis before its first stop string, if it has one.

        Args:
            prompt: Token ids of the prompt, shape (length,), int64.
            hypothesis: Hypothesis of fairseq's generator, changed in place. Its tokens are kept up to the one in which
                the stop begins, ``text`` is the text before the stop, and the score stays as it is.
        """
        tokens = [token for token in hypothesis["tokens"].tolist() if token != self.eos]
        cut = self.stops.cut(prompt.tolist(), tokens)
        if cut is not None:
            kept, hypothesis["text"] = cut
            scores = hypothesis["positional_scores"]
            hypothesis["tokens"] = hypothesis["tokens"].new_tensor([*tokens[:kept], self.eos])
            hypothesis["positional_scores"] = torch.cat([scores[:kept], scores.new_zeros(1)])
            self.on_cut(hypothesis)


class NextTokenRules(nn.Module):
    """Several rules for the next token, one after the other, in the place of fairseq's blocker of n-grams.

    Args:
        rules: Rules, each called as :class:`.NoRepeatedNgrams` is.
    """

    def __init__(self, rules: Sequence[nn.Module]):
        super().__init__()
        self.rules = nn.ModuleList(rules)

    def forward(self, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int) -> Tensor:
        """Change the log-probabilities of the next token; arguments are those of :class:`.NoRepeatedNgrams`."""
        for rule in self.rules:
            lprobs = rule(tokens, lprobs, bsz, beam_size, step)
        return lprobs


class StoppedLines:
    """A BPE for fairseq's commands that decodes hypotheses which a stop string ended to the text before it.

    Args:
        bpe: fairseq's BPE, or None for a dictionary of words; all other attributes of this object are its.
        spell: Function that spells the tokens of a hypothesis as the commands do, in a line of symbols.
    """

    def __init__(self, bpe, spell: Callable[[Tensor], str]):
        self.inner, self.spell = bpe, spell
        self._texts: Dict[str, str] = {}  # by the line of symbols

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def take(self, hypothesis: Dict[str, Any]) -> None:
        """Take a hypothesis that was cut."""
        self._texts[self.spell(hypothesis["tokens"])] = hypothesis["text"]
        if len(self._texts) > _TEXTS_KEPT:
            del self._texts[next(iter(self._texts))]

    def encode(self, line: str) -> str:
        """Encode a line."""
        return line if self.inner is None else self.inner.encode(line)

    def decode(self, symbols: str) -> str:
        """Decode a line of symbols."""
        text = self._texts.get(symbols)
        if self.inner is None:  # words, between which the line has the only spaces
            return symbols if text is None else text.strip()
        return self.inner.decode(symbols) if text is None else in_line(text)


def answers_in_lines(session, cfg, bpe, tokenizer):
    """Return the BPE of a command, after its generator was told to end answers at ``--stop``.

    Args:
        session: The command's :class:`longmem_fairseq.tasks.memory_session.MemorySession`; None without a generator.
        cfg: Configuration of the task: ``stop`` and ``post_process``.
        bpe: fairseq's BPE, or None for a dictionary of words.
        tokenizer: fairseq's tokenizer, or None.

    Returns:
        A BPE of lines, or None where there is nothing to decode.
    """
    lines = one_line(bpe)
    if session is None or not cfg.stop:
        return lines
    generator = session.generator
    dictionary, ignored = generator.tgt_dict, generator.symbols_to_strip_from_output
    text = ContinuationText(dictionary, bpe, tokenizer)
    generator.stop_at(StopStrings([of_line(stop) for stop in cfg.stop], text))
    stopped = StoppedLines(lines, lambda tokens: dictionary.string(tokens, cfg.post_process, False, ignored))
    generator.stop_rule.on_cut = stopped.take
    return stopped
