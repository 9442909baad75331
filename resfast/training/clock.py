"""Times work on the device, and copies tensors to the host, without synchronizing."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


class Clock:
    """Seconds since construction; on CUDA, of the work queued on the device since then.

    Args:
        device: the device whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.start = time.perf_counter()
        self.event = _event() if device.type == "cuda" else None

    def so_far(self) -> float:
        """Seconds since construction on the host's clock."""
        return time.perf_counter() - self.start

    def stop(self) -> tuple[Callable[[], float], Callable[[], bool]]:
        """Reads the clock.

        Returns:
            A function that waits for the reading and returns it in seconds, and one that tells
            whether the first would return at once.
        """
        if self.event is None:
            seconds = self.so_far()
            return lambda: seconds, lambda: True
        start, end = self.event, _event()

        def seconds_between() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1000

        return seconds_between, end.query


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def copy_to_host(values: Tensor) -> Tensor:
    """A copy in host memory; a copy from CUDA may still be in flight on return."""
    if not values.is_cuda:
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
