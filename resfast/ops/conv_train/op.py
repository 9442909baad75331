"""``resfast::conv2d_train``: a 3x3 convolution in bfloat16 with gradients, on the CPU.

Winograd's algorithm computes result and gradients with fewer multiplications than a direct
convolution (``csrc/cpu/conv/winograd.h``). With AMX, where multiplications are cheap, the weight
gradient and some results are computed directly (``csrc/cpu/conv/conv_direct.h``). A result of one
pixel is a matrix product.
The weight stays float32 and is rounded to bfloat16 once; its gradient is float32.
Where :func:`applies` returns False, use ``torch.nn.functional.conv2d``. The choice depends on the
shapes and the processor, never on a measurement, so a resumed run computes the same bits.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308.
Shapes: x ``[N, C, H, W]``, weight ``[K, C, 3, 3]``, result ``[N, K, P, Q]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..conv import cpu as conv_cpu
from ..conv import reference as conv_reference
from ..conv.cpu import TILES
from ..conv.reference import channels_last, new_map, output_shape
from ..registration import register

MIN_CHANNELS = 16
"""Fewest input and output channels for which the transforms save more than they cost."""
AVAILABLE = conv_cpu._has_kernels()
"""Whether the kernels are built and this processor has AVX512-BF16."""
AMX = conv_cpu.has_amx()
"""Whether it also has AMX."""
MAX_PADDED_RATIO = 1.25
"""The direct kernels compute whole groups of images: largest ratio to the images of the batch."""


def applies(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether :func:`conv2d` computes this convolution, and faster than PyTorch's own.

    Args:
        x: ``[N, C, H, W]``, on any device; its dtype is ignored.
        weight: ``[K, C, R, S]``.
        stride: stride of rows and columns.
        padding: zeros on each side.
    """
    return (
        x.device.type == "cpu"
        and weight.dtype == torch.float32
        and tuple(weight.shape[2:]) == (3, 3)
        and min(weight.shape[:2]) >= MIN_CHANNELS
        and stride in (1, 2)
        and padding in (0, 1, 2)
        and AVAILABLE
    )


def conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, tile: int = 2) -> Tensor:
    """A convolution without bias, with gradients.

    Args:
        x: ``[N, C, H, W]``, bfloat16, on a CPU with AVX512-BF16; fast in ``channels_last``.
        weight: float32 ``[K, C, 3, 3]``; fast in ``channels_last``.
        stride: 1 or 2, for rows and columns.
        padding: zeros on each side, 0 to 2.
        tile: side of the tiles of Winograd's algorithm: 2 or, for stride 1, also 3 or 4, which need
            0.69 and 0.56 times as many multiplications and have 2 to 3 times the rounding error
            (about 1 %).

    Returns:
        bfloat16 ``[N, K, P, Q]`` in ``channels_last`` memory. The weight's gradient is float32.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or a value out of range.
        RuntimeError: the C++ kernels are missing.
    """
    check_arguments(x, weight, stride, padding, tile)
    if type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _OnCpu.apply(x, weight, stride, padding, tile)
    return torch.ops.resfast.conv2d_train(x, weight, stride, padding, tile)


def check_arguments(x: Tensor, weight: Tensor, stride: int, padding: int, tile: int = 2) -> None:
    """Checks the operator's arguments.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or a value out of range.
    """
    if x.dtype != torch.bfloat16:
        raise TypeError(f"x is {x.dtype}; expected torch.bfloat16")
    if weight.dtype != torch.float32:
        raise TypeError(f"weight is {weight.dtype}; expected torch.float32")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}; expected {x.device}, like x")
    if x.ndim != 4:
        raise ValueError(f"x is {list(x.shape)}; expected [N, C, H, W]")
    if weight.ndim != 4 or 0 in weight.shape or tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight is {list(weight.shape)}; expected [K, C, 3, 3]")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has {x.shape[1]} channels, and weight {list(weight.shape)} is for "
            f"{weight.shape[1]}; they must be the same"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}; expected 1 or 2")
    if tile != 2 and (tile not in TILES or stride != 1):
        raise ValueError(f"tile is {tile}; expected 2, or 3 or 4 where the stride is 1")
    if padding not in (0, 1, 2):
        raise ValueError(f"padding is {padding}; expected 0, 1 or 2")
    if min(output_shape(x, weight, [stride] * 2, [padding] * 2)[2:]) < 1:
        raise ValueError(
            f"images of {x.shape[2]}x{x.shape[3]} with padding {padding} are smaller than the "
            "kernel of 3x3"
        )


def fits_groups(x: Tensor, columns: int) -> bool:
    """Whether the groups of images that the direct kernels compute are nearly full, and small.

    Args:
        x: ``[N, C, H, W]``, input of a convolution or gradient of its result.
        columns: width of the result.
    """
    images, batch = conv_cpu.group_images(columns), x.shape[0]
    filled = -(-batch // images) * images <= MAX_PADDED_RATIO * batch
    return filled and conv_cpu.group_is_small(x, columns)


def _is_direct(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether a result is computed directly: tiles save little, or there are many weights."""
    rows, columns = output_shape(x, weight, [stride] * 2, [padding] * 2)[2:]
    little = stride == 2 or min(rows, columns) <= 2 or weight.shape[:2].numel() > 256 * 256
    return AMX and little and fits_groups(x, columns)


def _convolve(
    x: Tensor, weight: Tensor, stride: int, padding: int, tile: int, *, transposed: bool = False
) -> Tensor:
    ops, wide = torch.ops.resfast, channels_last(weight)
    if _is_direct(x, weight, stride, padding):
        kernel, tiles = ops.conv_direct.default, ()
        packed = ops.conv_direct_train_pack(wide, transposed)
    else:
        kernel, tiles = ops.conv_winograd.default, (tile,)
        packed = ops.conv_train_pack(wide, stride, transposed, tile)
    outputs, channels = weight.shape[:2][::-1] if transposed else weight.shape[:2]
    geometry = [outputs, channels, 3, 3, stride, stride, padding, padding]
    return kernel(x, packed, None, None, geometry, 0, conv_reference.TORCH_NEGATIVE_SLOPE, *tiles)


@dataclass(frozen=True)
class _OnePixel:
    """A convolution whose result is one pixel: a matrix product with the taps inside the image.

    Most taps meet only padding where the image is small, and their gradient is 0.
    """

    rows: int
    columns: int
    padding: int

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride: int, padding: int) -> _OnePixel | None:
        if output_shape(x, weight, [stride] * 2, [padding] * 2)[2:] != [1, 1]:
            return None
        return cls(*(min(side, 3 - padding) for side in x.shape[2:]), padding)

    def inputs(self, x: Tensor) -> Tensor:
        """``[N, C * taps]``."""
        return x[:, :, : self.rows, : self.columns].flatten(1)

    def taps(self, weight: Tensor) -> Tensor:
        """A view ``[K, C, rows, columns]``."""
        first = self.padding
        return weight[:, :, first : first + self.rows, first : first + self.columns]

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        filters = self.taps(weight).to(torch.bfloat16).flatten(1)
        return new_map(x, [len(x), len(weight), 1, 1]).copy_(
            (self.inputs(x) @ filters.T)[..., None, None]
        )

    def for_x(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        filters = self.taps(weight).to(torch.bfloat16).flatten(1)
        found = torch.zeros_like(x)
        part = (grad.flatten(1) @ filters).unflatten(1, (-1, self.rows, self.columns))
        found[:, :, : self.rows, : self.columns] = part
        return found

    def for_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        found = torch.zeros_like(weight)
        sums = grad.flatten(1).float().T @ self.inputs(x).float()
        self.taps(found).copy_(sums.unflatten(1, (-1, self.rows, self.columns)))
        return found


def _cpu(x: Tensor, weight: Tensor, stride: int, padding: int, tile: int) -> Tensor:
    x = channels_last(x)
    if (one := _OnePixel.of(x, weight, stride, padding)) is not None:
        return one.forward(x, weight)
    return _convolve(x, weight, stride, padding, tile)


def _backward_cpu(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    needed: list[bool],
    tile: int,
) -> tuple[Tensor, Tensor]:
    grad, x = channels_last(grad), channels_last(x)
    none = x.new_empty(0)
    if (one := _OnePixel.of(x, weight, stride, padding)) is not None:
        for_x = one.for_x(grad, x, weight) if needed[0] else none
        return for_x, one.for_weight(grad, x, weight) if needed[1] else none
    if not needed[0]:
        for_x = none
    elif stride == 1:
        for_x = _convolve(grad, weight, 1, 2 - padding, tile, transposed=True)
    elif padding == 1:
        packed = torch.ops.resfast.conv_train_pack(channels_last(weight), stride, True, tile)
        sizes = [*x.shape[1:], weight.shape[0]]
        for_x = torch.ops.resfast.conv_winograd_transposed(grad, packed, sizes)
    else:
        rest = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False])
        narrow = weight.to(torch.bfloat16, memory_format=torch.channels_last)
        for_x = torch.ops.aten.convolution_backward(grad, x, narrow, *rest)[0]
    if not needed[1]:
        return for_x, none
    if AMX and fits_groups(x, grad.shape[3]) and fits_groups(grad, grad.shape[3]):
        return for_x, torch.ops.resfast.conv_direct_weight_gradient(x, grad, stride, padding)
    return for_x, torch.ops.resfast.conv_train_weight_gradient(x, grad, stride, padding, tile)


class _OnCpu(torch.autograd.Function):
    """The operator without its layers of Python, which take longer than small maps do."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, tile: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.where = stride, padding, tile
        return _cpu(x, weight, stride, padding, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, tile = ctx.where
        needed = list(ctx.needs_input_grad[:2])
        both = _backward_cpu(grad, x, weight, stride, padding, needed, tile)
        found = (one if wanted else None for one, wanted in zip(both, needed, strict=True))
        return *found, None, None, None


def _fake(x: Tensor, weight: Tensor, stride: int, padding: int, tile: int) -> Tensor:
    return new_map(x, output_shape(x, weight, [stride] * 2, [padding] * 2))


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    needed: list[bool],
    tile: int,
) -> tuple[Tensor, Tensor]:
    # Of one pixel, the weight's gradient has the strides of the weight.
    one = _OnePixel.of(x, weight, stride, padding) is not None
    formats = torch.channels_last, torch.preserve_format if one else torch.channels_last
    return tuple(
        torch.empty_like(like, memory_format=memory_format) if wanted else x.new_empty(0)
        for like, memory_format, wanted in zip((x, weight), formats, needed, strict=True)
    )


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.where = inputs[2:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:2])
    both = torch.ops.resfast.conv2d_train_backward(
        grad, x, weight, *ctx.where[:2], needed, ctx.where[2]
    )
    return (
        *(one if wanted else None for one, wanted in zip(both, needed, strict=True)),
        None,
        None,
        None,
    )


register(
    "conv2d_train(Tensor x, Tensor weight, int stride, int padding, int tile) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    setup_context=_setup,
    backward=_gradients,
)
register(
    "conv2d_train_backward(Tensor grad, Tensor x, Tensor weight, int stride, int padding, "
    "bool[2] needed, int tile) -> (Tensor, Tensor)",
    cpu=_backward_cpu,
    fake=_backward_fake,
)
