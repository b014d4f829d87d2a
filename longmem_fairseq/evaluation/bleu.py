"""BLEU-4 from counts that can be summed, so that it can be bootstrapped over responses."""

from typing import List

import numpy as np

from .reporting.statistic import Statistic


class Bleu:
    """BLEU-4 of sacrebleu with its defaults, as a statistic of sums over responses.

    Attributes:
        statistic: Statistic of the sums of :meth:`counts`.
        signature: sacrebleu's description of its settings.

    Raises:
        ValueError: sacrebleu is not installed.
    """

    def __init__(self):
        try:
            from sacrebleu.metrics import BLEU
        except ImportError:
            raise ValueError("BLEU needs sacrebleu: pip install it, or leave BLEU out with --generate none") from None
        self._metric = BLEU()
        self.statistic = Statistic("BLEU-4", "", self._compute, digits=2)
        self.counts("a", "a")  # the signature has the number of references once something was scored
        self.signature = str(self._metric.get_signature())

    def counts(self, answer: str, reference: str) -> List[int]:
        """Return the counts that BLEU is computed from.

        Args:
            answer: Generated response.
            reference: True response.

        Returns:
            Lengths of answer and reference in sacrebleu's tokens, then for n = 1 to 4 the matching n-grams, then for
            n = 1 to 4 all n-grams of the answer: 10 numbers.
        """
        score = self._metric.corpus_score([answer], [[reference]])
        return [score.sys_len, score.ref_len, *score.counts, *score.totals]

    def _compute(self, sums: np.ndarray) -> np.ndarray:
        """Return BLEU, shape (...), of sums, shape (..., 10)."""
        rows = np.rint(sums).astype(int).reshape(-1, 10)
        scores = [
            self._metric.compute_bleu(
                correct=row[2:6],
                total=row[6:],
                sys_len=row[0],
                ref_len=row[1],
                smooth_method=self._metric.smooth_method,
                smooth_value=self._metric.smooth_value,
            ).score
            for row in rows.tolist()
        ]
        return np.array(scores).reshape(sums.shape[:-1])
