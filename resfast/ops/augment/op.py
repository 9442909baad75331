"""``resfast::augment``: turns uint8 images into a batch for the network in one pass.

For every image of the batch, in this order:

1. geometry: either ``shift`` and ``flip`` (whole pixels, exact) or ``affine`` (bilinear);
2. ``color``: an affine map of the pixel's channels, clamped to 0 … 255;
3. normalization: ``(pixel - offset) * scale``;
4. ``cutout``: a rectangle set to 0, the mean;
5. mixing with a second image, its partner, which goes through steps 1 to 4 with parameters of its
   own: ``w * image + (1 - w) * partner``, where w is ``weight`` outside ``box`` and 0 inside it.

All arithmetic is float32, rounded once to the result's dtype. The results of all kernels are
bit-identical, except with ``affine``, ``color`` or a mixing weight other than 0 and 1.

Shapes: N images in the data set, B in the batch, C channels (1 to 4).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ..registration import fallback, register
from . import reference
from .noise import add_noise

Padding = Literal["reflect", "zero"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS = 4

SCHEMA = (
    "augment(Tensor images, Tensor indices, Tensor offset, Tensor scale, Tensor? shift, "
    "Tensor? flip, Tensor? affine, Tensor? color, Tensor? cutout, Tensor? partner, "
    "Tensor? weight, Tensor? box, bool zero_padding, ScalarType dtype, bool check) -> Tensor"
)


@dataclass(frozen=True)
class AugmentParams:
    """Parameters of each image of a data set; None skips a step.

    Attributes:
        shift: int32 ``[N, 2]``, rows and columns, in pixels: the result's ``[y, x]`` is the
            image's ``[y + shift_y, x + shift_x]``. Less than the image's side in absolute value.
        flip: bool ``[N]``: the result is mirrored left to right; its ``[y, x]`` is the image's
            ``[y + shift_y, W - 1 - x + shift_x]``.
        affine: float32 ``[N, 2, 3]``, instead of ``shift`` and ``flip``: the result's ``[y, x]``
            is the image at ``[a00 y + a01 x + a02, a10 y + a11 x + a12]``, in pixels,
            interpolated bilinearly. Coordinates are within ``-(side - 1) … 2 (side - 1)``.
        color: float32 ``[N, C, C + 1]``: result channel d is ``sum_c color[d, c] * pixel_c +
            color[d, C]``, in units of 0 … 255, clamped to that range.
        cutout: int32 ``[N, 4]``: top, left, bottom and right (both exclusive) of a rectangle of
            the result that is set to 0 after normalization; empty where bottom <= top.
        noise: int64 ``[N]``, at least 0: key of the noise of
            :func:`resfast.ops.augment.noise.add_noise`, which is added in a separate pass.
    """

    shift: Tensor | None = None
    flip: Tensor | None = None
    affine: Tensor | None = None
    color: Tensor | None = None
    cutout: Tensor | None = None
    noise: Tensor | None = None

    def to(self, device: torch.device | str) -> AugmentParams:
        """The same parameters on ``device``."""
        return AugmentParams(**{name: _moved(value, device) for name, value in _items(self)})

    def __getitem__(self, index: Tensor) -> AugmentParams:
        """The parameters of some images."""
        return AugmentParams(
            **{name: None if value is None else value[index] for name, value in _items(self)}
        )


@dataclass(frozen=True)
class MixParams:
    """Which image each image of a batch is mixed with, and how.

    Attributes:
        partner: int64 ``[B]``, index of the second image among the N.
        weight: float32 ``[B]``, 0 to 1: weight of the image itself outside ``box``.
        box: int32 ``[B, 4]``: top, left, bottom and right (both exclusive) of the rectangle that
            shows only the partner; empty where bottom <= top.
    """

    partner: Tensor
    weight: Tensor
    box: Tensor

    def of_batch(self, indices: Tensor) -> MixParams:
        """Parameters of a batch, from one row per image of the data set.

        The weight and box of the batch's first image apply to the whole batch.

        Args:
            indices: int64 ``[B]``, the batch's images in the data set.
        """
        first, batch = indices[:1], len(indices)
        return MixParams(
            self.partner[indices],
            self.weight[first].expand(batch).contiguous(),
            self.box[first].expand(batch, 4).contiguous(),
        )

    def label_weights(self, height: int, width: int) -> Tensor:
        """Weight of each image's own label, float32 ``[B]``: the image's part of the result."""
        top, left, bottom, right = self.box.unbind(1)
        area = (bottom - top).clamp(min=0) * (right - left).clamp(min=0)
        return self.weight * (1 - area.to(torch.float32) / (height * width))


def _items(params: AugmentParams) -> list[tuple[str, Tensor | None]]:
    return [(field.name, getattr(params, field.name)) for field in fields(params)]


def _moved(value: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if value is None else value.to(device)


def normalization(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and scale, float32 ``[C]``, the operator's form of ``mean`` and ``std``.

    Args:
        mean: float32 ``[C]`` in units of pixel / 255.
        std: float32 ``[C]`` in the same units, above 0.
    """
    return mean.float() * 255, 1 / (std.float() * 255)


def augment(
    images: Tensor,
    indices: Tensor,
    params: AugmentParams | None,
    mean: Tensor,
    std: Tensor,
    *,
    mix: MixParams | None = None,
    padding: Padding = "reflect",
    dtype: torch.dtype = torch.float32,
    noise: float = 0.0,
    check: bool = True,
) -> Tensor:
    """Gathers, augments and normalizes a batch in one pass.

    Args:
        images: uint8 ``[N, H, W, C]``, contiguous, C from 1 to 4.
        indices: int64 ``[B]`` into ``images``.
        params: one row per image of ``images``; None for no augmentation.
        mean: float32 ``[C]``, in units of pixel / 255.
        std: float32 ``[C]``, in the same units.
        mix: one row per image of the batch; None for no mixing.
        padding: pixels outside an image: its mirror image (``reflect``, without repeating the
            border) or black (``zero``).
        dtype: of the result: float32, bfloat16 or float16.
        noise: standard deviation of the noise of ``params``, in units of pixel / 255.
        check: whether values (indices, shifts, coordinates, weights) are checked too. On CUDA this
            waits for the device; without it, a value out of range reads a wrong pixel.

    Returns:
        ``[B, C, H, W]`` in ``channels_last`` memory, on the device of ``images``.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape, layout or device, or a value out of range.
    """
    if padding not in ("reflect", "zero"):
        raise ValueError(f"padding {padding!r} is unknown; expected reflect or zero")
    constants = normalization(mean, std)
    params = params or AugmentParams()
    args = _arguments(images, indices, params, constants, mix, padding, dtype)
    check_arguments(*args, check=check)
    if params.noise is not None and list(params.noise.shape) != [len(images)]:
        raise ValueError(f"noise is {list(params.noise.shape)}; expected {[len(images)]}")
    return augment_unchecked(
        images, indices, params, constants, mix=mix, padding=padding, dtype=dtype, noise=noise
    )


def augment_unchecked(
    images: Tensor,
    indices: Tensor,
    params: AugmentParams,
    constants: tuple[Tensor, Tensor],
    *,
    mix: MixParams | None,
    padding: Padding,
    dtype: torch.dtype,
    noise: float = 0.0,
) -> Tensor:
    """:func:`augment` without checks, for parameters of the sampler, which are in range.

    It does not wait for the device. The arguments are those of :func:`augment`, except
    ``constants``: offset and scale of :func:`normalization`, on the device.
    """
    if params.noise is None:
        args = _arguments(images, indices, params, constants, mix, padding, dtype)
        return torch.ops.resfast.augment(*args, False)
    args = _arguments(images, indices, params, constants, mix, padding, torch.float32)
    result = torch.ops.resfast.augment(*args, False)
    return add_noise(result, params.noise[indices], noise, constants[1]).to(dtype)


def _arguments(
    images: Tensor,
    indices: Tensor,
    params: AugmentParams,
    constants: tuple[Tensor, Tensor],
    mix: MixParams | None,
    padding: Padding,
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    """The operator's arguments, except ``check``."""
    return (
        images,
        indices,
        *constants,
        params.shift,
        params.flip,
        params.affine,
        params.color,
        params.cutout,
        *((None, None, None) if mix is None else (mix.partner, mix.weight, mix.box)),
        padding == "zero",
        dtype,
    )


def check_arguments(
    images: Tensor,
    indices: Tensor,
    offset: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    flip: Tensor | None,
    affine: Tensor | None,
    color: Tensor | None,
    cutout: Tensor | None,
    partner: Tensor | None,
    weight: Tensor | None,
    box: Tensor | None,
    zero_padding: bool,
    dtype: torch.dtype,
    check: bool,
) -> None:
    """Checks the operator's arguments; their values only if ``check`` is set.

    Raises:
        TypeError: a tensor of a wrong dtype.
        ValueError: a wrong shape, layout or device, or a value out of range.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}; expected torch.uint8")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images are {list(images.shape)}; expected [N, H, W, C], none of them 0")
    count, *_, channels = images.shape
    if channels > MAX_CHANNELS:
        raise ValueError(f"images have {channels} channels; expected 1 to {MAX_CHANNELS}")
    if not images.is_contiguous():
        raise ValueError("images are not contiguous; expected [N, H, W, C] in that order in memory")
    if dtype not in DTYPES:
        expected = ", ".join(map(str, DTYPES))
        raise TypeError(f"the result's dtype is {dtype}; expected one of {expected}")
    batch = indices.shape[0] if indices.ndim == 1 else "B"
    expected = {
        "indices": (indices, torch.int64, [batch]),
        "offset": (offset, torch.float32, [channels]),
        "scale": (scale, torch.float32, [channels]),
        "shift": (shift, torch.int32, [count, 2]),
        "flip": (flip, torch.bool, [count]),
        "affine": (affine, torch.float32, [count, 2, 3]),
        "color": (color, torch.float32, [count, channels, channels + 1]),
        "cutout": (cutout, torch.int32, [count, 4]),
        "partner": (partner, torch.int64, [batch]),
        "weight": (weight, torch.float32, [batch]),
        "box": (box, torch.int32, [batch, 4]),
    }
    for name, (tensor, kind, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != kind:
            raise TypeError(f"{name} is {tensor.dtype}; expected {kind}")
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {shape}")
        if tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {images.device}, like images")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
    if affine is not None and (shift is not None or flip is not None):
        raise ValueError(
            "affine is given together with shift or flip; include them in the affine map"
        )
    if len({value is None for value in (partner, weight, box)}) > 1:
        raise ValueError("mixing needs partner, weight and box together")
    if check and indices.numel():
        _check_values(images, indices, shift, affine, partner, weight)


def _check_values(
    images: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    affine: Tensor | None,
    partner: Tensor | None,
    weight: Tensor | None,
) -> None:
    count, height, width, _ = images.shape

    def within(name: str, values: Tensor, low: float, high: float, what: str) -> None:
        least, most = (value.item() for value in torch.aminmax(values))
        if not (low <= least and most <= high):  # also when NaN
            bad = most if low <= least else least
            raise ValueError(f"{name} {bad} {what}; expected {low} to {high}")

    within("index", indices, 0, count - 1, f"is out of range for {count} images")
    used = indices
    if partner is not None:
        within("partner", partner, 0, count - 1, f"is out of range for {count} images")
        used = torch.cat([indices, partner])
    if weight is not None:
        within("weight", weight, 0.0, 1.0, "is out of range")
    outside = f"leaves the padded image of {height}x{width} pixels"
    if shift is not None:
        for axis, side in enumerate((height, width)):
            within("shift", shift[used, axis], 1 - side, side - 1, outside)
    if affine is not None:
        y = torch.tensor([0, 0, height - 1, height - 1], device=images.device)
        x = torch.tensor([0, width - 1, 0, width - 1], device=images.device)
        corners = torch.stack([y, x, torch.ones_like(y)]).float()
        reached = affine[used] @ corners  # [B, 2, 4]; an affine map has its extremes at the corners
        for axis, side in enumerate((height, width)):
            # Tolerance of a thousandth of a pixel: coordinates are rounded.
            low, high = 1 - side - 1e-3, 2 * (side - 1) + 1e-3
            within("affine coordinate", reached[:, axis], low, high, outside)


def _cpu(*args: Any) -> Tensor:
    check_arguments(*args)
    return reference.augment(*args)


def _fake(images: Tensor, indices: Tensor, *args: Any) -> Tensor:
    dtype = args[-2]
    height, width, channels = images.shape[1:]
    shape = (indices.shape[0], height, width, channels)
    return images.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)


def _cuda(images: Tensor, indices: Tensor, *args: Any) -> Tensor:
    from . import triton as triton_augment

    check_arguments(images, indices, *args)
    return triton_augment.augment(images, indices, *args[:-1])


register(SCHEMA, cpu=fallback(_cpu), cuda=_cuda, fake=_fake, opaque=True)
