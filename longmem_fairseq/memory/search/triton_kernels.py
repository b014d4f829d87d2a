"""The kernels of the search on CUDA (see ``triton.py``), in Triton.

Slots are searched in blocks of G. A first kernel multiplies tiles of queries and keys on the matrix units and writes,
for each query and block, only a number that no score of the block exceeds: the largest product plus a bound of its
error. A second kernel takes the blocks of a query in the order of these bounds, computes the scores of their chunks in
float32 and keeps the n best, until no block is left whose bound is above the lowest of them. So the result is that of
comparing all scores in float32, however coarse the first products are; coarse ones only cost more blocks.

The matrix units read float32 as TF32, without the last 13 bits: a factor changes by less than 2^-10 of itself, and a
score by less than 2^-9 * |q| * |k|, with norms of the query and of the longest key of the block. The bound adds what
sums in float32 may lose, here and in the second kernel.

Legend: P pairs of a row of the batch and a KV head, H KV heads, T queries of a pair, d width of a head, N slots of a
lane, G slots of a block, S blocks of a span, n chunks to find. D, NP and SP are powers of two that d, n and the number
of spans are rounded up to.
"""

import triton
import triton.language as tl

# A slot's number that is larger than all that there are.
_NO_SLOT = tl.constexpr(2147483647)


@triton.jit
def _holds(slot, begin, held, N):
    """Return which slots of a ring hold chunks: ``held`` of them, from slot ``begin`` on."""
    age = slot - begin
    age = tl.where(age < 0, age + N, age)
    return (slot < N) & (age < held)


@triton.jit
def _lane(lanes, begins, held, pair, H, N):
    """Return a pair's first slot, counted over all lanes, the slot of its oldest chunk, and its number of chunks."""
    row = pair // H
    base = (tl.load(lanes + row) * H + pair % H) * N
    return base, tl.load(begins + row).to(tl.int32), tl.load(held + row).to(tl.int32)


@triton.jit
def _largest(x, ROWS: tl.constexpr):
    """Return the largest of each of ROWS rows; of one row as a scalar, so that tensors may differ in layout."""
    if ROWS == 1:
        return tl.max(x)
    else:
        return tl.max(x, axis=1)[:, None]


@triton.jit
def _least(x, ROWS: tl.constexpr):
    """Return the least of each of ROWS rows; of one row as a scalar."""
    if ROWS == 1:
        return tl.min(x)
    else:
        return tl.min(x, axis=1)[:, None]


@triton.jit
def _any(x, ROWS: tl.constexpr):
    """Return whether one of ROWS conditions holds."""
    if ROWS == 1:
        return x
    else:
        return tl.max(x.to(tl.int32)) > 0


@triton.jit
def _as_matrix_units_read(x, EMULATED: tl.constexpr):
    """Return float32 as TF32, where there are no matrix units: in the interpreter."""
    if EMULATED:
        x = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return x


@triton.jit(do_not_specialize=["H", "T", "rows"])
def scale_queries(
    q,
    scaled,
    reaches,
    stride_b,
    stride_h,
    stride_t,
    H,
    T,
    rows,
    error,
    d: tl.constexpr,
    SHRINK: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scale queries as ``scaling.scale_queries`` does, and bound the error of their products.

    A query that is not finite becomes zeros, and so finds chunks that are held: attention to them shows that it is not.
    ``reaches`` times the root mean square of a key bounds the error of the key's product.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    pair, t = row // T, row % T
    offsets = pair // H * stride_b + pair % H * stride_h + t * stride_t
    inside = (row < rows)[:, None] & (column < d)[None, :]
    x = tl.load(q + offsets[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    lost = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1)
    x = tl.where((lost == 0)[:, None], x, 0.0)
    largest = tl.max(tl.abs(x), axis=1)
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    x = x * inverse[:, None] * SHRINK
    tl.store(scaled + row[:, None] * d + column[None, :], x, mask=inside)
    tl.store(reaches + row, tl.sqrt(tl.sum(x * x, axis=1) * d) * error, mask=row < rows)


@triton.jit(do_not_specialize=["H", "N"])
def measure_keys(
    means,
    lanes,
    begins,
    held,
    lengths,
    H,
    N,
    d: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the largest root mean square of the keys of each block; keys that are not finite count as 0."""
    pair = tl.program_id(1).to(tl.int64)
    base, begin, count = _lane(lanes, begins, held, pair, H, N)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    inside = _holds(slot, begin, count, N)
    mask = inside[:, None] & (column < d)[None, :]
    x = tl.load(means + (base + slot)[:, None] * d + column[None, :], mask=mask, other=0.0)
    lost = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1)
    x = tl.where((lost == 0)[:, None], tl.abs(x), 0.0)
    largest = tl.max(x, axis=1)  # squares of larger numbers than 1e19 would overflow
    x = x / tl.where(largest == 0.0, 1.0, largest)[:, None]
    length = largest * tl.sqrt(tl.sum(x * x, axis=1) / d)
    block = tl.program_id(0) * (ROWS // G) + tl.arange(0, ROWS // G)
    blocks = (N + G - 1) // G
    tl.store(lengths + pair * blocks + block, tl.max(tl.reshape(length, [ROWS // G, G]), axis=1), mask=block < blocks)


@triton.jit(do_not_specialize=["first", "H", "T", "begin_t", "count_t", "N"])
def bound_blocks(
    scaled,
    reaches,
    means,
    lanes,
    begins,
    held,
    lengths,
    bounds,
    tops,
    first,
    H,
    T,
    begin_t,
    count_t,
    N,
    d: tl.constexpr,
    D: tl.constexpr,
    D_STEP: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Write a bound of the scores of each block of one span, and the largest of them, for a tile of queries.

    The queries are ``begin_t`` to ``begin_t + count_t - 1`` of the pairs from ``first`` on.
    """
    pair = first + tl.program_id(2).to(tl.int64)
    base, begin, count = _lane(lanes, begins, held, pair, H, N)
    start = tl.program_id(1) * (S * G)
    stop = tl.minimum(start + S * G, N)
    spans = (N + S * G - 1) // (S * G)
    blocks = (N + G - 1) // G
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    asked = t < count_t
    row = tl.program_id(2).to(tl.int64) * count_t + t  # of bounds and tops
    query = pair * T + begin_t + t
    column = tl.arange(0, D_STEP)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    # The span holds a chunk if its first slot does, or if the ring's first chunk is in it.
    age = (start - begin + N) % N
    if (count > 0) & ((age < count) | ((begin >= start) & (begin < stop))):
        reach = tl.load(reaches + query, mask=asked, other=0.0)
        x = tl.zeros([BLOCK_T, D_STEP], tl.float32)
        if D == D_STEP:
            mask = asked[:, None] & (column < d)[None, :]
            x = tl.load(scaled + query[:, None] * d + column[None, :], mask=mask, other=0.0)
            x = _as_matrix_units_read(x, EMULATED)
        for tile in range(start, stop, BLOCK_N):
            slot = tile + tl.arange(0, BLOCK_N)
            score = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            for part in tl.static_range(0, D, D_STEP):
                inside = (part + column < d)[None, :]
                if D > D_STEP:
                    place = scaled + query[:, None] * d + part + column[None, :]
                    x = _as_matrix_units_read(tl.load(place, mask=asked[:, None] & inside, other=0.0), EMULATED)
                place = means + (base + slot)[:, None] * d + part + column[None, :]
                key = _as_matrix_units_read(tl.load(place, mask=(slot < N)[:, None] & inside, other=0.0), EMULATED)
                score = tl.dot(x, tl.trans(key), score, input_precision="tf32")
            score = tl.where(_holds(slot, begin, count, N)[None, :], score, float("-inf"))
            block = tile // G + tl.arange(0, BLOCK_N // G)
            length = tl.load(lengths + pair * blocks + block, mask=block < blocks, other=0.0)
            bound = tl.max(tl.reshape(score, [BLOCK_T, BLOCK_N // G, G]), axis=2) + reach[:, None] * length[None, :]
            bound = tl.where(bound == bound, bound, float("-inf"))  # no key of the block is finite
            place = bounds + row[:, None] * blocks + block[None, :]
            tl.store(place, bound, mask=asked[:, None] & (block < blocks)[None, :])
            top = tl.maximum(top, tl.max(bound, axis=1))
    tl.store(tops + row * spans + tl.program_id(1), top, mask=asked)


@triton.jit(do_not_specialize=["first", "H", "T", "begin_t", "count_t", "rows", "N", "n"])
def select_chunks(
    scaled,
    means,
    lanes,
    begins,
    held,
    bounds,
    tops,
    slots,
    first,
    H,
    T,
    begin_t,
    count_t,
    rows,
    N,
    n,
    d: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    NP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the n best chunks of ROWS queries, best first; of equal scores, the lower slot first."""
    row = tl.program_id(0).to(tl.int64) * ROWS  # of bounds and tops
    if ROWS > 1:
        row += tl.arange(0, ROWS)[:, None]
    asked = row < rows
    pair = tl.where(asked, first + row // count_t, first)
    query = pair * T + begin_t + row % count_t
    base, begin, count = _lane(lanes, begins, held, pair, H, N)
    spans = (N + S * G - 1) // (S * G)
    blocks = (N + G - 1) // G
    span, block, member = tl.arange(0, SP)[None, :], tl.arange(0, S)[None, :], tl.arange(0, G)[None, :]
    column, number = tl.arange(0, D)[None, :], tl.arange(0, NP)[None, :]
    x = tl.load(scaled + query * d + column, mask=asked & (column < d), other=0.0)
    # The largest bound of each span among the blocks that were not scored yet, and the last block that was scored where
    # others have the same bound.
    left = tl.load(tops + row * spans + span, mask=asked & (span < spans), other=float("-inf"))
    scored = tl.full([ROWS, SP], -1, tl.int32)
    # The best so far, in any order; places from n on are never replaced.
    best = tl.where(number < n, float("-inf"), float("inf")) + tl.zeros([ROWS, NP], tl.float32)
    chunks = tl.full([ROWS, NP], -1, tl.int32)
    lowest = _least(best, ROWS)
    top = _largest(left, ROWS)
    while _any(top > lowest, ROWS):
        active = top > lowest
        of_span = _least(tl.where(left == top, span, SP), ROWS)
        here = span == of_span
        after = _largest(tl.where(here, scored, -1), ROWS)
        place = of_span * S + block
        bound = tl.load(bounds + row * blocks + place, mask=active & (place < blocks), other=float("-inf"))
        of_block = _least(tl.where((bound == top) & (block > after), block, S), ROWS)
        start = (of_span * S + of_block) * G
        slot = start + member
        exists = active & _holds(slot, begin, count, N)
        place = (base + slot)[:, :, None] * d + column[:, None, :]
        key = tl.load(means + place, mask=exists[:, :, None] & (column < d)[:, None, :], other=0.0)
        score = tl.sum(key * x[:, None, :], axis=2)
        score = tl.where(exists & (tl.abs(score) < float("inf")), score, float("-inf"))
        highest = _largest(score, ROWS)
        while _any(highest > lowest, ROWS):
            better = highest > lowest
            of_member = _least(tl.where(score == highest, member, G), ROWS)
            replaced = better & (number == _least(tl.where(best == lowest, number, NP), ROWS))
            best = tl.where(replaced, highest, best)
            chunks = tl.where(replaced, start + of_member, chunks)
            lowest = _least(best, ROWS)
            score = tl.where(better & (member == of_member), float("-inf"), score)
            highest = _largest(score, ROWS)
        rest = (bound < top) | ((bound == top) & (block > of_block))
        following = _largest(tl.where(rest, bound, float("-inf")), ROWS)
        here = here & active
        scored = tl.where(here, tl.where(following == top, of_block, -1), scored)
        left = tl.where(here, following, left)
        top = _largest(left, ROWS)
    best = tl.where(number < n, best, float("-inf"))
    chunks = tl.where(number < n, chunks, _NO_SLOT)
    for i in range(0, n):
        highest = _largest(best, ROWS)
        slot = _least(tl.where(best == highest, chunks, _NO_SLOT), ROWS)
        tl.store(slots + query * n + i, slot.to(tl.int64), mask=asked)
        written = (chunks == slot) & (slot >= 0)
        best = tl.where(written, float("-inf"), best)
        chunks = tl.where(written, _NO_SLOT, chunks)
