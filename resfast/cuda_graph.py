"""A function of tensors that is captured once and runs as one CUDA graph after that.

For training steps and fused networks alike; on the CPU the function is called each time, so that
what surrounds it is the same on both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CudaGraph:
    """A captured function, on input buffers of its own.

    Args:
        function: what to capture; it may change anything that keeps its address.
        inputs: its arguments, of the shapes, dtypes and layouts to come.
        device: where it runs.
        pool: memory pool that graphs may share of which no two run at a time.
        capturing: entered around the capture itself.

    Attributes:
        inputs: buffers that the captured function reads.
        outputs: what it returned, overwritten by each :meth:`replay`.
    """

    WARM_UP_CALLS = 3
    """Before the capture: libraries allocate, and kernels are chosen."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: list[Tensor],
        *,
        device: torch.device,
        pool: Any = None,
        capturing: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        self.inputs = [value.clone() for value in inputs]
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._capture(function, pool, capturing or contextlib.nullcontext())
        else:
            self.function = function
            self.outputs = function(*self.inputs)

    def _capture(
        self,
        function: Callable[..., Any],
        pool: Any,
        capturing: contextlib.AbstractContextManager[Any],
    ) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP_CALLS):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the threads of a data loader may go on meanwhile.
        capture = torch.cuda.graph(
            self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        with capturing, capture:
            self.outputs = function(*self.inputs)

    def replay(self, *inputs: Tensor) -> Any:
        """The result for some inputs, valid until the next call."""
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        if self.graph is not None:
            self.graph.replay()
        else:
            results = self.function(*self.inputs)
            for buffer, value in zip(self.outputs, results, strict=True):
                buffer.copy_(value)
        return self.outputs
