"""Named networks. The comments give parameter counts for 10 classes, which a test asserts."""

from __future__ import annotations

from torch import nn

from resfast.errors import ResfastError, nearest
from resfast.models.imported import KINDS, ImportedSpec, build_imported, is_imported
from resfast.models.resnet import ResNet, ResNetSpec
from resfast.models.speednet import SpeedNet, SpeedNetSpec
from resfast.models.vgg import IMAGE_SIZE, VGG, VGGSpec

Spec = ResNetSpec | SpeedNetSpec | VGGSpec | ImportedSpec
"""The architecture of a network."""

WIDE = (64, 128, 256, 512)
HALF = (32, 64, 128, 256)
NARROW = (16, 64, 128, 256)
VGG_A = (64, 128, 256, 512, 512)

PRESETS: dict[str, Spec] = {
    "resnet18": ResNetSpec((2, 2, 2, 2), WIDE),  # 11,173,962
    "resnet34": ResNetSpec((3, 4, 6, 3), WIDE),  # 21,282,122
    "resnet50": ResNetSpec((3, 4, 6, 3), WIDE, block="bottleneck"),  # 23,520,842
    "resnet101": ResNetSpec((3, 4, 23, 3), WIDE, block="bottleneck"),  # 42,512,970
    "resnet152": ResNetSpec((3, 8, 36, 3), WIDE, block="bottleneck"),  # 58,156,618
    "resnet-2111": ResNetSpec((2, 1, 1, 1), WIDE),  # 4,977,226
    "resnet-1111": ResNetSpec((1, 1, 1, 1), WIDE),  # 4,903,242
    "resnet-6543-half": ResNetSpec((6, 5, 4, 3), HALF, stem=32),  # 4,865,322
    "resnet-2222-half": ResNetSpec((2, 2, 2, 2), HALF, stem=32),  # 2,797,610
    "resnet-2222-half-identity": ResNetSpec(  # 2,753,706
        (2, 2, 2, 2), HALF, stem=32, shortcut="pool"
    ),
    "resnet-222": ResNetSpec((2, 2, 2), (64, 128, 256)),  # 2,777,674
    "resnet-222-identity": ResNetSpec((2, 2, 2), (64, 128, 256), shortcut="pool"),  # 2,735,946
    "resnet-narrow": ResNetSpec((2, 2, 2, 2), NARROW),  # 2,768,490
    "resnet-narrow-skip3": ResNetSpec((2, 2, 2, 2), NARROW, shortcut="conv3"),  # 3,112,554
    "resnet-narrow-dense": ResNetSpec(  # 3,151,786
        (2, 2, 2, 2), NARROW, shortcut="conv3", head=(128, 64)
    ),
    "resnet-deep8": ResNetSpec(  # 4,997,386
        (2,) * 8, (16, 32, 64, 96, 128, 160, 192, 220), strides=(1, 2) * 4
    ),
    "resnet-224": ResNetSpec((2, 2, 4), (64, 128, 256)),  # 5,139,018
    "resnet-224-250": ResNetSpec((2, 2, 4), (64, 128, 250)),  # 4,939,902
    "resnet-224-251": ResNetSpec((2, 2, 4), (64, 130, 251)),  # 4,993,025
    "resnet-453": ResNetSpec((4, 5, 3), (64, 128, 256)),  # 4,992,586
    "resnet-member1m": ResNetSpec((2, 2, 2, 2), (32, 64, 96, 120), stem=32),  # 987,402
    "speednet-94": SpeedNetSpec(  # 2,487,504
        (64, 192, 256), (3, 3, 3), residual=True, whitening_width=8, final_pool="both"
    ),
    "speednet-96": SpeedNetSpec(  # 3,358,992
        (96, 256, 256), (3, 3, 3), residual=True, whitening_width=8, final_pool="both"
    ),
    "cnn": VGGSpec((32, 64), (1, 1), head=(120, 84)),  # 522,046
    "vgg-a": VGGSpec(VGG_A, (1, 1, 2, 2, 2), head=(512, 512)),  # 9,750,922
    "vgg-a-bn": VGGSpec(VGG_A, (1, 1, 2, 2, 2), "batch", head=(512, 512)),  # 9,756,426
    "vgg-a-light": VGGSpec((16, 32), (1, 1), head=(128, 128)),  # 285,162
}
"""Architectures by preset name."""

DEFAULT_MODEL = "resnet-2111"


def preset(name: str) -> Spec:
    """The architecture of a preset, or a network from elsewhere (:mod:`resfast.models.imported`).

    Raises:
        ResfastError: an unknown name; the message suggests the nearest known one.
    """
    if is_imported(name):
        return ImportedSpec(name)
    if name.endswith(".py"):
        raise ResfastError(f"model {name!r} names a file; add its function, {name}:FUNCTION")
    if name not in PRESETS:
        raise ResfastError(
            f"unknown model {name!r}{nearest(name, PRESETS)} "
            f"(known: {', '.join(PRESETS)}; or 'resnet' with your own blocks and channels, or "
            "'speednet' or 'vgg' with your own convolutions and channels, or "
            f"{KINDS})"
        )
    return PRESETS[name]


def create_model(name: str = DEFAULT_MODEL, *, classes: int = 10) -> nn.Module:
    """A freshly initialised preset.

    Args:
        name: a key of :data:`PRESETS`, ``torchvision:NAME``, ``timm:NAME``, or ``FILE.py:FUNCTION``
            of a file given to :func:`resfast.trust`.
        classes: number of logits.

    Returns:
        A :class:`~resfast.models.resnet.ResNet`, :class:`~resfast.models.speednet.SpeedNet` or
        :class:`~resfast.models.vgg.VGG` (for images of 32x32 pixels), or another network, in
        training mode on the CPU, in float32.

    Raises:
        ResfastError: an unknown name or fewer than two classes.
    """
    return build_model(preset(name), classes)


def build_model(spec: Spec, classes: int = 10, image_size: int | None = None) -> nn.Module:
    """A freshly initialised network.

    Args:
        spec: the architecture.
        classes: number of logits.
        image_size: height and width in pixels of images it must accept; None for no check, and
            for 32 in a VGG.

    Returns:
        As :func:`create_model`.

    Raises:
        ResfastError: fewer than two classes, images too small for the network, or a network from
            elsewhere that cannot be built.
    """
    if isinstance(spec, ImportedSpec):
        return build_imported(spec, classes, image_size)
    if isinstance(spec, ResNetSpec):
        return ResNet(spec, classes)
    if isinstance(spec, VGGSpec):
        return VGG(spec, classes, IMAGE_SIZE if image_size is None else image_size)
    if image_size is not None and image_size < spec.least_image_size:
        raise ResfastError(
            f"images of {image_size}x{image_size} pixels are too small for this network, which "
            f"needs at least {spec.least_image_size}; use a larger --image-size or fewer --strides "
            "of 2"
        )
    return SpeedNet(spec, classes)
