"""Joint attention to the local window and to a memory (docs/method.md, "One step"; LongMem, section 2.3, equation 5).

Legend: B rows of a batch, H heads, T tokens of a segment, S keys of the window, d width of a head.
"""

import contextlib
from typing import Iterator, Optional

import torch
from torch import Tensor, nn

from .self_attention import SelfAttention
from .sliding_window import SeenWindow

# The parameters of a gate are this factor smaller than what they stand for, so that the learning rate of the weights,
# which moves a parameter by about its own size in a step, moves a gate so much farther. A power of two, so that the
# gates of older checkpoints are converted exactly.
GATE_PACE = 32.0


class MemoryGate:
    """Mixin for attention modules that mix the output of a memory reader into their own, with one gate per head.

    ``out = (1 - sigmoid(g)) * local + sigmoid(g) * memory``, and ``out = local`` exactly where nothing can be read.
    ``g = 32 b`` for each head, or ``g = 32 (b + w q / sqrt(d))`` for each head and query q (``--gate token``).
    A module calls :meth:`add_gate` when it is built and :meth:`mix` behind its local attention.

    Attributes:
        gate_bias: Parameter b, shape (H,), which starts at 0.
        gate_weight: Parameter w, shape (H, d), which starts at 0; None where a gate does not depend on the query.
        last_gates: Gates of the last call that depend on the query, shape (B, H, T, 1), without gradient; None before.
    """

    gate_bias: nn.Parameter
    gate_weight: Optional[nn.Parameter]
    last_gates: Optional[Tensor] = None
    _reader = None

    def add_gate(self, num_heads: int) -> None:
        """Add the gates.

        Args:
            num_heads: Number of query heads, H.
        """
        self.gate_bias = nn.Parameter(torch.zeros(num_heads))
        self.gate_weight = None

    def add_gate_weight(self, head_dim: int) -> None:
        """Let the gates depend on the query.

        Args:
            head_dim: Width of a head, d.
        """
        self.gate_weight = nn.Parameter(torch.zeros(self.gate_bias.size(0), head_dim))

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
        if self._reader is None and not self.training:
            return local
        gate = self.gates(q).to(local.dtype)
        if self._reader is None:
            # The gate stays in the graph: distributed training expects a gradient for every parameter at every step.
            return local + 0.0 * gate
        memory, present = self._reader(q, scaling)  # (B, H, T, d), (B,) bool
        if present is not None:
            gate = gate * present.to(gate.dtype).view(-1, 1, 1, 1)
        return (1 - gate) * local + gate * memory

    def gates(self, q: Tensor) -> Tensor:
        """Return the gates sigmoid(g) of queries (B, H, T, d), shape (B, H, T, 1) or (1, H, 1, 1), float32."""
        g = self.gate_bias.float().view(1, -1, 1, 1)
        if self.gate_weight is not None:
            d = q.size(3)
            g = g + (q.float() * self.gate_weight.float()[:, None]).sum(dim=3, keepdim=True) / d**0.5
            self.last_gates = torch.sigmoid(GATE_PACE * g.detach())
        return torch.sigmoid(GATE_PACE * g)

    @property
    def mean_gates(self) -> Tensor:
        """The gates sigmoid(g), shape (H,), float32, without gradient.

        Gates that depend on the query are means over the rows and tokens of the last call, and before the first call
        those of a query of zeros.
        """
        if self.gate_weight is None or self.last_gates is None:
            return torch.sigmoid(GATE_PACE * self.gate_bias.detach().float())
        return self.last_gates.mean(dim=(0, 2, 3))


class JointAttention(MemoryGate, SelfAttention):
    """:class:`SelfAttention` that also reads a memory; arguments are the same."""

    def __init__(self, embed_dim: int, num_heads: int, *args, **kwargs):
        super().__init__(embed_dim, num_heads, *args, **kwargs)
        self.add_gate(num_heads)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor] = None, seen: Optional[SeenWindow] = None
    ) -> Tensor:
        return self.mix(q, self.local_attention(q, k, v, left, seen), self.scaling)
