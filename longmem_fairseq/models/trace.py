"""What a model reads from its memory while it reads a text, token by token.

Legend: L tokens of the part that is looked at, H heads, T tokens of a segment, n chunks read per query and head, S
reads that are kept of a token.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..memory.bank import MemoryBank
from ..memory.document_memory import Document, DocumentMemory
from ..modules.memory_masses import chunk_masses, chunk_scores
from ..progress import token_bar

_QUERIES = 64  # compared with each other's reads at a time


class Trace(NamedTuple):
    """What was read to predict each token of a part of a text.

    A head gives ``(1 - gate) * local + gate * memory``. Of the memory's part each chunk has a mass, the attention
    weights of its tokens; a head's masses sum to 1. So ``gate * mass`` is the share of the head's output that comes
    from one chunk.

    Attributes:
        tokens: of the part, shape (L,), int64.
        begin: number in the text of the part's first token.
        position: where the text starts in the memory's stream; token i of the text stands at ``position + i + 1``,
            behind an end-of-sentence.
        documents: what else lies in the stream, from before.
        log_probabilities: of each token, natural logarithm, shape (L,), float32.
        without_memory: the same where the side network reads nothing.
        gates: sigma(g) of each head, shape (H,), float32.
        strongest: largest share of the layer's output, over all heads, that came from one chunk, shape (L,).
        by_head: largest gate * mass of each head, shape (L, H).
        heads: which head read, shape (L, S), int64, by falling gate * mass; -1 where fewer chunks were read.
        chunks: number of the chunk's first token in the stream, shape (L, S), int64.
        scores: inner product of query and mean key, by which it was found, shape (L, S), float32.
        masses: shape (L, S), float32.
        chunk_size: tokens of a chunk.
    """

    tokens: Tensor
    begin: int
    position: int
    documents: List[Document]
    log_probabilities: Tensor
    without_memory: Tensor
    gates: Tensor
    strongest: Tensor
    by_head: Tensor
    heads: Tensor
    chunks: Tensor
    scores: Tensor
    masses: Tensor
    chunk_size: int

    def where(self, position: int) -> Tuple[Optional[str], int]:
        """Document (None for the text itself) and number in it of the token at a place of the stream; -1 its start."""
        if position >= self.position:
            return None, position - self.position - 1
        found = next(document for document in self.documents if document.begin <= position < document.end)
        return found.name, position - found.begin - 1


class _Reads:
    """Watches :class:`MemoryBranches`: the reads of one segment, those with the largest gate * mass first."""

    def __init__(self, gates: Tensor, kept: int):
        self.gates, self.kept = gates, kept
        self.found: Optional[Tuple[Tensor, ...]] = None

    def __call__(self, rows, bank: MemoryBank, q: Tensor, slots: Tensor, scaling: float) -> None:
        lanes = slots.new_zeros(1)
        masses = chunk_masses(q, bank.keys, lanes, slots, scaling)[0].transpose(0, 1)  # (T, H, n)
        scores = chunk_scores(q, bank.means, lanes, slots)[0].transpose(0, 1)
        chunks = bank.chunk_numbers(lanes.cpu().numpy(), slots)[0].transpose(0, 1) * bank.chunk_size
        H, n = masses.shape[1:]
        shares = masses * self.gates[:, None]
        absent = (slots[0] < 0).transpose(0, 1).flatten(1)  # (T, H * n)
        best = shares.flatten(1).masked_fill(absent, -1.0).topk(min(self.kept, H * n), dim=1).indices  # (T, S)
        heads = torch.where(absent.gather(1, best), -1, best // n)
        kept = [x.flatten(1).gather(1, best).cpu() for x in (chunks, scores, masses)]
        self.found = (heads.cpu(), *kept, _largest(chunks.flatten(1), shares.flatten(1) / H), shares.amax(-1).cpu())


def _largest(chunks: Tensor, shares: Tensor) -> Tensor:
    """Largest sum of shares (T, R) that are of the same chunk, shape (T,), on the CPU."""
    same = zip(chunks.split(_QUERIES), shares.split(_QUERIES))
    sums = [((c[:, :, None] == c[:, None, :]) * s[:, None, :]).sum(-1).amax(-1) for c, s in same]
    return torch.cat(sums).cpu()


@torch.no_grad()
def trace_reads(
    decoder,
    tokens: Tensor,
    size: int,
    document_memory: DocumentMemory,
    begin: int = 0,
    length: Optional[int] = None,
    kept: int = 8,
) -> Trace:
    """Read a text behind what a library has, segment by segment as evaluation does, and note what is read.

    Args:
        decoder: a :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder` in evaluation mode, with a memory.
        tokens: of the whole text, shape (length,), int64.
        size: T.
        library: what is remembered from before; it is only read.
        begin, length: which part is looked at, by default all; what is before is only remembered.
        kept: reads that are kept of each token, S.

    Raises:
        ValueError: there is no such part, or ``kept`` is none.
    """
    end = len(tokens) if length is None else min(begin + length, len(tokens))
    if not 0 <= begin < end:
        raise ValueError(f"the text has tokens 0 to {len(tokens) - 1}: none lies between {begin} and {end}")
    if kept < 1:
        raise ValueError(f"{kept} reads of each token would show nothing: keep at least 1")
    branches = decoder.memory_branches(1, document_memory.bank)
    gates = torch.sigmoid(decoder.layers[decoder.reading_layer].self_attn.memory_gate.float())
    tokens = tokens.to(decoder.device)
    inputs = torch.cat([tokens.new_tensor([decoder.dictionary.eos()]), tokens[:-1]])
    parts = []
    with token_bar(end, "reading") as progress:
        for first in range(0, end, size):
            piece = inputs[first : first + size]
            if first + size <= begin:
                encoded = decoder.backbone.encode_for_memory(piece[None])
            else:
                encoded = decoder.backbone(piece[None])
                branches.watch = watch = _Reads(gates, kept)
                logits = [
                    decoder.output_layer(decoder.features(decoder.side_network(encoded, reader)))[0]  # (T, V)
                    for reader in (branches.reader(), None)
                ]
                target = tokens[first : first + size, None]
                on, off = (x.float().log_softmax(-1).gather(1, target)[:, 0].cpu() for x in logits)
                found = watch.found or _nothing(len(piece), len(gates), kept)
                part = slice(max(0, begin - first), end - first)
                parts.append([x[part] for x in (on, off, *(_widened(x, kept) for x in found[:4]), *found[4:])])
            branches.write([0], piece[None], encoded.keys, encoded.values)
            progress.update(len(piece))
    on, off, heads, chunks, scores, masses, strongest, by_head = (torch.cat(x) for x in zip(*parts))
    return Trace(
        tokens[begin:end].cpu(),
        begin,
        document_memory.end,
        document_memory.documents,
        on,
        off,
        gates.cpu(),
        strongest,
        by_head,
        heads,
        chunks,
        scores,
        masses,
        document_memory.bank.chunk_size,
    )


def _widened(x: Tensor, columns: int) -> Tensor:
    """x (T, fewer columns) with columns of reads that are none."""
    return torch.nn.functional.pad(x, (0, columns - x.size(1)), value=-1)


def _nothing(T: int, H: int, columns: int) -> Tuple[Tensor, ...]:
    """The reads of a segment with nothing to read."""
    none, zero = torch.full((T, columns), -1), torch.zeros(T, columns)
    return none, none, zero, zero, torch.zeros(T), torch.zeros(T, H)
