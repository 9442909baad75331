"""``resfast.fuse`` on operations beyond the ordinary ResNet, one small network each.

Every network is compared with the original in float64, for other batch and image sizes, in float32
and bfloat16, and where inputs are NaN or infinite.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfast
from resfast.inference import fuse as fusion
from resfast.ops.conv.op import ConvBiasAct
from tests.test_fuse import one_thread_and_no_cache_of_the_user

__all__ = ["one_thread_and_no_cache_of_the_user"]

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Largest error, relative to the largest value of the result."""


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with random weights and batch norms as training leaves them."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=random) * fan_in**-0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                size = module.num_features
                module.running_mean.copy_(torch.randn(size, generator=random) * 0.3)
                module.running_var.copy_(torch.rand(size, generator=random) + 0.5)
    return model.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kinds(values: Tensor) -> Tensor:
    """0 for finite values, 1 for NaN, 2 and 3 for infinities."""
    infinite = torch.where(values > 0, 2, 3)
    return torch.where(values.isnan(), 1, torch.where(values.isinf(), infinite, 0))


SIZES = ((2, 12, 12), (1, 12, 12), (3, 9, 13))
"""Batch, height and width of the images."""


@torch.no_grad()
def assert_same(
    model: nn.Module, dtype: torch.dtype = torch.float32, sizes: Any = SIZES, channels: int = 3
) -> fusion.FusedModel:
    """Checks a network against its fused copy and returns that."""
    fused = resfast.fuse(model, dtype)
    exact = copy.deepcopy(model).double()
    for batch, *size in sizes:
        x = images(batch, channels, *size)
        expected, result = exact(x.double()), fused(x)
        assert result.shape == expected.shape
        error = (result - expected).abs().max() / expected.abs().max()
        assert error <= LIMITS[dtype], f"error {error:.2g} for {batch, size}\n{fused.network.code}"
        for value in (torch.nan, torch.inf, -torch.inf):
            spoilt = x.clone()
            spoilt[0, 0, 1, 1] = value
            expected, result = kinds(exact(spoilt.double())), kinds(fused(spoilt))
            assert torch.equal(result, expected), f"{value} reaches others\n{fused.network.code}"
    return fused


def counts(fused: fusion.FusedModel) -> tuple[int, int, int, int]:
    report = fused.report
    return report.convolutions, report.batch_norms, report.residuals, report.activations


def calls(fused: fusion.FusedModel) -> list[str]:
    """What the fused graph calls: classes of modules, names of functions and methods."""
    network = fused.network
    found = []
    for node in network.graph.nodes:
        if node.op == "call_module":
            found.append(type(network.get_submodule(node.target)).__name__)
        elif node.op.startswith("call_"):
            found.append(str(getattr(node.target, "__name__", node.target)).partition(".")[0])
    return found


class Applied(nn.Module):
    """A convolution and a batch norm, a function, and another convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.function = function
        self.conv2 = nn.Conv2d(8, 6, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.function(self.bn1(self.conv1(x))))


# -- activations -----------------------------------------------------------------------------------


def in_place_relu6(x: Tensor) -> Tensor:
    x.clamp_(0, 6)
    return x


ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "nn.ReLU6": ("relu6", nn.ReLU6()),
    "nn.ReLU6 in place": ("relu6", nn.ReLU6(inplace=True)),
    "nn.Hardtanh": ("relu6", nn.Hardtanh(0, 6)),
    "relu6": ("relu6", F.relu6),
    "hardtanh": ("relu6", lambda x: F.hardtanh(x, 0.0, 6.0)),
    "hardtanh by name": ("relu6", lambda x: F.hardtanh(x, max_val=6, min_val=0)),
    "clamp": ("relu6", lambda x: x.clamp(0, 6)),
    "clamp by name": ("relu6", lambda x: torch.clamp(x, min=0, max=6)),
    "clamp_": ("relu6", in_place_relu6),
    "clamp from 0": ("relu", lambda x: x.clamp(min=0)),
    "clamp_min": ("relu", lambda x: torch.clamp_min(x, 0)),
    "nn.Hardswish": ("hardswish", nn.Hardswish()),
    "nn.Hardswish in place": ("hardswish", nn.Hardswish(inplace=True)),
    "hardswish": ("hardswish", F.hardswish),
    "x hardsigmoid": ("hardswish", lambda x: x * F.hardsigmoid(x)),
    "nn.Hardsigmoid times x": ("hardswish", lambda x: HARDSIGMOID(x) * x),
    "x relu6(x + 3) / 6": ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    "x (relu6(x + 3) / 6)": ("hardswish", lambda x: x * (F.relu6(x + 3.0, inplace=True) / 6.0)),
    "clamp(3 + x) / 6": ("hardswish", lambda x: x.mul((3 + x).clamp(0, 6).div(6))),
    "nn.Hardsigmoid": ("hardsigmoid", nn.Hardsigmoid()),
    "hardsigmoid": ("hardsigmoid", lambda x: F.hardsigmoid(x, inplace=True)),
    "relu6(x + 3) / 6": ("hardsigmoid", lambda x: F.relu6(x + 3) / 6),
    "relu6(x + 3) times": ("hardsigmoid", lambda x: F.relu6(x + 3) * (1 / 6)),
    "clamp(x / 6 + 0.5)": ("hardsigmoid", lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "clamp((x + 3) / 6)": ("hardsigmoid", lambda x: torch.clamp((x + 3) / 6, 0.0, 1.0)),
    "nn.Sigmoid": ("sigmoid", nn.Sigmoid()),
    "torch.sigmoid": ("sigmoid", torch.sigmoid),
    "sigmoid": ("sigmoid", F.sigmoid),
    "x.sigmoid_": ("sigmoid", lambda x: x.sigmoid_()),
    "nn.Tanh": ("tanh", nn.Tanh()),
    "torch.tanh": ("tanh", torch.tanh),
    "x.tanh": ("tanh", lambda x: x.tanh()),
    "x sigmoid": ("silu", lambda x: x * torch.sigmoid(x)),
    "sigmoid times x": ("silu", lambda x: x.sigmoid().mul(x)),
    "x *= sigmoid": ("silu", lambda x: x.mul_(F.sigmoid(x))),
    "nn.SiLU": ("silu", nn.SiLU()),
}
HARDSIGMOID = nn.Hardsigmoid()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_part_of_the_convolution(name: str, dtype: torch.dtype):
    activation, function = ACTIVATIONS[name]
    fused = assert_same(ready(Applied(function)), dtype)
    convs = [m for m in fused.modules() if isinstance(m, ConvBiasAct)]
    assert [conv.activation for conv in convs] == [activation, "none"]
    assert counts(fused) == (2, 1, 0, 1)
    assert not fused.report.left


@pytest.mark.parametrize("traced_by", ["torch.fx", "torch.export"])
@pytest.mark.parametrize("name", sorted({name for name, _ in ACTIVATIONS.values()}))
def test_activation_after_a_residual_is_part_of_the_convolution(name: str, traced_by: str):
    function = next(function for found, function in ACTIVATIONS.values() if found == name)

    class Residual(Applied):
        def forward(self, x: Tensor) -> Tensor:
            out = self.bn1(self.conv1(x))
            if traced_by == "torch.export" and x.mean() > 1e9:  # torch.fx cannot trace it
                return out
            return self.function(self.bn1(self.conv1(x)) + F.pad(x, (0, 0, 0, 0, 0, 5)))

    if traced_by == "torch.export":
        Residual.forward = lambda self, x: self.function(  # type: ignore[method-assign]
            self.bn1(self.conv1(x)) + F.pad(x, (0, 0, 0, 0, 0, len(list(x)) * 0 + 5))
        )
    model = ready(Residual(function))
    x = images(2, 3, 10, 10)
    fused = resfast.fuse(model, torch.float32, example=x)
    assert fused.report.traced_by == traced_by
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        assert (fused(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert counts(fused) == (1, 1, 1, 1)
    (conv,) = (m for m in fused.modules() if isinstance(m, ConvBiasAct))
    assert conv.activation == name


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp to 5": lambda x: x.clamp(0, 5),
    "clamp from -1": lambda x: x.clamp(-1, 6),
    "clamp up to 6": lambda x: x.clamp(max=6),
    "hardtanh": F.hardtanh,
    "relu6(x + 2) / 6": lambda x: F.relu6(x + 2) / 6,
    "relu6(x + 3) / 5": lambda x: F.relu6(x + 3) / 5,
    "6 / relu6(x + 3)": lambda x: 6 / (F.relu6(x + 3) + 1),
    "rounded sixth": lambda x: F.relu6(x + 3) * 0.1667,
    "sigmoid of twice": lambda x: x * torch.sigmoid(2 * x),
    "sigmoid of another": lambda x: x * torch.sigmoid(x.flip(1)),
    "sigmoid used twice": lambda x: x * torch.sigmoid(x) + torch.sigmoid(x) ** 2,
    "relu6 used twice": lambda x: (lambda y: y / 6 + y * x)(F.relu6(x + 3)),
    "alpha": lambda x: F.relu6(torch.add(x, 3, alpha=2)) / 6,
    "rounded division": lambda x: torch.div(F.relu6(x + 3), 6, rounding_mode="floor") + x,
    "clamp by tensors": lambda x: x.clamp(torch.tensor(0.0, dtype=x.dtype), x.new_tensor(6.0)),
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_what_only_resembles_an_activation_keeps_its_values(name: str, dtype: torch.dtype):
    fused = (
        assert_same(ready(Applied(OTHERS[name])), dtype)
        if name != "rounded division"
        else (resfast.fuse(ready(Applied(OTHERS[name])), dtype))
    )
    convs = [m for m in fused.modules() if isinstance(m, ConvBiasAct)]
    assert {conv.activation for conv in convs} <= {"none", "relu6"}  # x + 2 is folded


# -- groups and dilation ---------------------------------------------------------------------------

GROUPED = {
    "depthwise": {"groups": 8, "kernel_size": 3, "padding": 1},
    "depthwise stride": {"groups": 8, "kernel_size": 5, "padding": 2, "stride": 2},
    "multiplier": {"groups": 8, "kernel_size": 3, "out_channels": 24},
    "grouped": {"groups": 2, "kernel_size": 3, "padding": 1, "out_channels": 12},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "dilated groups": {"kernel_size": 3, "padding": "same", "dilation": (2, 1), "groups": 4},
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", GROUPED)
def test_groups_and_dilation_are_fused(name: str, dtype: torch.dtype):
    options = {"out_channels": 8, "bias": False, **GROUPED[name]}
    outputs = options["out_channels"]

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 1)
            self.conv2 = nn.Conv2d(8, **options)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.conv3 = nn.Conv2d(outputs, outputs, 1, groups=outputs)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu6(self.bn2(self.conv2(self.conv1(x))))
            return F.hardswish(self.conv3(x) + x)

    fused = assert_same(ready(Grouped()), dtype)
    assert counts(fused) == (3, 1, 1, 2)
    assert calls(fused) == ["ConvBiasAct"] * 3
    assert not fused.report.left


# -- constants -------------------------------------------------------------------------------------


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation, as in the reference code of arXiv:1903.10520."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = weight - mean
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NormedConv2d(nn.Conv2d):
    """The same with torch.std_mean, a learned gain, and weights made from a weight's shape."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))
        self.log_scale = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        scale = self.weight[0].numel() ** -0.5
        weight = (self.weight - mean) * self.gain * scale / (std + 1e-4) * self.log_scale.exp()
        return self._conv_forward(x, weight, self.bias)


class Cosine(nn.Module):
    """A classifier of cosines."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, features))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(F.normalize(x, eps=1e-3), F.normalize(self.weight))
        return x * self.scale.exp()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("conv", [StandardisedConv2d, NormedConv2d])
def test_computed_weights_are_computed_once(conv: type[nn.Conv2d], dtype: torch.dtype):
    model = ready(
        nn.Sequential(
            conv(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            conv(8, 8, 3, 2, 1, groups=4, bias=False),
            nn.SiLU(),
        )
    )
    fused = assert_same(model, dtype)
    assert calls(fused) == ["ConvBiasAct"] * 2
    assert counts(fused) == (2, 1, 0, 2)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_normalised_heads_normalise_their_weight_once(dtype: torch.dtype):
    model = ready(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.append(ready(Cosine(8, 5)))
    fused = assert_same(model, dtype)
    assert calls(fused).count("normalize") == 1
    assert "exp" not in calls(fused)


def test_computed_once_in_the_original_dtype():
    """As the original does, and rounded once."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4, 3, 1, 1), 1e4) + torch.rand(4, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean())

    assert_same(Model().eval(), torch.bfloat16)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand_like(self.weight) + torch.bernoulli(self.weight * 0.5)
        return F.conv2d(x, self.weight + F.dropout(noise, 0.5, training=True))


def test_random_weights_stay_random():
    fused = resfast.fuse(Noisy().eval(), torch.float32)
    x = images(1, 3, 4, 4)
    assert not torch.equal(fused(x), fused(x))
    assert [reason for _, reason in fused.report.left] == ["convolution whose weight is computed"]


class Counting(nn.Module):
    """Counts its calls in a buffer, which torch.export can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.conv(x) * (self.calls * 2)


def test_what_the_network_changes_is_not_constant():
    model = Counting().eval()
    x = images(2, 3, 4, 4)
    fused = resfast.fuse(model, torch.float32, example=x)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), model(x))


def test_constants_of_several_results_are_found():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.randn(8, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.both.chunk(2)
            return F.relu(F.conv2d(x, first)) + F.conv2d(x, second, self.both.flatten(1).sum(1)[:4])

    fused = assert_same(Model().eval())
    assert fused.report.convolutions == 2


# -- the report ------------------------------------------------------------------------------------


def test_the_report_names_what_is_left_and_why():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.conv3 = nn.Conv2d(8, 8, 1)
            self.mish, self.pool = nn.Mish(), nn.MaxPool2d(2)
            self.fc, self.tanh = nn.Linear(16, 5), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            x = self.mish(self.conv1(x))
            x = self.pool(x)
            y = F.relu(self.conv2(x)) + torch.sigmoid(x)
            z = self.conv3(y)
            z = torch.cat([F.silu(z), z], 1)
            return self.tanh(self.fc(z.mean((2, 3))))

    report = assert_same(ready(Model())).report
    found = dict(report.rest)
    assert found["mish"] == "Mish: the fused kernel does not support it"
    assert found["pool"] == "MaxPool2d: a pool is an operation of its own"
    assert found["sigmoid"] == "sigmoid: it follows no convolution"
    assert found["add"].startswith("addition: the convolution before it already has an activation")
    assert found["silu"] == "silu: the convolution before it is also read elsewhere"
    assert found["cat"] == "concatenation: its result is read as a whole"
    assert found["tanh"] == "Tanh: it follows no convolution"
    assert len(found) == 7
    text = str(report)
    assert "1 kept: concatenation: its result is read as a whole (cat)" in text
    assert text.count("mish") == 1
