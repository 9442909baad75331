"""The operators keep the conventions of a collection of kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resfast.ops import layers

LAYERS = [
    value for value in vars(layers).values() if isinstance(value, type) and value is not Tensor
]
SHAPE = (2, 6, 5, 4)  # N C H W


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def width_first(x: Tensor) -> Tensor:
    return x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 3)[..., ::2]


def of_one_image(x: Tensor) -> Tensor:
    return x[:1].expand(len(x), -1, -1, -1)


LAYOUTS = (contiguous, channels_last, width_first, every_second, of_one_image)


def calls() -> dict[str, tuple[nn.Module, Callable[..., Tensor], int]]:
    """By layer: the module it takes the place of, what it has to compute, and its inputs."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)
    norm = nn.BatchNorm2d(6).eval()
    for tensor in (norm.weight, norm.running_mean, norm.running_var, norm.bias):
        nn.init.uniform_(tensor, 0.5, 2)
    for module in (conv, norm):
        module.requires_grad_(False)
    return {
        "Conv2d": (conv, conv, 1),
        "BatchNorm2d": (norm, norm, 1),
        "AddReLU": (nn.Identity(), lambda x, y: (x + y).relu(), 2),
    }


def test_layers_have_a_forward_and_no_state():
    modules = [layer for layer in LAYERS if issubclass(layer, nn.Module)]
    assert {layer.__name__ for layer in modules} == set(calls())
    for layer in modules:
        own = {name for name in vars(layer) if not name.startswith("__")}
        assert own == {"forward", "has_backward", "can_torch_compile"}
        assert "__init__" not in vars(layer)
        assert "super()" not in inspect.getsource(layer)
        assert not layer().state_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", calls())
def test_a_layer_computes_what_it_takes_the_place_of(name, layout):
    module, expected, inputs = calls()[name]
    values = [layout(torch.randn(SHAPE)) for _ in range(inputs)]
    forward = getattr(layers, name).forward
    torch.testing.assert_close(forward(module, *values), expected(*values), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", calls())
def test_a_fake_kernel_gives_shape_dtype_and_strides_of_the_real_one(name, layout):
    module, _, inputs = calls()[name]
    forward = getattr(layers, name).forward
    for dtype in (torch.float32, torch.bfloat16):
        values = [layout(torch.randn(SHAPE).to(dtype)) for _ in range(inputs)]
        real = forward(module, *values)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = forward(module, *(mode.from_tensor(value) for value in values))
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert fake.stride() == real.stride()


@pytest.mark.parametrize("name", calls())
def test_a_layer_is_compiled_as_one_graph(name):
    module, expected, inputs = calls()[name]
    layer = getattr(layers, name)
    assert layer.can_torch_compile
    compiled = torch.compile(
        lambda *values: layer.forward(module, *values), backend="aot_eager", fullgraph=True
    )
    values = [width_first(torch.randn(SHAPE)) for _ in range(inputs)]
    torch.testing.assert_close(compiled(*values), expected(*values), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", calls())
def test_has_backward_says_whether_gradients_are_recorded(name):
    module, _, inputs = calls()[name]
    layer = getattr(layers, name)
    values = [torch.randn(SHAPE, requires_grad=True) for _ in range(inputs)]
    if layer.has_backward:
        layer.forward(module, *values).sum().backward()
        assert all(value.grad is not None for value in values)
    else:
        with pytest.raises(RuntimeError, match="for inference only"):
            layer.forward(module, *values)


def test_what_a_layer_cannot_do_is_refused():
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="padding is 'same' of zeros; expected a number"):
        layers.Conv2d.forward(nn.Conv2d(6, 4, 3, padding="same"), x)
    with pytest.raises(ValueError, match="expected eval mode"):
        layers.BatchNorm2d.forward(nn.BatchNorm2d(6), x)
