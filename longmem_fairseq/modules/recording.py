"""Recording what a function gives a GPU to do, and repeating it without running the function again (CUDA graphs).

A step of a language model over few tokens is hundreds of small kernels, and takes as long as the host needs to launch
them. A recording launches all of them at once. It reads its inputs and writes its outputs at fixed addresses.
"""

from typing import Callable, Dict, List, NamedTuple, Protocol, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Function = Callable[[], Tuple[Tensor, ...]]
Replay = Callable[[], None]

_WARM_UPS = 2  # runs before a recording, in which libraries allocate and kernels are compiled


class Recorder(Protocol):
    """What records functions."""

    def suits(self, device: torch.device) -> bool:
        """Return whether functions that compute on a device can be recorded."""

    def record(self, function: Function) -> Tuple[Tuple[Tensor, ...], Replay]:
        """Record a function without arguments.

        Args:
            function: Function whose kernels depend on nothing but sizes.

        Returns:
            Its outputs, and a function that computes them again in place. They have no values before the first replay.
        """


class CudaRecorder:
    """Records CUDA graphs, which share their memory: an output is valid until another graph is replayed."""

    def __init__(self):
        self._pool = None

    def suits(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def record(self, function: Function) -> Tuple[Tuple[Tensor, ...], Replay]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, which pin the memory of batches that come, do not end the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function()
        self._pool = graph.pool()
        return outputs, graph.replay


class Recording(NamedTuple):
    """A function that was recorded.

    Attributes:
        inputs: Tensors that it reads its inputs from.
        outputs: Tensors that it writes its outputs to.
        replay: Function that computes the outputs again.
        kept: What it reads beside its inputs, and where its weights are; tensors must not be freed before it.
    """

    inputs: Sequence[Tensor]
    outputs: Tuple[Tensor, ...]
    replay: Replay
    kept: List[Tensor]

    def __call__(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Return the outputs for some inputs: tensors that the next call overwrites."""
        for static, given in zip(self.inputs, inputs):
            static.copy_(given, non_blocking=True)
        self.replay()
        return self.outputs


def new_recording(recorder: Recorder, function: Function, inputs: Sequence[Tensor]) -> Recording:
    """Record a function.

    Args:
        recorder: What records it.
        function: The function.
        inputs: Tensors that it reads its inputs from, which belong to the recording.
    """
    kept = _Kept()

    def watched() -> Tuple[Tensor, ...]:
        kept.start()
        with kept:
            return function()

    # A weight that was converted before would not be converted again by a replay, after it changed.
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        outputs, replay = recorder.record(watched)
    finally:
        torch.set_autocast_cache_enabled(caches)
    return Recording(inputs, outputs, replay, kept.tensors)


class _Kept(TorchDispatchMode):
    """Collects the tensors that a function reads and did not make, such as masks that are kept for a while."""

    def start(self) -> None:
        self._made: Dict[int, bool] = {}
        self._read: Dict[int, Tensor] = {}

    @property
    def tensors(self) -> List[Tensor]:
        """The tensors."""
        return list(self._read.values())

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, Tensor) and _address(x) not in self._made:
                self._read.setdefault(_address(x), x)
        for x in tree_flatten(result)[0]:
            if isinstance(x, Tensor) and _address(x) not in self._read:
                self._made[_address(x)] = True
        return result


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
