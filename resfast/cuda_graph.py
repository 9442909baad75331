"""A function of tensors that is captured once and then replayed as a CUDA graph.

Used for training steps and fused networks. On the CPU the function is called each time, so that
callers need not distinguish the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CudaGraph:
    """A captured function with its own input buffers.

    Args:
        function: what to capture; it may modify any tensor that keeps its address.
        inputs: example arguments, of the shapes, dtypes and layouts of later calls.
        device: where the function runs.
        pool: memory pool to share with graphs that never run at the same time.
        capturing: context manager entered around the capture itself.

    Attributes:
        inputs: buffers that the captured function reads.
        outputs: the function's results, overwritten by each :meth:`replay`.
    """

    WARM_UP_CALLS = 3
    """Calls before the capture, in which libraries allocate memory and choose kernels."""

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
        # thread_local, because the threads of a data loader keep running.
        capture = torch.cuda.graph(
            self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        with capturing, capture:
            self.outputs = function(*self.inputs)

    def replay(self, *inputs: Tensor) -> Any:
        """Copies ``inputs`` to the buffers and runs; the result is valid until the next call."""
        for buffer, value in zip(self.inputs, inputs, strict=True):
            buffer.copy_(value)
        if self.graph is not None:
            self.graph.replay()
        else:
            results = self.function(*self.inputs)
            for buffer, value in zip(self.outputs, results, strict=True):
                buffer.copy_(value)
        return self.outputs
