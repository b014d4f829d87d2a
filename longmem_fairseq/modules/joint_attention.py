"""Joint attention to the local window and to a memory (docs/method.md, "One step"; LongMem, section 2.3, equation 5).

Legend: B rows of a batch, H heads, T tokens of a segment, S keys of the window, d width of a head.
"""

import contextlib
from typing import Iterator, Optional

import torch
from torch import Tensor, nn

from .self_attention import SelfAttention


class MemoryGate:
    """Mixin for attention modules that mix the output of a memory reader into their own, with one gate per head.

    ``out = (1 - sigmoid(g)) * local + sigmoid(g) * memory``, and ``out = local`` exactly where nothing can be read.
    A module calls :meth:`add_gate` when it is built and :meth:`mix` behind its local attention.

    Attributes:
        memory_gate: Parameter g, shape (H,), which starts at 0.
    """

    memory_gate: nn.Parameter
    _reader = None

    def add_gate(self, num_heads: int) -> None:
        """Add the gates.

        Args:
            num_heads: Number of query heads, H.
        """
        self.memory_gate = nn.Parameter(torch.zeros(num_heads))

    @contextlib.contextmanager
    def reading(self, reader) -> Iterator[None]:
        """Let the attention read from a memory within this context.

        Args:
            reader: A :class:`longmem_fairseq.memory.reader.MemoryReader`, or None to read nothing.
        """
        self._reader = reader
        try:
            yield
        finally:
            self._reader = None

    def mix(self, q: Tensor, local: Tensor, scaling: float) -> Tensor:
        """Mix what the reader returns into the output of local attention.

        Args:
            q: Queries without position, shape (B, H, T, d).
            local: Output of local attention, shape (B, H, T, d).
            scaling: Factor of the memory's scores, 1 / sqrt(d).

        Returns:
            Output of joint attention, shape (B, H, T, d).
        """
        gate = torch.sigmoid(self.memory_gate.float()).to(local.dtype).view(1, -1, 1, 1)
        if self._reader is None:
            # The gate stays in the graph: distributed training expects a gradient for every parameter at every step.
            return local + 0.0 * gate if self.training else local
        memory, present = self._reader(q, scaling)  # (B, H, T, d), (B,) bool
        if present is not None:
            gate = gate * present.to(gate.dtype).view(-1, 1, 1, 1)
        return (1 - gate) * local + gate * memory


class JointAttention(MemoryGate, SelfAttention):
    """:class:`SelfAttention` that also reads a memory; arguments are the same."""

    def __init__(self, embed_dim: int, num_heads: int, *args, **kwargs):
        super().__init__(embed_dim, num_heads, *args, **kwargs)
        self.add_gate(num_heads)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor] = None, window: Optional[int] = None
    ) -> Tensor:
        return self.mix(q, self.local_attention(q, k, v, left, window), self.scaling)
