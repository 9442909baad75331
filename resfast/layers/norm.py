"""Batch norm with an optional max pool before it and a residual and activation after it.

In bfloat16 training on a CPU with AVX512-BF16, or on CUDA within :func:`captured_step`, pooling,
norm, addition and activation are one operator, :func:`resfast.ops.norm_act.op.batch_norm_act`.
Everywhere else, in eval mode and under tracers the modules run one by one. Outside a CUDA graph the
operator is not used on CUDA: its launch overhead on the host exceeds that of the modules, and the
GPU would wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast.errors import ResfastError
from resfast.layers.activation import NETWORK_NEGATIVE_SLOPE, name_and_slope
from resfast.layers.replaced import original_class
from resfast.ops.conv.reference import ACTIVATIONS, KERNEL_ACTIVATIONS

LEAST_CHANNELS = 16
"""With fewer channels less than half of a vector would be used."""

_CAPTURED_STEP: ContextVar[bool] = ContextVar("resfast_captured_step", default=False)


@contextlib.contextmanager
def captured_step(captured: bool = True) -> Iterator[None]:
    """Within it, networks are part of a training step that is captured as a CUDA graph, or not.

    Enter it outside of a compiled function: torch.compile guards on the value, so that each value
    has one compiled version. Other threads have a value of their own.
    """
    token = _CAPTURED_STEP.set(captured)
    try:
        yield
    finally:
        _CAPTURED_STEP.reset(token)


def in_captured_step() -> bool:
    """Whether the caller is within :func:`captured_step`."""
    return _CAPTURED_STEP.get()


def norm_act(
    x: Tensor,
    bn: nn.Module,
    activation: str | nn.Module,
    residual: Tensor | None = None,
    pool: bool = False,
) -> Tensor:
    """``activation(bn(x) + residual)``, with ``x`` first max-pooled 2x2 if ``pool``.

    Args:
        x: ``[N, C, H, W]``.
        bn: a batch norm, or ``nn.Identity``.
        activation: a module, or ``none``, ``relu``, ``leaky_relu`` (slope 0.1), ``silu``,
            ``gelu`` (exact) or another one of ``conv2d_bias_act``.
        residual: added before the activation; of the shape of the result.
        pool: whether to apply ``max_pool2d(x, 2)`` before the norm.

    Returns:
        ``[N, C, H, W]``, or ``[N, C, H // 2, W // 2]`` with ``pool``.

    Raises:
        ResfastError: an unknown activation.
    """
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ResfastError(
            f"activation {activation!r} is unknown; choose {', '.join(ACTIVATIONS)} or pass a "
            "module"
        )
    known = kernel_activation(activation)
    if known is not None and isinstance(bn, nn.BatchNorm2d) and applies(x, bn, pool):
        return fused_norm_act(x, bn, *known, residual, pool)
    out = bn(F.max_pool2d(x, 2) if pool else x)
    if residual is not None:
        out = out + residual
    if isinstance(activation, str):
        return ACTIVATIONS[activation](out, NETWORK_NEGATIVE_SLOPE)
    return activation(out)


def kernel_activation(activation: str | nn.Module) -> tuple[str, float] | None:
    """Name and slope, or None if the operator does not support the module or it has hooks."""
    if isinstance(activation, str):
        return (activation, NETWORK_NEGATIVE_SLOPE) if activation in KERNEL_ACTIVATIONS else None
    if activation._forward_hooks or activation._forward_pre_hooks:
        return None
    found = name_and_slope(activation)
    known = found is not None and found[0] in KERNEL_ACTIVATIONS and found[1] >= 0
    return found if known else None


def applies(x: Tensor, bn: nn.BatchNorm2d, pool: bool = False) -> bool:
    """Whether the operator computes a batch norm now: training in bfloat16, nothing unusual."""
    if not (
        bn.training
        and torch.is_grad_enabled()
        and original_class(bn).forward is nn.BatchNorm2d.forward
        and bn.running_mean is not None
        and bn.momentum is not None
        and not bn._forward_hooks
        and not bn._forward_pre_hooks
    ):
        return False
    # Tracers pass proxies instead of tensors.
    if not (isinstance(x, Tensor) and x.dtype == torch.bfloat16):
        return False
    tensors = [t for t in (bn.weight, bn.bias, bn.running_mean) if t is not None]
    if any(t.dtype != torch.float32 for t in tensors):
        return False
    from resfast.ops.norm_act import op as kernel

    return (
        (x.device.type != "cuda" or in_captured_step())
        and kernel.available(x.device)
        and x.dim() == 4
        and x.shape[1] == bn.num_features >= LEAST_CHANNELS
        and _count(x, pool) > 1
    )


def _count(x: Tensor, pool: bool) -> int:
    """Number of values per channel in the statistics."""
    n, _, h, w = x.shape
    return n * (h // 2) * (w // 2) if pool else n * h * w


def fused_norm_act(
    x: Tensor,
    bn: nn.BatchNorm2d,
    activation: str = "none",
    negative_slope: float = 0.0,
    residual: Tensor | None = None,
    pool: bool = False,
) -> Tensor:
    """Batch norm, addition and activation as one operator, where :func:`applies` is True.

    Updates the running statistics. Arguments are those of :func:`norm_act`, with the name of the
    activation.
    """
    from resfast.ops.norm_act import op as kernel

    out, mean, var = kernel.batch_norm_act(
        x,
        bn.weight,
        bn.bias,
        None if residual is None else residual.to(x.dtype),
        eps=bn.eps,
        activation=activation,
        negative_slope=negative_slope,
        pool=pool,
    )
    count = _count(x, pool)
    with torch.no_grad():
        bn.num_batches_tracked.add_(1)
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(var * (count / (count - 1)), bn.momentum)
    return out


def train_mode(model: nn.Module) -> None:
    """Puts a network in training mode, except batch norms whose parameters are all frozen.

    A frozen batch norm normalizes with its running statistics, which stay as they are.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            parameters = list(module.parameters(recurse=False))
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
