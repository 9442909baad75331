"""One residual network for CIFAR-scale images, described by a :class:`ResNetSpec`.

Shapes: images are ``[N, 3, H, W]``, logits ``[N, classes]``. A stage is a sequence of blocks of the
same width; its first block applies the stage's stride. Source: He et al., "Deep Residual Learning
for Image Recognition", arXiv:1512.03385, with the 3x3 stem used on CIFAR.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from resfast.errors import ResfastError
from resfast.layers.activation import ACTIVATIONS, NETWORK_NEGATIVE_SLOPE, make_activation
from resfast.layers.conv import Conv2d
from resfast.layers.norm import norm_act
from resfast.layers.shortcut import PoolPadShortcut

Block = Literal["basic", "bottleneck"]
Shortcut = Literal["conv1", "conv3", "pool"]
Activation = Literal["relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh", "softplus"]
Norm = Literal["batch", "none"]
Init = Literal["he", "torch"]
Stem = Literal["cifar", "imagenet"]

BOTTLENECK_EXPANSION = 4


@dataclass(frozen=True)
class ResNetSpec:
    """The architecture of a :class:`ResNet`.

    Attributes:
        blocks: residual blocks per stage.
        channels: width of each stage; a bottleneck stage has four times as many output channels.
        stem: output channels of the first 3x3 convolution.
        strides: stride of each stage; empty for 1 in the first and 2 in the others.
        block: ``basic`` (two 3x3 convolutions) or ``bottleneck`` (1x1, 3x3, 1x1).
        shortcut: shortcut of blocks that change the shape: ``conv1`` or ``conv3`` (convolution of
            that kernel size and batch norm), ``pool`` (average pooling and zero-padded channels, no
            parameters).
        activation: a key of :data:`resfast.layers.activation.ACTIVATIONS`.
        negative_slope: of ``leaky_relu``.
        norm: ``batch``, or ``none`` for convolutions with a bias and no norm.
        stem_kind: ``cifar`` (3x3 convolution) or ``imagenet`` (7x7 convolution of stride 2, 3x3 max
            pool of stride 2).
        init: of convolutions: ``he`` (fan-out, arXiv:1502.01852), or ``torch`` for its default,
            uniform.
        head: sizes of dense layers between the pooled features and the logits.
        dropout: probability of dropping a feature before each dense layer.
        freeze_norm_scale: whether batch norm scales stay 1 (Jordan, arXiv:2404.00498).
        dirac_init: whether convolutions start as the identity on their first channels
            (:func:`dirac_init`).

    Raises:
        ResfastError: stages of different number, or a value out of range.
    """

    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    stem: int = 64
    strides: tuple[int, ...] = ()
    block: Block = "basic"
    shortcut: Shortcut = "conv1"
    activation: Activation = "relu"
    head: tuple[int, ...] = ()
    dropout: float = 0.0
    freeze_norm_scale: bool = False
    dirac_init: bool = False
    negative_slope: float = NETWORK_NEGATIVE_SLOPE
    norm: Norm = "batch"
    stem_kind: Stem = "cifar"
    init: Init = "he"

    def __post_init__(self) -> None:
        stages = len(self.blocks)
        if not self.strides:
            object.__setattr__(self, "strides", (1,) + (2,) * (stages - 1))
        if stages == 0 or len(self.channels) != stages or len(self.strides) != stages:
            raise ResfastError(
                f"blocks {as_text(self.blocks)}, channels {as_text(self.channels)} and strides "
                f"{as_text(self.strides)} must give the same number of stages, at least one"
            )
        for name in ("blocks", "channels", "strides", "head"):
            if any(value < 1 for value in getattr(self, name)):
                raise ResfastError(f"{name} {as_text(getattr(self, name))} must all be at least 1")
        if self.stem < 1:
            raise ResfastError(f"stem {self.stem} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ResfastError(f"dropout {self.dropout} must be at least 0 and below 1")
        check_activation(self.activation, self.negative_slope)

    def __str__(self) -> str:
        text = f"blocks {as_text(self.blocks)}  channels {as_text(self.channels)}  stem {self.stem}"
        text += f"  {self.block}" if self.block != "basic" else ""
        text += f"  shortcut {self.shortcut}" if self.shortcut != "conv1" else ""
        text += f"  norm {self.norm}" if self.norm != "batch" else ""
        text += f"  stem {self.stem_kind}" if self.stem_kind != "cifar" else ""
        return text + (f"  head {as_text(self.head)}" if self.head else "")

    @property
    def expansion(self) -> int:
        """Output channels of a block per channel of its stage."""
        return BOTTLENECK_EXPANSION if self.block == "bottleneck" else 1


def check_activation(name: str, negative_slope: float) -> None:
    """Checks an activation of a network.

    Raises:
        ResfastError: an unknown name, or a slope that is not finite.
    """
    if name not in ACTIVATIONS:
        raise ResfastError(f"activation {name!r} is unknown; choose {', '.join(ACTIVATIONS)}")
    if not math.isfinite(negative_slope):
        raise ResfastError(f"negative_slope {negative_slope} must be a finite number")


def as_text(values: tuple[int, ...]) -> str:
    """Values as on the command line: ``2,1,1``."""
    return ",".join(map(str, values)) or "(none)"


def _shortcut(spec: ResNetSpec, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if spec.shortcut == "pool":
        if out_channels < in_channels:
            raise ResfastError(
                f"shortcut 'pool' cannot narrow {in_channels} channels to {out_channels}; "
                "use 'conv1' or 'conv3', or channels that do not decrease"
            )
        return PoolPadShortcut(in_channels, out_channels, stride)
    kernel_size = 3 if spec.shortcut == "conv3" else 1
    return ConvNorm(
        OrderedDict(
            conv=_conv(spec, in_channels, out_channels, kernel_size, stride),
            bn=_norm(spec, out_channels),
        )
    )


def _conv(spec: ResNetSpec, *sizes: int) -> Conv2d:
    """A convolution of these channels, kernel size and stride, with a bias if there is no norm."""
    return Conv2d(*sizes, bias=spec.norm == "none")


def _norm(spec: ResNetSpec, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if spec.norm == "batch" else nn.Identity()


def _activation(spec: ResNetSpec) -> nn.Module:
    return make_activation(spec.activation, spec.negative_slope)


class ConvNorm(nn.Sequential):
    """``conv``, ``bn`` and, optionally, ``activation``."""

    def forward(self, x: Tensor) -> Tensor:
        return norm_act(self.conv(x), self.bn, getattr(self, "activation", "none"))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[N, Cin, H, W]`` to ``[N, C, H/stride, W/stride]``."""

    def __init__(self, spec: ResNetSpec, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(spec, in_channels, channels, 3, stride)
        self.bn1 = _norm(spec, channels)
        self.conv2 = _conv(spec, channels, channels, 3)
        self.bn2 = _norm(spec, channels)
        self.shortcut = _shortcut(spec, in_channels, channels, stride)
        self.activation = _activation(spec)

    def forward(self, x: Tensor) -> Tensor:
        out = norm_act(self.conv1(x), self.bn1, self.activation)
        return norm_act(self.conv2(out), self.bn2, self.activation, self.shortcut(x))

    @property
    def last(self) -> nn.Module:
        """The norm before the addition, or the convolution if there is no norm."""
        return self.conv2 if isinstance(self.bn2, nn.Identity) else self.bn2


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions and a shortcut, with ``4 * channels`` outputs."""

    def __init__(self, spec: ResNetSpec, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * BOTTLENECK_EXPANSION
        self.conv1 = _conv(spec, in_channels, channels, 1)
        self.bn1 = _norm(spec, channels)
        self.conv2 = _conv(spec, channels, channels, 3, stride)
        self.bn2 = _norm(spec, channels)
        self.conv3 = _conv(spec, channels, out_channels, 1)
        self.bn3 = _norm(spec, out_channels)
        self.shortcut = _shortcut(spec, in_channels, out_channels, stride)
        self.activation = _activation(spec)

    def forward(self, x: Tensor) -> Tensor:
        out = norm_act(self.conv1(x), self.bn1, self.activation)
        out = norm_act(self.conv2(out), self.bn2, self.activation)
        return norm_act(self.conv3(out), self.bn3, self.activation, self.shortcut(x))

    @property
    def last(self) -> nn.Module:
        """The norm before the addition, or the convolution if there is no norm."""
        return self.conv3 if isinstance(self.bn3, nn.Identity) else self.bn3


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}


class ResNet(nn.Module):
    """A residual network for small images.

    Args:
        spec: the architecture.
        classes: number of logits.

    Shape: float ``[N, 3, H, W]`` (fastest in ``channels_last``) to ``[N, classes]``, for any H and
    W that leave a last feature map of at least 1x1.

    Norms start at scale 1, bias 0.

    Raises:
        ResfastError: fewer than two classes.
    """

    def __init__(self, spec: ResNetSpec, classes: int = 10) -> None:
        super().__init__()
        if classes < 2:
            raise ResfastError(f"classes {classes} must be at least 2")
        self.spec = spec
        self.classes = classes
        self.stem = ConvNorm(
            OrderedDict(
                conv=_conv(spec, 3, spec.stem, *((3,) if spec.stem_kind == "cifar" else (7, 2))),
                bn=_norm(spec, spec.stem),
                activation=_activation(spec),
            )
        )
        if spec.stem_kind == "imagenet":
            self.stem = nn.Sequential(self.stem, nn.MaxPool2d(3, 2, 1))
        block = BLOCKS[spec.block]
        stages, width = [], spec.stem
        for blocks, channels, stride in zip(spec.blocks, spec.channels, spec.strides, strict=True):
            stage = []
            for index in range(blocks):
                stage.append(block(spec, width, channels, stride if index == 0 else 1))
                width = channels * spec.expansion
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        head: list[nn.Module] = [nn.Flatten()]
        for size in spec.head:
            head += [*_dropout(spec), nn.Linear(width, size), _activation(spec)]
            width = size
        head += [*_dropout(spec), nn.Linear(width, classes)]
        self.head = nn.Sequential(*head)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and self.spec.init == "he":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.spec.dirac_init:
            dirac_init(self)
        if self.spec.freeze_norm_scale:
            freeze_norm_scales(self)

    def zero_init_residual(self) -> None:
        """Zeroes the last scale (or filters) of every block, which then starts as its shortcut.

        Source: Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677, section 5.1.
        """
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(self.stem(x))))

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that gives the logits."""
        return self.head[-1]

    def embed(self, x: Tensor) -> Tensor:
        """The features of each image that the last layer classifies, ``[N, features]``."""
        return self.head[:-1](self.pool(self.stages(self.stem(x))))

    def classify(self, features: Tensor) -> Tensor:
        """The logits of features from :meth:`embed`, ``[N, classes]``."""
        return self.last_layer(features)


def _dropout(spec: ResNetSpec) -> list[nn.Module]:
    return [nn.Dropout(spec.dropout)] if spec.dropout > 0 else []


def dirac_init(model: nn.Module) -> None:
    """Sets the first filters of each convolution to the identity on its input channels.

    The number of these filters is the smaller of input and output channels; all other weights are
    unchanged. Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight[: module.in_channels])


def freeze_norm_scales(model: nn.Module) -> None:
    """Freezes the scale of every batch norm at its initial value, 1.

    Sources: Page, "How to Train Your ResNet 8: Bag of tricks" (myrtle.ai, 2019); Jordan, "94% on
    CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, including frozen ones."""
    return sum(p.numel() for p in model.parameters())
