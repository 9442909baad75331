"""Convolutional networks for training in seconds, described by a :class:`SpeedNetSpec`.

Shapes: images are ``[N, 3, H, W]``, logits ``[N, classes]``. A first layer of frozen whitening
filters is followed by stages of 3x3 convolutions, the first of each with a 2x2 max pool, then a
global pool and a linear layer without bias. Sources: Page, "How to Train Your ResNet" (myrtle.ai,
2018 to 2019); Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498, whose
airbench94 and airbench96 are built from the same layers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast.errors import ResfastError
from resfast.layers.activation import ACTIVATIONS, NETWORK_NEGATIVE_SLOPE, make_activation
from resfast.layers.conv import Conv2d
from resfast.layers.norm import norm_act
from resfast.models.resnet import (
    Activation,
    as_text,
    dirac_init,
    freeze_norm_scales,
)
from resfast.ops.frozen_conv import op as frozen_conv
from resfast.ops.global_pool import op as global_pool

FinalPool = Literal["max", "avg", "both"]
Padding = Literal["valid", "same"]
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class SpeedNetSpec:
    """The architecture of a :class:`SpeedNet`.

    Attributes:
        channels: width of each stage.
        convolutions: 3x3 convolutions per stage.
        strides: 2 for a 2x2 max pool after the first convolution of a stage, 1 for none; empty
            for 2 in all.
        residual: whether stages of at least three convolutions have an identity shortcut around
            all but the first (airbench96).
        whitening: whether the first convolution has a bias and frozen weights computed from
            training images (:mod:`resfast.layers.whitening`); otherwise it is learned, without
            bias, and followed by a batch norm. Its shape is the same in both cases.
        whitening_kernel: height and width in pixels of the first convolution's kernel.
        whitening_padding: ``valid`` for none, or ``same`` for zero padding that keeps the image
            size; an even kernel gets one more row and column after the image than before it.
        whitening_width: number of eigenvectors, each used as two filters of opposite sign; 0 for
            all ``3 * whitening_kernel**2``.
        activation: a key of :data:`resfast.layers.activation.ACTIVATIONS` (leaky ReLU has slope
            0.1), after every norm and after the whitening.
        final_pool: maximum (``max``) or average (``avg``) of each channel before the head, or
            ``both``, the maxima first.
        logit_scale: factor applied to the logits.
        head_std: standard deviation that the head's initial weight is scaled to; 0 for PyTorch's
            default, ``(3 * features) ** -0.5``.
        norm_momentum: momentum of the running statistics of batch norms.
        norm_eps: added to the variance in batch norms.
        freeze_norm_scale: whether batch norm scales stay 1 (airbench94).
        dirac_init: whether convolutions other than the first start as the identity on their first
            channels (:func:`resfast.models.resnet.dirac_init`).

    Raises:
        ResfastError: stages of different number, or a value out of range.
    """

    channels: tuple[int, ...]
    convolutions: tuple[int, ...]
    strides: tuple[int, ...] = ()
    residual: bool = False
    whitening: bool = True
    whitening_kernel: int = 2
    whitening_padding: Padding = "valid"
    whitening_width: int = 0
    activation: Activation = "gelu"
    final_pool: FinalPool = "max"
    logit_scale: float = 1 / 9
    head_std: float = 0.0
    norm_momentum: float = 0.4
    norm_eps: float = 1e-5
    freeze_norm_scale: bool = True
    dirac_init: bool = True

    def __post_init__(self) -> None:
        stages = len(self.channels)
        if not self.strides:
            object.__setattr__(self, "strides", (2,) * stages)
        if stages == 0 or len(self.convolutions) != stages or len(self.strides) != stages:
            raise ResfastError(
                f"channels {as_text(self.channels)}, convolutions {as_text(self.convolutions)} and "
                f"strides {as_text(self.strides)} must give the same number of stages, at least one"
            )
        for name in ("channels", "convolutions"):
            if min(getattr(self, name)) < 1:
                raise ResfastError(f"{name} {as_text(getattr(self, name))} must all be at least 1")
        if not set(self.strides) <= {1, 2}:
            raise ResfastError(
                f"strides {as_text(self.strides)} must all be 2 (a max pool) or 1 (no max pool) in "
                "a speednet"
            )
        if self.whitening_kernel < 1:
            raise ResfastError(
                f"whitening_kernel {self.whitening_kernel} must be at least 1; to learn the first "
                "convolution, set whitening to False"
            )
        max_width = self.patch_size if self.whitening else None
        if self.whitening_width < 0 or (max_width and self.whitening_width > max_width):
            raise ResfastError(
                f"whitening_width {self.whitening_width} must be 1 to {self.patch_size}, the "
                f"values in a patch of {self.whitening_kernel}x{self.whitening_kernel} pixels, or "
                "0 for all of them"
            )
        for name, known in (
            ("activation", tuple(ACTIVATIONS)),
            ("final_pool", get_args(FinalPool)),
            ("whitening_padding", get_args(Padding)),
        ):
            if getattr(self, name) not in known:
                raise ResfastError(
                    f"{name} {getattr(self, name)!r} is unknown; choose {', '.join(known)}"
                )
        for name, ok, expected in (
            ("logit_scale", 0 < self.logit_scale < float("inf"), "a positive number"),
            ("head_std", 0 <= self.head_std < float("inf"), "finite and at least 0"),
            ("norm_momentum", 0 < self.norm_momentum <= 1, "above 0 and at most 1"),
            ("norm_eps", 0 < self.norm_eps < float("inf"), "a positive number"),
        ):
            if not ok:
                raise ResfastError(f"{name} {getattr(self, name)} must be {expected}")

    def __str__(self) -> str:
        text = (
            f"convolutions {as_text(self.convolutions)}  channels {as_text(self.channels)}  "
            f"stem {self.stem}"
        )
        text += "  residual" if self.residual else ""
        return text + ("" if self.whitening else "  learned stem")

    @property
    def patch_size(self) -> int:
        """Values in an input patch of the first convolution, and so the number of eigenvectors."""
        return IMAGE_CHANNELS * self.whitening_kernel**2

    @property
    def stem(self) -> int:
        """Output channels of the first convolution."""
        return 2 * (self.whitening_width or self.patch_size)

    @property
    def least_image_size(self) -> int:
        """Height and width in pixels of the smallest image that leaves no pool's output empty."""
        return math.prod(self.strides) + self.whitening_kernel - 1 - sum(self.zeros)

    @property
    def zeros(self) -> tuple[int, int]:
        """Rows and columns of zeros before and after the image."""
        if self.whitening_padding == "valid":
            return 0, 0
        return (self.whitening_kernel - 1) // 2, self.whitening_kernel // 2


class SpeedStage(nn.Module):
    """Convolutions of one width: ``[N, Cin, H, W]`` to ``[N, C, H // stride, W // stride]``.

    The max pool comes between the first convolution and its norm, so that the norm has a quarter of
    the values to process.
    """

    def __init__(
        self, spec: SpeedNetSpec, in_channels: int, channels: int, convolutions: int, stride: int
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * convolutions
        self.convs = nn.ModuleList(Conv2d(cin, cout, 3) for cin, cout in pairwise(widths))
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels, eps=spec.norm_eps, momentum=spec.norm_momentum)
            for _ in range(convolutions)
        )
        self.activation = make_activation(spec.activation)
        self.pool = stride == 2
        self.residual = spec.residual and convolutions >= 3

    def forward(self, x: Tensor) -> Tensor:
        x = norm_act(self.convs[0](x), self.norms[0], self.activation, pool=self.pool)
        shortcut, last = x, len(self.convs) - 1
        for index in range(1, len(self.convs)):
            residual = shortcut if self.residual and index == last else None
            x = norm_act(self.convs[index](x), self.norms[index], self.activation, residual)
        return x


class SpeedNet(nn.Module):
    """A network for small images that trains fast.

    Args:
        spec: the architecture and initialisation.
        classes: number of logits.

    Shape: float ``[N, 3, H, W]`` (fastest in ``channels_last``) to ``[N, classes]``; any H and W of
    at least ``spec.least_image_size``.

    Convolutions use PyTorch's default initialisation, then the identity if ``spec.dirac_init``. The
    whitening filters are frozen at random values until
    :func:`resfast.layers.whitening.prepare_model` computes them; their bias starts at 0.

    Raises:
        ResfastError: fewer than two classes.
    """

    def __init__(self, spec: SpeedNetSpec, classes: int = 10) -> None:
        super().__init__()
        if classes < 2:
            raise ResfastError(f"classes {classes} must be at least 2")
        self.spec = spec
        self.classes = classes
        before, after = spec.zeros
        self.extra_padding = after - before
        kernel = spec.whitening_kernel
        first = nn.Conv2d(IMAGE_CHANNELS, spec.stem, kernel, padding=before, bias=spec.whitening)
        if spec.whitening:
            self.whitening = first
            first.weight.requires_grad_(False)
            nn.init.zeros_(first.bias)
            self.activation = make_activation(spec.activation)
        else:
            norm = nn.BatchNorm2d(spec.stem, eps=spec.norm_eps, momentum=spec.norm_momentum)
            self.stem = nn.Sequential(
                OrderedDict(conv=first, bn=norm, activation=make_activation(spec.activation))
            )
        stages, width = [], spec.stem
        for channels, convolutions, stride in zip(
            spec.channels, spec.convolutions, spec.strides, strict=True
        ):
            stages.append(SpeedStage(spec, width, channels, convolutions, stride))
            width = channels
        self.stages = nn.Sequential(*stages)
        features = width * (2 if spec.final_pool == "both" else 1)
        self.head = nn.Linear(features, classes, bias=False)
        if spec.dirac_init:
            dirac_init(self.stages)
        if spec.freeze_norm_scale:
            freeze_norm_scales(self)
        if spec.head_std:
            self.head.weight.data.mul_(spec.head_std / self.head.weight.data.std())

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.embed(x))

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that gives the logits."""
        return self.head

    def embed(self, x: Tensor) -> Tensor:
        """The features of each image that the last layer classifies, ``[N, features]``."""
        return self._pooled(self.stages(self._first(x)))

    def classify(self, features: Tensor) -> Tensor:
        """The logits of features from :meth:`embed`, ``[N, classes]``."""
        return self.head(features) * self.spec.logit_scale

    def _first(self, x: Tensor) -> Tensor:
        """The first convolution and its activation."""
        if self.training and self.spec.whitening:
            before, after = self.spec.zeros
            conv, activation = self.whitening, self.spec.activation
            if frozen_conv.applies(x, conv.weight, conv.bias):
                return frozen_conv.frozen_conv_act(
                    x,
                    conv.weight,
                    conv.bias,
                    before=before,
                    after=after,
                    activation=activation,
                    negative_slope=NETWORK_NEGATIVE_SLOPE,
                )
        if self.extra_padding:
            x = F.pad(x, (0, self.extra_padding, 0, self.extra_padding))
        if self.spec.whitening:
            return self.activation(self.whitening(x))
        return norm_act(self.stem.conv(x), self.stem.bn, self.stem.activation)

    def _pooled(self, x: Tensor) -> Tensor:
        """The features of each image, ``[N, features]``."""
        if global_pool.applies(x):
            return global_pool.global_pool(x, self.spec.final_pool)
        if self.spec.final_pool == "avg":
            return x.mean((2, 3))
        # Not amax: its compiled gradient compares with the maximum and finds none if the map was
        # rounded in between. Not adaptive_max_pool2d: its CUDA gradient is slower than a
        # convolution's.
        maxima = F.max_pool2d(x, x.shape[2:]).flatten(1)
        return maxima if self.spec.final_pool == "max" else torch.cat([maxima, x.mean((2, 3))], 1)
