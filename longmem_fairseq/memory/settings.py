"""The memory's options: read once from a model's configuration, and all checks of them in one place."""

from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from fairseq.utils import safe_getattr

from .placement import Placement, choose_placement
from .policies import memory_policy
from .search.base import check_search
from .search.faiss import has_faiss_gpu
from .search.index_spec import FLAT, IndexSpec, index_spec, split_index
from .token_bank import HALF

MEMORY_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MemorySettings:
    """What a memory holds, how it is searched, and where it is stored.

    Attributes:
        size: Number of tokens that a lane holds (``--memory-size``); 0 where the memory is off.
        chunk_size: Number of tokens in a chunk, C.
        tokens_per_query: Number of tokens that each query and head reads (``--k``).
        scope: Name of the memory policy (``--memory-scope``).
        search: Name of the search backend (``--memory-search``).
        index: Factory string of an approximate index (``--memory-index``); ``flat`` for exact search.
        index_parameters: Search parameters of the index, such as ``nprobe=32``; empty for its defaults.
        dtype: Precision of keys and values (``--memory-dtype``); None for the model's, and half precision in the token
            memory.
        device: Where keys and values are stored (``--memory-device``): ``auto``, ``cuda`` or ``cpu``.
        directory: Directory of a memory-mapped file for keys and values (``--memory-map``), or None.
        needs_gpu_search: Whether a GPU build of faiss is required (``--use-gpu-to-search``).
        token_memory: Number of tokens that the token memory of a lane holds (``--token-memory``); 0 where it, or the
            memory, is off.
        token_entries: Number of its entries that each token reads (``--token-memory-k``).
    """

    size: int
    chunk_size: int
    tokens_per_query: int
    scope: str = "document"
    search: str = "auto"
    index: str = FLAT
    index_parameters: str = ""
    dtype: Optional[torch.dtype] = None
    device: str = "auto"
    directory: Optional[str] = None
    needs_gpu_search: bool = False
    token_memory: int = 0
    token_entries: int = 1024

    @classmethod
    def from_config(cls, cfg: Any) -> "MemorySettings":
        """Read the settings from a model's configuration.

        Args:
            cfg: Configuration with the fields of :class:`longmem_fairseq.models.longmem_config.LongMemConfig`.

        Raises:
            ValueError: A value is not one of those that are allowed.
        """
        index, parameters = split_index(cfg.memory_index, cfg.memory_index_parameters)
        dtype = str(cfg.memory_dtype)
        if dtype != "auto" and dtype not in MEMORY_DTYPES:
            raise ValueError(f"--memory-dtype {dtype} is unknown: choose auto, {', '.join(MEMORY_DTYPES)}")
        return cls(
            size=cfg.memory_size if cfg.use_external_memory else 0,
            chunk_size=cfg.chunk_size,
            tokens_per_query=cfg.k,
            scope=str(safe_getattr(cfg, "memory_scope", "document")),
            search=str(cfg.memory_search),
            index=index,
            index_parameters=parameters,
            dtype=MEMORY_DTYPES.get(dtype),
            device=str(cfg.memory_device),
            directory=cfg.memory_map,
            needs_gpu_search=cfg.use_gpu_to_search,
            token_memory=cfg.token_memory if cfg.use_external_memory and cfg.memory_size else 0,
            token_entries=cfg.token_memory_k,
        )

    @property
    def enabled(self) -> bool:
        """Whether there is a memory."""
        return self.size != 0  # a negative size is refused by check

    @property
    def token_dtype(self) -> torch.dtype:
        """Precision of the hidden states in the token memory."""
        return self.dtype or HALF

    @property
    def indexed(self) -> bool:
        """Whether the search is by an approximate index."""
        return self.index != FLAT

    @property
    def chunks(self) -> int:
        """Number of chunks that a lane holds."""
        return self.size // self.chunk_size

    @property
    def chunks_per_query(self) -> int:
        """Number of chunks that each query and head reads."""
        return self.tokens_per_query // self.chunk_size

    def with_size(self, tokens: int) -> "MemorySettings":
        """Return the same settings for a memory of another size, of at least one chunk.

        The token memory holds no more tokens than that.
        """
        return replace(self, size=max(tokens, self.chunk_size), token_memory=min(self.token_memory, tokens))

    def index_spec(self, head_dim: int) -> IndexSpec:
        """Return the index that these settings ask for.

        Args:
            head_dim: Width of a key.

        Raises:
            ValueError: faiss does not make this index, or the memory cannot use it.
        """
        return index_spec(self.index, self.index_parameters, head_dim, self.chunks)

    def placement(self, device: torch.device) -> Placement:
        """Return where a bank is stored.

        Args:
            device: Device of the model.

        Raises:
            ValueError: It cannot be stored there.
        """
        return choose_placement(self.device, self.directory, device, self.indexed)

    def check(self, head_dim: int, segment: Optional[int]) -> None:
        """Refuse settings that contradict each other, the model or this machine.

        Args:
            head_dim: Width of a key.
            segment: Number of tokens in a segment (``--tokens-per-sample``); None where it is not known.

        Raises:
            ValueError: Settings contradict each other; the message names them.
        """
        C, k = self.chunk_size, self.tokens_per_query
        if C < 1 or k < 1 or k % C:
            raise ValueError(f"--k {k} is not a positive multiple of --chunk-size {C}")
        if self.size < 0 or (segment is not None and self.size < segment):
            raise ValueError(
                f"--memory-size {self.size} is smaller than one segment of --tokens-per-sample {segment} tokens: "
                "raise it, or turn the memory off with --memory-size 0"
            )
        if self.size < C:
            raise ValueError(
                f"--memory-size {self.size} is smaller than one chunk of --chunk-size {C} tokens: raise the first or "
                "lower the second"
            )
        memory_policy(self.scope)
        check_search(self.search)
        if self.indexed:
            self.index_spec(head_dim)
        self.placement(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if self.needs_gpu_search and self.indexed:
            raise ValueError(
                f"--use-gpu-to-search contradicts --memory-index {self.index}, which is stored on the CPU: leave one "
                "of them out"
            )
        if self.needs_gpu_search and not (has_faiss_gpu() and torch.cuda.is_available()):
            raise ValueError(
                "--use-gpu-to-search needs a GPU and a faiss built for it: pip uninstall faiss-cpu and pip install "
                "faiss-gpu, or leave the option out"
            )

    def check_token_memory(self) -> None:
        """Refuse settings of the token memory that are out of range, or contradict the memory's scope.

        Raises:
            ValueError: A setting is not supported; the message names it.
        """
        if self.token_memory < 0:
            raise ValueError(f"--token-memory {self.token_memory} is negative: set it to 0 or more tokens")
        if self.token_entries < 1:
            raise ValueError(f"--token-memory-k {self.token_entries} is less than one entry: raise it")
        if self.token_memory and memory_policy(self.scope).shares_memory:
            raise ValueError(
                f"--token-memory {self.token_memory} keeps the lanes' documents apart, which --memory-scope "
                f"{self.scope} joins: set --token-memory 0, or --memory-scope document"
            )
