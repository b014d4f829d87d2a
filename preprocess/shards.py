"""Independent parts of a collection, for a cluster's scheduler to make in any order without coordination."""

from __future__ import annotations

from collections.abc import Sequence

from preprocess.document_source import DocumentSource

# Whole files are cheaper, since each is then read once; but no shard may get much more than its part.
LARGEST_EXCESS = 1.2


def shard(
    sources: Sequence[DocumentSource], shard_id: int, num_shards: int
) -> tuple[list[DocumentSource], tuple[int, int], str]:
    """Choose the part of a collection that belongs to one shard; every shard computes the same division.

    Args:
        sources: Files of the collection.
        shard_id: Index of the shard.
        num_shards: Number of shards.

    Returns:
        The files to read, the stripe of their documents to keep (for ``read_blocks``), and the unit of the division:
        ``files``, or ``documents`` if the files are too few or too unequal.
    """
    if num_shards == 1:
        return list(sources), (0, 1), "files"
    parts: list[list[DocumentSource]] = [[] for _ in range(num_shards)]
    loads = [0] * num_shards
    for source in sorted(sources, key=lambda source: -source.size):  # stable: equal files stay in input order
        lightest = loads.index(min(loads))
        parts[lightest].append(source)
        loads[lightest] += source.size
    if min(map(len, parts)) > 0 and max(loads) * num_shards <= LARGEST_EXCESS * sum(loads):
        part = set(parts[shard_id])
        return [source for source in sources if source in part], (0, 1), "files"
    return list(sources), (shard_id, num_shards), "documents"
