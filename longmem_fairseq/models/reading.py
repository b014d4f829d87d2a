"""Reading a document segment by segment behind a memory: what scoring, tracing, memorizing and prefill share.

Legend: B rows, T tokens of a segment, b segments encoded side by side, d width of a head, H_kv key/value heads.
"""

from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..backbones.base import Backbone, EncodedSegment
from ..data.segments import Segments
from ..memory.bank import MemoryBank
from ..memory.branches import MemoryBranches
from ..memory.document_memory import DocumentMemory
from ..progress import token_bar
from .carried_window import CarriedSegment, CarriedWindow, new_carried_window

_TOKENS_AT_ONCE = 4096  # number of tokens that are encoded side by side


class ReadSegment(NamedTuple):
    """One segment while it is read; it is written into the memory when the next one is requested.

    Attributes:
        begin: Number of the segment's first input in the document.
        inputs: Inputs, shape (1, T), int64.
        encoded: Segment as the backbone encoded it, with all layers.
        carried: State behind a carried window, with which the side network must read the segment once; None where no
            window is carried.
    """

    begin: int
    inputs: Tensor
    encoded: EncodedSegment
    carried: Optional[CarriedSegment] = None

    def again(self) -> "ReadSegment":
        """Return the segment for another reading, of which nothing is carried on."""
        return self._replace(carried=None if self.carried is None else self.carried.again())


def encode_side_by_side(
    backbone: Backbone, segments: Sequence[Tensor], all_layers: bool = False
) -> Iterator[Tuple[List[int], Tensor, EncodedSegment]]:
    """Encode segments of one length, several at a time.

    Args:
        backbone: Backbone that encodes them.
        segments: Inputs of each segment, shape (T,), int64.
        all_layers: Whether all layers are run; if false, only as many as the memory needs.

    Yields:
        Numbers of the segments, their inputs (b, T), and what the backbone computed for them.
    """
    encode = backbone.encode if all_layers else backbone.encode_for_memory
    at_once = max(1, _TOKENS_AT_ONCE // len(segments[0])) if len(segments) else 1
    for begin in range(0, len(segments), at_once):
        inputs = torch.stack(list(segments[begin : begin + at_once])).to(backbone.device)
        yield list(range(begin, begin + len(inputs))), inputs, encode(inputs)


def encode_document(
    backbone: Backbone, inputs: Tensor, segment: int, all_layers: bool = False
) -> Iterator[Tuple[Tensor, EncodedSegment]]:
    """Encode a document's segments, each by itself: whole ones side by side, then the rest.

    Args:
        backbone: Backbone that encodes them.
        inputs: Inputs of the document, shape (length,), int64.
        segment: Number of tokens in a segment, T.
        all_layers: Whether all layers are run; if false, only as many as the memory needs.

    Yields:
        Inputs of consecutive segments (b, T), and what the backbone computed for them.
    """
    pieces = inputs.split(segment)
    whole = len(inputs) // segment
    for part in (pieces[:whole], pieces[whole:] if len(inputs) % segment else ()):
        for _, batch, encoded in encode_side_by_side(backbone, part, all_layers):
            yield batch, encoded


class DocumentReader:
    """Reads documents as ``fairseq-eval-lm`` does: segments of T inputs, each behind the memory of those before it.

    The inputs of a document are an end-of-sentence and its tokens but the last; its targets are its tokens.

    Args:
        decoder: A :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder` in evaluation mode.
        segment: Number of tokens in a segment, T.
    """

    def __init__(self, decoder, segment: int):
        self.decoder, self.segment = decoder, segment

    def branches(self, rows: int = 1, base: Optional[MemoryBank] = None) -> Optional[MemoryBranches]:
        """Return memories for some rows that are read from and written to; None with the memory off.

        Args:
            rows: Number of rows.
            base: Bank of one lane that every row starts with, which is only read; None for an empty memory.
        """
        decoder = self.decoder
        if not decoder.has_memory:
            return None
        return decoder.memory_factory.branches(rows, decoder.backbone.dtype, decoder.device, base)

    def new_memory(self) -> Optional[DocumentMemory]:
        """Return an empty memory of documents; None with the memory off."""
        decoder = self.decoder
        if not decoder.has_memory:
            return None
        return DocumentMemory(decoder.memory_factory.document_bank(decoder.backbone.dtype, decoder.device))

    def inputs_of(self, tokens: Tensor) -> Tensor:
        """Return a document's inputs, shape (length,), on the model's device, from its tokens (length,)."""
        tokens = tokens.to(self.decoder.device)
        return torch.cat([tokens.new_tensor([self.decoder.dictionary.eos()]), tokens[:-1]])

    @torch.no_grad()
    def memorize(self, memory: DocumentMemory, name: str, tokens: Tensor) -> None:
        """Encode a document and write it into a memory; a progress bar shows from the first second on.

        An exception, or an interruption by the user, leaves the memory as it was.

        Args:
            memory: Memory to write into.
            name: Name of the document.
            tokens: Token ids of the document, shape (length,), int64, without end-of-sentence.

        Raises:
            ValueError: The memory has a document of this name.
        """
        eos = tokens.new_tensor([self.decoder.dictionary.eos()])
        inputs = torch.cat([eos, tokens]).to(self.decoder.device)  # the last token too: later text can read it
        with memory.writing(name, len(inputs)) as bank, token_bar(len(inputs), f"memorizing {name}") as progress:
            for part, encoded in self._encode_for_memory(inputs):
                for keys, values in zip(encoded.keys, encoded.values):
                    bank.append(0, keys, values)
                states = self.decoder.predictor.token_states(encoded, part)
                if states is not None:
                    bank.token_bank.append(0, states.hidden.flatten(0, 1), states.tokens.flatten())
                progress.update(part.numel())

    def _encode_for_memory(self, inputs: Tensor) -> Iterator[Tuple[Tensor, EncodedSegment]]:
        """Yield consecutive inputs (b, T) of a document, and what is written of them."""
        backbone, all_layers = self.decoder.backbone, self.decoder.predictor.writes_hidden
        window = self.carried_window(for_memory=True)
        if window is None:
            yield from encode_document(backbone, inputs, self.segment, all_layers)
            return
        if all_layers:
            yield from ((segment.inputs, segment.encoded) for segment in self.read(inputs))
            return
        for place, piece in self._segments(inputs):
            state = window.open(place)
            yield piece, backbone.encode_for_memory(piece, state, state.start)
            window.write(place, piece, state)

    def carried_window(self, for_memory: bool = False) -> Optional[CarriedWindow]:
        """Return an empty carried window of one lane; None where none is carried.

        Args:
            for_memory: Whether the document is only encoded for the memory.
        """
        size = self.decoder.lane_state.windows.size
        return new_carried_window(self.decoder, 1, size, for_memory) if size else None

    def _segments(self, inputs: Tensor) -> Iterator[Tuple[Segments, Tensor]]:
        """Yield the places of a document's segments, and their inputs (1, T)."""
        for begin in range(0, len(inputs), self.segment):
            piece = inputs[None, begin : begin + self.segment]
            yield Segments([0], [0], [begin], [piece.size(1)], 1), piece

    @torch.no_grad()
    def read(self, inputs: Tensor, branches: Optional[MemoryBranches] = None, begin: int = 0) -> Iterator[ReadSegment]:
        """Encode a document segment by segment, and write each segment when the next one is requested.

        Args:
            inputs: Inputs of the document, shape (length,), int64, on the model's device.
            branches: Memory of one row that is read and written; None for none.
            begin: Number of an input; segments that end before it are only written.
        """
        backbone, window = self.decoder.backbone, self.carried_window()
        for place, piece in self._segments(inputs):
            first = int(place.starts[0])
            only_written = first + self.segment <= begin
            if window is None:
                encoded = self.decoder.predictor.encode_for_memory(piece) if only_written else backbone.encode(piece)
                state = None
            else:
                state = window.open(place)
                encoded = backbone.encode(piece, state, state.start)
            if not only_written:
                yield ReadSegment(first, piece, encoded, state)
            elif state is not None:  # the side network's keys are carried too
                self.decoder.side_network(encoded, branches and branches.reader(), state)
            if branches is not None:
                states = self.decoder.predictor.token_states(encoded, piece)
                branches.write([0], piece, encoded.keys, encoded.values, states and states.hidden)
            if window is not None:
                window.write(place, piece, state)

    @torch.no_grad()
    def score(self, tokens: Tensor, memory: Optional[DocumentMemory] = None, use_memory: bool = True) -> Tensor:
        """Score a document behind what was memorized.

        Args:
            tokens: Token ids of the document, shape (length,), int64, without end-of-sentence.
            memory: What was memorized, which is only read; None for nothing.
            use_memory: Whether the document is read behind a memory; if false, a segment reads no more than the
                carried window.

        Returns:
            Log-probability of each token, natural logarithm, shape (length,), float32, on the CPU.
        """
        branches = self.branches(1, memory and memory.bank) if use_memory else None
        targets = tokens.to(self.decoder.device)
        parts = []
        for segment in self.read(self.inputs_of(tokens), branches):
            target = targets[segment.begin : segment.begin + segment.inputs.size(1)]
            parts.append(self.target_log_probs(segment, branches, target))
        return torch.cat(parts)

    def target_log_probs(self, segment: ReadSegment, branches: Optional[MemoryBranches], targets: Tensor) -> Tensor:
        """Return the log-probability of each target, shape (T,), float32, on the CPU, of a segment of one row.

        Args:
            segment: The segment.
            branches: Memory of one row, which is only read; None for none.
            targets: Token ids to predict, shape (T,), int64.
        """
        decoder, reads = self.decoder, None
        states = decoder.side_network(segment.encoded, branches and branches.reader(), segment.carried)
        if branches is not None:
            reads = branches.read_segments(decoder.predictor.token_states(segment.encoded, segment.inputs))
        logits = decoder.predictor(decoder.features(states), reads)[0]  # (T, V)
        return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu()
