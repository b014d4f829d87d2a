"""The step of the decoder as a CUDA graph (``--cuda-graphs``).

In evaluation a graph contains backbone, search, reading and side network: everything between the tokens and the
features. In training it contains the frozen backbone, which has no gradient. What comes before and after, such as the
write into the memory and the logits, is launched as without a graph; the results are the same, bit by bit.

Legend: B rows, T tokens of a segment, n memory layers.
"""

import logging
from typing import Dict, Hashable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..backbones.base import EncodedSegment
from ..memory.reader import BatchReader
from ..memory.ring import RingPlaces
from ..modules.recording import CudaRecorder, Recorder, Recording, new_recording

logger = logging.getLogger(__name__)

MODES = ("auto", "on", "off")
_MOST = 8  # recordings that are kept: segments at the ends of documents have other sizes

Step = Tuple[EncodedSegment, List[Tensor]]
CARRIED = "--carry-window makes it depend on what lanes carry"


class StepGraphs:
    """Records the steps of a decoder when they come for the second time, and replays them from then on.

    Args:
        decoder: A :class:`longmem_fairseq.models.longmem_decoder.LongMemDecoder`.
        recorder: What records; None for CUDA graphs.

    Attributes:
        mode: Value of ``--cuda-graphs``.
        replays: Number of replays so far.
    """

    def __init__(self, decoder, recorder: Optional[Recorder] = None):
        self.decoder = decoder
        self.recorder = CudaRecorder() if recorder is None else recorder
        self.mode, self.replays = "auto", 0
        self._refused: Optional[str] = None
        self.clear()

    def choose(self, mode: str, trains: bool) -> None:
        """Set :attr:`mode`, and refuse ``on`` before anything is read where the settings leave no step to record.

        Args:
            mode: Value of ``--cuda-graphs``.
            trains: Whether the model is trained, so that only the backbone is recorded.

        Raises:
            ValueError: No step can be recorded.
        """
        self.mode, factory = mode, self.decoder.memory_factory
        if mode != "on":
            return
        if self.decoder.lane_state.windows.size:
            self._refuse(CARRIED)
        if self.decoder.has_memory and not trains:
            reason = factory.why_not_static(torch.device("cuda"))
            if reason is not None:
                self._refuse(reason)

    def clear(self) -> None:
        """Free all recordings."""
        self._recordings: Dict[Hashable, Recording] = {}
        self._seen: Dict[Hashable, bool] = {}
        self._weights: List[Tuple[Tensor, int]] = []
        self._bank = 0

    def __getstate__(self):
        recorder = type(self.recorder)()
        return {**self.__dict__, "recorder": recorder, "_recordings": {}, "_seen": {}, "_weights": [], "_bank": 0}

    @property
    def recordings(self) -> int:
        """Number of recordings that are kept."""
        return len(self._recordings)

    def run(self, tokens: Tensor, reader: Optional[BatchReader], carried) -> Step:
        """Encode a segment of each lane and run the side network, as :meth:`LongMemDecoder.read_segment` does.

        Args:
            tokens: Token ids, shape (B, T), int64.
            reader: What the rows read, or None.
            carried: State of a carried window, or None.

        Returns:
            What the backbone computed, whose hidden states the next call may overwrite, and the side network's states.

        Raises:
            ValueError: ``--cuda-graphs on`` and the step cannot be recorded.
        """
        decoder = self.decoder
        if self.mode == "off" or not self.recorder.suits(tokens.device):
            return decoder.read_segment(tokens, reader, carried)
        trains = decoder.training or torch.is_grad_enabled()
        reason = CARRIED if carried is not None else None if trains else _why_not_static(reader)
        if reason is not None:
            self._refuse(reason)
            return decoder.read_segment(tokens, reader, carried)
        if trains:
            with torch.no_grad():
                encoded = self._replay(_Encoding(decoder, tokens))
            return encoded, decoder.side_network(encoded, reader)
        return self._replay(_Reading(decoder, tokens, reader))

    def _refuse(self, reason: str) -> None:
        if self.mode == "on":
            raise ValueError(f"--cuda-graphs on: the step cannot be a CUDA graph, as {reason}; leave the option out")
        if reason != self._refused:
            self._refused = reason
            logger.info("the step is not a CUDA graph, as %s", reason)

    def _replay(self, work: "_Encoding"):
        """Return the result of a piece of work: replayed where it came before, else computed."""
        if work.bank not in (0, self._bank) or any(x.data_ptr() != address for x, address in self._weights):
            self.clear()
            self._bank = work.bank
        key = (type(work), work.tokens.shape, work.key, *_context(work.tokens.device))
        recording = self._recordings.get(key)
        if recording is None and key in self._seen:
            recording = self._record(key, work)
        if recording is None:
            self._seen[key] = True
            return work.result(work.compute(work.inputs))
        self._recordings[key] = self._recordings.pop(key)  # the one that was used last is freed last
        self.replays += 1
        return work.result(recording(work.inputs))

    def _record(self, key: Hashable, work: "_Encoding") -> Optional[Recording]:
        """Record a piece of work; None where PyTorch cannot."""
        inputs = [x.clone() for x in work.inputs]
        try:
            recording = new_recording(self.recorder, lambda: work.compute(inputs), inputs)
        except RuntimeError as error:  # whatever a backbone family of others does that a graph cannot contain
            self.clear()
            self._refuse(f"PyTorch cannot record it ({str(error).splitlines()[0]})")
            self.mode = "off"
            return None
        if len(self._recordings) >= _MOST:
            del self._recordings[next(iter(self._recordings))]
        self._recordings[key] = recording
        self._weights = [(x, x.data_ptr()) for x in self.decoder.parameters()]
        logger.info("a step of %d rows of %d tokens is a CUDA graph from now on", *work.tokens.shape)
        return recording


def _why_not_static(reader: Optional[BatchReader]) -> Optional[str]:
    reasons = [] if reader is None else [layer.why_not_static() for layer in reader.readers]
    return next((reason for reason in reasons if reason is not None), None)


def _context(device: torch.device) -> Tuple[Hashable, ...]:
    """Return what else decides which kernels run."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return device, autocast, torch.is_inference_mode_enabled()


class _Encoding:
    """The encoding of a segment of each lane.

    Args:
        decoder: The decoder.
        tokens: Token ids, shape (B, T), int64.

    Attributes:
        inputs: Tensors that it depends on.
        key: What its kernels depend on beside sizes.
        bank: Address of the bank that it reads; 0 for none.
    """

    def __init__(self, decoder, tokens: Tensor):
        self.decoder, self.tokens = decoder, tokens
        self.inputs, self.bank = [tokens], 0
        self.key: Hashable = None

    def compute(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Return keys, values and hidden states for some inputs."""
        encoded = self.decoder.backbone(inputs[0])
        return (encoded.keys, encoded.values, *encoded.hidden)

    def result(self, outputs: Sequence[Tensor]) -> EncodedSegment:
        """Return the outputs as the decoder takes them; copies of those that are needed after the step."""
        keys, values, first, *hidden = outputs
        return EncodedSegment([first.clone(), *hidden], keys.clone(), values.clone())


class _Reading(_Encoding):
    """The encoding of a segment of each lane and what the side network makes of it and of what it reads.

    Args:
        decoder: The decoder.
        tokens: Token ids, shape (B, T), int64.
        reader: What the rows read, or None.
    """

    def __init__(self, decoder, tokens: Tensor, reader: Optional[BatchReader]):
        super().__init__(decoder, tokens)
        self.reader = reader
        readers = [] if reader is None else reader.readers
        self.readers = [layer for layer in readers if layer.reads]
        self.inputs += [layer.places(tokens.device).packed for layer in self.readers]
        if readers:
            self.bank = readers[0].bank.keys.data_ptr()
        self.key = self.bank, len(self.readers)

    def compute(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Return keys, values, hidden states, states of the side network, slots that were found, and gates."""
        tokens, *places = inputs
        for reader, packed in zip(self.readers, places):
            reader.bind(RingPlaces(packed))
        encoded, states = self.decoder.read_segment(tokens, self.reader)
        slots = [reader.slots for reader in self.readers]
        return (encoded.keys, encoded.values, *encoded.hidden, *states, *slots, *self._gates())

    def result(self, outputs: Sequence[Tensor]) -> Step:
        """Return the outputs as the decoder takes them; copies of those that are needed after the step."""
        encoded = super().result(outputs[: self.decoder.backbone.num_layers + 3])
        rest = [x.clone() for x in outputs[self.decoder.backbone.num_layers + 3 :]]
        states, rest = rest[: len(self.decoder.layers) + 1], rest[len(self.decoder.layers) + 1 :]
        for reader, packed, slots in zip(self.readers, self.inputs[1:], rest):
            reader.bind(RingPlaces(packed))
            reader.slots = slots
        for attention, gates in zip(self._attentions, rest[len(self.readers) :]):
            attention.last_gates = gates
        return encoded, states

    @property
    def _attentions(self) -> List[nn.Module]:
        """The attention modules whose gates depend on the query and are looked at behind the step."""
        attentions = [self.decoder.layers[s].self_attn for s in self.decoder.reading_layers]
        return [attention for attention in attentions if self.reader is not None and attention.gate_weight is not None]

    def _gates(self) -> List[Tensor]:
        return [attention.last_gates for attention in self._attentions]
