"""The needle test: how many facts are recalled, over their distance, the size of the memory and how many there are.

    python examples/recall/needle.py --path CHECKPOINT --results-path DIR

asks for facts as those of facts.py, one at a time at the end of documents of 60,000 tokens, and draws a heat map for
each number of facts. evaluate.py, beside it, reads the questions as part of the document instead.
"""

import os
import sys

import numpy as np

sys.path[:0] = [os.path.join(os.path.dirname(__file__), "..", ".."), os.path.dirname(__file__)]
from facts import spread, symbols  # noqa: E402

from longmem_fairseq.evaluation.command import main  # noqa: E402
from longmem_fairseq.evaluation.needle import Haystack, Needle  # noqa: E402


def make_haystack(dictionary, facts: int, length: int, seed: int) -> Haystack:
    """Facts at random places amid filler, in the symbols of facts.py."""
    names, values, fillers = symbols(dictionary)
    rng = np.random.default_rng([seed, facts])
    stated = np.stack([rng.choice(names, facts, replace=False), rng.choice(values, facts)], axis=1)  # (facts, 2)
    tokens = spread(rng, stated, length, fillers)
    return Haystack(tokens, *stated.T, np.flatnonzero(np.isin(tokens, names)))


if __name__ == "__main__":
    print(main(Needle(make_haystack)))
