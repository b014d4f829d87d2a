"""``--no-repeat-ngram-size`` for hypotheses behind a prompt."""

from torch import Tensor, nn


class NoRepeatedNgrams(nn.Module):
    """Forbid a hypothesis to repeat an n-gram; only new tokens count, not the prompt.

    fairseq's own block compares with the end of its buffer instead of the end of the hypothesis, so it forbids nothing
    until the buffer is full.

    Args:
        size: Number of tokens of an n-gram.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int) -> Tensor:
        """Set the log-probability of tokens that would repeat an n-gram to -inf.

        Args:
            tokens: Buffer of token ids, shape (rows, > step), int64; the first is the prompt's last token.
            lprobs: Log-probabilities of the next token, shape (rows, V); changed in place.
            bsz: Ignored.
            beam_size: Ignored.
            step: Number of new tokens so far.

        Returns:
            The log-probabilities.
        """
        n, generated = self.size, tokens[:, 1 : step + 1]  # (rows, step)
        if step >= n:
            ngrams = generated.unfold(1, n, 1)  # (rows, step - n + 1, n)
            repeated = (ngrams[..., :-1] == generated[:, None, step - n + 1 :]).all(dim=-1)
            rows, places = repeated.nonzero(as_tuple=True)
            lprobs[rows, ngrams[rows, places, -1]] = float("-inf")
        return lprobs
