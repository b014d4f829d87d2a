"""What a model reads from its memory while it reads a text, token by token.

Legend: L tokens of the part that is traced, H query heads of a reading layer, A heads of all reading layers, those of
the lowest layer first, T tokens of a segment, n chunks read per query and head, S reads that are kept of each token.
"""

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..memory.document_memory import DocumentMemory, MemorizedDocument
from ..memory.reader import ReadEvent
from ..modules.joint_attention import MemoryGate
from ..modules.memory_masses import chunk_masses, chunk_scores
from ..modules.query_groups import group_queries, ungroup
from ..progress import token_bar
from .reading import DocumentReader

_QUERIES = 64  # queries whose reads are compared with each other at a time


class Trace(NamedTuple):
    """What was read to predict each token of a part of a text.

    A head outputs ``(1 - gate) * local + gate * memory``. In the memory's part each chunk has a mass, the attention
    weights of its tokens; a head's masses sum to 1. So ``gate * mass`` is the share of the head's output that comes
    from one chunk.

    Attributes:
        tokens: Token ids of the part, shape (L,), int64.
        begin: Number of the part's first token in the text.
        position: Place of the text in the memory's stream; token i of the text is number ``position + i + 1``, behind
            an end-of-sentence.
        documents: Other documents in the stream, from before.
        log_probabilities: Log-probability of each token, natural logarithm, shape (L,), float32.
        without_memory: Log-probability where the side network reads nothing, shape (L,), float32.
        layers: Numbers of the memory layers, ascending; the heads of each follow each other.
        gates: Gate sigma(g) of each head, shape (L, A), float32; the same for all tokens unless gates depend on them.
        strongest: Largest share of a reading layer's output, over all its heads, that came from one chunk, shape (L,).
        by_head: Largest gate * mass of each head, shape (L, A).
        heads: Head of each read, shape (L, S), int64, by falling gate * mass; -1 where fewer chunks were read.
        chunks: Number of the chunk's first token in the stream, shape (L, S), int64.
        scores: Inner product of query and mean key, by which the chunk was found, shape (L, S), float32.
        masses: Mass of each read, shape (L, S), float32.
        chunk_size: Number of tokens in a chunk.
    """

    tokens: Tensor
    begin: int
    position: int
    documents: List[MemorizedDocument]
    log_probabilities: Tensor
    without_memory: Tensor
    layers: Tuple[int, ...]
    gates: Tensor
    strongest: Tensor
    by_head: Tensor
    heads: Tensor
    chunks: Tensor
    scores: Tensor
    masses: Tensor
    chunk_size: int

    def where(self, position: int) -> Tuple[Optional[str], int]:
        """Locate a token of the stream.

        Args:
            position: Number of the token in the stream.

        Returns:
            Name of its document (None for the text itself), and its number in it; -1 for the document's start.
        """
        if position >= self.position:
            return None, position - self.position - 1
        document = next(document for document in self.documents if document.begin <= position < document.end)
        return document.name, position - document.begin - 1


class ReadRecorder:
    """Observer of a reader: keeps the reads of one segment, those with the largest gate * mass first.

    Args:
        gates: The gates of each reading layer, lowest layer first.
        tokens: Number of tokens in the segment, T.
        kept: Number of reads that are kept of each token, S.
    """

    def __init__(self, gates: Sequence[MemoryGate], tokens: int, kept: int):
        self.gates, self.tokens, self.kept = gates, tokens, kept
        self._layers: Dict[int, Dict[str, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, event: ReadEvent) -> None:
        bank, q, slots = event.bank, event.queries, event.slots  # of one row
        H, n = slots.size(1), slots.size(3)
        first = event.layer * H
        lanes = torch.from_numpy(event.lanes).to(slots.device)
        grouped_q, grouped_slots = group_queries(q, bank.heads), group_queries(slots, bank.heads)
        masses = ungroup(chunk_masses(grouped_q, bank.keys, lanes, grouped_slots, event.scaling), H)
        scores = ungroup(chunk_scores(grouped_q, bank.means, lanes, grouped_slots), H)
        chunks = bank.chunk_numbers(event.lanes, slots) * bank.chunk_size
        masses, scores, chunks = (x[0].transpose(0, 1) for x in (masses, scores, chunks))  # (T, H, n)
        gates = self.gates[event.layer].gates(q).expand(1, H, slots.size(2), 1)[0].transpose(0, 1)  # (T, H, 1)
        shares = masses * gates
        absent = (slots[0] < 0).transpose(0, 1).flatten(1)  # (T, H * n)
        order, best = shares.flatten(1).masked_fill(absent, -1.0).topk(min(self.kept, H * n), dim=1)  # (T, S)
        self._layers[event.layer] = {
            "order": order.cpu(),
            "heads": torch.where(absent.gather(1, best), -1, first + best // n).cpu(),
            "chunks": chunks.flatten(1).gather(1, best).cpu(),
            "scores": scores.flatten(1).gather(1, best).cpu(),
            "masses": masses.flatten(1).gather(1, best).cpu(),
            "strongest": _largest_sum(chunks.flatten(1), shares.flatten(1) / H),
            "by_head": shares.amax(-1).cpu(),
            "gates": gates[:, :, 0].cpu(),
        }

    @property
    def columns(self) -> Dict[str, Tensor]:
        """The fields of :class:`Trace` that describe reads, shape (T, ...) each, on the CPU."""
        if not self._layers:
            absent, zero = torch.full((self.tokens, self.kept), -1), torch.zeros(self.tokens, self.kept)
            reads = {"heads": absent, "chunks": absent, "scores": zero, "masses": zero}
            gates = torch.cat([gate.mean_gates for gate in self.gates]).cpu().expand(self.tokens, -1)
            return {
                **reads,
                "strongest": torch.zeros(self.tokens),
                "by_head": torch.zeros_like(gates),
                "gates": gates,
            }
        layers = [self._layers[number] for number in sorted(self._layers)]
        joined = {name: torch.cat([x[name] for x in layers], dim=1) for name in layers[0] if name != "strongest"}
        best = joined.pop("order").argsort(dim=1, descending=True, stable=True)[:, : self.kept]  # (T, S)
        by_head, gates = joined.pop("by_head"), joined.pop("gates")
        reads = {name: self._widen(x.gather(1, best)) for name, x in joined.items()}
        strongest = torch.stack([x["strongest"] for x in layers]).amax(0)
        return {**reads, "strongest": strongest, "by_head": by_head, "gates": gates}

    def _widen(self, x: Tensor) -> Tensor:
        """Return x (T, fewer columns) with S columns; -1 where there are no reads."""
        return torch.nn.functional.pad(x, (0, self.kept - x.size(1)), value=-1)


def _largest_sum(chunks: Tensor, shares: Tensor) -> Tensor:
    """Return the largest sum of shares (T, R) of the same chunk, shape (T,), on the CPU."""
    sums = []
    for c, s in zip(chunks.split(_QUERIES), shares.split(_QUERIES)):
        same = c[:, :, None] == c[:, None, :]
        sums.append((same * s[:, None, :]).sum(-1).amax(-1))
    return torch.cat(sums).cpu()


@torch.no_grad()
def trace_reads(
    reader: DocumentReader,
    tokens: Tensor,
    memory: DocumentMemory,
    begin: int = 0,
    length: Optional[int] = None,
    kept: int = 8,
) -> Trace:
    """Read a text behind a memory, segment by segment as evaluation does, and record what is read.

    Args:
        reader: Reader of documents whose decoder has a memory.
        tokens: Token ids of the whole text, shape (length,), int64.
        memory: What was memorized before, which is only read.
        begin: Number of the first token that is traced; the text before it is only written.
        length: Number of tokens that are traced; None for all.
        kept: Number of reads that are kept of each token, S.

    Raises:
        ValueError: The text does not have this part, or ``kept`` is less than 1.
    """
    end = len(tokens) if length is None else min(begin + length, len(tokens))
    if not 0 <= begin < end:
        raise ValueError(f"the text has tokens 0 to {len(tokens) - 1}, none of them between {begin} and {end}")
    if kept < 1:
        raise ValueError(f"keeping {kept} reads of each token shows nothing: keep at least 1")
    gates = [reader.decoder.layers[s].self_attn for s in reader.decoder.reading_layers]
    branches = reader.branches(1, memory.bank)
    targets = tokens.to(reader.decoder.device)
    parts: Dict[str, List[Tensor]] = {}
    inputs = reader.inputs_of(tokens)[: -(-end // reader.segment) * reader.segment]  # whole segments up to the end
    with token_bar(len(inputs), "reading") as progress:
        for segment in reader.read(inputs, branches, begin):
            T = segment.inputs.size(1)
            target = targets[segment.begin : segment.begin + T]
            branches.on_read = recorder = ReadRecorder(gates, T, kept)
            columns = {
                "log_probabilities": reader.target_log_probs(segment, branches, target),
                "without_memory": reader.target_log_probs(segment.again(), None, target),
            }
            part = slice(max(0, begin - segment.begin), end - segment.begin)
            for name, x in {**columns, **recorder.columns}.items():
                parts.setdefault(name, []).append(x[part])
            progress.update(segment.begin + T - progress.n)
    return Trace(
        tokens=tokens[begin:end].cpu(),
        begin=begin,
        position=memory.end,
        documents=list(memory.documents),
        layers=reader.decoder.backbone.memory_layers,
        chunk_size=memory.bank.chunk_size,
        **{name: torch.cat(x) for name, x in parts.items()},
    )
