"""Documents out of text files, directories of text files and JSON lines, one at a time.

An input path is one of:

* a text file: one document, named after the file; with a separator, the documents between the separators, named after
  the file and their number;
* a directory: every regular file below it that is not hidden, in sorted order, named after its path in the directory;
* JSON lines: one document a line, the string under ``"text"`` or another key, named after ``"name"`` if there is one,
  else ``file:line``. ``{"meta": {"pile_set_name": "..."}}`` names its subset, as in the Pile. They are recognized by
  ``.jsonl`` or ``.ndjson``, or by their content;
* a Parquet file: one document a row, with columns of these names.

Each but Parquet may be compressed (gzip, zstd, xz, bzip2). Text is UTF-8 and kept exactly: newlines, tabs and spaces
are content. A document's subset is its ``pile_set_name`` or, without one, the name of the input path without its
extensions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from preprocess.blocks import read_blocks
from preprocess.document_source import DocumentFormat, list_sources
from preprocess.text_document import TextDocument


def iter_documents(
    paths: Iterable[str | os.PathLike],
    bad_documents: str = "refuse",
    progress: bool = False,
    form: DocumentFormat | None = None,
) -> Iterator[TextDocument]:
    """Iterate over all documents of the input, in order, one at a time.

    Args:
        paths: Paths of text files, directories and JSON lines.
        bad_documents: ``refuse`` to raise at an empty or undecodable document, ``skip`` to leave it out.
        progress: If true, show a progress bar of the bytes read.
        form: Marks of the documents; if None, the defaults.

    Yields:
        The documents.

    Raises:
        InputError: A path does not exist, or a document is bad and not to be left out.
    """
    sources = list_sources(paths, form)
    total = sum(source.size for source in sources)
    with tqdm(total=total, desc="read", unit="B", unit_scale=True, mininterval=0.5, disable=not progress) as bar:
        for block, position in read_blocks(sources):
            yield from block.parse(bad_documents).documents
            bar.update(position.consumed - bar.n)
