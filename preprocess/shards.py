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
    parts: list[list[int]] = [[] for _ in range(num_shards)]  # places in the input, where a file may be twice
    loads = [0] * num_shards
    for place in sorted(range(len(sources)), key=lambda place: -sources[place].size):  # stable: input order
        lightest = loads.index(min(loads))
        parts[lightest].append(place)
        loads[lightest] += sources[place].size
    if min(map(len, parts)) > 0 and max(loads) * num_shards <= LARGEST_EXCESS * sum(loads):
        return [sources[place] for place in sorted(parts[shard_id])], (0, 1), "files"
    return list(sources), (shard_id, num_shards), "documents"
