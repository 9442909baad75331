"""``resfast::conv2d_bias_act``: convolution, bias, residual and activation, for inference.

``activation(conv2d(x, weight, stride, padding) + bias + residual)``, accumulated in float32. The
algorithm is chosen by :mod:`resfast.ops.conv.cpu` or :mod:`resfast.ops.conv.cuda`.

Shapes: x ``[N, C, H, W]``, weight ``[K, C / groups, R, S]``, result ``[N, K, P, Q]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import nearest
from ..registration import fallback, register
from . import choice as conv_choice
from . import cpu as conv_cpu
from . import cuda as conv_cuda
from . import reference as conv_reference
from .reference import channels_last, new_map, output_shape

Activation = Literal[
    "none",
    "relu",
    "leaky_relu",
    "silu",
    "gelu",
    "relu6",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "tanh",
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SCHEMA = (
    "conv2d_bias_act(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, "
    "int[2] padding, str activation, float negative_slope=0.01, int groups=1, int[2] dilation=1) "
    "-> Tensor"
)
GRAD = (
    "{name} requires grad, and the fused convolution is for inference only; call it under "
    "torch.inference_mode() or torch.no_grad(), or train with the unfused network"
)


def conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    activation: Activation = "none",
    negative_slope: float = conv_reference.TORCH_NEGATIVE_SLOPE,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """A convolution with its epilogue in one call.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16 or float16, any strides; fast in ``channels_last``.
        weight: ``[K, C / groups, R, S]`` of x's dtype. A constant weight is faster in
            :class:`ConvBiasAct`, which packs it for the kernel once.
        bias: float32 ``[K]``.
        residual: the result's shape and dtype; added before the activation.
        stride: rows and columns, at least 1.
        padding: zeros on each side, rows and columns, at least 0.
        activation: ``none``, ``relu``, ``leaky_relu``, ``silu``, ``gelu`` (exact GELU), ``relu6``,
            ``hardswish``, ``hardsigmoid``, ``sigmoid`` or ``tanh``. Those after ``gelu`` are an
            operation of their own on CUDA, and on the CPU where oneDNN lacks them.
        negative_slope: slope of ``leaky_relu`` for negative values.
        groups: a divisor of C and K; the depthwise convolution has C.
        dilation: of rows and columns, at least 1.

    Returns:
        ``[N, K, P, Q]`` in ``channels_last`` memory, of x's dtype; P = (H + 2 padding -
        dilation (R - 1) - 1) // stride + 1, and Q from W and S.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or a value out of range.
        RuntimeError: a tensor requires grad while gradients are recorded.
    """
    return torch.ops.resfast.conv2d_bias_act(
        x,
        weight,
        bias,
        residual,
        _pair(stride),
        _pair(padding),
        activation,
        negative_slope,
        groups,
        _pair(dilation),
    )


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    activation: str,
    negative_slope: float = conv_reference.TORCH_NEGATIVE_SLOPE,
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> None:
    """Checks the operator's arguments.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or a value out of range.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    for name, tensor, kind in (
        ("weight", weight, x.dtype),
        ("bias", bias, torch.float32),
        ("residual", residual, x.dtype),
    ):
        if tensor is None:
            continue
        if tensor.dtype != kind:
            like = "" if name == "bias" else ", like x"
            raise TypeError(f"{name} is {tensor.dtype}; expected {kind}{like}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, like x")
    if x.ndim != 4:
        raise ValueError(f"x is {list(x.shape)}; expected [N, C, H, W]")
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(f"weight is {list(weight.shape)}; expected [K, C, R, S], none of them 0")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups is {groups}; expected a divisor of the weight's {weight.shape[0]} filters"
        )
    if x.shape[1] != weight.shape[1] * groups:
        in_groups = f" in {groups} groups" if groups > 1 else ""
        raise ValueError(
            f"x has {x.shape[1]} channels, and weight {list(weight.shape)}{in_groups} is for "
            f"{weight.shape[1] * groups}; they must be the same"
        )
    pairs = (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    for name, pair, least in pairs:
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} is {list(pair)}; expected two numbers of at least {least}")
    if activation not in conv_reference.ACTIVATIONS:
        known = conv_reference.ACTIVATIONS
        raise ValueError(
            f"activation {activation!r} is unknown; expected one of {', '.join(known)}"
            f"{nearest(activation, known)}"
        )
    if not math.isfinite(negative_slope):
        raise ValueError(f"negative_slope is {negative_slope}; expected a finite number")
    shape = output_shape(x, weight, stride, padding, dilation)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"images of {x.shape[2]}x{x.shape[3]} with padding {list(padding)} are smaller than "
            f"the kernel of {weight.shape[2]}x{weight.shape[3]}"
            + (f" with dilation {list(dilation)}" if max(dilation) > 1 else "")
        )
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"bias is {list(bias.shape)}; expected {[weight.shape[0]]}")
    if residual is not None and list(residual.shape) != shape:
        raise ValueError(f"residual is {list(residual.shape)}; expected {shape}, like the result")


def _cpu(*args: Any) -> Tensor:
    check_arguments(*args)
    return conv_cpu.conv2d_bias_act(*args)


def _cuda(*args: Any) -> Tensor:
    check_arguments(*args)
    return conv_cuda.conv2d_bias_act(*args)


def _fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    check_arguments(x, weight, *args)
    return new_map(x, output_shape(x, weight, *args[2:4], *args[7:8]))


def _refuse(ctx: Any, inputs: tuple, output: Tensor) -> None:
    for name, tensor in zip(("x", "weight", "bias", "residual"), inputs, strict=False):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(GRAD.format(name=name))


def _no_backward(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(GRAD.format(name="a tensor"))


register(
    SCHEMA,
    cpu=fallback(_cpu) or _cpu,  # it chooses among kernels in C++ and PyTorch
    cuda=_cuda,
    fake=_fake,
    setup_context=_refuse,
    backward=_no_backward,
    opaque=True,
)


class ConvBiasAct(nn.Module):
    """A convolution with its epilogue, for inference; its weight is packed once per device.

    Args:
        weight: ``[K, C / groups, R, S]``, float32, bfloat16 or float16.
        bias: ``[K]``, or None.
        stride: rows and columns.
        padding: rows and columns.
        activation: as in :func:`conv2d_bias_act`.
        negative_slope: slope of ``leaky_relu`` for negative values.
        groups: a divisor of C and K.
        dilation: rows and columns.

    Shape: ``[N, C, H, W]`` of the weight's dtype and, optionally, a residual of the result's shape,
    to ``[N, K, P, Q]`` in ``channels_last`` memory; or one image, ``[C, H, W]`` to ``[K, P, Q]``.

    Attributes:
        version: rises with :meth:`repack`.
        tile: largest tile side of Winograd's algorithm on a CPU, 2 to 4; larger tiles are faster
            and less accurate (:func:`resfast.layers.conv.set_winograd_tile`).

    In ``torch.onnx.export`` it is a convolution, an addition and an activation. Otherwise the first
    call for a shape measures which algorithm is fastest; see
    :mod:`resfast.ops.conv.cpu` and :mod:`resfast.ops.conv.cuda`. After writing to
    ``weight`` in place, call :meth:`repack`; ``load_state_dict``, ``to`` and similar methods do it
    themselves.

    Raises:
        TypeError, ValueError, RuntimeError: those of :func:`conv2d_bias_act`.
    """

    weight: Tensor
    bias: Tensor | None
    tile = 2

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        activation: Activation = "none",
        negative_slope: float = conv_reference.TORCH_NEGATIVE_SLOPE,
        groups: int = 1,
        dilation: int | tuple[int, int] = 1,
    ) -> None:
        super().__init__()
        if weight.ndim != 4:
            raise ValueError(f"weight is {list(weight.shape)}; expected [K, C, R, S]")
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.stride, self.padding = _pair(stride), _pair(padding)
        self.activation = activation
        self.negative_slope = negative_slope
        self.groups, self.dilation = groups, _pair(dilation)
        least = (
            d * (size - 1) + 1 for d, size in zip(self.dilation, weight.shape[2:], strict=True)
        )
        check_arguments(
            weight.new_empty((1, weight.shape[1] * groups, *least), device="meta"),
            self.weight.to("meta"),
            None if bias is None else self.bias.to("meta"),
            None,
            self.stride,
            self.padding,
            activation,
            negative_slope,
            groups,
            self.dilation,
        )
        self.repack()

    def repack(self) -> None:
        """Discards the packed weights; the next call packs them again."""
        self.version = getattr(self, "version", 0) + 1
        self.discard_packed()
        if self.weight.is_cuda:
            self.weight = channels_last(self.weight)

    def discard_packed(self) -> None:
        """Frees the packed weights of an unchanged weight; the next call packs them again."""
        self._plans: dict[tuple, conv_choice.Plan] = {}
        self._packed: dict[Any, Any] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.ndim == 3 and (residual is None or residual.ndim == 3):
            return self.forward(x[None], None if residual is None else residual[None])[0]
        is_cpu = x.is_cpu
        if type(x) is not Tensor or not (is_cpu or x.is_cuda) or torch.compiler.is_compiling():
            args = self._arguments(x, residual)
            if torch.onnx.is_in_onnx_export():  # ONNX has no operator of ours
                return conv_reference.unfused(*args)
            return torch.ops.resfast.conv2d_bias_act(*args)
        how = torch.get_num_threads() if is_cpu else conv_cuda.tf32(x.dtype)
        key = (x.shape, x.dtype, x.device, residual is None, how, self.tile)
        plan = self._plans.get(key)
        if plan is None:
            args = self._arguments(x, residual)
            check_arguments(*args)
            if is_cpu:
                plan = conv_cpu.plan(*args, packed=self._packed, largest_tile=self.tile)
            else:
                plan = conv_cuda.plan(*args)
            if plan.settled:
                self._plans[key] = plan
        if residual is not None and (
            residual.shape != plan.shape or residual.dtype != x.dtype or residual.device != x.device
        ):
            check_arguments(*self._arguments(x, residual))
        if torch.is_grad_enabled() and (
            x.requires_grad or (residual is not None and residual.requires_grad)
        ):
            raise RuntimeError(GRAD.format(name="x" if x.requires_grad else "residual"))
        return plan.run(x, residual)

    def _arguments(self, x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
        """The operator's arguments."""
        where = (x, self.weight, self.bias, residual, self.stride, self.padding)
        return (*where, self.activation, self.negative_slope, self.groups, self.dilation)

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.weight.shape))
        slope = f"({self.negative_slope})" if self.activation == "leaky_relu" else ""
        rest = f", groups={self.groups}" if self.groups > 1 else ""
        rest += f", dilation={self.dilation}" if max(self.dilation) > 1 else ""
        return (
            f"{shape}, stride={self.stride}, padding={self.padding}, "
            f"activation={self.activation}{slope}{rest}"
        )

    def _apply(self, *args: Any, **kwargs: Any) -> ConvBiasAct:
        super()._apply(*args, **kwargs)
        if self.bias is not None and self.bias.dtype != torch.float32:
            self.bias = self.bias.float()  # also after .to(torch.bfloat16)
        self.repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}, "_packed": {}}
