"""Convolutions that stay with PyTorch: :class:`KeptConv2d`."""

from __future__ import annotations

from torch import Tensor, nn


class KeptConv2d(nn.Conv2d):
    """``nn.Conv2d`` without the memory that PyTorch's 16-bit convolution reads by mistake.

    On processors with AMX it reads uninitialized memory where the result is one column wide and the
    horizontal stride at least 2 (torch 2.15). Such results are computed in float32.

    Args:
        conv: the convolution; its tensors are shared.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        tensors = {"weight": conv.weight, "bias": conv.bias}
        state = {name: value for name, value in vars(conv).items() if not name.startswith("_param")}
        self.__dict__.update({**state, "_parameters": {}})
        for name, tensor in tensors.items():
            self.register_parameter(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.element_size() == 2 and self.stride[1] > 1 and self._columns(x) == 1:
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
        return super().forward(x)

    def _columns(self, x: Tensor) -> int:
        padding = 0 if isinstance(self.padding, str) else self.padding[1]
        reach = self.dilation[1] * (self.kernel_size[1] - 1)
        return (x.shape[-1] + 2 * padding - reach - 1) // self.stride[1] + 1
