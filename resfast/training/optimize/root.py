"""The forward of a whole optimized network: its dtype and the memory format of its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resfast.inference.fuse.inputs import map_tensors, tensors
from resfast.training.optimize.blocks import Block
from resfast.training.optimize.report import OptimizationReport


@dataclass(frozen=True)
class Root:
    """How an optimized network is called.

    Attributes:
        dtype: compute dtype under autocast, or float32 for none.
        channels_last: whether contiguous images may be converted.
        views: path of each module that must run its rewritten forward for that.
        report: what was replaced.
    """

    dtype: torch.dtype
    channels_last: bool
    views: tuple[tuple[str, Block], ...]
    report: OptimizationReport

    def forward(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the network's new class, which calls another one."""

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not module.training:
                return inner(module, *args, **kwargs)
            first = next(tensors((args, kwargs)), None)
            if first is None:
                return inner(module, *args, **kwargs)
            converts = self._converts(module, first)
            if converts:
                args, kwargs = (
                    map_tensors(_channels_last, args),
                    map_tensors(_channels_last, kwargs),
                )
            device = first.device.type
            if self.dtype == torch.float32 or torch.is_autocast_enabled(device):
                out = inner(module, *args, **kwargs)
                return map_tensors(_contiguous, out) if converts else out
            with torch.autocast(device, self.dtype):
                out = inner(module, *args, **kwargs)
            out = map_tensors(_float, out)
            return map_tensors(_contiguous, out) if converts else out

        return forward

    def _converts(self, module: nn.Module, images: Tensor) -> bool:
        """Whether to convert contiguous images to ``channels_last`` for this call."""
        if not (
            self.channels_last
            and images.dim() == 4
            and images.device.type == "cpu"
            and images.is_contiguous()
            and torch.is_grad_enabled()
        ):
            return False
        for path, block in self.views:
            if not block.holds(module.get_submodule(path) if path else module):
                return False
        return True


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous() if x.dim() == 4 else x


def _float(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
