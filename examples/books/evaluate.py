"""Perplexity of long documents, by length, position and kind of word, with memories of several sizes.

    python -m examples.books.evaluate --path CHECKPOINT --data books_test/ --valid books_valid/ --results-path DIR

The baseline beside it is a neural cache over the same tokens as the memory, tuned on the documents of --valid. See
docs/evaluation.md for the formats that it reads and for the published collections.
"""

from longmem_fairseq.evaluation.books import Books
from longmem_fairseq.evaluation.command import main
from preprocess.documents import iter_documents


def read_texts(paths):
    """Iterate over the (name, text) of the documents at some paths."""
    return ((document.name, document.text) for document in iter_documents(paths))


if __name__ == "__main__":
    print(main(Books(read_texts)))
