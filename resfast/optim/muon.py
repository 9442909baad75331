"""Muon: momentum whose update is orthogonalised, for convolution filters; SGD for all else.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/. ``torch.optim.Muon`` takes matrices only and one at a
time. Shapes: K filters of ``[C, R, S]`` are a matrix of K rows and n = C * R * S columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from resfast import runtime
from resfast.ops.muon import op as muon

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic a x + b x^3 + c x^5, which brings singular values near 1 in a few iterations."""
_STEPS_PER_GRAM_MATRIX = 5
"""Each iteration multiplies what float32 rounds off a gram matrix by up to a^2 = 12."""


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of the given ones, by Newton-Schulz.

    Each iteration is X <- (a I + b X X^T + c (X X^T)^2) X, beginning at Frobenius norm 1; five of
    them bring singular values above 0.002 of that to between 0.68 and 1.21. On CUDA all products
    are of bfloat16. On the CPU the factors before X, which commute with X X^T, are multiplied with
    each other first, in float32, and X comes in at the end: the same result with fewer operations
    where a matrix is far from square. The products with X itself are of its dtype.

    Args:
        matrices: float32 or bfloat16 ``[B, rows, columns]``.
        steps: iterations, at least 1.

    Returns:
        ``[B, rows, columns]``, on the CPU of the dtype of ``matrices``, else bfloat16. A zero
        matrix stays zero.
    """
    if matrices.device.type == "cpu":
        result = matrices
        for done in range(0, steps, _STEPS_PER_GRAM_MATRIX):
            count = min(steps - done, _STEPS_PER_GRAM_MATRIX)
            result = _by_gram_matrix(result, count, normalize=not done)
        return result
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    norm = x.float().norm(dim=(1, 2), keepdim=True).clamp(min=muon.LEAST_NORM)
    x = _directly((x / norm).to(torch.bfloat16), steps)
    return x.mT if tall else x


def _directly(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x


def _by_gram_matrix(x: Tensor, steps: int, *, normalize: bool) -> Tensor:
    tall = x.shape[1] > x.shape[2]
    gram = (torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)).float()
    if muon.has_newton_schulz_product():
        product = torch.stack(
            [
                torch.ops.resfast.newton_schulz_product(one, steps, normalize, *COEFFICIENTS)
                for one in gram
            ]
        )
    else:
        product = _product(gram, steps, normalize)
    product = product.to(x.dtype)
    return torch.bmm(x, product) if tall else torch.bmm(product, x)  # product is symmetric


def _product(gram: Tensor, steps: int, normalize: bool) -> Tensor:
    a, b, c = COEFFICIENTS
    product = norm = None
    if normalize:  # the trace is the square of the Frobenius norm
        trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
        norm = trace.sqrt().clamp_(min=muon.LEAST_NORM)
        gram = gram / norm.square()
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        if step + 1 < steps:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    return product if norm is None else product / norm


class Muon(torch.optim.Optimizer):
    """Nesterov momentum; in groups with ``muon=True`` its update is orthogonalised.

    For the filters of a convolution, as K rows: B <- momentum B + G, the update is
    ``orthogonalize(G + momentum B)`` times sqrt(max(1, K / n)), and the weight loses lr times
    weight_decay of itself and lr times the update. Other groups are ``torch.optim.SGD`` with
    Nesterov momentum and L2 weight decay.

    Nothing waits for the device, and a learning rate may be a 0-d tensor on it: a step can be
    captured as a CUDA graph once it has run eagerly.

    Args:
        groups: parameter groups, each with ``muon`` (bool) and those values below that differ.
        lr: learning rate, a number or a 0-d tensor.
        momentum: at least 0, below 1.
        weight_decay: see above.
        newton_schulz_steps: iterations of the orthogonalisation.
        normalize_filters: before each step scale every weight of a ``muon`` group to the Frobenius
            norm sqrt(K), each filter 1 on average (airbench94_muon).
        product_dtype: on the CPU, of the products of an update with itself and at the end, float32
            or bfloat16, which a processor may multiply twice as fast; None for what it does best.

    Raises:
        ValueError: a ``product_dtype`` of neither kind, or a parameter of a ``muon`` group with
            fewer than two dimensions.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        newton_schulz_steps: int = 5,
        normalize_filters: bool = False,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        if product_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"product_dtype is {product_dtype}; expected torch.float32, torch.bfloat16 or None"
            )
        self.product_dtype = product_dtype
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "newton_schulz_steps": newton_schulz_steps,
            "normalize_filters": normalize_filters,
            "muon": False,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["muon"] and parameter.ndim < 2:
                    raise ValueError(
                        f"a parameter of shape {list(parameter.shape)} has no rows to "
                        "orthogonalise; put it into a group without muon"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Moves the parameters that have a gradient.

        Args:
            closure: computes loss and gradients first, as in ``torch.optim``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            if group["muon"]:
                self._step_muon(parameters, buffers, group)
            else:
                sgd(
                    parameters,
                    [p.grad for p in parameters],
                    buffers,
                    fused=True,
                    lr=group["lr"],
                    momentum=group["momentum"],
                    weight_decay=group["weight_decay"],
                    dampening=0.0,
                    nesterov=group["momentum"] > 0,
                    maximize=False,
                )
        return loss

    def _step_muon(
        self, parameters: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
    ) -> None:
        alike: dict[tuple[_Way, torch.Size], list[int]] = defaultdict(list)
        for index, (parameter, buffer) in enumerate(zip(parameters, buffers, strict=True)):
            alike[_way(parameter, buffer), parameter.shape].append(index)
        # The products of one shape leave most of a GPU idle.
        with runtime.Branches(parameters[0].device) as branches:
            for (way, _), indices in alike.items():
                with branches.branch():
                    mine = [parameters[i] for i in indices], [buffers[i] for i in indices]
                    way(*mine, group, self.product_dtype or _product_dtype())


_Way = Callable[[list[Tensor], list[Tensor], dict[str, Any], torch.dtype], None]


def _product_dtype() -> torch.dtype:
    return torch.bfloat16 if runtime.cpu_has_bf16() else torch.float32


def _way(parameter: Tensor, buffer: Tensor) -> _Way:
    """What moves a parameter: the kernels for its device where it is dense, else operators."""
    dense = parameter.is_contiguous() or _in_memory_order(parameter).is_contiguous()
    alike = all(
        tensor.dtype == torch.float32 and tensor.stride() == parameter.stride()
        for tensor in (parameter, buffer)
    )
    if dense and alike and parameter.device.type == "cpu":
        return _by_kernels
    if dense and alike and parameter.device.type == "cuda" and runtime.has_triton():
        return _by_triton
    return _by_foreach


def _by_kernels(
    parameters: list[Tensor], buffers: list[Tensor], group: dict[str, Any], dtype: torch.dtype
) -> None:
    lr = float(group["lr"])
    keep = 1 - lr * group["weight_decay"]
    for parameter, buffer in zip(parameters, buffers, strict=True):
        update = torch.empty_like(buffer, dtype=dtype)
        torch.ops.resfast.nesterov_(buffer, parameter.grad, update, group["momentum"])
        in_order = update if update.is_contiguous() else _in_memory_order(update)
        matrix = in_order.flatten(1)
        result = orthogonalize(matrix[None], group["newton_schulz_steps"])[0]
        size = lr * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
        moved = parameter if in_order is update else _in_memory_order(parameter)
        torch.ops.resfast.move_filters_(
            moved, result.view_as(moved), size, keep, group["normalize_filters"]
        )


def _by_triton(
    parameters: list[Tensor], buffers: list[Tensor], group: dict[str, Any], dtype: torch.dtype
) -> None:
    from resfast.ops.muon import triton as triton_muon

    gradients = [p.grad for p in parameters]
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        if gradient.stride() != parameter.stride():
            gradients[index] = torch.empty_like(parameter).copy_(gradient)
    triton_muon.step(
        parameters,
        gradients,
        buffers,
        lr=group["lr"],
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        steps=group["newton_schulz_steps"],
        normalize=group["normalize_filters"],
        coefficients=COEFFICIENTS,
        least=muon.LEAST_NORM,
    )


def _by_foreach(
    parameters: list[Tensor], buffers: list[Tensor], group: dict[str, Any], dtype: torch.dtype
) -> None:
    lr, momentum = group["lr"], group["momentum"]
    gradients = [p.grad for p in parameters]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients)
    updates = torch._foreach_add(gradients, buffers, alpha=momentum)
    if group["normalize_filters"]:
        norms = torch._foreach_norm(parameters)
        torch._foreach_clamp_min_(norms, muon.LEAST_NORM)
        torch._foreach_reciprocal_(norms)
        torch._foreach_mul_(norms, [math.sqrt(len(p)) for p in parameters])
        torch._foreach_mul_(parameters, norms)
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    stacked = torch.stack([_in_memory_order(update) for update in updates])
    matrices = stacked.flatten(2)
    result = orthogonalize(matrices, group["newton_schulz_steps"]).to(stacked.dtype)
    result = result * (lr * math.sqrt(max(1.0, matrices.shape[1] / matrices.shape[2])))
    moved = [_in_memory_order(parameter) for parameter in parameters]
    torch._foreach_sub_(moved, list(result.view_as(stacked)))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """``[K, R, S, C]`` of a convolution's weight, contiguous where that is ``channels_last``.

    The order of columns changes nothing in an orthogonalisation.
    """
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
