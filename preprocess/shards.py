"""Independent parts of a collection, for a cluster's scheduler to make in any order without coordination."""

from __future__ import annotations

from collections.abc import Sequence

from preprocess.documents import Source

# Whole files are cheaper, since each is then read once; but no shard may get much more than its part.
LARGEST_EXCESS = 1.2


def shard(sources: Sequence[Source], shard_id: int, num_shards: int) -> tuple[list[Source], tuple[int, int], str]:
    """The part of the ``sources`` that belongs to one shard; every shard computes the same division.

    Returns:
        The files to read, the stripe of their documents to keep (for ``read_blocks``), and how the collection was
        divided: by ``files``, or by ``documents`` if the files are too few or too unequal.
    """
    if num_shards == 1:
        return list(sources), (0, 1), "files"
    owners: list[list[Source]] = [[] for _ in range(num_shards)]
    loads = [0] * num_shards
    for source in sorted(sources, key=lambda source: -source.size):  # stable: equal files stay in input order
        owner = loads.index(min(loads))
        owners[owner].append(source)
        loads[owner] += source.size
    if min(map(len, owners)) > 0 and max(loads) * num_shards <= LARGEST_EXCESS * sum(loads):
        mine = set(owners[shard_id])
        return [source for source in sources if source in mine], (0, 1), "files"
    return list(sources), (shard_id, num_shards), "documents"
