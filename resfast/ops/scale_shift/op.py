"""``resfast::scale_shift_act``: a batch norm in eval mode and an activation over concatenated maps.

``activation(cat(maps, 1) * scale + shift)`` in one pass, for inference: a batch norm that no
convolution can take in, without a copy for the concatenation before it, as in DenseNets (Huang et
al., arXiv:1608.06993). Computed in float32 and rounded once.

On the CPU the kernel is ``csrc/cpu/scale_shift/scale_shift.cpp``; where it was not built, and on
CUDA, PyTorch computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import nearest
from ..conv.reference import (
    ACTIVATIONS,
    TORCH_NEGATIVE_SLOPE,
    channels_last,
    new_map,
)
from ..registration import fallback, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = {
    name: number
    for number, name in enumerate(ACTIVATIONS)
    if name in ("none", "relu", "leaky_relu", "relu6", "hardswish", "hardsigmoid")
}
"""Activations of the kernel in C++; the others follow it in place."""
EPSILON = 1e-5
"""What cuDNN's batch norm, which PyTorch calls, wants at least."""
HAS_KERNEL = hasattr(torch.ops.resfast, "scale_shift")
GRAD = "{name} requires grad, and scale_shift_act is for inference only; use torch.no_grad()"


def scale_shift_act(
    maps: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    *,
    activation: str = "none",
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
) -> Tensor:
    """``activation(cat(maps, 1) * scale + shift)``.

    Args:
        maps: at least one of ``[N, C_i, H, W]``, of one dtype: float32, bfloat16 or float16; fast
            in ``channels_last`` and as slices of channels of such maps.
        scale: float32 ``[C]``; C is the sum of C_i.
        shift: float32 ``[C]``.
        activation: as in :func:`resfast.ops.conv.op.conv2d_bias_act`.
        negative_slope: slope of ``leaky_relu`` for negative values.

    Returns:
        ``[N, C, H, W]`` in ``channels_last`` memory, of the maps' dtype.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or an unknown activation.
        RuntimeError: a tensor requires grad while gradients are recorded.
    """
    return torch.ops.resfast.scale_shift_act(list(maps), scale, shift, activation, negative_slope)


def check_arguments(
    maps: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    activation: str,
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
) -> None:
    """Checks the operator's arguments.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or an unknown activation.
    """
    if not maps:
        raise ValueError("maps has no tensors; expected at least one")
    first = maps[0]
    if first.dtype not in DTYPES:
        raise TypeError(f"a map is {first.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    for x in maps:
        if x.dtype != first.dtype:
            raise TypeError(f"a map is {x.dtype}; expected {first.dtype}, like the first one")
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (first.shape[0], *first.shape[2:]):
            raise ValueError(
                f"a map is {list(x.shape)}; expected [N, C, H, W] with the size of the first one, "
                f"{list(first.shape)}"
            )
    channels = sum(x.shape[1] for x in maps)
    for name, x in (("scale", scale), ("shift", shift)):
        if x.dtype != torch.float32:
            raise TypeError(f"{name} is {x.dtype}; expected torch.float32")
        if list(x.shape) != [channels]:
            raise ValueError(f"{name} is {list(x.shape)}; expected {[channels]}")
    for name, x in (*(("a map", x) for x in maps), ("scale", scale), ("shift", shift)):
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}; expected {first.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {activation!r} is unknown; expected one of {', '.join(ACTIVATIONS)}"
            f"{nearest(activation, ACTIVATIONS)}"
        )


def _whole(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(list(maps), 1)


def reference(
    maps: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    activation: str,
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
) -> Tensor:
    """In plain PyTorch, in float32 (float64 for float64), for ``[N, C, ...]``; a new tensor."""
    x = _whole(maps)
    sizes = [-1] + [1] * (x.ndim - 2)
    out = x.to(torch.promote_types(x.dtype, torch.float32)) * scale.view(sizes) + shift.view(sizes)
    return ACTIVATIONS[activation](out, negative_slope, True).to(x.dtype)


def _is_row_of_pixels(x: Tensor) -> bool:
    """Whether each pixel's channels lie together, and the pixels at one distance."""
    _, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    step = x.stride(3)
    return x.stride() == (height * width * step, 1, width * step, step) and step >= channels


def _kernel(
    maps: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    activation: str,
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
) -> Tensor:
    given = [x if _is_row_of_pixels(x) else channels_last(x) for x in maps]
    number = NUMBERS.get(activation)
    kernel = torch.ops.resfast.scale_shift.default
    out = kernel(given, scale, shift, number or 0, negative_slope)
    return out if number is not None else ACTIVATIONS[activation](out, negative_slope, True)


def _cpu(*args: Any) -> Tensor:
    check_arguments(*args)
    return _kernel(*args) if HAS_KERNEL else channels_last(reference(*args))


def _cuda(
    maps: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    activation: str,
    negative_slope: float = TORCH_NEGATIVE_SLOPE,
) -> Tensor:
    check_arguments(maps, scale, shift, activation, negative_slope)
    x = channels_last(_whole(maps))
    mean, var = torch.zeros_like(scale), torch.full_like(scale, 1 - EPSILON)
    out = F.batch_norm(x, mean, var, scale, shift, False, 0.0, EPSILON)  # one kernel
    return channels_last(ACTIVATIONS[activation](out, negative_slope, True))


def _fake(maps: Sequence[Tensor], *args: Any) -> Tensor:
    check_arguments(maps, *args)
    n, _, h, w = maps[0].shape
    return new_map(maps[0], [n, sum(x.shape[1] for x in maps), h, w])


def _refuse(ctx: Any, inputs: tuple, output: Tensor) -> None:
    maps, scale, shift, *_ = inputs
    for name, x in (*(("a map", x) for x in maps), ("scale", scale), ("shift", shift)):
        if x.requires_grad:
            raise RuntimeError(GRAD.format(name=name))


def _no_backward(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(GRAD.format(name="a tensor"))


register(
    "scale_shift_act(Tensor[] maps, Tensor scale, Tensor shift, str activation, "
    "float negative_slope=0.01) -> Tensor",
    cpu=fallback(_cpu) or _cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_refuse,
    backward=_no_backward,
    opaque=True,
)


def _is_map(x: Tensor) -> bool:
    """Whether the kernel can take a tensor as it is, without the operator's checks."""
    is_map = type(x) is Tensor and x.ndim == 4 and x.is_cpu and x.dtype in DTYPES
    return is_map and HAS_KERNEL and not (x.requires_grad and torch.is_grad_enabled())


class ScaleShiftAct(nn.Module):
    """Scale and shift of each channel, and an activation, for inference.

    Args:
        scale: ``[C]``.
        shift: ``[C]``.
        activation: as in :func:`scale_shift_act`.
        negative_slope: slope of ``leaky_relu`` for negative values.

    Attributes:
        version: rises whenever the factors may have changed; after writing to them in place, call
            :meth:`repack`.

    Shape: one or several tensors ``[N, C_i, H, W]``, which are concatenated, to ``[N, C, H, W]`` in
    ``channels_last`` memory; or one tensor ``[N, C, ...]`` of another rank.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        scale: Tensor,
        shift: Tensor,
        *,
        activation: str = "none",
        negative_slope: float = TORCH_NEGATIVE_SLOPE,
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("shift", shift.detach().float())
        self.activation = activation
        self.negative_slope = negative_slope
        self.version = 0

    def repack(self) -> None:
        """Says that the factors were written to."""
        self.version += 1

    def forward(self, *maps: Tensor) -> Tensor:
        rest = (self.scale, self.shift, self.activation, self.negative_slope)
        dtypes = {x.dtype for x in maps}
        if not torch.compiler.is_compiling() and len(dtypes) == 1 and all(map(_is_map, maps)):
            return _kernel(maps, *rest)
        if len(dtypes) > 1 or maps[0].ndim != 4 or maps[0].dtype not in DTYPES:
            return reference(maps, *rest)
        if torch.onnx.is_in_onnx_export():  # ONNX has no operator of ours
            return self.unfused(*maps)
        return torch.ops.resfast.scale_shift_act(list(maps), *rest)

    def unfused(self, *maps: Tensor) -> Tensor:
        """The same with standard operators, in the dtype of the maps."""
        x = _whole(maps)
        scale, shift = (factor.to(x.dtype)[:, None, None] for factor in (self.scale, self.shift))
        return ACTIVATIONS[self.activation](x * scale + shift, self.negative_slope)

    def extra_repr(self) -> str:
        return f"{self.scale.shape[0]}, activation={self.activation}"

    def _apply(self, *args: Any, **kwargs: Any) -> ScaleShiftAct:
        super()._apply(*args, **kwargs)
        self.scale, self.shift = self.scale.float(), self.shift.float()
        self.repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()
