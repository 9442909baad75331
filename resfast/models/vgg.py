"""Networks of convolutions, max pools and dense layers, described by a :class:`VGGSpec`.

Shapes: images are ``[N, 3, H, W]`` of one size, logits ``[N, classes]``. Each stage is some 3x3
convolutions and a 2x2 max pool; the last map is flattened. Source: Simonyan and Zisserman,
arXiv:1409.1556, whose network A, for CIFAR's image size, is the preset ``vgg-a``.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from resfast.errors import ResfastError
from resfast.layers.activation import NETWORK_NEGATIVE_SLOPE, make_activation
from resfast.layers.conv import Conv2d
from resfast.layers.norm import norm_act
from resfast.models.resnet import (
    Activation,
    Norm,
    as_text,
    check_activation,
    freeze_norm_scales,
)

IMAGE_SIZE = 32


@dataclass(frozen=True)
class VGGSpec:
    """The architecture of a :class:`VGG`.

    Attributes:
        channels: width of each stage.
        convolutions: 3x3 convolutions per stage, each with a bias.
        norm: ``batch`` for a batch norm after each convolution, or ``none``.
        activation: after each convolution and dense layer but the last.
        negative_slope: of ``leaky_relu``.
        head: sizes of dense layers between the flattened map and the logits.
        dropout: probability of dropping a feature before each dense layer.

    Raises:
        ResfastError: stages of different number, or a value out of range.
    """

    channels: tuple[int, ...]
    convolutions: tuple[int, ...]
    norm: Norm = "none"
    activation: Activation = "relu"
    negative_slope: float = NETWORK_NEGATIVE_SLOPE
    head: tuple[int, ...] = ()
    dropout: float = 0.0
    freeze_norm_scale: bool = False

    def __post_init__(self) -> None:
        if not self.channels or len(self.channels) != len(self.convolutions):
            raise ResfastError(
                f"channels {as_text(self.channels)} and convolutions {as_text(self.convolutions)} "
                "must give the same number of stages, at least one"
            )
        for name in ("channels", "convolutions", "head"):
            if any(value < 1 for value in getattr(self, name)):
                raise ResfastError(f"{name} {as_text(getattr(self, name))} must all be at least 1")
        if not 0 <= self.dropout < 1:
            raise ResfastError(f"dropout {self.dropout} must be at least 0 and below 1")
        check_activation(self.activation, self.negative_slope)

    def __str__(self) -> str:
        text = f"convolutions {as_text(self.convolutions)}  channels {as_text(self.channels)}"
        text += f"  norm {self.norm}" if self.norm != "none" else ""
        text += f"  head {as_text(self.head)}" if self.head else ""
        return text + (f"  dropout {self.dropout:g}" if self.dropout else "")

    @property
    def least_image_size(self) -> int:
        """Height and width in pixels of the smallest images that leave a map of one pixel."""
        return 2 ** len(self.channels)


class VGG(nn.Module):
    """Convolutions, max pools and dense layers.

    Args:
        spec: the architecture.
        classes: number of logits.
        image_size: height and width of the images, in pixels, on which the first dense layer
            depends.

    Shape: float ``[N, 3, image_size, image_size]`` to ``[N, classes]``; another image size is
    accepted only if it leaves a last map of the same size.

    Initialised as by torch; norms start at scale 1, bias 0.

    Raises:
        ResfastError: fewer than two classes, or images that are too small.
    """

    def __init__(self, spec: VGGSpec, classes: int = 10, image_size: int = IMAGE_SIZE) -> None:
        super().__init__()
        if classes < 2:
            raise ResfastError(f"classes {classes} must be at least 2")
        side = image_size // spec.least_image_size
        if side < 1:
            raise ResfastError(
                f"images of {image_size}x{image_size} pixels are too small for "
                f"{len(spec.channels)} max pools; use at least {spec.least_image_size}"
            )
        self.spec, self.classes = spec, classes
        layers: list[nn.Module] = []
        width = 3
        for channels, count in zip(spec.channels, spec.convolutions, strict=True):
            for _ in range(count):
                layers.append(_Conv(spec, width, channels))
                width = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        head: list[nn.Module] = [nn.Flatten()]
        width *= side * side
        for size in (*spec.head, classes):
            if spec.dropout:
                head.append(nn.Dropout(spec.dropout))
            head += [nn.Linear(width, size), make_activation(spec.activation, spec.negative_slope)]
            width = size
        self.head = nn.Sequential(*head[:-1])
        if spec.freeze_norm_scale:
            freeze_norm_scales(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that gives the logits."""
        return self.head[-1]

    def embed(self, x: Tensor) -> Tensor:
        """The features of each image that the last layer classifies, ``[N, features]``."""
        return self.head[:-1](self.features(x))

    def classify(self, features: Tensor) -> Tensor:
        """The logits of features from :meth:`embed`, ``[N, classes]``."""
        return self.last_layer(features)


class _Conv(nn.Sequential):
    """A convolution, ``bn`` if there is one, and ``activation``."""

    def __init__(self, spec: VGGSpec, in_channels: int, channels: int) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["conv"] = Conv2d(in_channels, channels, 3, bias=True)
        if spec.norm == "batch":
            parts["bn"] = nn.BatchNorm2d(channels)
        parts["activation"] = make_activation(spec.activation, spec.negative_slope)
        super().__init__(parts)

    def forward(self, x: Tensor) -> Tensor:
        bn = getattr(self, "bn", None)
        x = self.conv(x)
        return self.activation(x) if bn is None else norm_act(x, bn, self.activation)
