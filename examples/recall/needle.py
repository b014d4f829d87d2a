"""The needle test: how many facts are recalled, by their distance, the size of the memory and their number.

    python -m examples.recall.needle --path CHECKPOINT --results-path DIR

queries facts such as those of facts.py, one at a time at the end of documents of 60,000 tokens, and draws a heat map
for each number of facts. evaluate.py, beside it, reads the questions as part of the document instead.
"""

import numpy as np
from fairseq.data import Dictionary

from examples.recall.facts import spread, symbols
from longmem_fairseq.evaluation.command import main
from longmem_fairseq.evaluation.needle import Haystack, Needle


def make_haystack(dictionary: Dictionary, facts: int, length: int, seed: int) -> Haystack:
    """Put facts at random places in filler, with the kinds of symbols of facts.py.

    Args:
        dictionary: Dictionary of the model.
        facts: Number of facts.
        length: Number of tokens of the document.
        seed: Seed of the random choices.
    """
    names, values, fillers = symbols(dictionary)
    rng = np.random.default_rng([seed, facts])
    stated = np.stack([rng.choice(names, facts, replace=False), rng.choice(values, facts)], axis=1)  # (facts, 2)
    tokens = spread(rng, stated, length, fillers)
    return Haystack(tokens, *stated.T, np.flatnonzero(np.isin(tokens, names)))


if __name__ == "__main__":
    print(main(Needle(make_haystack)))
