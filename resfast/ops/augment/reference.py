"""Reference implementations in plain PyTorch, against which the kernels are tested.

They run on any device, and replace the C++ kernels if the extension was not built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv import reference as conv_reference

_MASK32 = 0xFFFFFFFF


def philox(indices: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    """Philox 4x32-10; arguments and result as for :func:`resfast.ops.philox.op.philox`."""
    low = indices & _MASK32
    words = [
        low,
        (indices >> 32) & _MASK32,
        torch.full_like(low, epoch),
        torch.full_like(low, stream),
    ]
    key = [seed & _MASK32, (seed >> 32) & _MASK32]
    for _ in range(10):
        # The products wrap modulo 2^64; shifting and masking still extracts both halves.
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            ((second >> 32) & _MASK32) ^ words[1] ^ key[0],
            second & _MASK32,
            ((first >> 32) & _MASK32) ^ words[3] ^ key[1],
            first & _MASK32,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK32, (key[1] + 0xBB67AE85) & _MASK32]
    return torch.stack(words)


def augment(
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
    check: bool = True,
) -> Tensor:
    """The operator ``resfast::augment``; see :mod:`resfast.ops.augment.op` for its arguments."""

    def prepared(rows: Tensor) -> Tensor:  # float32 [B, H, W, C], normalized
        if affine is not None:
            pixels = _bilinear(images, rows, affine[rows], zero_padding)
        else:
            pixels = _shifted(
                images,
                rows,
                None if shift is None else shift[rows],
                None if flip is None else flip[rows],
                zero_padding,
            )
        if color is not None:
            matrix = color[rows]
            pixels = torch.einsum("bhwc,bdc->bhwd", pixels, matrix[:, :, :-1])
            pixels = (pixels + matrix[:, None, None, :, -1]).clamp(0, 255)
        pixels = (pixels - offset) * scale
        if cutout is not None:
            pixels = torch.where(_inside(cutout[rows], images)[..., None], 0.0, pixels)
        return pixels

    result = prepared(indices)
    if partner is not None and weight is not None and box is not None:
        own = torch.where(_inside(box, images), 0.0, weight[:, None, None])[..., None]
        result = own * result + (1 - own) * prepared(partner)
    return result.to(dtype).permute(0, 3, 1, 2)


def _inside(box: Tensor, images: Tensor) -> Tensor:
    """bool ``[B, H, W]`` for int32 ``[B, 4]`` boxes of top, left, bottom, right."""
    height, width = images.shape[1:3]
    y = torch.arange(height, device=images.device)[:, None]
    x = torch.arange(width, device=images.device)
    top, left, bottom, right = box[:, :, None, None].unbind(1)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def _shifted(
    images: Tensor, rows: Tensor, shift: Tensor | None, flip: Tensor | None, zero_padding: bool
) -> Tensor:
    height, width = images.shape[1:3]
    y = torch.arange(height, device=images.device).expand(len(rows), -1)
    x = torch.arange(width, device=images.device).expand(len(rows), -1)
    if flip is not None:
        x = torch.where(flip[:, None], width - 1 - x, x)
    if shift is not None:
        y, x = y + shift[:, :1], x + shift[:, 1:]
    return _fetch(images, rows, y[:, :, None], x[:, None, :], zero_padding)


def _bilinear(images: Tensor, rows: Tensor, affine: Tensor, zero_padding: bool) -> Tensor:
    height, width = images.shape[1:3]
    y = torch.arange(height, device=images.device, dtype=torch.float32)[:, None]
    x = torch.arange(width, device=images.device, dtype=torch.float32)
    (yy, yx, y0), (xy, xx, x0) = (row.unbind(1) for row in affine[..., None, None].unbind(1))
    source_y, source_x = yy * y + yx * x + y0, xy * y + xx * x + x0
    top, left = source_y.floor(), source_x.floor()
    down, right = (source_y - top)[..., None], (source_x - left)[..., None]
    top, left = top.long(), left.long()
    taps = [
        _fetch(images, rows, top + dy, left + dx, zero_padding) for dy in (0, 1) for dx in (0, 1)
    ]
    upper = taps[0] * (1 - right) + taps[1] * right
    lower = taps[2] * (1 - right) + taps[3] * right
    return upper * (1 - down) + lower * down


def _fetch(images: Tensor, rows: Tensor, y: Tensor, x: Tensor, zero_padding: bool) -> Tensor:
    """float32 ``[B, H, W, C]`` pixels at ``y`` and ``x``, which broadcast to ``[B, H, W]``."""
    height, width = images.shape[1:3]
    rows = rows[:, None, None]
    if not zero_padding:
        return images[rows, _reflect(y, height), _reflect(x, width)].float()
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixels = images[rows, y.clamp(0, height - 1), x.clamp(0, width - 1)].float()
    return pixels * inside[..., None]


def _reflect(position: Tensor, size: int) -> Tensor:
    """Reflects once at either border without repeating it, then clamps to the image."""
    position = position.abs()
    position = torch.where(position >= size, 2 * (size - 1) - position, position)
    return position.clamp(0, size - 1)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`resfast.ops.norm_act.op.batch_norm_act`; any floating-point dtype."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    values = (F.max_pool2d(x, 2) if pool else x).to(compute_dtype)
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    out = F.batch_norm(
        values,
        None,
        None,
        *(None if t is None else t.to(compute_dtype) for t in (weight, bias)),
        True,
        0,
        eps,
    )
    if residual is not None:
        out = out + residual.to(compute_dtype)
    out = conv_reference.ACTIVATIONS[activation](out, negative_slope)
    return out.to(x.dtype), mean.detach(), var.detach()
