"""Convolution + batch norm (+ residual) + activation, as one kernel when no gradient is needed.

Each layer keeps ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d`` children, so it is initialised,
trained and saved as usual. In eval mode without gradients (``torch.no_grad`` or
``torch.inference_mode``) the batch norm is folded into the weights, which are rounded once to the
dtype of the call, and :class:`resfast.ops.conv.op.ConvBiasAct` runs. In training mode, with
gradients enabled, or when a child cannot be folded (hooks, a forward of its own, no running
statistics) or a residual broadcasts, the children run unchanged.

Weights are folded again after any change to their inputs: an in-place change or replacement of a
tensor, a move to another dtype or device, a call of ``train()`` or ``eval()``. Writes that PyTorch
cannot detect (``parameter.data.copy_(...)``, a NumPy view) must be followed by ``eval()``.
``torch.compile`` and ``torch.export`` capture the folding in the graph; ``torch.fx`` and
:func:`resfast.fuse` see the children.

Folding: Jacob et al., arXiv:1712.05877, section 3.2.

Long because the layers and the blocks made of them share one folding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from resfast.layers.conv import Conv2d
from resfast.ops.conv.reference import ACTIVATIONS, TORCH_NEGATIVE_SLOPE, output_shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def hooked(module: nn.Module) -> bool:
    """Whether forward hooks of the module, or of all modules, run when it is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
    )


def overridden(module: nn.Module) -> bool:
    """Whether an attribute of the instance replaces a method, or its class has its own call."""
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__:
        return True
    return any(callable(getattr(kind, name, None)) for name in module.__dict__)


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class and nothing else."""
    return not hooked(module) and not overridden(module)


def is_conv(module: nn.Module) -> bool:
    """Whether the module is a plain ``nn.Conv2d``: no forward of its own, no hooks."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and type(module)._conv_forward in (nn.Conv2d._conv_forward, Conv2d._conv_forward)
        and is_plain(module)
    )


_IMAGE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def is_norm(module: nn.Module, *, of_rows: bool = False) -> bool:
    """Whether the module is a plain 2d batch norm in eval mode with running statistics.

    Args:
        module: any module.
        of_rows: whether it is one for ``[N, C]`` instead.
    """
    kinds = (nn.BatchNorm1d, nn.SyncBatchNorm) if of_rows else _IMAGE_NORMS
    return (
        isinstance(module, kinds)
        and type(module).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
        and is_plain(module)
        and not module.training
        and module.running_mean is not None
        and module.running_var is not None
    )


def conv_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Rows and columns of zeros on each side, or None if the padding is asymmetric."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return (conv.padding[0], conv.padding[1])


def why_not_fused(conv: nn.Conv2d) -> str | None:
    """Why the fused kernel cannot compute a plain ``nn.Conv2d``, or None if it can."""
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}; the fused kernel pads with zeros"
    if conv_padding(conv) is None:
        return "asymmetric padding ('same' with an even kernel)"
    return None


def norm_factors(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode, ``scale * x + shift``: float64 ``[C]`` each."""
    scale = (var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def fold(
    weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution with the batch norm after it folded in.

    Args:
        weight: ``[K, C / groups, R, S]``.
        bias: ``[K]`` or None.
        norm: scale and shift from :func:`norm_factors`, or None for no norm.

    Returns:
        The weight in float64 (unchanged if ``norm`` is None) and the bias in float32 or None.
    """
    if norm is None:
        return weight, None if bias is None else bias.float()
    scale, shift = norm
    folded = shift if bias is None else shift + scale * bias.double()
    return weight.double() * scale[:, None, None, None], folded.float()


def fold_before(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Weight and bias of an unpadded convolution with the batch norm before it folded in.

    Args:
        weight: ``[K, C / groups, R, S]``.
        bias: ``[K]`` or None.
        scale: of :func:`norm_factors`, ``[C]``.
        shift: of :func:`norm_factors`, ``[C]``.
        groups: of the convolution.

    Returns:
        Both in float64.
    """
    outputs, inputs, *_ = weight.shape
    of_filters = (groups, 1, inputs)
    scales, shifts = (
        factor.view(of_filters).expand(groups, outputs // groups, inputs).reshape(outputs, inputs)
        for factor in (scale, shift)
    )
    moved = (weight.double().sum((2, 3)) * shifts).sum(1)
    folded = weight.double() * scales[:, :, None, None]
    return folded, moved if bias is None else bias.double() + moved


def _factors(norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor] | None:
    if norm is None:
        return None
    return norm_factors(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


class _Folded:
    """Cache of one convolution's packed weights; copies and pickles start empty."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.sources: list[Tensor] = []
        self.module: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Folded:
        return _Folded()

    def __reduce__(self) -> tuple[type[_Folded], tuple[()]]:
        return _Folded, ()

    def get(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None,
        dtype: torch.dtype,
        activation: str,
        negative_slope: float,
    ) -> nn.Module:
        """The :class:`~resfast.ops.conv.op.ConvBiasAct` for the current values of the children."""
        from resfast.ops.conv.op import ConvBiasAct

        tensors = [conv.weight, conv.bias]
        if norm is not None:
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        tensors = [tensor for tensor in tensors if tensor is not None]
        eps = None if norm is None else norm.eps
        versions = [(t.data_ptr(), t._version, t.dtype, t.device) for t in tensors]
        options = {
            "stride": tuple(conv.stride),
            "padding": conv_padding(conv),
            "activation": activation,
            "negative_slope": negative_slope,
            "groups": conv.groups,
            "dilation": tuple(conv.dilation),
        }
        key = (dtype, norm is None, conv.bias is None, eps, *options.values(), *versions)
        if self.module is None or self.key != key:
            # Inference tensors created under inference_mode could not be used outside it.
            with torch.inference_mode(False), torch.no_grad():
                weight, bias = fold(conv.weight, conv.bias, _factors(norm))
                self.module = ConvBiasAct(weight.to(dtype), bias, **options)
            self.key = key
            # Keeps the memory alive, so that no new tensor can have the same address.
            self.sources = [tensor.detach() for tensor in tensors]
        return self.module


def _in_format(out: Tensor, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``out`` in the memory format of PyTorch's convolution, on which a later ``view`` depends."""
    last = torch.channels_last
    if any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, conv.weight)):
        return out
    return out.contiguous()


class _FusedLayer(nn.Module):
    """Base of the fused layers: decides when to run one kernel and caches its weights."""

    def __init__(self) -> None:
        super().__init__()
        self._folded: dict[str, _Folded] = {}

    def train(self, mode: bool = True) -> _FusedLayer:
        for folded in self._folded.values():
            folded.clear()
        return super().train(mode)

    def _dtype(self, x: Tensor) -> torch.dtype | None:
        """Compute dtype of the fused kernel, or None to run the children."""
        if self.training or torch.is_grad_enabled():
            return None
        # Weights cannot be packed for torch.fx proxies or fake tensors.
        if type(x) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        return dtype if dtype in DTYPES else None

    def _conv(
        self,
        name: str,
        conv: nn.Module,
        norm: nn.Module,
        x: Tensor,
        residual: Tensor | None = None,
        activation: str = "none",
        negative_slope: float = TORCH_NEGATIVE_SLOPE,
    ) -> Tensor:
        """``activation(norm(conv(x)) + residual)``."""
        dtype = self._dtype(x)
        if (
            dtype is not None
            and self._foldable(conv, norm, x)
            and (residual is None or self._addable(conv, x, residual))
        ):
            x = x.to(dtype)
            residual = None if residual is None else residual.to(dtype)
            epilogue = (activation, negative_slope)
            if torch.compiler.is_compiling():
                return _in_format(self._in_graph(conv, norm, x, residual, *epilogue), x, conv)
            if not conv.weight.is_inference():  # inference tensors have no version counter
                module = self._folded.setdefault(name, _Folded()).get(conv, norm, dtype, *epilogue)
                out = module(x) if residual is None else module(x, residual)
                return _in_format(out, x, conv)
        out = norm(conv(x))
        out = out if residual is None else out + residual
        return ACTIVATIONS[activation](out, negative_slope)

    @staticmethod
    def _foldable(conv: nn.Module, norm: nn.Module, x: Tensor) -> bool:
        if not is_conv(conv) or not is_norm(norm) or why_not_fused(conv) is not None:
            return False
        # A dtype or device mismatch is left to PyTorch, which raises its own error.
        autocast = torch.is_autocast_enabled(x.device.type)
        return conv.weight.device == x.device and (autocast or conv.weight.dtype == x.dtype)

    @staticmethod
    def _addable(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> bool:
        """Whether the kernel can add the residual: it neither broadcasts nor promotes dtypes."""
        geometry = (conv.stride, conv_padding(conv), conv.dilation)
        shape = output_shape(x, conv.weight, *geometry)
        autocast = torch.is_autocast_enabled(x.device.type)
        return list(residual.shape) == list(shape) and (autocast or residual.dtype == x.dtype)

    @staticmethod
    def _in_graph(
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
        x: Tensor,
        residual: Tensor | None,
        activation: str,
        negative_slope: float,
    ) -> Tensor:
        from resfast.ops.conv.op import conv2d_bias_act

        weight, bias = fold(conv.weight, conv.bias, _factors(norm))
        return conv2d_bias_act(
            x,
            weight.to(x.dtype),
            bias,
            residual,
            stride=tuple(conv.stride),
            padding=conv_padding(conv),
            activation=activation,
            negative_slope=negative_slope,
            groups=conv.groups,
            dilation=tuple(conv.dilation),
        )


class ConvBNReLU(_FusedLayer):
    """Convolution, batch norm, activation.

    State dict: ``conv.weight``, ``bn.weight``, ``bn.bias``, ``bn.running_mean``,
    ``bn.running_var``, ``bn.num_batches_tracked``, as in timm's ``ConvNormAct``.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: height and width of the kernel.
        stride: vertical and horizontal stride.
        padding: zeros on each side; None for ``kernel_size // 2``.
        activation: ``relu``, ``leaky_relu``, ``silu``, ``gelu``, ``none`` or another one of
            :func:`~resfast.ops.conv.op.conv2d_bias_act`.
        negative_slope: slope of ``leaky_relu`` below 0.

    Shape: ``[N, C, H, W]`` to ``[N, K, H', W']``; ``H' = (H + 2 padding - kernel_size) // stride
    + 1``. Fastest in ``channels_last`` memory; the output has the memory format of the input.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        *,
        activation: str = "relu",
        negative_slope: float = TORCH_NEGATIVE_SLOPE,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is unknown; choose {', '.join(ACTIVATIONS)}"
            )
        if padding is None:
            padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return self._conv("conv", self.conv, self.bn, x, None, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class ConvBNAddReLU(ConvBNReLU):
    """Convolution, batch norm, addition of a residual, activation: the end of a residual block.

    Arguments and state dict are those of :class:`ConvBNReLU`; ``forward(x, residual)`` takes a
    residual of the output's shape; one that broadcasts is added by PyTorch.
    """

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        epilogue = (self.activation, self.negative_slope)
        return self._conv("conv", self.conv, self.bn, x, residual, *epilogue)


class _Block(_FusedLayer):
    """Base of the residual blocks: argument checks and the shortcut."""

    downsample: nn.Module | None

    def _finish(
        self, stride: int, downsample: nn.Module | None, groups: int, dilation: int
    ) -> None:
        if groups != 1 or dilation != 1:
            raise ValueError(
                f"groups {groups} and dilation {dilation}: {type(self).__name__} supports only 1 "
                "for both; use torchvision's block"
            )
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def _shortcut(self, x: Tensor) -> Tensor:
        layers = self.downsample
        if layers is None:
            return x
        if type(layers) is nn.Sequential and len(layers) == 2 and is_plain(layers):
            return self._conv("downsample", layers[0], layers[1], x)
        return layers(x)


class FusedBasicBlock(_Block):
    """Two 3x3 convolutions and a shortcut, a drop-in for torchvision's ``BasicBlock``.

    ``torchvision.models.ResNet(FusedBasicBlock, [2, 2, 2, 2])`` is a resnet18. The state dict is
    torchvision's: ``conv1``, ``bn1``, ``conv2``, ``bn2``, and ``downsample.0`` and
    ``downsample.1`` if the shortcut has them.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: stride of the first convolution.
        downsample: applied to the input before the addition; an ``nn.Sequential`` of a convolution
            and a batch norm also runs as one kernel. None for an identity shortcut.
        groups: must be 1.
        base_width: must be 64.
        dilation: must be 1.
        norm_layer: called with the number of channels; None for ``nn.BatchNorm2d``.

    Shape: ``[N, inplanes, H, W]`` to ``[N, planes, ceil(H / stride), ceil(W / stride)]``.

    Raises:
        ValueError: other groups, base width or dilation.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if base_width != 64:
            raise ValueError(f"base_width {base_width}: expected 64; use FusedBottleneck")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(planes)
        self._finish(stride, downsample, groups, dilation)

    def forward(self, x: Tensor) -> Tensor:
        out = self._conv("conv1", self.conv1, self.bn1, x, None, "relu")
        return self._conv("conv2", self.conv2, self.bn2, out, self._shortcut(x), "relu")


class FusedBottleneck(_Block):
    """1x1, 3x3 (strided) and 1x1 convolutions and a shortcut, as torchvision's ``Bottleneck``.

    ``torchvision.models.ResNet(FusedBottleneck, [3, 4, 6, 3])`` is a resnet50. The state dict is
    torchvision's: ``conv1`` to ``conv3``, ``bn1`` to ``bn3``, ``downsample.0``, ``downsample.1``.

    Args:
        inplanes: channels of the input.
        planes: a quarter of the output's channels.
        stride: stride of the 3x3 convolution.
        downsample: as in :class:`FusedBasicBlock`.
        groups: must be 1.
        base_width: channels of the inner convolutions per 64 ``planes``.
        dilation: must be 1.
        norm_layer: called with the number of channels; None for ``nn.BatchNorm2d``.

    Shape: ``[N, inplanes, H, W]`` to ``[N, 4 planes, ceil(H / stride), ceil(W / stride)]``.

    Raises:
        ValueError: other groups or dilation.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = planes * base_width // 64
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self._finish(stride, downsample, groups, dilation)

    def forward(self, x: Tensor) -> Tensor:
        out = self._conv("conv1", self.conv1, self.bn1, x, None, "relu")
        out = self._conv("conv2", self.conv2, self.bn2, out, None, "relu")
        return self._conv("conv3", self.conv3, self.bn3, out, self._shortcut(x), "relu")
