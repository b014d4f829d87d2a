"""Perplexity of long documents, by length, position and kind of word, with memories of several sizes.

    python examples/books/evaluate.py --path CHECKPOINT --data books_test/ --valid books_valid/ --results-path DIR

The baseline beside it is a neural cache over the same tokens as the memory, tuned on the documents of --valid. The
README ("Evaluations") says which formats it reads and where to get the published collections.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from longmem_fairseq.evaluation.books import Books  # noqa: E402
from longmem_fairseq.evaluation.command import main  # noqa: E402
from preprocess.documents import iter_documents  # noqa: E402


def read_texts(paths):
    """(name, text) of each document."""
    return ((document.name, document.text) for document in iter_documents(paths))


if __name__ == "__main__":
    print(main(Books(read_texts)))
