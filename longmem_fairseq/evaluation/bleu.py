"""BLEU-4 of all responses by sacrebleu, and the mean of the responses' own by nltk: published figures use both."""

from typing import List

import numpy as np

from .reporting.statistic import MEAN, Statistic

SMOOTHING = "method1"  # of nltk's SmoothingFunction: 0.1 in place of a count of 0


class Bleu:
    """BLEU-4 of sacrebleu with its defaults as a statistic of sums over responses, and nltk's of each response.

    Attributes:
        statistic: Statistic of the sums of :meth:`counts`.
        sentence_statistic: Statistic of the sums of :meth:`of_sentence` and of the number of responses.
        signature: sacrebleu's description of its settings.
        sentence_signature: Version of nltk, its method of smoothing, and the tokens.

    Raises:
        ValueError: sacrebleu or nltk is not installed.
    """

    def __init__(self):
        try:
            import nltk
            from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
            from sacrebleu.metrics import BLEU
            from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
        except ImportError as error:
            raise ValueError(
                f"BLEU needs {error.name.split('.')[0]}: pip install it, or leave BLEU out with --generate none"
            ) from None
        self._metric, self._tokenizer = BLEU(), Tokenizer13a()
        self._sentence_bleu, self._smoothing = sentence_bleu, getattr(SmoothingFunction(), SMOOTHING)
        self.statistic = Statistic("BLEU-4", "", self._compute, digits=2)
        self.sentence_statistic = MEAN._replace(name="sentence BLEU-4")
        self.sentence_signature = f"nltk {nltk.__version__}, SmoothingFunction().{SMOOTHING}, tok:13a"
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

    def of_sentence(self, answer: str, reference: str) -> float:
        """Return the smoothed BLEU-4 of one response, from 0 to 100.

        Args:
            answer: Generated response.
            reference: True response.
        """
        tokens, expected = (self._tokenizer(text).split() for text in (answer, reference))
        return 100 * float(self._sentence_bleu([expected], tokens, smoothing_function=self._smoothing))

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
