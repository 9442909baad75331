"""``resfast::batch_norm_act`` and its backward on CUDA: two Triton kernels each.

The first kernel reads the maps once and each of its programs writes sums per channel to
``partials``. In the second kernel every program adds these up, and the maps are read once more.
With pooling, the first forward kernel reads x and writes the pooled x, which the others work on;
the last backward kernel writes the gradient of the full x. The order of the additions is fixed, so
results are reproducible on one kind of GPU. Nothing synchronizes with the device.

Maps are treated as matrices: a row is a pixel of ``[N, H, W]``, a column a channel. The grid is
blocks of channels by ``programs``; tiles of ``ROWS * UNROLL`` rows are distributed round-robin over
the programs. The second kernel processes its tiles in reverse order, because the last tiles of the
first are still in the cache. Tiles are prefetched by one iteration; otherwise the compiler would
delay loads to their first use and leave memory idle.

Partial variances are combined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise
algorithm for computing sample variances", 1979. The error function is formula 7.1.26 of Abramowitz
and Stegun, "Handbook of Mathematical Functions", accurate to 1.5e-7.

Long because the four kernels and their launchers share one layout of the rows and one set of
inlined device functions, and a change to one is a change to all.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conv.reference import channels_last, new_map

WARPS = 16
PROGRAMS_PER_MULTIPROCESSOR = 1
"""Maximum; kept low because the second kernels read the sums of every program."""
PARTS = 64
"""Number of programs whose sums are read at once."""
STATISTICS, POOLING, APPLY, APPLY_TO_TWO = 4, 2, 4, 2
SUMS, SUMS_OF_THREE, GRADIENT, UNPOOLING = 2, 1, 2, 1
"""``UNROLL`` of the kernels: 16-byte vectors of each map that a thread reads at once, limited by
the 128 registers per thread that are available with this many warps."""
INTEGERS = ["rows", "units", "programs", "height", "width"]
"""Arguments excluded from specialization."""


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _sum(values):
    return tl.reduce(values, 0, _plus, keep_dims=True)


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _normal(z):
    """The CDF of the standard normal distribution at z, and exp(-z^2 / 2)."""
    root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(z))
    t = root * root  # cheaper than a division
    power = tl.exp2(z * z * -0.72134752)
    tail = 0.5307027 * t - 0.7265760
    tail = tail * t + 0.7107069
    tail = tail * t - 0.1422484
    tail = (tail * t + 0.1274148) * t * power
    return tl.where(z > 0, 1.0 - tail, tail), power


@triton.jit
def _logistic(z):
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.44269504))
    return root * root


@triton.jit
def _activated(z, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)  # NaN stays, as in torch
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z < 0, z * slope, z)
    elif ACTIVATION == "silu":
        z = z * _logistic(z)
    elif ACTIVATION == "gelu":
        normal, _ = _normal(z)
        z = z * normal
    return z


@triton.jit
def _before_activation(grad, z, slope, ACTIVATION: tl.constexpr):
    """The gradient with respect to z; relu and leaky_relu use only the sign of z."""
    if ACTIVATION == "relu":
        grad = tl.where(z <= 0, 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(z > 0, grad, grad * slope)
    elif ACTIVATION == "silu":
        s = _logistic(z)
        grad = grad * (s + z * s * (1.0 - s))
    elif ACTIVATION == "gelu":
        normal, power = _normal(z)
        grad = grad * (normal + z * power * 0.39894228)
    return grad


@triton.jit
def _block(units, VECTOR: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr):
    """Total number of channels, the channels of this program, and which of these exist."""
    channels = units * VECTOR  # tells the compiler that VECTOR divides it
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = tl.full((1, CHANNELS), 1, tl.int1) if WHOLE else column < channels
    return channels, column, inside


@triton.jit
def _mask(row_exists, inside, WHOLE: tl.constexpr):
    return row_exists if WHOLE else row_exists & inside


@triton.jit
def _per_channel(values, column, inside, default):
    """float32 row ``[1, CHANNELS]``; ``default`` if ``values`` is None."""
    if values is None:
        return tl.full(column.shape, default, tl.float32)
    else:
        return tl.load(values + column, mask=inside, other=0)


@triton.jit
def _corner(row, height, width, rows, columns):
    """First pixel of a pooling window, its image, and its row and column among the windows."""
    row, columns, rows = row.to(tl.uint32), columns.to(tl.uint32), rows.to(tl.uint32)
    line = row // columns
    image = line // rows
    y, x = (line - image * rows).to(tl.int32), (row - line * columns).to(tl.int32)
    return (image.to(tl.int32) * height + 2 * y) * width + 2 * x, image.to(tl.int32), y, x


@triton.jit
def _next_down(start, step, rows):
    """Start of the preceding tile, and the number of rows; 0 rows if there is no such tile."""
    return tl.maximum(start - step, 0), tl.where(start >= step, rows, 0)


@triton.jit
def _read(
    maps,
    start,
    rows,
    channels,
    column,
    inside,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A tile of each map from row ``start``, in ``UNROLL`` parts; zeros after the last row."""
    values = ()
    for j in tl.static_range(len(maps)):
        first = maps[j] + start.to(tl.int64) * channels
        for i in tl.static_range(UNROLL):
            row = i * ROWS + tl.arange(0, ROWS)[:, None]
            mask = _mask(start + row < rows, inside, WHOLE)
            values += (tl.load(first + row * channels + column, mask=mask, other=0),)
    return values


@triton.jit
def _read_pooled(
    maps,
    start,
    windows,
    height,
    width,
    channels,
    column,
    inside,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """As :func:`_read`, but from window ``start`` of the windows that cover the unpooled map."""
    values = ()
    sources = ()
    masks = ()
    for i in tl.static_range(UNROLL):
        window = start + i * ROWS + tl.arange(0, ROWS)[:, None]
        _pixel, image, y, x = _corner(window, height, width, (height + 1) // 2, (width + 1) // 2)
        exists = (window < windows) & (y < height // 2) & (x < width // 2)
        row = (image * (height // 2) + y) * (width // 2) + x
        sources += (row.to(tl.int64) * channels + column,)
        masks += (_mask(exists, inside, WHOLE),)
    for j in tl.static_range(len(maps)):
        for i in tl.static_range(UNROLL):
            fill = 4 * (j == 2)  # in `where`, 4 is not a position in a window
            values += (tl.load(maps[j] + sources[i], mask=masks[i], other=fill),)
    return values


@triton.jit(do_not_specialize=INTEGERS)
def _statistics_kernel(
    partials,  # float32 [programs, 2, C]: means, and sums of squared differences from them
    pooled,
    where,
    x,
    rows,
    units,
    height,
    width,
    POOL: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    channels, column, inside = _block(units, VECTOR, WHOLE, CHANNELS)
    program, programs = tl.program_id(1), tl.num_programs(1)
    local = tl.arange(0, ROWS)[:, None]
    tiles = (rows + ROWS * UNROLL - 1) // (ROWS * UNROLL)
    first = program * (ROWS * UNROLL)
    if POOL:
        first = _corner(first, height, width, height // 2, width // 2)[0]
    # Subtracts some value of the channel, so that a large mean costs no precision.
    shift = tl.load(x + first.to(tl.int64) * channels + column, mask=inside, other=0)
    shift = shift.to(tl.float32)
    total = tl.full((ROWS, CHANNELS), 0, tl.float32)
    square = tl.full((ROWS, CHANNELS), 0, tl.float32)
    count = 0
    tile = program
    while tile < tiles:
        start = tile * (ROWS * UNROLL)
        count += tl.minimum(rows - start, ROWS * UNROLL)
        at = start.to(tl.int64) * channels
        values = ()
        for i in tl.static_range(UNROLL):
            row = i * ROWS + local
            mask = _mask(start + row < rows, inside, WHOLE)
            if POOL:
                corner = _corner(start + row, height, width, height // 2, width // 2)[0]
                source = x + corner.to(tl.int64) * channels + column
                for side in tl.static_range(4):
                    step = (side // 2 * width + side % 2) * channels
                    values += (tl.load(source + step, mask=mask, other=0),)
            else:
                values += (tl.load(x + at + row * channels + column, mask=mask, other=0),)
        for i in tl.static_range(UNROLL):
            row = i * ROWS + local
            mask = _mask(start + row < rows, inside, WHOLE)
            if POOL:
                a, b = values[4 * i].to(tl.float32), values[4 * i + 1].to(tl.float32)
                c, d = values[4 * i + 2].to(tl.float32), values[4 * i + 3].to(tl.float32)
                value = _largest(_largest(a, b), _largest(c, d))
                number = tl.where(value == a, 0, tl.where(value == b, 1, 2 + (value != c)))
                to = at + row * channels + column
                tl.store(pooled + to, value.to(tl.bfloat16), mask=mask)
                tl.store(where + to, number.to(tl.uint8), mask=mask)
            else:
                value = values[i].to(tl.float32)
            value = tl.where(mask, value - shift, 0.0)
            total += value
            square += value * value
        tile += programs
    total, square = _sum(total), _sum(square)
    mean = total / count
    to = partials + program * 2 * channels + column
    tl.store(to, shift + mean, mask=inside)
    tl.store(to + channels, _largest(square - total * mean, 0.0), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def _apply_kernel(
    out,
    mean,
    var,
    x,
    residual,
    weight,
    bias,
    partials,
    rows,
    units,
    programs,  # of the statistics kernel
    eps,
    slope,
    ACTIVATION: tl.constexpr,
    STEP: tl.constexpr,  # ROWS * UNROLL of the statistics kernel
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    PARTS: tl.constexpr,
):
    channels, column, inside = _block(units, VECTOR, WHOLE, CHANNELS)
    program, stride = tl.program_id(1), tl.num_programs(1)
    local = tl.arange(0, ROWS)[:, None]
    tiles = (rows + ROWS * UNROLL - 1) // (ROWS * UNROLL)
    last = program + (tiles - 1 - program) // stride * stride
    maps = (x, residual) if residual is not None else (x,)
    start = last * (ROWS * UNROLL)
    ahead = _read(maps, start, rows, channels, column, inside, WHOLE, ROWS, UNROLL)

    tiles = (rows + STEP - 1) // STEP
    first_mean = tl.load(partials + column, mask=inside, other=0)
    total = tl.full((PARTS, CHANNELS), 0, tl.float32)
    square = tl.full((PARTS, CHANNELS), 0, tl.float32)
    start = 0
    while start < programs:
        part = start + tl.arange(0, PARTS)[:, None]
        mask = _mask(part < programs, inside, WHOLE)
        at = partials + part * 2 * channels + column
        difference = tl.load(at, mask=mask, other=0) - first_mean
        squares = tl.load(at + channels, mask=mask, other=0)
        count = (tiles // programs + (part < tiles % programs)) * STEP
        count -= tl.where(part == (tiles - 1) % programs, tiles * STEP - rows, 0)
        count = tl.where(part < programs, count, 0).to(tl.float32)
        total += count * difference
        square += squares + count * difference * difference
        start += PARTS
    average = _sum(total) / rows
    variance = _sum(square) / rows - average * average
    variance = _largest(variance, 0.0)
    average += first_mean
    if tl.program_id(1) == 0:
        tl.store(mean + column, average, mask=inside)
        tl.store(var + column, variance, mask=inside)
    scale = tl.rsqrt(variance + eps) * _per_channel(weight, column, inside, 1.0)
    level = _per_channel(bias, column, inside, 0.0)
    step = program
    while step <= last:
        start = (last + program - step) * (ROWS * UNROLL)
        at = start.to(tl.int64) * channels
        values = ahead
        start_of_next, end = _next_down(start, stride * (ROWS * UNROLL), rows)
        ahead = _read(maps, start_of_next, end, channels, column, inside, WHOLE, ROWS, UNROLL)
        for i in tl.static_range(UNROLL):
            row = i * ROWS + local
            mask = _mask(start + row < rows, inside, WHOLE)
            z = (values[i].to(tl.float32) - average) * scale + level
            if residual is not None:
                z += values[UNROLL + i].to(tl.float32)
            z = _activated(z, slope, ACTIVATION).to(tl.bfloat16)
            tl.store(out + at + row * channels + column, z, mask=mask)
        step += stride


@triton.jit(do_not_specialize=INTEGERS)
def _sums_kernel(
    partials,  # float32 [programs, 2, C]: sums of dz, and of dz (x - mean)
    dz,  # written if there is `other`
    grad,
    x,
    other,
    weight,
    bias,
    mean,
    var,
    rows,
    units,
    eps,
    slope,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    SIGN: tl.constexpr = ACTIVATION == "relu" or ACTIVATION == "leaky_relu"
    FROM_RESULT: tl.constexpr = other is not None and SIGN
    channels, column, inside = _block(units, VECTOR, WHOLE, CHANNELS)
    average = tl.load(mean + column, mask=inside, other=0)
    if ACTIVATION != "none" and not FROM_RESULT:
        scale = tl.rsqrt(tl.load(var + column, mask=inside, other=1) + eps)
        scale *= _per_channel(weight, column, inside, 1.0)
        level = _per_channel(bias, column, inside, 0.0)
    program, programs = tl.program_id(1), tl.num_programs(1)
    local = tl.arange(0, ROWS)[:, None]
    tiles = (rows + ROWS * UNROLL - 1) // (ROWS * UNROLL)
    first = tl.full((ROWS, CHANNELS), 0, tl.float32)
    second = tl.full((ROWS, CHANNELS), 0, tl.float32)
    maps = (grad, x, other) if other is not None else (grad, x)
    start = program * (ROWS * UNROLL)
    ahead = _read(maps, start, rows, channels, column, inside, WHOLE, ROWS, UNROLL)
    tile = program
    while tile < tiles:
        start = tile * (ROWS * UNROLL)
        at = start.to(tl.int64) * channels
        values = ahead
        after = start + programs * (ROWS * UNROLL)
        ahead = _read(maps, after, rows, channels, column, inside, WHOLE, ROWS, UNROLL)
        for i in tl.static_range(UNROLL):
            row = i * ROWS + local
            mask = _mask(start + row < rows, inside, WHOLE)
            difference = values[UNROLL + i].to(tl.float32) - average
            z = difference
            if FROM_RESULT:
                z = values[2 * UNROLL + i].to(tl.float32)
            elif ACTIVATION != "none":
                z = difference * scale + level
                if other is not None:
                    z += values[2 * UNROLL + i].to(tl.float32)
            value = _before_activation(values[i].to(tl.float32), z, slope, ACTIVATION)
            if other is not None:
                to = dz + at + row * channels + column
                tl.store(to, value.to(tl.bfloat16), mask=mask)
            first += value  # 0 after the last row, because the gradient is loaded as 0
            second += value * difference
        tile += programs
    to = partials + program * 2 * channels + column
    tl.store(to, _sum(first), mask=inside)
    tl.store(to + channels, _sum(second), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def _gradient_kernel(
    dx,
    weight_grad,
    bias_grad,
    grad,
    x,
    where,
    weight,
    bias,
    mean,
    var,
    partials,
    rows,
    units,
    programs,  # of the sums kernel
    height,
    width,
    eps,
    slope,
    ACTIVATION: tl.constexpr,
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    PARTS: tl.constexpr,
):
    channels, column, inside = _block(units, VECTOR, WHOLE, CHANNELS)
    program, stride = tl.program_id(1), tl.num_programs(1)
    local = tl.arange(0, ROWS)[:, None]
    down, across = (height + 1) // 2, (width + 1) // 2
    windows = rows
    if where is not None:  # includes partial windows at the edge of odd heights and widths
        windows = rows // ((height // 2) * (width // 2)) * (down * across)
    tiles = (windows + ROWS * UNROLL - 1) // (ROWS * UNROLL)
    last = program + (tiles - 1 - program) // stride * stride
    start = last * (ROWS * UNROLL)
    place = channels, column, inside
    if where is not None:
        size = height, width
        maps = grad, x, where
        ahead = _read_pooled(maps, start, windows, *size, *place, WHOLE, ROWS, UNROLL)
    else:
        maps = grad, x
        ahead = _read(maps, start, windows, *place, WHOLE, ROWS, UNROLL)

    first = tl.full((PARTS, CHANNELS), 0, tl.float32)
    second = tl.full((PARTS, CHANNELS), 0, tl.float32)
    start = 0
    while start < programs:
        part = start + tl.arange(0, PARTS)[:, None]
        mask = _mask(part < programs, inside, WHOLE)
        at = partials + part * 2 * channels + column
        first += tl.load(at, mask=mask, other=0)
        second += tl.load(at + channels, mask=mask, other=0)
        start += PARTS
    average = tl.load(mean + column, mask=inside, other=0)
    rstd = tl.rsqrt(tl.load(var + column, mask=inside, other=1) + eps)
    sums, products = _sum(first), _sum(second) * rstd
    if tl.program_id(1) == 0:
        tl.store(bias_grad + column, sums, mask=inside)
        tl.store(weight_grad + column, products, mask=inside)
    scale = rstd * _per_channel(weight, column, inside, 1.0)
    level = _per_channel(bias, column, inside, 0.0)
    constant, factor = -scale * sums / rows, -scale * rstd * products / rows
    step = program
    while step <= last:
        start = (last + program - step) * (ROWS * UNROLL)
        at = start.to(tl.int64) * channels
        values = ahead
        start_of_next, end = _next_down(start, stride * (ROWS * UNROLL), windows)
        if where is not None:
            ahead = _read_pooled(maps, start_of_next, end, *size, *place, WHOLE, ROWS, UNROLL)
        else:
            ahead = _read(maps, start_of_next, end, *place, WHOLE, ROWS, UNROLL)
        for i in tl.static_range(UNROLL):
            row = i * ROWS + local
            mask = _mask(start + row < windows, inside, WHOLE)
            difference = values[UNROLL + i].to(tl.float32) - average
            value = values[i].to(tl.float32)
            if ACTIVATION != "none":
                z = difference * scale + level
                value = _before_activation(value, z, slope, ACTIVATION)
            value = (value * scale + (difference * factor + constant)).to(tl.bfloat16)
            if where is not None:
                corner, _image, p, q = _corner(start + row, height, width, down, across)
                to = dx + corner.to(tl.int64) * channels + column
                for side in tl.static_range(4):
                    y, z = side // 2, side % 2
                    part = tl.where(values[2 * UNROLL + i] == side, value, 0.0)
                    exists = mask & (2 * p + y < height) & (2 * q + z < width)
                    tl.store(to + (y * width + z) * channels, part, mask=exists)
            else:
                tl.store(dx + at + row * channels + column, value, mask=mask)
        step += stride


def layout(channels: int, unroll: int) -> dict[str, Any]:
    """Compile-time constants of the kernels: how they split ``[rows, channels]``.

    If the channels are not a multiple of 8, they are read one by one, four per thread, without
    unrolling.
    """
    vector = 8 if channels % 8 == 0 else 1
    block = 64 if channels % 64 == 0 else 32 if channels % 32 == 0 else 64
    block = min(block, max(16, triton.next_power_of_2(channels)))
    return {
        "VECTOR": vector,
        "WHOLE": channels % block == 0,
        "CHANNELS": block,
        "ROWS": WARPS * 32 * (8 if vector > 1 else 4) // block,
        "UNROLL": unroll if vector > 1 else 1,
    }


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernels; arguments as for ``resfast::batch_norm_act``, already checked.

    Returns:
        The result, mean and variance, and with ``pool`` the pooled x and, in its memory order, the
        position 0 to 3 of each maximum in its window, uint8 ``[N * P * Q * C]``.

    Raises:
        ValueError: x has more than 2^30 pixels.
    """
    n, channels, height, width = x.shape
    if n * height * width > 2**30:
        raise ValueError(f"x is {list(x.shape)}; expected at most 2^30 pixels")
    sizes = [n, channels, height // 2, width // 2] if pool else list(x.shape)
    rows = n * sizes[2] * sizes[3]
    x = channels_last(x)
    weight, bias, residual = _dense(weight), _dense(bias), _map(residual)
    pooled, where = x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    if pool:
        pooled = new_map(x, sizes)
        where = x.new_empty(rows * channels, dtype=torch.uint8)
    out = new_map(x, sizes)
    mean, var = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    read_layout = layout(channels, POOLING if pool else STATISTICS)
    step, programs = _grid(x, rows, read_layout)
    partials = x.new_empty((programs[1], 2, channels), dtype=torch.float32)
    units = channels // read_layout["VECTOR"]
    with torch.cuda.device_of(x):
        _statistics_kernel[programs](
            partials,
            pooled if pool else None,
            where if pool else None,
            x,
            rows,
            units,
            height,
            width,
            POOL=pool,
            **read_layout,
            num_warps=WARPS,
        )
        write_layout = layout(channels, APPLY if residual is None else APPLY_TO_TWO)
        _apply_kernel[_grid(x, rows, write_layout)[1]](
            out,
            mean,
            var,
            pooled if pool else x,
            residual,
            weight,
            bias,
            partials,
            rows,
            units,
            programs[1],
            eps,
            negative_slope,
            ACTIVATION=activation,
            STEP=step,
            **write_layout,
            PARTS=PARTS,
            num_warps=WARPS,
        )
    return out, mean, var, pooled, where


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    other: Tensor | None,
    where: Tensor | None,
    size: list[int],
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernels; arguments and results as for ``resfast::batch_norm_act_backward``.

    If ``where`` is given, x is the pooled x.
    """
    n, channels, *_ = x.shape
    rows = x.numel() // channels
    grad, x, other = channels_last(grad), channels_last(x), _map(other)
    weight, bias = _dense(weight), _dense(bias)
    residual_grad = x.new_empty(0) if other is None else new_map(x, list(x.shape))
    weight_grad, bias_grad = torch.empty_like(mean), torch.empty_like(mean)
    dx = new_map(x, [n, channels, *size])
    sum_layout = layout(channels, SUMS if other is None else SUMS_OF_THREE)
    _, programs = _grid(x, rows, sum_layout)
    partials = x.new_empty((programs[1], 2, channels), dtype=torch.float32)
    units = channels // sum_layout["VECTOR"]
    with torch.cuda.device_of(x):
        _sums_kernel[programs](
            partials,
            None if other is None else residual_grad,
            grad,
            x,
            other,
            weight,
            bias,
            mean,
            var,
            rows,
            units,
            eps,
            negative_slope,
            ACTIVATION=activation,
            **sum_layout,
            num_warps=WARPS,
        )
        windows = rows if where is None else n * ((size[0] + 1) // 2) * ((size[1] + 1) // 2)
        write_layout = layout(channels, GRADIENT if where is None else UNPOOLING)
        _gradient_kernel[_grid(x, windows, write_layout)[1]](
            dx,
            weight_grad,
            bias_grad,
            grad if other is None else residual_grad,
            x,
            where,
            weight,
            bias,
            mean,
            var,
            partials,
            rows,
            units,
            programs[1],
            *size,
            eps,
            negative_slope,
            ACTIVATION=activation if other is None else "none",
            **write_layout,
            PARTS=PARTS,
            num_warps=WARPS,
        )
    return dx, weight_grad, bias_grad, residual_grad


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _map(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else channels_last(tensor)


def _grid(x: Tensor, rows: int, constants: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """Rows per tile, and the grid: blocks of channels by programs that share the rows."""
    step = constants["ROWS"] * constants["UNROLL"]
    blocks = triton.cdiv(x.shape[1], constants["CHANNELS"])
    multiprocessors = 2  # in Triton's interpreter
    if x.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = max(1, multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // blocks)
    return step, (blocks, min(triton.cdiv(rows, step), programs))
