"""``resfast::conv2d_int8``: a convolution with 8-bit operands and its epilogue, by oneDNN.

Maps are uint8 with one scale and zero point each, weights int8 with a scale per output channel, as
in Jacob et al. (arXiv:1712.05877); sums are int32. For the CPU, and for inference only.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...runtime import cpu_info
from ..conv import reference as conv_reference
from ..conv.op import ConvBiasAct
from ..conv.reference import channels_last
from ..registration import register
from .maps import Quantization

SCHEMA = (
    "conv2d_int8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? residual, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str activation, "
    "float negative_slope, float[] scales, int[] zero_points, bool to_uint8) -> Tensor"
)
WEIGHT_LEVELS = 127
"""Largest magnitude of a weight."""
POST_OPERATIONS: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "silu": ("swish", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
}
"""oneDNN's name and arguments of the activations that it computes with the convolution."""
AFTER_ADDITION = ("none", "relu")
"""Those that it computes after the addition of a residual."""

Packed = tuple[Tensor, Tensor, Tensor]
"""A weight as oneDNN reads it, its scales and its zero points."""


@functools.cache
def available() -> bool:
    """Whether torch has oneDNN's int8 convolutions here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")


@functools.cache
def sums_are_exact() -> bool:
    """Whether the processor adds products of 8-bit values without saturation.

    Without VNNI (or AMX) the sum of two products is saturated to 16 bits, so that weights must have
    one bit less.
    """
    info = cpu_info()
    return any(flag in info for flag in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp"))


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as int8 and the scale of each output channel.

    Args:
        weight: float ``[K, C, R, S]``.

    Returns:
        int8 ``[K, C, R, S]`` and float32 ``[K]``.
    """
    scale = weight.float().abs().amax((1, 2, 3)) / WEIGHT_LEVELS
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    return (weight.float() / scale[:, None, None, None]).round_().to(torch.int8), scale


def multiplied(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The weight that this processor multiplies with: int8 ``[K, C, R, S]``, and scales ``[K]``."""
    if sums_are_exact():
        return weight, scale
    limit = WEIGHT_LEVELS // 2
    return (weight.float() / 2).round_().clamp_(-limit, limit).to(torch.int8), 2 * scale


def conv2d_int8(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: list[Any],
    activation: str,
    negative_slope: float,
    quantizations: tuple[Quantization, Quantization, Quantization],
    to_uint8: bool,
    overwrites: bool = False,
) -> Tensor:
    """The operator, for packed weights.

    Args:
        x: uint8 ``[N, C, H, W]``.
        packed: from :func:`pack`.
        bias: float32 ``[K]``, or None.
        residual: uint8 of the result's shape, or None.
        geometry: stride, padding, dilation, groups.
        activation: a key of ``ACTIVATIONS``.
        negative_slope: of leaky ReLU.
        quantizations: of x, residual and result.
        to_uint8: whether the result is uint8; otherwise float32.
        overwrites: whether the result may take the residual's memory.

    Returns:
        ``[N, K, P, Q]`` in ``channels_last`` memory.
    """
    of_x, of_residual, of_result = quantizations
    scale, zero_point = (of_result.scale, of_result.zero_point) if to_uint8 else (1.0, 0)
    dtype = torch.uint8 if to_uint8 else torch.float32
    x = channels_last(x)
    operands = (x, of_x.scale, of_x.zero_point, *packed)
    unary = torch.ops.onednn.qconv2d_pointwise.default
    if residual is None and activation in POST_OPERATIONS:
        name, scalars = POST_OPERATIONS[activation]
        return unary(*operands, bias, *geometry, scale, zero_point, dtype, name, scalars, "")
    if residual is not None and to_uint8 and activation in AFTER_ADDITION:
        total = channels_last(residual)
        if total is residual and not overwrites:
            total = residual.clone()
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *operands, total, bias, *geometry, scale, zero_point, dtype, of_residual.scale,
            of_residual.zero_point, "sum", 1.0, activation, [], "",
        )  # fmt: skip
    value = unary(*operands, bias, *geometry, 1.0, 0, torch.float32, "none", [], "")
    if residual is not None:
        value = value + of_residual.dequantize(channels_last(residual))
    value = conv_reference.ACTIVATIONS[activation](value, negative_slope)
    return of_result.quantize(value) if to_uint8 else value


def pack(
    weight: Tensor, scale: Tensor, x: Tensor, of_x: Quantization, geometry: list[Any]
) -> Packed:
    """A weight for inputs like ``x``."""
    weight, scale = multiplied(weight, scale)
    packed = torch.ops.onednn.qconv_prepack.default(
        weight, scale, of_x.scale, of_x.zero_point, *geometry, list(x.shape)
    )
    return packed, scale, torch.zeros(len(scale), dtype=torch.int64)


def _check(x: Tensor, residual: Tensor | None) -> None:
    for tensor in (x, residual):
        if tensor is not None and tensor.dtype != torch.uint8:
            raise TypeError(f"a quantized map is {tensor.dtype}; expected torch.uint8")


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Packed weights of the operator, which ``torch.compile`` and ``torch.export`` call, by weight."""


def _cpu(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    negative_slope: float,
    scales: list[float],
    zero_points: list[int],
    to_uint8: bool,
) -> Tensor:
    _check(x, residual)
    of_x, of_residual, of_result = map(Quantization, scales, zero_points)
    geometry = [stride, padding, dilation, groups]
    version = None if weight.is_inference() else weight._version
    key, packed = _packed.get(weight, (None, None))
    if packed is None or key != (version, of_x):
        packed = pack(weight, weight_scale, x, of_x, geometry)
        _packed[weight] = (version, of_x), packed
    return conv2d_int8(
        x, packed, bias, residual, geometry, activation, negative_slope,
        (of_x, of_residual, of_result), to_uint8,
    )  # fmt: skip


def _fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *rest: Any,
) -> Tensor:
    _check(x, residual)
    shape = conv_reference.output_shape(x, weight, stride, padding, dilation)
    result = conv_reference.new_map(x, shape)
    return result if rest[-1] else result.float()


register(SCHEMA, cpu=_cpu, fake=_fake, opaque=True)


class Int8Conv(nn.Module):
    """A fused convolution with 8-bit operands, for inference on the CPU.

    Args:
        conv: the convolution in floating point; its weight is quantized.
        x: of the input.
        result: of the result, or None for a result in float32.
        residual: of the residual, or None if there is none.
        overwrites: whether the result may take the residual's memory.

    Shape: uint8 ``[N, C, H, W]`` and, optionally, a uint8 residual of the result's shape, to
    ``[N, K, P, Q]`` of uint8 or float32 in ``channels_last`` memory; or one image.

    Raises:
        TypeError: an input that is not uint8.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        conv: ConvBiasAct,
        x: Quantization,
        result: Quantization | None,
        residual: Quantization | None = None,
        *,
        overwrites: bool = False,
    ) -> None:
        super().__init__()
        weight, scale = quantize_weight(conv.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", conv.bias)
        unused = Quantization(1.0, 0)
        self.quantizations = x, residual or unused, result or unused
        self.to_uint8 = result is not None
        self.overwrites = overwrites
        self.geometry = [list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups]
        self.activation, self.negative_slope = conv.activation, conv.negative_slope
        self._packed: Packed | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.ndim == 3:
            return self.forward(x[None], None if residual is None else residual[None])[0]
        if torch.onnx.is_in_onnx_export():  # ONNX has no operator of ours
            return self._plain(x, residual)
        epilogue = (self.activation, self.negative_slope)
        if type(x) is not Tensor or torch.compiler.is_compiling():
            scales = [quantization.scale for quantization in self.quantizations]
            zero_points = [quantization.zero_point for quantization in self.quantizations]
            return torch.ops.resfast.conv2d_int8(
                x, self.weight, self.weight_scale, self.bias, residual, *self.geometry, *epilogue,
                scales, zero_points, self.to_uint8,
            )  # fmt: skip
        _check(x, residual)
        if self._packed is None:
            of_x = self.quantizations[0]
            self._packed = pack(self.weight, self.weight_scale, x, of_x, self.geometry)
        return conv2d_int8(
            x, self._packed, self.bias, residual, self.geometry, *epilogue, self.quantizations,
            self.to_uint8, self.overwrites,
        )  # fmt: skip

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same with floating-point operations of PyTorch, on the values of the operands."""
        of_x, of_residual, of_result = self.quantizations
        weight, scale = multiplied(self.weight, self.weight_scale)
        stride, padding, dilation, groups = self.geometry
        value = conv_reference.conv2d_bias_act(
            of_x.dequantize(x),
            weight.float() * scale[:, None, None, None],
            self.bias,
            None if residual is None else of_residual.dequantize(residual),
            stride, padding, self.activation, self.negative_slope, groups, dilation,
        )  # fmt: skip
        return of_result.quantize(value) if self.to_uint8 else value

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.weight.shape))
        stride, padding, dilation, groups = self.geometry
        return (
            f"{shape}, stride={stride}, padding={padding}, dilation={dilation}, groups={groups}, "
            f"activation={self.activation}, to_uint8={self.to_uint8}"
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Int8Conv:
        self._packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}
