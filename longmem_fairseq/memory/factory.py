"""Making banks, searches and memories for one model, from its settings."""

from typing import Dict, Optional

import torch
from torch import Tensor

from ..modules.memory_attention import MemoryAttention, memory_attention
from .bank import MemoryBank
from .branches import MemoryBranches
from .placement import Placement
from .policies import memory_policy
from .reader import ChunkReader
from .search.base import SearchBackend, choose_search
from .search.index import IndexSearch
from .settings import MemorySettings
from .stream_memory import StreamMemory, why_not_static
from .token_bank import TokenBank
from .token_reader import TokenReader, choose_token_search
from .token_streams import TokenStreams

_SIZES_KEPT = 16  # factories of other sizes that are kept


class MemoryFactory:
    """Builds the memories of a model, and their search and attention.

    What the settings decide is computed once for each device and kept.

    Args:
        settings: Settings of the memory, checked.
        kv_heads: Number of key/value heads of a memory layer, H_kv.
        head_dim: Width of a head, d.
        attention: Function that attends to retrieved chunks (see
            :func:`longmem_fairseq.modules.memory_attention.memory_attention`).
        layers: Number of memory layers.
        width: Width of the hidden states that a token memory holds, D; 0 where there is none.
        symbols: Number of symbols of the dictionary, V; None where it is not known.
    """

    def __init__(
        self,
        settings: MemorySettings,
        kv_heads: int,
        head_dim: int,
        attention: MemoryAttention = memory_attention,
        layers: int = 1,
        width: int = 0,
        symbols: Optional[int] = None,
    ):
        self.settings, self.kv_heads, self.head_dim, self.attention = settings, kv_heads, head_dim, attention
        self.layers, self.width, self.symbols = layers, width, symbols
        self._placements: Dict[torch.device, Placement] = {}
        self._token_readers: Dict[torch.device, TokenReader] = {}
        self._searches: Dict[torch.device, SearchBackend] = {}
        self._sizes: Dict[int, MemoryFactory] = {}

    def with_size(self, tokens: int) -> "MemoryFactory":
        """Return the factory of memories of another size.

        Args:
            tokens: Number of tokens that a lane holds; at least one chunk is held.
        """
        settings = self.settings.with_size(tokens)
        if settings == self.settings:
            return self
        if settings.size not in self._sizes:
            if len(self._sizes) >= _SIZES_KEPT:  # an evaluation may ask for another size for every text
                del self._sizes[next(iter(self._sizes))]
            self._sizes[settings.size] = self.with_settings(settings)
        return self._sizes[settings.size]

    def with_settings(self, settings: MemorySettings) -> "MemoryFactory":
        """Return a factory of memories of the same model with other settings, which are checked."""
        sizes = self.kv_heads, self.head_dim, self.attention, self.layers, self.width, self.symbols
        return MemoryFactory(settings, *sizes)

    def placement(self, device: torch.device) -> Placement:
        """Return where banks are stored for a model on a device."""
        if device not in self._placements:
            self._placements[device] = self.settings.placement(device)
        return self._placements[device]

    def search(self, device: torch.device) -> SearchBackend:
        """Return the search of banks for a model on a device: always the same one, since it counts its recall."""
        if device not in self._searches:
            search = choose_search(self.settings.search, self.placement(device).means)
            if self.settings.indexed:
                search = IndexSearch(self.settings.index_spec(self.head_dim), search)
            self._searches[device] = search
        return self._searches[device]

    def chunk_reader(self, device: torch.device) -> ChunkReader:
        """Return search and attention for a model on a device."""
        return ChunkReader(self.search(device), self.attention, self.settings.chunks_per_query)

    def why_not_static(self, device: torch.device) -> Optional[str]:
        """Return the reason why a CUDA graph on a device cannot contain the reading, as a clause; None if it can."""
        if memory_policy(self.settings.scope).shares_memory:
            return f"--memory-scope {self.settings.scope} has no ring for each row"
        return why_not_static(self.placement(device), self.search(device))

    def bank(self, lanes: int, dtype: torch.dtype, device: torch.device) -> MemoryBank:
        """Make an empty bank.

        Args:
            lanes: Number of lanes.
            dtype: Precision of the model's activations, which the bank takes unless ``--memory-dtype`` sets another.
            device: Device of the model.

        Raises:
            ValueError: There is no room for it.
        """
        try:
            return self._new_bank(lanes, dtype, device)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # whatever PyTorch raises for this size
            size, layers = self.settings.size, f" in {self.layers} layers" if self.layers > 1 else ""
            raise ValueError(
                f"there is no room for --memory-size {size:,} (tokens of each of {lanes} lanes{layers}): lower it"
            ) from error

    def _new_bank(self, lanes: int, dtype: torch.dtype, device: torch.device) -> MemoryBank:
        settings = self.settings
        return MemoryBank(
            lanes,
            self.layers * self.kv_heads,
            self.head_dim,
            settings.size,
            settings.chunk_size,
            settings.dtype or dtype,
            exact_means=memory_policy(settings.scope).exact_means,
            placement=self.placement(device),
            layers=self.layers,
        )

    def memory(self, lanes: int, like: Tensor, keep_reads: bool = False) -> StreamMemory:
        """Make an empty memory of a split, of the class that ``--memory-scope`` selects.

        Args:
            lanes: Number of lanes.
            like: Keys of the model, whose dtype and device the memory takes.
            keep_reads: Whether a backward pass may come after later batches were written.
        """
        policy = memory_policy(self.settings.scope)
        bank = self.bank(1 if policy.shares_memory else lanes, like.dtype, like.device)
        memory = policy.memory_class(bank, self.chunk_reader(like.device), keep_reads)
        if self.settings.token_memory:
            memory.token_streams = TokenStreams(self.token_bank(lanes, like.device), self.token_reader(like.device))
        return memory

    def token_bank(self, lanes: int, device: torch.device) -> TokenBank:
        """Make an empty bank of a token memory.

        Args:
            lanes: Number of lanes.
            device: Device of the model.

        Raises:
            ValueError: There is no room for it.
        """
        size = self.settings.token_memory
        try:
            return TokenBank(lanes, self.width, size, device, self.settings.token_dtype, self.symbols)
        except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # whatever PyTorch raises for this size
            raise ValueError(
                f"there is no room for --token-memory {size:,} (tokens of each of {lanes} lanes): lower it"
            ) from error

    def token_reader(self, device: torch.device) -> TokenReader:
        """Return the reader of token memories for a model on a device."""
        if device not in self._token_readers:
            search = choose_token_search(self.settings.search, device, self.settings.token_dtype, self.width)
            self._token_readers[device] = TokenReader(search, self.settings.token_entries)
        return self._token_readers[device]

    def document_bank(self, dtype: torch.dtype, device: torch.device) -> MemoryBank:
        """Make an empty bank of one stream, with the bank of its token memory if there is one.

        Args:
            dtype: Precision of the model's activations, as for :meth:`bank`.
            device: Device of the model.
        """
        bank = self.bank(1, dtype, device)
        if self.settings.token_memory:
            bank.token_bank = self.token_bank(1, device)
        return bank

    def branches(
        self, rows: int, dtype: torch.dtype, device: torch.device, base: Optional[MemoryBank] = None
    ) -> MemoryBranches:
        """Make memories for generation, one for each row whatever the memory's scope.

        Args:
            rows: Number of rows.
            dtype: Precision of the model's activations.
            device: Device of the model.
            base: Bank of one lane that every row starts with, which is only read; None for an empty memory.
        """
        return MemoryBranches(
            rows,
            lambda: self.document_bank(dtype, device),
            self.chunk_reader(device),
            base,
            self.layers,
            self.token_reader(device) if self.settings.token_memory else None,
            self.settings.token_dtype,
        )
