"""Muon: momentum with orthogonalised updates for convolution filters, SGD for everything else.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/. ``torch.optim.Muon`` takes only matrices, one at a
time. Shapes: K filters ``[C, R, S]`` are a matrix of K rows and n = C * R * S columns.
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
"""a, b, c of the quintic a x + b x^3 + c x^5, which moves singular values to about 1 in a few
iterations."""
_STEPS_PER_GRAM_MATRIX = 5
"""Each iteration amplifies the float32 rounding error of a Gram matrix by up to a^2 = 12."""


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the same singular vectors, by Newton-Schulz iteration.

    Each iteration is X <- (a I + b X X^T + c (X X^T)^2) X, starting from Frobenius norm 1; five
    iterations move singular values above 0.002 of that norm to between 0.68 and 1.21. On CUDA all
    products are in bfloat16. On the CPU the factors left of X, which commute with X X^T, are
    multiplied together first, in float32, and applied to X at the end: the same result with fewer
    operations for matrices far from square. Products with X itself are in the dtype of X.

    Args:
        matrices: float32 or bfloat16 ``[B, rows, columns]``.
        steps: iterations, at least 1.

    Returns:
        ``[B, rows, columns]``, in the dtype of ``matrices`` on the CPU and in bfloat16 elsewhere.
        A zero matrix stays zero.
    """
    if matrices.device.type == "cpu":
        result = matrices
        for done in range(0, steps, _STEPS_PER_GRAM_MATRIX):
            count = min(steps - done, _STEPS_PER_GRAM_MATRIX)
            result = _newton_schulz_by_gram_matrix(result, count, normalize=not done)
        return result
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    norm = x.float().norm(dim=(1, 2), keepdim=True).clamp(min=muon.MIN_NORM)
    x = _newton_schulz((x / norm).to(torch.bfloat16), steps)
    return x.mT if tall else x


def _newton_schulz(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x


def _newton_schulz_by_gram_matrix(x: Tensor, steps: int, *, normalize: bool) -> Tensor:
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
        norm = trace.sqrt().clamp_(min=muon.MIN_NORM)
        gram = gram / norm.square()
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        if step + 1 < steps:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    return product if norm is None else product / norm


class Muon(torch.optim.Optimizer):
    """Nesterov momentum; in groups with ``muon=True`` the update is orthogonalised.

    For the K filters of a convolution: B <- momentum B + G; U = sqrt(max(1, K / n))
    ``orthogonalize(G + momentum B)``; W <- (1 - lr weight_decay) W - lr U. Other groups use SGD
    with Nesterov momentum and L2 weight decay, as in ``torch.optim.SGD``.

    A step does not synchronize with the device, and a learning rate may be a 0-d tensor on it, so
    a step can be captured as a CUDA graph once it has run eagerly.

    Args:
        groups: parameter groups, each with ``muon`` (bool) and any of the values below that differ.
        lr: learning rate, a number or a 0-d tensor.
        momentum: at least 0, below 1.
        weight_decay: see above.
        newton_schulz_steps: iterations of the orthogonalisation.
        normalize_filters: before each step, scale every weight of a ``muon`` group to Frobenius
            norm sqrt(K), so that a filter's mean square norm is 1 (airbench94_muon).
        product_dtype: on the CPU, dtype of the update's products, float32 or bfloat16, which some
            processors multiply twice as fast; None for bfloat16 where the processor supports it.

    Raises:
        ValueError: another ``product_dtype``, or a parameter with fewer than two dimensions in a
            ``muon`` group.
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
                        f"a parameter of shape {list(parameter.shape)} cannot be orthogonalised: "
                        "it has fewer than two dimensions; move it to a group with muon=False"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates the parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss, as in ``torch.optim``.
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
        batches: dict[tuple[_Update, torch.Size], list[int]] = defaultdict(list)
        for index, (parameter, buffer) in enumerate(zip(parameters, buffers, strict=True)):
            batches[_choose_update(parameter, buffer), parameter.shape].append(index)
        # The products of a single shape leave most of a GPU idle.
        with runtime.Branches(parameters[0].device) as branches:
            for (update, _), indices in batches.items():
                with branches.branch():
                    update(
                        [parameters[i] for i in indices],
                        [buffers[i] for i in indices],
                        group,
                        self.product_dtype or _product_dtype(),
                    )


_Update = Callable[[list[Tensor], list[Tensor], dict[str, Any], torch.dtype], None]


def _product_dtype() -> torch.dtype:
    return torch.bfloat16 if runtime.cpu_has_bf16() else torch.float32


def _choose_update(parameter: Tensor, buffer: Tensor) -> _Update:
    """The kernels for the parameter's device if it is dense float32, else PyTorch operators."""
    dense = parameter.is_contiguous() or _in_memory_order(parameter).is_contiguous()
    same_layout = all(
        tensor.dtype == torch.float32 and tensor.stride() == parameter.stride()
        for tensor in (parameter, buffer)
    )
    if dense and same_layout and parameter.device.type == "cpu":
        return _update_cpu
    if dense and same_layout and parameter.device.type == "cuda" and runtime.has_triton():
        return _update_triton
    return _update_foreach


def _update_cpu(
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
        scale = lr * math.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1]))
        filters = parameter if in_order is update else _in_memory_order(parameter)
        torch.ops.resfast.move_filters_(
            filters, result.view_as(filters), scale, keep, group["normalize_filters"]
        )


def _update_triton(
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
        min_norm=muon.MIN_NORM,
    )


def _update_foreach(
    parameters: list[Tensor], buffers: list[Tensor], group: dict[str, Any], dtype: torch.dtype
) -> None:
    lr, momentum = group["lr"], group["momentum"]
    gradients = [p.grad for p in parameters]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients)
    updates = torch._foreach_add(gradients, buffers, alpha=momentum)
    if group["normalize_filters"]:
        norms = torch._foreach_norm(parameters)
        torch._foreach_clamp_min_(norms, muon.MIN_NORM)
        torch._foreach_reciprocal_(norms)
        torch._foreach_mul_(norms, [math.sqrt(len(p)) for p in parameters])
        torch._foreach_mul_(parameters, norms)
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    stacked = torch.stack([_in_memory_order(update) for update in updates])
    matrices = stacked.flatten(2)
    result = orthogonalize(matrices, group["newton_schulz_steps"]).to(stacked.dtype)
    result = result * (lr * math.sqrt(max(1.0, matrices.shape[1] / matrices.shape[2])))
    filters = [_in_memory_order(parameter) for parameter in parameters]
    torch._foreach_sub_(filters, list(result.view_as(stacked)))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A convolution's weight as ``[K, R, S, C]``, contiguous if the weight is ``channels_last``.

    Orthogonalisation does not depend on the order of the columns.
    """
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor
