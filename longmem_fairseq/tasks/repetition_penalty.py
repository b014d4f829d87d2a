"""``--repetition-penalty``: tokens of the prompt and the continuation become less likely (Keskar et al., 2019).

Legend: B prompts, R rows (hypotheses), V symbols.
"""

from typing import Optional, Sequence

import torch
from torch import Tensor


class RepetitionPenalty:
    """Divide positive logits of tokens that were seen by the penalty, and multiply negative ones, as transformers does.

    The tokens of the whole prompt count, whatever its length, and those of the hypothesis; an end-of-sentence before
    the prompt and memorized documents do not.

    Args:
        penalty: Penalty; above 1 discourages repetition, below 1 encourages it, and 1 changes nothing.
        vocabulary: Number of symbols, V.
    """

    def __init__(self, penalty: float, vocabulary: int):
        self.penalty, self.vocabulary = penalty, vocabulary
        self._seen: Optional[Tensor] = None  # tokens of each row's prompt, shape (R, V), bool

    def start(self, prompts: Sequence[Tensor], beam: int) -> None:
        """Take the prompts of a generation.

        Args:
            prompts: Token ids of each prompt, shape (length,), int64.
            beam: Number of rows of each prompt.
        """
        self._seen = torch.zeros(len(prompts), self.vocabulary, dtype=torch.bool, device=prompts[0].device)
        for row, prompt in zip(self._seen, prompts):
            row[prompt] = True
        self._seen = self._seen.repeat_interleave(beam, dim=0)

    def reorder(self, order: Tensor) -> None:
        """Make row i what row ``order[i]`` was; rows may be dropped or repeated."""
        self._seen = self._seen[order]

    def __call__(self, logits: Tensor, generated: Tensor) -> Tensor:
        """Return the penalized logits of the next token.

        Args:
            logits: Logits, shape (R, V).
            generated: Tokens of each hypothesis so far, shape (R, steps), int64.
        """
        seen = self._seen.scatter(1, generated, True)
        penalized = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(seen, penalized, logits)
