"""The rings of a batch's lanes as a GPU sees them: where they are, and writing into all of them at once.

Nothing here waits for the device or has a size that depends on what the lanes hold: a number that the host knows is
copied to the device (:func:`longmem_fairseq.modules.staging.staged`), and what does not exist is masked.

Legend: B rows of a batch, L lanes of a bank, H key/value heads, N slots of a lane, C tokens of a chunk, d width of a
head, T tokens of a segment, J chunks that a segment can complete, S = C + T tokens of a tail and a segment.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RingPlaces:
    """Where the rings of a batch's lanes are.

    Attributes:
        packed: Lane of each row, and what the lane holds, has written and has read, shape (4, B), int64, on the device
            of the model.
    """

    packed: Tensor

    @property
    def lanes(self) -> Tensor:
        """Lane of each row, shape (B,), int64."""
        return self.packed[0]

    @property
    def held(self) -> Tensor:
        """Number of chunks that each row's lane holds, shape (B,), int64; 0 for an empty lane."""
        return self.packed[1]

    @property
    def written(self) -> Tensor:
        """One past the number of the last chunk of each row's lane, shape (B,), int64.

        Chunk i is in slot i mod N, so the lane holds the slots of chunks ``written - held`` to ``written - 1``.
        """
        return self.packed[2]

    @property
    def positions(self) -> Tensor:
        """Number of tokens of each row's stream so far, shape (B,), int64."""
        return self.packed[3]


def chunk_numbers(written: Tensor, slots: Tensor, chunks: int) -> Tensor:
    """Return the number of the chunk in each slot, counted from its stream's start, in the shape of ``slots``.

    Args:
        written: One past the number of the last chunk of each row's lane, shape (B,), int64.
        slots: Slots, shape (B, ...), int64.
        chunks: Number of slots of a lane, N.
    """
    newest = (written - 1).view(-1, *([1] * (slots.dim() - 1)))
    return newest - (newest - slots) % chunks


class SegmentChunks:
    """The chunks that a segment of each row completes together with the tokens that were waiting, and the tokens left.

    Args:
        plan: Lane of each row, chunks that were written into it, tokens that waited, tokens of the segment that are
            left out at its start, and tokens that waited or are new, shape (5, B), int64.
        T: Number of tokens of a segment.
        chunk_size: Number of tokens of a chunk, C.
        chunks: Number of slots of a lane, N.
    """

    def __init__(self, plan: Tensor, T: int, chunk_size: int, chunks: int):
        self.lanes, written, waiting, skipped, total = plan
        self._C, self._N = chunk_size, chunks
        self._source = waiting, skipped
        complete = total // chunk_size  # (B,)
        columns = torch.arange(min(-(-T // chunk_size), chunks), device=plan.device)
        # A segment longer than the memory leaves only its end.
        numbers = (complete - chunks).clamp(min=0)[:, None] + columns  # (B, J)
        self.present = numbers < complete[:, None]  # (B, J)
        self._slots = (written[:, None] + numbers) % chunks  # (B, J)
        self._columns = self._from(numbers, T)  # (B, J * C)
        self._rest = total - complete * chunk_size  # (B,)
        self._rest_columns = self._from(complete[:, None], T)  # (B, C)

    def _from(self, numbers: Tensor, T: int) -> Tensor:
        """Return the columns of chunks' tokens in a tail and a segment side by side, shape (B, chunks * C)."""
        (waiting, skipped), C = self._source, self._C
        tokens = (numbers[..., None] * C + torch.arange(C, device=numbers.device)).flatten(1)
        behind = tokens + (C + skipped - waiting)[:, None]
        return torch.where(tokens < waiting[:, None], tokens, behind).clamp(max=C + T - 1)

    def rows(self, heads: int) -> Tensor:
        """Return the rows of the chunks' slots in a table (L * H * N, ...), shape (B * H * J,), int64."""
        heads = self.lanes[:, None] * heads + torch.arange(heads, device=self.lanes.device)  # (B, H)
        return (heads[:, :, None] * self._N + self._slots[:, None]).flatten()

    def take(self, tokens: Tensor) -> Tensor:
        """Return the chunks' tokens, shape (B, H, J, C, d), from a tail and a segment side by side (B, H, S, d)."""
        return _columns(tokens, self._columns).unflatten(2, (-1, self._C))

    def take_rest(self, tokens: Tensor, tail: Tensor) -> Tensor:
        """Return the new tail, (B, H, C, d): what is left of tokens (B, H, S, d), and behind it what was there."""
        left = torch.arange(self._C, device=tail.device) < self._rest[:, None]  # (B, C)
        return torch.where(left[:, None, :, None], _columns(tokens, self._rest_columns), tail)


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """Return columns (B, S') of each row of x (B, H, S, d), shape (B, H, S', d)."""
    B, H, S, d = x.shape
    first = torch.arange(B * H, device=x.device).view(B, H, 1) * S
    return x.reshape(-1, d).index_select(0, (first + columns[:, None]).flatten()).view(B, H, -1, d)


def replace_rows(buffer: Tensor, rows: Tensor, new: Tensor, present: Tensor, whole: bool) -> None:
    """Write chunks into a buffer.

    Args:
        buffer: Buffer of a bank, contiguous, shape (L, H, N, ...), changed in place.
        rows: Rows of the buffer as a table (L * H * N, ...), none twice, shape (B * H * J,), int64.
        new: New rows, shape (B, H, J, ...), any floating dtype.
        present: Which chunks exist, shape (B, J), bool; the rows of others stay as they are.
        whole: Whether all exist, so that what is there need not be read.
    """
    table = buffer.view(-1, *buffer.shape[3:])
    if rows.device != buffer.device:
        rows, new, present = (x.to(buffer.device) for x in (rows, new, present))
    new = new.to(buffer.dtype)
    if not whole:
        mask = present.view(present.size(0), 1, -1, *[1] * (new.dim() - 3))
        new = torch.where(mask, new, table.index_select(0, rows).view(new.shape))
    table.index_copy_(0, rows, new.reshape(-1, *new.shape[3:]))
