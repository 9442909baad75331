"""``resfast::batch_norm_act``: batch norm in training, fused with pool, addition and activation.

``activation(batch_norm(x) + residual)``, where x may be max-pooled by 2x2 first, and its gradients,
in bfloat16. Forward and backward read x twice: for the statistics and for the result. Arithmetic is
float32; only the result and the pooled x are rounded. Saved for the backward are x (or the pooled x
and the position of each maximum: two bits on the CPU, a byte on CUDA), the statistics and, with a
residual, the result or, for silu and gelu, the residual. The CPU kernels are C++ and give the same
bits for any number of threads; the CUDA kernels are Triton and deterministic.

Sources: Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167; Bulo et al., "In-Place
Activated BatchNorm", arXiv:1712.02616, for fusing norm and activation; Hendrycks and Gimpel,
"Gaussian Error Linear Units", arXiv:1606.08415, here with an error up to 1e-5.
Shapes: x ``[N, C, H, W]``; result ``[N, C, P, Q]`` with the height and width of x, or half of them
if pooled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import runtime
from ..conv import cpu as conv_cpu
from ..conv import reference as conv_reference
from ..conv.reference import channels_last, new_map
from ..registration import register

ACTIVATIONS = conv_reference.KERNEL_ACTIVATIONS
"""In the order of their numbers in ``csrc/cpu/conv/conv_bf16.h``."""
AVAILABLE = conv_cpu._has_kernels() and hasattr(torch.ops.resfast, "norm_act_forward")
"""Whether the CPU kernels are built and this processor has AVX512-BF16."""
HAS_TRITON = runtime.has_triton()
"""Whether Triton is installed, which the CUDA kernels need."""


def available(device: torch.device) -> bool:
    """Whether there are kernels for a device; CUDA needs compute capability 8.0 or higher."""
    if device.type == "cuda":  # constant for a compiler
        return (
            HAS_TRITON
            and torch.cuda.is_available()
            and torch.cuda.get_device_properties(device).major >= runtime.MIN_COMPUTE_CAPABILITY[0]
        )
    return device.type == "cpu" and AVAILABLE


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
    pool: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``activation(batch_norm(x) + residual)`` with the statistics of the batch, with gradients.

    Args:
        x: bfloat16 ``[N, C, H, W]`` on the CPU or CUDA; fast in ``channels_last``. The other
            tensors are on its device.
        weight: float32 ``[C]``, or None for ones.
        bias: float32 ``[C]``, or None for zeros.
        residual: bfloat16, of the shape of the result.
        eps: added to the variance.
        activation: ``none``, ``relu``, ``leaky_relu``, ``silu`` or ``gelu`` (exact GELU).
        negative_slope: slope of ``leaky_relu`` for negative values, at least 0.
        pool: whether ``max_pool2d(x, 2)`` is applied to x first.

    Returns:
        The result, bfloat16 in ``channels_last`` memory, and mean and biased variance of x (or the
        pooled x), float32 ``[C]``, which have no gradients.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or a value out of range.
        RuntimeError: there are no kernels for the device.
    """
    check_arguments(x, weight, bias, residual, eps, activation, negative_slope, pool)
    if not available(x.device):
        what = "the C++ kernels and AVX512-BF16"
        if x.device.type == "cuda":
            what = "Triton and a GPU of compute capability 8.0 or higher"
        raise RuntimeError(f"batch_norm_act needs {what}; use resfast.layers.norm.norm_act")
    if type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling():
        number = ACTIVATIONS.index(activation)
        return _OnCpu.apply(x, weight, bias, residual, eps, number, negative_slope, pool)
    out, mean, var, _, _ = torch.ops.resfast.batch_norm_act(
        x, weight, bias, residual, eps, activation, negative_slope, pool
    )
    return out, mean.detach(), var.detach()


def result_shape(x: Tensor, pool: bool) -> list[int]:
    """``[N, C, P, Q]``."""
    n, c, h, w = x.shape
    return [n, c, h // 2, w // 2] if pool else [n, c, h, w]


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    pool: bool,
) -> None:
    """Checks the operator's arguments.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape or device, or a value out of range.
    """
    if x.dim() != 4:
        raise ValueError(f"x is {list(x.shape)}; expected [N, C, H, W]")
    shape = result_shape(x, pool)
    for name, tensor, dtype, sizes in (
        ("x", x, torch.bfloat16, list(x.shape)),
        ("weight", weight, torch.float32, [x.shape[1]]),
        ("bias", bias, torch.float32, [x.shape[1]]),
        ("residual", residual, torch.bfloat16, shape),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; expected {dtype}")
        if list(tensor.shape) != sizes:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {sizes}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, like x")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"x is on {x.device}; expected the CPU or CUDA")
    if math.prod(shape) == 0:
        raise ValueError(f"x is {list(x.shape)}, which leaves nothing to normalize")
    if eps < 0:
        raise ValueError(f"eps is {eps}; expected at least 0")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if negative_slope < 0:
        raise ValueError(f"negative_slope is {negative_slope}; expected at least 0")


def _cpu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    number = ACTIVATIONS.index(activation)
    residual = None if residual is None else channels_last(residual)
    kernel = torch.ops.resfast.norm_act_forward
    return kernel(channels_last(x), weight, bias, residual, eps, number, negative_slope, pool)


def _backward_cpu(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    other: Tensor | None,
    where: Tensor | None,
    size: list[int],
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    number = ACTIVATIONS.index(activation)
    other = None if other is None else channels_last(other)
    both = channels_last(grad), channels_last(x)
    kernel = torch.ops.resfast.norm_act_backward
    return kernel(*both, weight, bias, mean, var, other, where, size, eps, number, negative_slope)


class _OnCpu(torch.autograd.Function):
    """The operator without its layers of Python, which take longer than small maps do."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        number: int,
        negative_slope: float,
        pool: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = channels_last(x)
        residual = None if residual is None else channels_last(residual)
        kernel = torch.ops.resfast.norm_act_forward.default
        out, mean, var, pooled, where = kernel(
            x, weight, bias, residual, eps, number, negative_slope, pool
        )
        other = None
        if residual is not None and number:
            other = residual if ACTIVATIONS[number] in ("silu", "gelu") else out
        kept = (pooled, where) if pool else (x, None)
        ctx.save_for_backward(kept[0], weight, bias, mean, var, other, kept[1])
        ctx.rest = [x.shape[2], x.shape[3]], eps, number, negative_slope
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        if grad is None:
            return nothing * 2
        saved = ctx.saved_tensors
        kernel = torch.ops.resfast.norm_act_backward.default
        *found, for_residual = kernel(channels_last(grad), *saved, *ctx.rest)
        needed = ctx.needs_input_grad
        if needed[3]:
            found.append(for_residual if saved[5] is not None else grad)
        wanted = zip(found, needed, strict=False)
        gradients = [one if is_needed else None for one, is_needed in wanted]
        return *gradients, *nothing[len(gradients) :], *nothing


def _cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import triton as triton_norm_act

    return triton_norm_act.forward(*args)


def _backward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import triton as triton_norm_act

    return triton_norm_act.backward(*args)


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, c, p, q = result_shape(x, pool)
    mean, var = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
    pooled = new_map(x, [n, c, p, q]) if pool else x.new_empty(0)
    bytes_of_pixel = c if x.device.type == "cuda" else (c + 31) // 32 * 8
    where = x.new_empty(n * p * q * bytes_of_pixel if pool else 0, dtype=torch.uint8)
    return new_map(x, [n, c, p, q]), mean, var, pooled, where


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    other: Tensor | None,
    where: Tensor | None,
    size: list[int],
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for_residual = x.new_empty(0) if other is None else new_map(x, list(x.shape))
    both = (mean.new_empty(x.shape[1]) for _ in range(2))
    return new_map(x, [*x.shape[:2], *size]), *both, for_residual


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, *ctx.rest, pool = inputs
    out, mean, var, pooled, where = output
    ctx.size = list(x.shape[2:])
    activation = ctx.rest[1]
    other = None
    if residual is not None and activation != "none":
        other = residual if activation in ("silu", "gelu") else out
    ctx.residual = residual is not None
    ctx.save_for_backward(
        pooled if pool else x, weight, bias, mean, var, other, where if pool else None
    )
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if grad is None:
        return nothing
    kernel = torch.ops.resfast.batch_norm_act_backward
    *four, for_residual = kernel(grad, *ctx.saved_tensors, ctx.size, *ctx.rest)
    if ctx.residual:
        four.append(grad if ctx.rest[1] == "none" else for_residual)
    wanted = zip(four, ctx.needs_input_grad, strict=False)
    found = [one if needed else None for one, needed in wanted]
    return *found, *nothing[len(found) :]


register(
    "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "str activation, float negative_slope, bool pool) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    setup_context=_setup,
    backward=_gradients,
)
register(
    "batch_norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, Tensor? other, Tensor? where, int[2] size, float eps, str activation, "
    "float negative_slope) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)
