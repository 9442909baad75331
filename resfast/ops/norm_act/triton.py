"""``resfast::batch_norm_act`` and its backward on CUDA: two Triton kernels each.

The first reads the maps once and writes sums over its rows, for each channel, to ``partials``; the
second adds these up, each program for itself, and reads the maps once more. With pooling the first
reads x and writes the pooled x, which all the others work on, and the last writes the gradient of
all of x. The order of the additions is fixed, so that results are the same in every run on one
kind of GPU. Nothing waits for the device.

Maps are matrices here: a row is a pixel of ``[N, H, W]``, a column a channel. Programs stand in a
grid of blocks of channels by ``programs``, which share the rows out in tiles of ``ROWS * UNROLL``,
every ``programs``-th to one. The second kernel takes its tiles last first, while the first one's
last are in the cache. Tiles are read one ahead: the compiler would put off reads to where their
values are needed, and leave memory idle.

Variances of parts are put together as by Chan, Golub and LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances", 1979; the error function is formula 7.1.26 of
Abramowitz and Stegun, "Handbook of Mathematical Functions", to 1.5e-7.

Long because the four kernels and their launchers share one layout of the rows and one set of
inlined device functions, and a change of it is a change of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfast.ops.conv.reference import channels_last, new_map

WARPS = 16
PROGRAMS = 1
"""To a multiprocessor, at most: the second kernels read the sums of each."""
PARTS = 64
"""Programs whose sums are read at once."""
STATISTICS, POOLING, APPLY, APPLY_TO_TWO = 4, 2, 4, 2
SUMS, SUMS_OF_THREE, GRADIENT, UNPOOLING = 2, 1, 2, 1
"""``UNROLL`` of the kernels: vectors of 16 bytes of each map that a thread reads at once. No more
than keeps the kernels within 128 registers, which is what there is for that many warps."""
INTEGERS = ["rows", "units", "programs", "height", "width"]
"""What kernels are not compiled for the values of."""


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
    """The distribution function of the normal distribution at z, and exp(-z^2 / 2)."""
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
    """The gradient before the activation of z; relu and leaky_relu want no more than z's sign."""
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
    """Of this program: number of channels, its channels, and which of them there are."""
    channels = units * VECTOR  # so that the compiler knows what divides it
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    inside = tl.full((1, CHANNELS), 1, tl.int1) if WHOLE else column < channels
    return channels, column, inside


@triton.jit
def _both(ok, inside, WHOLE: tl.constexpr):
    return ok if WHOLE else ok & inside


@triton.jit
def _per_channel(values, column, inside, default):
    """Row ``[1, CHANNELS]`` of float32; ``default`` where there are no values."""
    if values is None:
        return tl.full(column.shape, default, tl.float32)
    else:
        return tl.load(values + column, mask=inside, other=0)


@triton.jit
def _corner(row, height, width, rows, columns):
    """The first pixel of a window, and its place among the windows of an image."""
    row, columns, rows = row.to(tl.uint32), columns.to(tl.uint32), rows.to(tl.uint32)
    line = row // columns
    image = line // rows
    y, x = (line - image * rows).to(tl.int32), (row - line * columns).to(tl.int32)
    return (image.to(tl.int32) * height + 2 * y) * width + 2 * x, image.to(tl.int32), y, x


@triton.jit
def _next_down(start, step, rows):
    """Where the tile before begins, and the rows that there are: none, if there is no such tile."""
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
    """A tile of each map from row ``start`` on, in ``UNROLL`` parts; zeros after the last row."""
    values = ()
    for j in tl.static_range(len(maps)):
        first = maps[j] + start.to(tl.int64) * channels
        for i in tl.static_range(UNROLL):
            row = i * ROWS + tl.arange(0, ROWS)[:, None]
            mask = _both(start + row < rows, inside, WHOLE)
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
    """Likewise from window ``start`` on, of those that cover the map before the pooling."""
    values = ()
    sources = ()
    masks = ()
    for i in tl.static_range(UNROLL):
        window = start + i * ROWS + tl.arange(0, ROWS)[:, None]
        _pixel, image, y, x = _corner(window, height, width, (height + 1) // 2, (width + 1) // 2)
        there = (window < windows) & (y < height // 2) & (x < width // 2)
        row = (image * (height // 2) + y) * (width // 2) + x
        sources += (row.to(tl.int64) * channels + column,)
        masks += (_both(there, inside, WHOLE),)
    for j in tl.static_range(len(maps)):
        for i in tl.static_range(UNROLL):
            nowhere = 4 * (j == 2)  # in `where` no place in a window
            values += (tl.load(maps[j] + sources[i], mask=masks[i], other=nowhere),)
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
    # Differences from any value of the channel: sums of squares lose nothing to a large mean.
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
            mask = _both(start + row < rows, inside, WHOLE)
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
            mask = _both(start + row < rows, inside, WHOLE)
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
    programs,  # of the kernel of the statistics
    eps,
    slope,
    ACTIVATION: tl.constexpr,
    STEP: tl.constexpr,  # its ROWS * UNROLL
    VECTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    PARTS: tl.constexpr,
):
    channels, column, inside = _block(units, VECTOR, WHOLE, CHANNELS)
    program, others = tl.program_id(1), tl.num_programs(1)
    local = tl.arange(0, ROWS)[:, None]
    tiles = (rows + ROWS * UNROLL - 1) // (ROWS * UNROLL)
    last = program + (tiles - 1 - program) // others * others
    maps = (x, residual) if residual is not None else (x,)
    start = last * (ROWS * UNROLL)
    ahead = _read(maps, start, rows, channels, column, inside, WHOLE, ROWS, UNROLL)

    tiles = (rows + STEP - 1) // STEP
    some = tl.load(partials + column, mask=inside, other=0)
    total = tl.full((PARTS, CHANNELS), 0, tl.float32)
    square = tl.full((PARTS, CHANNELS), 0, tl.float32)
    start = 0
    while start < programs:
        part = start + tl.arange(0, PARTS)[:, None]
        mask = _both(part < programs, inside, WHOLE)
        at = partials + part * 2 * channels + column
        difference = tl.load(at, mask=mask, other=0) - some
        own = tl.load(at + channels, mask=mask, other=0)
        count = (tiles // programs + (part < tiles % programs)) * STEP
        count -= tl.where(part == (tiles - 1) % programs, tiles * STEP - rows, 0)
        count = tl.where(part < programs, count, 0).to(tl.float32)
        total += count * difference
        square += own + count * difference * difference
        start += PARTS
    average = _sum(total) / rows
    variance = _sum(square) / rows - average * average
    variance = _largest(variance, 0.0)
    average += some
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
        start_of_next, end = _next_down(start, others * (ROWS * UNROLL), rows)
        ahead = _read(maps, start_of_next, end, channels, column, inside, WHOLE, ROWS, UNROLL)
        for i in tl.static_range(UNROLL):
            row = i * ROWS + local
            mask = _both(start + row < rows, inside, WHOLE)
            z = (values[i].to(tl.float32) - average) * scale + level
            if residual is not None:
                z += values[UNROLL + i].to(tl.float32)
            z = _activated(z, slope, ACTIVATION).to(tl.bfloat16)
            tl.store(out + at + row * channels + column, z, mask=mask)
        step += others


@triton.jit(do_not_specialize=INTEGERS)
def _sums_kernel(
    partials,  # float32 [programs, 2, C]: sums of dz, and of dz (x - mean)
    dz,  # written where there is `other`
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
            mask = _both(start + row < rows, inside, WHOLE)
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
            first += value  # 0 where there are no rows, as the gradient is there
            second += value * difference
        tile += programs
    to = partials + program * 2 * channels + column
    tl.store(to, _sum(first), mask=inside)
    tl.store(to + channels, _sum(second), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def _gradient_kernel(
    dx,
    for_weight,
    for_bias,
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
    programs,  # of the kernel of the sums
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
    program, others = tl.program_id(1), tl.num_programs(1)
    local = tl.arange(0, ROWS)[:, None]
    down, across = (height + 1) // 2, (width + 1) // 2
    windows = rows
    if where is not None:  # and those that the last row or column of an odd number is half of
        windows = rows // ((height // 2) * (width // 2)) * (down * across)
    tiles = (windows + ROWS * UNROLL - 1) // (ROWS * UNROLL)
    last = program + (tiles - 1 - program) // others * others
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
        mask = _both(part < programs, inside, WHOLE)
        at = partials + part * 2 * channels + column
        first += tl.load(at, mask=mask, other=0)
        second += tl.load(at + channels, mask=mask, other=0)
        start += PARTS
    average = tl.load(mean + column, mask=inside, other=0)
    rstd = tl.rsqrt(tl.load(var + column, mask=inside, other=1) + eps)
    sums, products = _sum(first), _sum(second) * rstd
    if tl.program_id(1) == 0:
        tl.store(for_bias + column, sums, mask=inside)
        tl.store(for_weight + column, products, mask=inside)
    scale = rstd * _per_channel(weight, column, inside, 1.0)
    level = _per_channel(bias, column, inside, 0.0)
    constant, factor = -scale * sums / rows, -scale * rstd * products / rows
    step = program
    while step <= last:
        start = (last + program - step) * (ROWS * UNROLL)
        at = start.to(tl.int64) * channels
        values = ahead
        start_of_next, end = _next_down(start, others * (ROWS * UNROLL), windows)
        if where is not None:
            ahead = _read_pooled(maps, start_of_next, end, *size, *place, WHOLE, ROWS, UNROLL)
        else:
            ahead = _read(maps, start_of_next, end, *place, WHOLE, ROWS, UNROLL)
        for i in tl.static_range(UNROLL):
            row = i * ROWS + local
            mask = _both(start + row < windows, inside, WHOLE)
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
                    there = mask & (2 * p + y < height) & (2 * q + z < width)
                    tl.store(to + (y * width + z) * channels, part, mask=there)
            else:
                tl.store(dx + at + row * channels + column, value, mask=mask)
        step += others


def layout(channels: int, unroll: int) -> dict[str, Any]:
    """How kernels split ``[rows, channels]``: their constants.

    Channels that are no multiple of 8 are read one by one, four to a thread, and not unrolled.
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
    """Launches the kernels; arguments as of ``resfast::batch_norm_act``, already checked.

    Returns:
        The result, mean and variance, and with ``pool`` the pooled x and, uint8 ``[N * P * Q * C]``
        in the order of its memory, which of the four values of its window each is.

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
    reading = layout(channels, POOLING if pool else STATISTICS)
    step, programs = _shared(x, rows, reading)
    partials = x.new_empty((programs[1], 2, channels), dtype=torch.float32)
    units = channels // reading["VECTOR"]
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
            **reading,
            num_warps=WARPS,
        )
        writing = layout(channels, APPLY if residual is None else APPLY_TO_TWO)
        _apply_kernel[_shared(x, rows, writing)[1]](
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
            **writing,
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
    """Launches the kernels; arguments and results of ``resfast::batch_norm_act_backward``.

    With ``where`` x is the pooled one.
    """
    n, channels, *_ = x.shape
    rows = x.numel() // channels
    grad, x, other = channels_last(grad), channels_last(x), _map(other)
    weight, bias = _dense(weight), _dense(bias)
    for_residual = x.new_empty(0) if other is None else new_map(x, list(x.shape))
    for_weight, for_bias = torch.empty_like(mean), torch.empty_like(mean)
    dx = new_map(x, [n, channels, *size])
    summing = layout(channels, SUMS if other is None else SUMS_OF_THREE)
    _, programs = _shared(x, rows, summing)
    partials = x.new_empty((programs[1], 2, channels), dtype=torch.float32)
    units = channels // summing["VECTOR"]
    with torch.cuda.device_of(x):
        _sums_kernel[programs](
            partials,
            None if other is None else for_residual,
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
            **summing,
            num_warps=WARPS,
        )
        windows = rows if where is None else n * ((size[0] + 1) // 2) * ((size[1] + 1) // 2)
        writing = layout(channels, GRADIENT if where is None else UNPOOLING)
        _gradient_kernel[_shared(x, windows, writing)[1]](
            dx,
            for_weight,
            for_bias,
            grad if other is None else for_residual,
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
            **writing,
            PARTS=PARTS,
            num_warps=WARPS,
        )
    return dx, for_weight, for_bias, for_residual


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _map(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else channels_last(tensor)


def _shared(x: Tensor, rows: int, constants: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """Rows of a tile, and the grid of programs: blocks of channels by those that share the rows."""
    step = constants["ROWS"] * constants["UNROLL"]
    blocks = triton.cdiv(x.shape[1], constants["CHANNELS"])
    processors = 2  # of Triton's interpreter
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return step, (blocks, min(triton.cdiv(rows, step), max(1, processors * PROGRAMS // blocks)))
