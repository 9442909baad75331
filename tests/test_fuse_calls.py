"""What a call of a network does around its forward, and what goes in and out, after fusion."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from resfast.layers.fused import ConvBNAddReLU, ConvBNReLU


def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode, with batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(size, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(size, generator=generator) * 0.2)
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())


# -- layers ------------------------------------------------------------------------------------

OVERRIDES: dict[str, Callable[[nn.Module], None]] = {
    "_conv_forward": lambda m: setattr(
        m.conv,
        "_conv_forward",
        types.MethodType(lambda self, *args: nn.Conv2d._conv_forward(self, *args) + 1, m.conv),
    ),
    "norm forward": lambda m: setattr(
        m.bn, "forward", lambda x: nn.BatchNorm2d.forward(m.bn, x) * 2
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_layer_runs_a_method_that_its_child_overrides(name: str):
    torch.manual_seed(0)
    layer = trained_like(ConvBNReLU(3, 8))
    x = images(2, 3, 8, 8)
    with torch.no_grad():
        before = layer(x)
    OVERRIDES[name](layer)
    expected = layer(x)  # with gradients, the children run
    with torch.no_grad():
        assert relative_error(layer(x), expected) < 1e-5
    assert relative_error(before, expected) > 0.1


def test_layer_runs_global_hooks_on_its_children():
    torch.manual_seed(0)
    layer = trained_like(ConvBNReLU(3, 8))
    x = images(2, 3, 8, 8)
    handle = module_hooks.register_module_forward_hook(
        lambda module, args, out: out + 1 if isinstance(module, nn.BatchNorm2d) else None
    )
    try:
        expected = layer(x)
        with torch.no_grad():
            assert relative_error(layer(x), expected) < 1e-5
    finally:
        handle.remove()
    assert relative_error(layer(x), expected) > 0.1


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 1, 1), (3, 2, 8, 8, 8), (2, 8, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_broadcasts_alike_with_and_without_gradients(
    shape: tuple[int, ...], dtype: torch.dtype
):
    torch.manual_seed(0)
    layer = trained_like(ConvBNAddReLU(3, 8))
    x, residual = images(2, 3, 8, 8), images(*shape).to(dtype)
    expected = layer(x, residual)
    with torch.no_grad():
        actual = layer(x, residual)
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected) < 1e-5
