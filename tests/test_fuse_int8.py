"""``fuse`` with 8-bit operands: what is quantized, from which ranges, and what comes out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import resfast
from resfast.errors import ResfastError
from resfast.inference.fuse import FusedModel
from resfast.inference.fuse.quantize import BINS, best_range
from resfast.ops.conv_int8 import op as int8
from resfast.ops.conv_int8.op import Int8Conv

pytestmark = pytest.mark.skipif(not int8.available(), reason="torch has no oneDNN here")


def conv_norm(channels: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> Any:
    conv = nn.Conv2d(channels, outputs, size, stride, size // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.2)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return nn.Sequential(conv, norm)


class Residual(nn.Module):
    """Convolutions, an identity and a convolution as shortcuts, a max pool, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16)
        self.a, self.b = conv_norm(16, 16), conv_norm(16, 16)
        self.c, self.d = conv_norm(16, 32, stride=2), conv_norm(32, 32)
        self.shortcut = conv_norm(16, 32, 1, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        x = F.relu(self.d(F.relu(self.c(x))) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class Mixed(nn.Module):
    """Depthwise convolutions, activations of other kinds, squeeze-and-excitation, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16)
        self.depthwise, self.point = conv_norm(16, 16, groups=16), conv_norm(16, 24, 1)
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.left, self.right = conv_norm(24, 16), conv_norm(24, 16, 1)
        self.last = conv_norm(32, 20)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        x = F.relu6(self.depthwise(x))
        x = F.leaky_relu(self.point(x), 0.2)
        scale = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = x * torch.sigmoid(scale)
        x = torch.cat([F.gelu(self.left(x)), F.silu(self.right(x))], 1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Chain(nn.Module):
    """A residual whose convolution reads the same map, and a map that is read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_norm(3, 16), conv_norm(16, 16), conv_norm(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.a(x) + x)
        z = F.relu(self.b(y) + x)
        return (z + 2 * x + y).mean((2, 3))


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def fused(model: nn.Module, **options: Any) -> FusedModel:
    return resfast.fuse(model, torch.int8, **{"calibration": images(64), **options})


def count(model: nn.Module) -> int:
    return sum(isinstance(module, Int8Conv) for module in model.modules())


@pytest.mark.parametrize(("kind", "convolutions"), [(Residual, 6), (Mixed, 8), (Chain, 3)])
@torch.no_grad()
def test_results_are_close_to_those_of_float32(
    kind: Callable[[], nn.Module], convolutions: int
) -> None:
    model = make(kind)
    quantized = fused(model)
    assert (count(quantized), quantized.report.int8) == (convolutions, convolutions)
    assert f"{convolutions} of them in int8" in str(quantized.report)
    for batch in (1, 5):
        x = images(batch, seed=2)
        expected = model(x)
        found = quantized(x)
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.04 * expected.norm()


@torch.no_grad()
def test_maps_stay_in_int8_between_convolutions() -> None:
    quantized = fused(make(Residual))
    kinds = [
        type(quantized.network.get_submodule(node.target)).__name__
        for node in quantized.network.graph.nodes
        if node.op == "call_module"
    ]
    assert kinds.count("Quantize") == 1  # of the input
    assert "Dequantize" not in kinds  # the last convolution has a float32 result
    seen = []
    for module in quantized.modules():
        if isinstance(module, Int8Conv):
            module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    quantized(images(2))
    assert seen == 5 * [torch.uint8] + [torch.float32]


@torch.no_grad()
def test_images_with_nan_or_infinity_have_outputs_of_nan_and_others_do_not() -> None:
    quantized = fused(make(Residual))
    x = images(4)
    expected = quantized(x)
    x[1, 0, 3, 5], x[2, 1, 0, 0] = torch.nan, -torch.inf
    found = quantized(x)
    assert found[[1, 2]].isnan().all()
    assert torch.equal(found[[0, 3]], expected[[0, 3]])


@torch.no_grad()
def test_copies_compute_the_same() -> None:
    quantized = fused(make(Residual))
    x = images(3)
    expected = quantized(x)
    for copied in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(copied(x), expected)
    assert torch.equal(quantized.float()(x), expected)
    with pytest.raises(ResfastError, match=r"cannot be converted to torch\.bfloat16"):
        quantized.bfloat16()


@torch.no_grad()
def test_it_compiles_and_exports() -> None:
    quantized = fused(make(Residual))
    x = images(3)
    expected = quantized(x)
    exported = torch.export.export(quantized, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-5)
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), expected, atol=1e-5)


@torch.no_grad()
def test_a_traced_export_is_quantized_too() -> None:
    class Branching(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.shape[0] > 1000 else 2 * x)

    model = make(Branching)
    quantized = fused(model, example=images(2))
    assert quantized.report.traced_by == "torch.export"
    assert count(quantized) == 6
    expected = model(images(5))
    assert (quantized(images(5)) - expected).norm() < 0.04 * expected.norm()


@torch.no_grad()
def test_calibration_may_come_in_batches_with_labels() -> None:
    model, x = make(Residual), images(96)
    data = TensorDataset(x, torch.arange(96))
    whole = fused(model, calibration=x)(x[:5])
    for batches in (
        DataLoader(data, batch_size=64),
        [x[:64], x[64:]],
        iter([(x[:64],), (x[64:],)]),
        (x,),
    ):
        assert torch.allclose(fused(model, calibration=batches)(x[:5]), whole, atol=1e-4)


def test_only_about_a_thousand_images_are_read() -> None:
    read = 0

    def endless() -> Iterator[Tensor]:
        nonlocal read
        while True:
            read += 64
            yield images(64, seed=read)

    fused(make(Chain), calibration=endless())
    assert read == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": None}, "int8 needs calibration="),
        ({"calibration": images(0)}, "calibration has no images"),
        ({"calibration": []}, "calibration has no images"),
        ({"calibration": 3}, "calibration is a int; expected a batch"),
        ({"calibration": "images"}, "calibration is a str; expected a batch"),
        ({"calibration": images(2) / 0}, "NaN or infinite"),
        ({"calibration": [["a", "b"]]}, "expected tensors of images"),
        ({"device": "cuda"}, "int8 runs on the CPU, not on cuda"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ResfastError, match=message):
        fused(make(Chain), **options)


def test_calibration_is_for_int8() -> None:
    with pytest.raises(ResfastError, match=r"calibration is for torch\.int8"):
        resfast.fuse(make(Chain), torch.float32, calibration=images(2))


@pytest.mark.gpu
def test_an_int8_network_stays_on_the_cpu() -> None:
    with pytest.raises(ResfastError, match="cannot move to"):
        fused(make(Chain)).to("cuda")


def test_outliers_do_not_widen_a_range() -> None:
    """A million values around 1 and one of 100: clipping that one costs less than coarse steps."""
    histogram = torch.zeros(BINS)
    histogram[: BINS // 25] = 1e4
    histogram[-1] = 1
    found = best_range(histogram, 0.0, 100.0)
    assert 4 < 255 * found.scale < 50
    assert found.zero_point == 0


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-0.2, 3.0)])
def test_the_range_of_even_values_holds_all_of_them(low: float, high: float) -> None:
    found = best_range(torch.full((BINS,), 10.0), low, high)
    assert (-found.zero_point * found.scale, (255 - found.zero_point) * found.scale) == (
        pytest.approx(low, abs=0.02 * (high - low)),
        pytest.approx(high, abs=0.02 * (high - low)),
    )
