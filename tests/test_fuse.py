"""``resfast.fuse`` and the fused layers: the numbers of the ordinary network, and what is fused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

import resfast
from resfast.errors import ResfastError
from resfast.inference import fuse as fusion
from resfast.inference.fuse.rewrite import Rewriter
from resfast.inference.fuse.trace import from_export
from resfast.layers import ConvBNAddReLU, ConvBNReLU, FusedBasicBlock, FusedBottleneck
from resfast.models.presets import PRESETS
from resfast.models.resnet import ResNet, ResNetSpec
from resfast.models.speednet import SpeedNet, SpeedNetSpec
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.network.network import Network

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
LAYERS = {
    "ConvBNReLU": lambda: ConvBNReLU(8, 16, stride=2),
    "ConvBNReLU-silu": lambda: ConvBNReLU(8, 16, 1, activation="silu"),
    "ConvBNReLU-gelu": lambda: ConvBNReLU(8, 16, 1, activation="gelu"),
    "ConvBNReLU-leaky": lambda: ConvBNReLU(8, 16, 5, activation="leaky_relu", negative_slope=0.2),
    "FusedBasicBlock": lambda: FusedBasicBlock(8, 8),
    "FusedBasicBlock-down": lambda: FusedBasicBlock(8, 16, 2, downsample(8, 16)),
    "FusedBottleneck": lambda: FusedBottleneck(8, 2),
    "FusedBottleneck-down": lambda: FusedBottleneck(8, 4, 2, downsample(8, 16)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory):
    """Small networks gain nothing from more threads, and lose where tests share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


def downsample(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))


def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with batch norms as training leaves them: none is the identity."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=random) * 0.3)
            module.running_var.copy_(torch.rand(size, generator=random) + 0.5)
            if module.weight is not None:
                module.weight.data.copy_(torch.rand(size, generator=random) + 0.5)
                module.bias.data.copy_(torch.randn(size, generator=random) * 0.2)
    return model.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def error(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The largest difference of two networks' outputs, relative to the largest output."""
    expected, got = model(x), other(x)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


def counts(report: fusion.FusionReport) -> tuple[int, int, int, int]:
    return report.convolutions, report.batch_norms, report.residuals, report.activations


# -- networks of others ------------------------------------------------------------------------


class CifarBlock(nn.Module):
    """The style of pytorch-cifar: functional ReLUs, in-place addition, an empty shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = downsample(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each convolution (He et al., arXiv:1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class CifarNet(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(block(8, 8, 1), block(8, 16, 2), block(16, 24, 2))
        self.linear = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.avg_pool2d(self.layers(out), 4)
        return self.linear(out.view(out.size(0), -1))


class Small(nn.Module):
    """Two convolutions of 3 and 8 to 8 channels and their norms, for a ``forward`` of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(3, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)


class OutputOfConvUsedTwice(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        return self.bn1(out) + self.bn2(self.conv2(out))


class OutputOfNormUsedTwice(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return torch.cat([F.relu(out), out], 1)


class ReluedResidual(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return torch.add(self.relu(self.bn2(self.conv2(out))), out)


class AddedToItself(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return F.relu(out + out)


class ScaledAddition(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return torch.add(self.bn2(self.conv2(out)), out, alpha=0.5)


class BroadcastAddition(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.pool(out))


class TwoBranches(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(x) + self.bn1(self.conv1(x)))


class SharedConvolution(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn1(self.conv2(out)))
        return self.relu(self.bn2(self.conv2(out)) + out)


class ChangedInPlace(Small):
    """The residual is read after an in-place ReLU, so that it is not what the norm put out."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        out = self.relu(first)
        out = self.bn2(self.conv2(out)).add_(first)
        return out.relu_()


class ResidualChangedLater(Small):
    """The addition reads the residual before it is changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.bn1(self.conv1(x)))
        out = first + self.bn2(self.conv2(first))
        first.mul_(2)
        return F.relu(out) - first


class Reversed(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return F.silu(input=out.add(self.bn2(self.conv2(out))))


class ConvNormNorm(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn2(self.bn1(self.conv1(x))))


class OtherActivation(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
        return F.gelu(self.bn2(self.conv2(out)) + out, approximate="tanh")


class Functional(Small):
    """No module is called: its parameters go to functions."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(x, self.conv1.weight, self.conv1.bias, padding=1)
        bn = self.bn1
        out = F.batch_norm(out, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return torch.relu(out)


class Casts(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x.float() / 2)).float()
        return self.conv2(out.to(torch.float32)) + torch.ones(8, 1, 1, dtype=torch.float32)


# name: module, (convolutions, norms, residuals, activations), words of the reasons for the rest
GRAPHS = {
    "cifar": (lambda: CifarNet(CifarBlock), (9, 9, 3, 7), ()),
    "preact": (lambda: CifarNet(PreActBlock), (9, 4, 3, 4), ("follows no convolution",) * 3),
    "conv-used-twice": (OutputOfConvUsedTwice, (2, 1, 1, 0), ("used elsewhere",)),
    "norm-used-twice": (OutputOfNormUsedTwice, (1, 1, 0, 0), ()),
    "relued-residual": (ReluedResidual, (2, 2, 0, 2), ()),
    "added-to-itself": (AddedToItself, (1, 1, 0, 0), ()),
    "scaled-addition": (ScaledAddition, (2, 2, 0, 1), ()),
    "broadcast-addition": (BroadcastAddition, (2, 2, 0, 1), ("broadcasts",)),
    "two-branches": (TwoBranches, (2, 1, 1, 1), ()),
    "shared-convolution": (SharedConvolution, (3, 3, 1, 3), ()),
    "changed-in-place": (ChangedInPlace, (2, 2, 1, 2), ()),
    "residual-changed-later": (ResidualChangedLater, (2, 2, 1, 2), ()),
    "reversed": (Reversed, (2, 2, 1, 2), ()),
    "norm-norm": (ConvNormNorm, (1, 2, 0, 1), ()),
    "other-activation": (OtherActivation, (2, 2, 1, 1), ("gelu",)),
    "functional": (Functional, (1, 1, 0, 1), ()),
    "casts": (Casts, (2, 1, 0, 0), ()),
}


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_network_is_fused_where_that_is_sound_and_keeps_its_numbers(name: str):
    make, expected, left = GRAPHS[name]
    torch.manual_seed(0)
    model = trained_like(make())
    fused = resfast.fuse(model, torch.float32)
    assert error(model, fused, images(3, 3, 16, 16)) < 1e-5
    assert counts(fused.report) == expected
    assert sum(isinstance(module, ConvBiasAct) for module in fused.modules()) == expected[0]
    assert len(fused.report.left) == len(left)
    for (_, why), words in zip(fused.report.left, left, strict=True):
        assert words in why
    assert error(model, resfast.fuse(model), images(3, 3, 16, 16)) < 0.03


# -- resfast's and torchvision's ---------------------------------------------------------------


def conv_count(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


@pytest.mark.parametrize("name", sorted(n for n, s in PRESETS.items() if type(s) is ResNetSpec))
def test_every_resnet_preset_is_fused_as_a_whole(name: str):
    torch.manual_seed(0)
    model = trained_like(resfast.create_model(name))
    fused = resfast.fuse(model, torch.float32)
    assert error(model, fused, images(2, 3, 32, 32)) < 1e-4
    spec = PRESETS[name]
    convs = conv_count(model)
    shortcuts = sum(isinstance(module, nn.BatchNorm2d) for module in model.stages.modules())
    inner = sum(spec.blocks) * (3 if spec.block == "bottleneck" else 2)
    shortcuts -= inner
    assert counts(fused.report) == (convs, convs, sum(spec.blocks), convs - shortcuts)
    assert fused.report.left == ()
    assert "batch_norm" not in fused.network.code
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


def as_trained(model: SpeedNet) -> SpeedNet:
    """Its frozen scales stay 1."""
    trained_like(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            nn.init.ones_(module.weight)
    if model.spec.whitening:
        nn.init.normal_(model.whitening.bias, 0, 0.3)
    return model


@pytest.mark.parametrize("name", sorted(n for n, s in PRESETS.items() if type(s) is SpeedNetSpec))
def test_every_speednet_preset_is_fused_but_for_its_pools_and_the_gelu_behind_them(name: str):
    torch.manual_seed(0)
    model = as_trained(resfast.create_model(name))
    spec = model.spec
    fused = resfast.fuse(model, torch.float32)
    assert error(model, fused, images(2, 3, 32, 32)) < 1e-4
    assert error(model, resfast.fuse(model), images(8, 3, 32, 32)) < 0.03
    norms = sum(spec.convolutions)
    residuals = sum(spec.residual and count >= 3 for count in spec.convolutions)
    behind_pools = len(spec.channels)
    assert counts(fused.report) == (norms + 1, norms, residuals, norms + 1 - behind_pools)
    assert not fused.report.left
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize(
    ("values", "activations"),
    [
        ({}, 4),  # not increasing: those of the two pools stay behind them
        ({"activation": "relu"}, 6),
        ({"activation": "leaky_relu"}, 6),
        ({"activation": "silu"}, 4),
        ({"activation": "relu", "whitening": False}, 6),
        ({"activation": "relu", "strides": (1, 2), "final_pool": "avg"}, 6),
        ({"activation": "relu", "final_pool": "both"}, 6),
        ({"activation": "relu", "whitening_padding": "same", "whitening_kernel": 3}, 6),
        ({"activation": "relu", "whitening_padding": "same"}, 6),
    ],
)
@pytest.mark.parametrize("scales", ["frozen", "positive"])
def test_every_speednet_keeps_its_numbers(values: dict, activations: int, scales: str):
    torch.manual_seed(0)
    model = as_trained(
        SpeedNet(
            SpeedNetSpec(
                (8, 12), (2, 3), residual=True, freeze_norm_scale=scales == "frozen", **values
            )
        )
    )
    fused = resfast.fuse(model, torch.float32)
    for size in (13, 18):
        assert error(model, fused, images(3, 3, size, size)) < 1e-5
    assert error(model, resfast.fuse(model), images(3, 3, 16, 16)) < 0.03
    norms = 5 if model.spec.whitening else 6
    assert counts(fused.report) == (6, norms, 1, activations)
    assert not fused.report.left
    assert "batch_norm" not in fused.network.code


class Pooled(nn.Module):
    """Convolution, max pool, norm and ReLU; ``control`` is control flow torch.fx cannot follow."""

    def __init__(
        self, scales: tuple[float, ...], functional: bool, between: bool, control: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, len(scales), 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.bn = nn.BatchNorm2d(len(scales))
        self.act = nn.ReLU(inplace=True)
        self.functional, self.between, self.control = functional, between, control

    def forward(self, x: Tensor) -> Tensor:
        if self.control and x.shape[2] < 5:
            return x
        x = self.conv(x)
        pooled = F.max_pool2d(x, 3, 2, 1, ceil_mode=True) if self.functional else self.pool(x)
        out = self.act(self.bn(pooled))
        return out + x.mean() if self.between else out


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    ("scales", "between", "folded"),
    [
        ((0.5, 2.0, 1.0, 1e-3), False, True),
        ((0.5, 2.0, -1.0, 1.0), False, False),
        ((0.5, 2.0, 0.0, 1.0), False, False),
        ((0.5, 2.0, 1.0, 1.0), True, False),
    ],
)
@pytest.mark.parametrize("traced_by", ["torch.fx", "torch.export"])
def test_a_norm_behind_a_max_pool_is_folded_where_its_scales_are_positive(
    scales: tuple[float, ...], between: bool, folded: bool, functional: bool, traced_by: str
):
    torch.manual_seed(0)
    model = trained_like(Pooled(scales, functional, between, traced_by == "torch.export"))
    model.bn.weight.data.copy_(torch.tensor(scales))
    x = images(2, 3, 11, 14)
    fused = resfast.fuse(model, torch.float32, example=x)
    assert fused.report.traced_by == traced_by
    assert error(model, fused, x) < 1e-5
    assert counts(fused.report) == (1, int(folded), 0, int(folded))
    if not folded:
        assert any("after a max pool" in why for _, why in fused.report.left)


@pytest.mark.parametrize("activation", ["leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["conv3", "pool"])
def test_every_variant_keeps_its_numbers(activation: str, block: str, shortcut: str):
    spec = ResNetSpec((1, 2), (8, 12), 8, (), block, shortcut, activation, (6,), 0.1)
    torch.manual_seed(0)
    model = trained_like(ResNet(spec, classes=3))
    fused = resfast.fuse(model, torch.float32)
    assert error(model, fused, images(3, 3, 9, 9)) < 1e-5
    assert fused.report.convolutions == conv_count(model)
    assert fused.report.residuals == 3
    assert fused.report.activations > 0
    assert not fused.report.left


@pytest.mark.parametrize(
    ("name", "expected", "left"),
    [
        ("resnet18", (20, 20, 8, 17), 0),
        ("resnet34", (36, 36, 16, 33), 0),
        ("resnet50", (53, 53, 16, 49), 0),
        ("resnet101", (104, 104, 33, 100), 0),
        ("wide_resnet50_2", (53, 53, 16, 49), 0),
        ("resnext50_32x4d", (53, 53, 16, 49), 0),
        ("regnet_x_400mf", (71, 71, 22, 67), 0),
    ],
)
def test_torchvision_network_is_fused(name: str, expected: tuple[int, ...], left: int):
    torch.manual_seed(0)
    model = trained_like(getattr(tv, name)(weights=None, num_classes=10))
    fused = resfast.fuse(model, torch.float32)
    assert error(model, fused, images(2, 3, 64, 64)) < 1e-4
    assert counts(fused.report) == expected
    assert len(fused.report.left) == left
    assert all("groups" in why for _, why in fused.report.left)


@pytest.mark.parametrize("name", ["resnet-2111", "resnet-narrow-dense", "resnet-member1m"])
def test_bf16_is_no_further_off_than_the_unfused_network_in_bf16(name: str):
    torch.manual_seed(0)
    model = trained_like(resfast.create_model(name)).to(memory_format=torch.channels_last)
    x = images(64, 3, 32, 32)
    fused = resfast.fuse(model)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain(x.bfloat16()).float()

    plain = copy.deepcopy(model).bfloat16()
    assert error(model, fused, x) <= 1.2 * error(model, Plain(), x)
    with torch.inference_mode():
        logits, ours = model(x), fused(x)
    top = logits.topk(2).values
    sure = (top[:, 0] - top[:, 1]) > 0.02 * logits.abs().max()
    assert sure.sum() >= 16
    assert torch.equal(ours.argmax(1)[sure], logits.argmax(1)[sure])


def test_fp16_is_a_dtype_like_the_others():
    model = trained_like(resfast.create_model("resnet-member1m"))
    assert error(model, resfast.fuse(model, torch.float16), images(2, 3, 32, 32)) < 5e-3


# -- tracing and compiling ----------------------------------------------------------------------


class DependsOnShape(Small):
    """torch.fx cannot follow this, and torch.export can for one size."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out[:, :2] *= 2
        if out.shape[2] > 8:
            y = self.bn2(self.conv2(out))
            y += out
            out = F.relu(y)
        return {"logits": self.pool(out).flatten(1)}["logits"]


class DependsOnData(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) if x.sum() > 0 else self.conv3(x)


class OptionalResidual(Small):
    def forward(self, x: Tensor, residual: Tensor | None = None, scale: float = 2.0) -> Tensor:
        out = self.bn1(self.conv1(x))
        return F.relu(out if residual is None else out + residual) * scale


def test_arguments_that_are_not_given_have_their_defaults():
    torch.manual_seed(0)
    model = trained_like(OptionalResidual())
    x, residual = images(2, 3, 8, 8), images(2, 8, 8, 8)
    for inputs in ((x,), (x, residual)):
        example = inputs if len(inputs) > 1 else None
        fused = resfast.fuse(model, torch.float32, example=example)
        assert fused.report.residuals == len(inputs) - 1
        torch.testing.assert_close(fused(*inputs), model(*inputs).detach())
    with pytest.raises(ResfastError, match="with the default of 'residual'"):
        resfast.fuse(model)(x, residual)


def test_export_is_the_second_way_and_keeps_the_batch_size_free():
    torch.manual_seed(0)
    model = trained_like(DependsOnShape())
    with pytest.raises(ResfastError, match=r"torch\.fx cannot trace DependsOnShape.*pass example="):
        resfast.fuse(model)
    fused = resfast.fuse(model, torch.float32, example=images(2, 3, 16, 16))
    assert fused.report.traced_by == "torch.export"
    assert counts(fused.report) == (2, 2, 1, 2)
    for batch in (1, 2, 5):
        assert error(model, fused, images(batch, 3, 16, 16)) < 1e-5
    with pytest.raises(ResfastError, match=r"\[2, 3, 8, 8\].*\[any, 3, 16, 16\]"):
        fused(images(2, 3, 8, 8))
    assert (
        error(model, resfast.fuse(model, example=images(2, 3, 16, 16)), images(4, 3, 16, 16)) < 0.03
    )


def test_export_fuses_a_whole_network_like_fx():
    torch.manual_seed(0)
    model = trained_like(tv.resnet18(num_classes=10))
    x = images(2, 3, 64, 64)
    exported = from_export(torch.export.export(model, (x,)).run_decompositions({}).module())
    report = Rewriter(exported, torch.float32, (x,), "torch.export").run()
    assert counts(report) == counts(resfast.fuse(model).report) == (20, 20, 8, 17)


def test_network_that_nothing_can_trace_is_refused():
    with pytest.raises(ResfastError, match=r"neither torch\.fx \(.*nor torch\.export \("):
        resfast.fuse(DependsOnData().eval(), example=images(2, 3, 8, 8))


class ChangesPart(Small):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        half = out.chunk(2, 1)[0]
        half.add_(1)
        return F.relu(self.bn2(self.conv2(out)))


def test_part_changed_in_place_is_not_lost():
    torch.manual_seed(0)
    model = trained_like(ChangesPart())
    with pytest.raises(ResfastError, match="in place"):
        resfast.fuse(model)
    fused = resfast.fuse(model, torch.float32, example=images(2, 3, 8, 8))
    assert error(model, fused, images(3, 3, 8, 8)) < 1e-5


# -- what the result is ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return trained_like(ResNet(ResNetSpec((1, 1), (8, 16), 8), classes=5))


def test_original_is_untouched_and_shares_no_memory(model: nn.Module):
    before = copy.deepcopy(model.state_dict())
    training = [module.training for module in model.modules()]
    in_place = [getattr(module, "inplace", None) for module in model.modules()]
    fused = resfast.fuse(model, torch.float32)
    owned = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not owned & {t.untyped_storage().data_ptr() for t in fused.state_dict().values()}
    for tensor in fused.state_dict().values():
        tensor.zero_()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert training == [module.training for module in model.modules()]
    assert in_place == [getattr(module, "inplace", None) for module in model.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_report_is_text(model: nn.Module):
    messages: list[str] = []
    fused = resfast.fuse(model, report=messages.append)
    assert messages == [str(fused.report)]
    assert messages[0].startswith("6 convolutions fused into one kernel each (2 with a residual")
    left = str(resfast.fuse(trained_like(CifarNet(PreActBlock))).report)
    assert "3 not fused: batch norm that follows no convolution (layers.0.bn1, layers.1.bn1" in left


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_put_out_the_same(model: nn.Module, copied):
    fused = resfast.fuse(model)
    x = images(3, 3, 16, 16)
    with torch.inference_mode():
        expected = fused(x)
        assert torch.equal(copied(fused)(x), expected)
    assert copied(fused).report == fused.report


def test_state_dict_loads_into_a_network_fused_alike(model: nn.Module):
    fused = resfast.fuse(model, torch.float32)
    other = resfast.fuse(trained_like(copy.deepcopy(model), seed=5), torch.float32)
    x = images(2, 3, 16, 16)
    with torch.inference_mode():
        assert not torch.equal(other(x), fused(x))
        other.load_state_dict(fused.state_dict())
        assert torch.equal(other(x), fused(x))


def test_layout_and_strides_of_the_input_do_not_matter(model: nn.Module):
    fused = resfast.fuse(model, torch.float32)
    x = images(4, 3, 16, 16)
    wide = images(4, 3, 16, 32)
    wide[..., ::2] = x
    with torch.inference_mode():
        expected = fused(x)
        assert torch.equal(fused(x.to(memory_format=torch.channels_last)), expected)
        assert torch.equal(fused(wide[..., ::2]), expected)
        assert torch.equal(fused(x.double()), expected)


def test_images_stay_in_channels_last(model: nn.Module):
    fused = resfast.fuse(model)
    seen: list[bool] = []
    for module in fused.modules():
        if isinstance(module, ConvBiasAct):
            module.register_forward_pre_hook(
                lambda _, args: seen.extend(
                    x.is_contiguous(memory_format=torch.channels_last) for x in args
                )
            )
    with torch.inference_mode():
        fused(images(2, 3, 16, 16))
    assert len(seen) == 6 + 2
    assert all(seen)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_autocast_changes_nothing(
    model: nn.Module, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
):
    if one_by_one:  # as a chain may choose
        monkeypatch.setattr(Network, "_choose", lambda self, x: self.by_layers)
    fused = resfast.fuse(model, torch.float32)
    x = images(2, 3, 16, 16)
    with torch.inference_mode():
        expected = fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(x), expected)


def test_compiled_and_exported_network_put_out_the_same(model: nn.Module):
    fused = resfast.fuse(model, torch.float32)
    x = images(2, 3, 16, 16)
    with torch.no_grad():
        expected = fused(x)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
        more = images(5, 3, 16, 16)
        torch.testing.assert_close(program.module()(more), fused(more), rtol=1e-5, atol=1e-5)
    calls = [n for n in program.graph.nodes if "conv2d_bias_act" in str(n.target)]
    assert len(calls) == 6


def test_trained_run_is_fused(tiny):
    run = resfast.load(resfast.train(tiny).path)
    fused = resfast.fuse(run.model, torch.float32)
    assert error(run.model, fused, images(4, 3, 16, 16)) < 1e-5
    with pytest.raises(ResfastError, match=r"TrainedRun.*pass its \.model"):
        resfast.fuse(run)


# -- what is refused ---------------------------------------------------------------------------


def test_network_in_training_mode_is_refused(model: nn.Module):
    with pytest.raises(ResfastError, match=r"training mode; call model\.eval\(\)"):
        resfast.fuse(copy.deepcopy(model).train())
    partly = copy.deepcopy(model)
    partly.stem.bn.train()
    with pytest.raises(ResfastError, match=r"stem\.bn \(BatchNorm2d\) is in training mode"):
        resfast.fuse(partly)
    with pytest.raises(ResfastError, match="cannot be trained"):
        resfast.fuse(model).train()
    assert not resfast.fuse(model).eval().training


def test_fused_network_is_not_fused_again(model: nn.Module):
    fused = resfast.fuse(model)
    for again in (fused, nn.Sequential(fused), fused.network):
        with pytest.raises(ResfastError, match="is already fused"):
            resfast.fuse(again.eval())


def test_what_is_no_float_network_is_refused(model: nn.Module):
    with pytest.raises(ResfastError, match=r"dtype torch\.int16.*choose torch\.bfloat16"):
        resfast.fuse(model, torch.int16)
    with pytest.raises(ResfastError, match=r"cannot fuse a function; expected an nn\.Module"):
        resfast.fuse(F.relu)
    with pytest.raises(ResfastError, match="meta device; load the weights"):
        resfast.fuse(copy.deepcopy(model).to("meta"))
    scripted = torch.jit.trace(model, images(1, 3, 8, 8))
    with pytest.raises(ResfastError, match="TorchScript"):
        resfast.fuse(scripted)
    quantised = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), torch.ao.nn.quantized.Linear(4, 2))
    with pytest.raises(ResfastError, match=r"2 \(Linear\) is quantised"):
        resfast.fuse(quantised.eval())


def test_wrappers_are_taken_off(model: nn.Module):
    x = images(2, 3, 16, 16)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model).eval()):
        assert error(model, resfast.fuse(wrapped, torch.float32), x) < 1e-5


def test_hooks_and_statistics_that_are_not_tracked_keep_a_layer_from_being_folded():
    torch.manual_seed(0)
    model = trained_like(Reversed())
    model.conv1.register_forward_hook(lambda module, args, out: out * 2)
    model.bn2 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    fused = resfast.fuse(model, torch.float32)
    assert error(model, fused, images(3, 3, 16, 16)) < 1e-5
    assert counts(fused.report) == (1, 0, 0, 0)
    assert [name for name, _ in fused.report.left] == ["conv1", "bn1", "bn2"]


def test_weights_that_are_parametrized_are_taken_as_they_are():
    torch.manual_seed(0)
    model = trained_like(ReluedResidual())
    nn.utils.parametrizations.weight_norm(model.conv2)
    fused = resfast.fuse(model.eval(), torch.float32)
    assert error(model, fused, images(3, 3, 16, 16)) < 1e-5
    assert counts(fused.report) == (2, 2, 0, 2)


def test_cuda_graph_without_cuda_is_refused(model: nn.Module):
    with pytest.raises(ResfastError, match=r"cuda_graph=True needs a CUDA device.*on cpu"):
        resfast.fuse(model, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", fusion.DTYPES)
def test_cuda_graphs_replay_every_shape_like_eager_calls(model: nn.Module, dtype: torch.dtype):
    eager = resfast.fuse(model, dtype, device="cuda")
    graphed = resfast.fuse(model, dtype, device="cuda", cuda_graph=True)
    kept = []
    for seed, (batch, size) in enumerate([(1, 16), (8, 16), (3, 24), (1, 16), (8, 16)]):
        x = images(batch, 3, size, size, seed=seed).cuda()
        mode = torch.inference_mode() if seed % 2 else torch.no_grad()
        with mode:
            kept.append((graphed(x), eager(x)))
    for got, expected in kept:  # later replays must not have written over earlier outputs
        torch.testing.assert_close(got, expected)
    assert len(graphed._captured) == 3
    assert copy.deepcopy(graphed)._captured == {}
    with pytest.raises(ResfastError, match="CUDA tensor"):
        graphed(images(1, 3, 16, 16))


@pytest.mark.gpu
def test_cuda_network_keeps_its_numbers(model: nn.Module):
    on_gpu = copy.deepcopy(model).cuda()
    x = images(4, 3, 16, 16).cuda()
    assert error(on_gpu, resfast.fuse(on_gpu, torch.float32), x) < 2e-3
    assert error(on_gpu, resfast.fuse(model, device="cuda"), x) < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_cuda_speednet_keeps_its_numbers(padding: str):
    torch.manual_seed(0)
    spec = SpeedNetSpec((16, 24), (2, 3), residual=True, whitening_padding=padding)
    on_gpu = as_trained(SpeedNet(spec)).cuda()
    x = images(4, 3, 18, 18).cuda()
    assert error(on_gpu, resfast.fuse(on_gpu, torch.float32), x) < 2e-3
    assert error(on_gpu, resfast.fuse(on_gpu), x) < 0.03


# -- layers ------------------------------------------------------------------------------------


def ran_fused(layer: nn.Module) -> list[ConvBiasAct]:
    """The kernels that a layer holds."""
    return [cached.module for cached in layer._folded.values() if cached.module is not None]


@pytest.mark.parametrize("name", sorted(LAYERS))
@pytest.mark.parametrize("device", DEVICES)
def test_layer_in_eval_is_one_kernel_per_convolution(name: str, device: str):
    torch.manual_seed(0)
    layer = trained_like(LAYERS[name]()).to(device)
    x = images(2, 8, 9, 9).to(device)
    with torch.enable_grad():
        expected = layer(x)
    assert expected.requires_grad
    assert ran_fused(layer) == []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = layer(x)
        tolerance = 1e-5 if device == "cpu" else 2e-3
        torch.testing.assert_close(got, expected.detach(), rtol=tolerance, atol=tolerance)
        assert len(ran_fused(layer)) == conv_count(layer) > 0


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layer_in_training_has_the_ordinary_gradients_and_statistics(name: str):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    if name.startswith("ConvBN"):
        act = {"relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU()}
        act["leaky_relu"] = nn.LeakyReLU(0.2)
        conv, bn = copy.deepcopy(layer.conv), copy.deepcopy(layer.bn)
        plain = nn.Sequential(conv, bn, act[layer.activation])
    else:
        block = {1: tv.resnet.BasicBlock, 4: tv.resnet.Bottleneck}[layer.expansion]
        planes = layer.conv2.out_channels
        plain = block(8, planes, layer.stride, copy.deepcopy(layer.downsample))
        plain.load_state_dict(layer.state_dict())
    x = images(4, 8, 9, 9)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, y in zip((layer.train(), plain.train()), inputs, strict=True):
        module(y).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_end_of_a_block_adds_the_residual():
    torch.manual_seed(0)
    layer = trained_like(ConvBNAddReLU(8, 8))
    x, residual = images(2, 8, 6, 6), images(2, 8, 6, 6, seed=2)
    expected = F.relu(layer.bn(layer.conv(x)) + residual).detach()
    with torch.no_grad():
        torch.testing.assert_close(layer(x, residual), expected, rtol=1e-5, atol=1e-5)
    assert len(ran_fused(layer)) == 1


CHANGES = {
    "in place": lambda m: m.bn.weight.detach().mul_(2),
    "running statistics": lambda m: m.bn.running_mean.add_(1),
    "no affine": lambda m: setattr(m.bn, "bias", None),
    "eps": lambda m: setattr(m.bn, "eps", 0.5),
    "other memory": lambda m: setattr(m.conv.weight, "data", m.conv.weight.data * 2),
    "new parameter": lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight * 2)),
    "load_state_dict": lambda m: m.load_state_dict({n: t + 1 for n, t in m.state_dict().items()}),
    "training step": lambda m: (m.train()(images(2, 8, 5, 5, seed=9)), m.eval()),
    "unseen write, then eval()": lambda m: (m.conv.weight.data.mul_(3), m.eval()),
    "float64 and back": lambda m: (m.double(), m.bn.bias.data.add_(1), m.float()),
    "stride": lambda m: setattr(m.conv, "stride", (2, 2)),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_folded_weights_are_never_stale(change: str):
    torch.manual_seed(0)
    layer = trained_like(ConvBNReLU(8, 8))
    x = images(2, 8, 6, 6)
    with torch.no_grad():
        before = layer(x)
        held = ran_fused(layer)
        layer(x)
        assert ran_fused(layer) == held  # folded once
        CHANGES[change](layer)
        after = layer(x)
    with torch.enable_grad():
        expected = layer(x).detach()
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert after.shape != before.shape or not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


def test_layer_runs_its_children_where_they_cannot_be_folded():
    torch.manual_seed(0)
    layer = trained_like(ConvBNReLU(8, 8))
    x = images(2, 8, 6, 6)
    layer.conv.register_forward_hook(lambda module, args, out: out * 0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.relu(layer.bn(torch.zeros(2, 8, 6, 6))))
        layer = trained_like(ConvBNReLU(8, 8))
        layer.bn.train()
        assert torch.equal(layer(x), F.relu(layer.bn(layer.conv(x))))
        with pytest.raises(RuntimeError, match="type"):
            layer(x.double())
    assert ran_fused(layer) == []


def test_layer_follows_autocast():
    torch.manual_seed(0)
    layer = trained_like(ConvBNReLU(8, 8))
    x = images(2, 8, 6, 6)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = layer(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("fused_block", "block", "depths"),
    [
        (FusedBasicBlock, tv.resnet.BasicBlock, [2, 1, 1, 1]),
        (FusedBottleneck, tv.resnet.Bottleneck, [1, 1, 1, 1]),
    ],
)
def test_blocks_build_torchvision_networks(fused_block, block, depths: list[int]):
    torch.manual_seed(0)
    theirs = trained_like(tv.ResNet(block, depths, num_classes=10))
    ours = tv.ResNet(fused_block, depths, num_classes=10).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 3, 40, 40)
    assert error(theirs, ours, x) < 1e-4
    assert len(ran_fused(ours.layer2[0])) == conv_count(ours.layer2[0])
    # What fuse makes of them is what it makes of torchvision's.
    assert counts(resfast.fuse(ours).report) == counts(resfast.fuse(theirs).report)
    assert error(theirs, resfast.fuse(ours, torch.float32), x) < 1e-4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_layer_folds_its_own_weights(copied):
    torch.manual_seed(0)
    layer = trained_like(ConvBNReLU(8, 8))
    x = images(2, 8, 6, 6)
    with torch.no_grad():
        expected = layer(x)
        other = copied(layer)
        assert torch.equal(other(x), expected)
        other.bn.bias.add_(1)
        assert not torch.equal(other(x), expected)
        assert torch.equal(layer(x), expected)


def test_compiled_and_exported_layer_hold_the_fused_call():
    torch.manual_seed(0)
    layer = trained_like(FusedBasicBlock(8, 16, 2, downsample(8, 16)))
    x = images(2, 8, 8, 8)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        layer.bn1.weight.mul_(2)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
        program = torch.export.export(layer, (x,))
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)
    assert sum("conv2d_bias_act" in str(n.target) for n in program.graph.nodes) == 3


def test_arguments_of_layers_are_checked():
    with pytest.raises(ValueError, match=r"'swish' is unknown; choose none, relu"):
        ConvBNReLU(3, 8, activation="swish")
    for arguments in ({"groups": 2}, {"dilation": 2}):
        for block in (FusedBasicBlock, FusedBottleneck):
            with pytest.raises(ValueError, match="use torchvision's block"):
                block(8, 8, **arguments)
    with pytest.raises(ValueError, match="base_width 32"):
        FusedBasicBlock(8, 8, base_width=32)
