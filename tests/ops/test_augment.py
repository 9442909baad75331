"""Operators: the reference against torch's own, every kernel against the reference.

``operator`` is the registered operator on the CPU (C++ where it was built), ``interpreter`` the
Triton kernel run by Triton's interpreter, ``cuda`` the same kernel on a GPU.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resfast.ops.augment import op as face
from resfast.ops.augment import reference
from resfast.ops.augment.op import DTYPES, AugmentParams, MixParams, augment, normalization
from resfast.ops.philox import op as philox_face
from tests.triton_code import compiled, interpreted, triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

TABLES = ("shift", "flip", "affine", "color", "cutout", "partner", "weight", "box")
KERNELS = ("operator", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu))
SCALE = 1 / 40
"""Largest factor of the tests' normalization, of units of 0 … 255."""


def run(kernel: str, args: tuple) -> Tensor:
    """What a kernel makes of the operator's arguments (without ``check``), on the CPU."""
    if kernel == "interpreter":
        return interpreted("augment").augment(*args)
    if kernel == "cuda":
        args = tuple(value.cuda() if isinstance(value, Tensor) else value for value in args)
    return torch.ops.resfast.augment(*args, False).cpu()


def random_images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def arguments(
    images: Tensor,
    indices: Tensor | list[int],
    tables: dict[str, Tensor] | None = None,
    *,
    zero: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple:
    """Arguments of the operator up to ``check``, with a normalization of its own per channel."""
    channels = images.shape[-1]
    offset, scale = normalization(
        torch.tensor([0.49, 0.48, 0.45, 0.1])[:channels],
        torch.tensor([0.25, 0.24, 0.26, 0.16])[:channels],
    )
    rest = [(tables or {}).get(name) for name in TABLES]
    return (images, torch.as_tensor(indices), offset, scale, *rest, zero, dtype)


def random_tables(
    seed: int, count: int, batch: int, height: int, width: int, channels: int, steps: set[str]
) -> dict[str, Tensor]:
    """Tables of the steps named; mixing (``mix``: any weight, ``cutmix``: weights 0 and 1)."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:  # both ends can come up
        return torch.randint(low, high + 1, shape, generator=generator)

    def floats(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def boxes(rows: int) -> Tensor:  # also empty, and reaching beyond the image
        y, x = integers(-2, height + 2, rows, 2), integers(-2, width + 2, rows, 2)
        return torch.stack([y[:, 0], x[:, 0], y[:, 1], x[:, 1]], 1).int()

    tables = {}
    if "shift" in steps:
        tables["shift"] = torch.cat(
            [integers(1 - side, side - 1, count, 1) for side in (height, width)], 1
        ).int()
    if "flip" in steps:
        tables["flip"] = integers(0, 1, count).bool()
    if "affine" in steps:  # every corner of the result lands somewhere in the padded image
        tables["affine"] = torch.empty(count, 2, 3)
        for axis, side in enumerate((height, width)):
            low, high = 1 - side, 2 * (side - 1)
            slopes = floats(-0.7, 0.7, count, 2) * (side - 1)
            slopes /= torch.tensor([max(height - 1, 1), max(width - 1, 1)])
            ends = slopes * torch.tensor([height - 1, width - 1])
            least, most = ends.clamp(max=0).sum(1), ends.clamp(min=0).sum(1)
            start = low - least + floats(0, 1, count) * (high - low - (most - least))
            tables["affine"][:, axis] = torch.cat([slopes, start[:, None]], 1)
    if "color" in steps:
        matrix = floats(-0.5, 1.5, count, channels, channels)
        tables["color"] = torch.cat([matrix, floats(-60, 60, count, channels, 1)], 2)
    if "cutout" in steps:
        tables["cutout"] = boxes(count)
    if {"mix", "cutmix"} & steps:
        tables["partner"] = integers(0, count - 1, batch)
        tables["weight"] = floats(0, 1, batch) if "mix" in steps else integers(0, 1, batch).float()
        tables["box"] = boxes(batch)
    return tables


def truncated(values: Tensor) -> Tensor:
    """bfloat16 by cutting off, as Triton's interpreter converts (a GPU rounds to nearest)."""
    return (values.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


def assert_kernel_equals_reference(kernel: str, args: tuple) -> None:
    """Bit for bit without affine, colour and mixing; else within the rounding of the steps.

    Float32: a coordinate of up to twice the longer side is rounded a few times, and a pixel
    differs from the next by at most 255; a colour is a sum of up to 5 terms of up to 400; that
    is 16 roundings of either. The other formats: one unit in the last place more.
    """
    images, dtype = args[0], args[-1]
    affine, color, weight = args[6], args[7], args[10]
    result = run(kernel, args)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    exact = reference.augment(*args[:-1], torch.float32)
    expected = exact.to(dtype)
    mixed = weight is not None and not torch.isin(weight, torch.tensor([0.0, 1.0])).all()
    if affine is None and color is None and not mixed:
        if (
            kernel == "interpreter"
            and dtype == torch.bfloat16
            and not torch.equal(result, expected)
        ):
            expected = truncated(exact.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        assert torch.equal(result, expected)
        return
    largest = 255 * SCALE * (2 * max(images.shape[1:3]) if affine is not None else 1)
    relative = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(
        result.float(), exact, rtol=relative, atol=16 * 2.0**-24 * max(largest, 400 * SCALE)
    )


# The reference, against torch's own operators.


def by_slicing(images: Tensor, args: tuple, row: int) -> Tensor:
    """Image ``row``, float32 ``[C, H, W]``, padded on all sides, cut out and mirrored."""
    _, height, width, _ = images.shape
    pixels = images[row].permute(2, 0, 1).double()[None]
    sides = (width - 1, width - 1, height - 1, height - 1)
    padded = F.pad(pixels, sides, mode="constant" if args[-2] else "reflect")[0]
    dy, dx = args[4][row].tolist()
    cut = padded[:, height - 1 + dy : 2 * height - 1 + dy, width - 1 + dx : 2 * width - 1 + dx]
    return cut.flip(2) if args[5][row] else cut


def normalized(pixels: Tensor, args: tuple) -> Tensor:
    """``[…, C, H, W]`` pixels, normalized in float64."""
    offset, scale = args[2].double(), args[3].double()
    return (pixels.double() - offset[:, None, None]) * scale[:, None, None]


@pytest.mark.parametrize("zero", [False, True], ids=["reflect", "zero"])
def test_reference_shifts_and_flips_like_pad_slice_and_flip(zero: bool) -> None:
    height, width = 4, 5
    every = list(itertools.product(range(-3, 4), range(-4, 5), (False, True)))
    images = random_images((len(every), height, width, 3))
    tables = {
        "shift": torch.tensor([[dy, dx] for dy, dx, _ in every], dtype=torch.int32),
        "flip": torch.tensor([mirrored for _, _, mirrored in every]),
    }
    args = arguments(images, list(range(len(every))), tables, zero=zero)
    expected = torch.stack([by_slicing(images, args, row) for row in range(len(every))])
    torch.testing.assert_close(
        reference.augment(*args).double(), normalized(expected, args), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("zero", [False, True], ids=["reflect", "zero"])
@pytest.mark.parametrize("size", [(7, 9), (28, 28), (2, 12)], ids=str)
def test_reference_affine_equals_grid_sample(size: tuple[int, int], zero: bool) -> None:
    height, width = size
    images = random_images((6, height, width, 3))
    tables = random_tables(1, 6, 6, height, width, 3, {"affine"})
    args = arguments(images, list(range(6)), tables, zero=zero)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ones = torch.stack([y, x, torch.ones_like(y)], -1).double()
    source = torch.einsum("hwk,nak->nhwa", ones, tables["affine"].double())
    grid = 2 * source.flip(-1) / torch.tensor([width - 1, height - 1]) - 1
    pixels = F.grid_sample(
        images.permute(0, 3, 1, 2).double(),
        grid,
        mode="bilinear",
        padding_mode="zeros" if zero else "reflection",
        align_corners=True,
    )
    torch.testing.assert_close(
        reference.augment(*args).double(), normalized(pixels, args), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_whole_pixel_affine_equals_shift_and_flip(kernel: str) -> None:
    images = random_images((3, 6, 8, 3))
    shift = torch.tensor([[1, -2], [0, 3], [-4, 0]], dtype=torch.int32)
    flip = torch.tensor([False, True, True])
    affine = torch.tensor(
        [
            [[1.0, 0, 1], [0, 1, -2]],
            [[1.0, 0, 0], [0, -1, 7 + 3]],
            [[1.0, 0, -4], [0, -1, 7]],
        ]
    )
    moved = reference.augment(*arguments(images, [2, 0, 1], {"shift": shift, "flip": flip}))
    args = arguments(images, [2, 0, 1], {"affine": affine})
    result = reference.augment(*args) if kernel == "reference" else run(kernel, args)
    assert torch.equal(result, moved)


COLORS = {
    "brightness": (TF.adjust_brightness, lambda f, gray: f * torch.eye(3)),
    "saturation": (TF.adjust_saturation, lambda f, gray: f * torch.eye(3) + (1 - f) * gray),
}


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.7])
@pytest.mark.parametrize("name", COLORS)
def test_reference_color_equals_torchvision(name: str, factor: float) -> None:
    adjust, matrix = COLORS[name]
    images = random_images((2, 6, 5, 3))
    gray = torch.tensor([0.2989, 0.587, 0.114]).expand(3, 3)
    color = F.pad(matrix(factor, gray), (0, 1)).expand(2, 3, 4).contiguous()
    args = arguments(images, [1, 0], {"color": color})
    pixels = adjust(images[[1, 0]].permute(0, 3, 1, 2).float() / 255, factor) * 255
    torch.testing.assert_close(
        reference.augment(*args).double(), normalized(pixels, args), rtol=0, atol=2e-4
    )


def test_reference_color_with_an_offset_equals_contrast_of_torchvision() -> None:
    images = random_images((1, 6, 5, 3))
    mean = TF.rgb_to_grayscale(images.permute(0, 3, 1, 2).float()).mean().item()
    color = torch.cat([1.5 * torch.eye(3), torch.full((3, 1), -0.5 * mean)], 1)[None]
    args = arguments(images, [0], {"color": color})
    pixels = TF.adjust_contrast(images.permute(0, 3, 1, 2).float() / 255, 1.5) * 255
    torch.testing.assert_close(
        reference.augment(*args).double(), normalized(pixels, args), rtol=0, atol=1e-3
    )


def test_reference_cuts_out_and_mixes_as_by_hand() -> None:
    images = random_images((4, 6, 8, 3))
    tables = {
        "flip": torch.tensor([True, False, True, False]),
        "cutout": torch.tensor(
            [[1, 2, 3, 4], [0, 0, 6, 8], [4, 4, 4, 8], [-3, 5, 2, 99]], dtype=torch.int32
        ),
        "partner": torch.tensor([1, 3, 0]),
        "weight": torch.tensor([1.0, 0.25, 0.0]),
        "box": torch.tensor([[0, 3, 5, 7], [2, 2, 2, 9], [1, 1, 3, 3]], dtype=torch.int32),
    }
    args = arguments(images, [2, 0, 3], tables)
    alone = normalized(images.permute(0, 3, 1, 2), args)
    alone[[0, 2]] = alone[[0, 2]].flip(3)
    alone[0, :, 1:3, 2:4] = 0
    alone[1] = 0
    alone[3, :, :2, 5:] = 0
    expected = torch.stack([alone[2], 0.25 * alone[0] + 0.75 * alone[3], alone[0]])
    expected[0, :, 0:5, 3:7] = alone[1][:, 0:5, 3:7]
    torch.testing.assert_close(reference.augment(*args).double(), expected, rtol=1e-6, atol=1e-6)


def test_label_weights_are_the_mean_weights_of_the_images() -> None:
    """Two images of one colour each, mixed: the mean pixel says how much of either there is."""
    images = torch.stack([torch.full((6, 8, 1), 255), torch.zeros(6, 8, 1)]).to(torch.uint8)
    mix = MixParams(
        partner=torch.tensor([1, 1, 1]),
        weight=torch.tensor([1.0, 0.25, 0.5]),
        box=torch.tensor([[0, 3, 5, 7], [2, 2, 2, 8], [5, 5, 1, 7]], dtype=torch.int32),
    )
    result = augment(images, torch.zeros(3).long(), None, torch.zeros(1), torch.ones(1), mix=mix)
    torch.testing.assert_close(mix.label_weights(6, 8), result.mean((1, 2, 3)))


def test_public_function_normalizes_by_mean_and_std() -> None:
    images = random_images((3, 5, 4, 3))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    result = augment(images, torch.tensor([2, 0]), None, mean, std)
    pixels = images[[2, 0]].permute(0, 3, 1, 2).double() / 255
    expected = (pixels - mean.double()[:, None, None]) / std.double()[:, None, None]
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


# Every kernel, against the reference.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (33, 31)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_reference_at_usual_and_odd_sizes(
    kernel: str, size: tuple[int, int], channels: int, dtype: torch.dtype
) -> None:
    images = random_images((4, *size, channels))
    tables = random_tables(2, 4, 2, *size, channels, {"shift", "flip", "cutout", "cutmix"})
    for zero in (False, True):
        args = arguments(images, [3, 0], tables, zero=zero, dtype=dtype)
        assert_kernel_equals_reference(kernel, args)


@pytest.mark.parametrize("size", [(28, 28), (33, 31)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_rotates_and_colors_like_reference_at_odd_sizes(
    kernel: str, size: tuple[int, int]
) -> None:
    for channels, dtype in ((1, torch.float16), (3, torch.float32), (3, torch.bfloat16)):
        images = random_images((4, *size, channels))
        tables = random_tables(3, 4, 2, *size, channels, {"affine", "color", "mix"})
        assert_kernel_equals_reference(kernel, arguments(images, [3, 1], tables, dtype=dtype))


@pytest.mark.parametrize(
    ("steps", "channels"), [({"shift", "flip"}, 1), ({"shift", "flip"}, 3), ({"affine"}, 1)]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_reference_at_224(kernel: str, channels: int, steps: set[str]) -> None:
    """Several programs share an image of this size."""
    images = random_images((2, 224, 224, channels))
    tables = random_tables(4, 2, 1, 224, 224, channels, steps)
    assert_kernel_equals_reference(kernel, arguments(images, [1], tables))


GEOMETRY = (set(), {"shift"}, {"flip"}, {"shift", "flip"}, {"affine"})
MIXING = (set(), {"mix"}, {"cutmix"})
SIZES = ((5, 8), (4, 4), (7, 6), (3, 11), (1, 9), (6, 1))


def _combinations() -> list[tuple]:
    cases = []
    steps = itertools.product(GEOMETRY, (set(), {"color"}), (set(), {"cutout"}), MIXING)
    for geometry, color, cutout, mixing in steps:
        for zero in (False, True):
            choose = random.Random(len(cases))
            rest = (choose.choice(range(1, 5)), choose.choice(SIZES), choose.choice(DTYPES))
            cases.append((frozenset(geometry | color | cutout | mixing), zero, *rest))
    return cases


COMBINATIONS = _combinations()


def test_combinations_have_every_pair_of_options() -> None:
    steps = ("shift", "flip", "affine", "color", "cutout", "mix", "cutmix")
    values: dict[str, Any] = dict.fromkeys((*steps, "zero"), (False, True))
    values |= {"channels": range(1, 5), "size": SIZES, "dtype": DTYPES}
    seen = set()
    for present, *rest in COMBINATIONS:
        options = [*((name, name in present) for name in steps)]
        options += zip(("zero", "channels", "size", "dtype"), rest, strict=True)
        seen |= set(itertools.combinations(options, 2))
    exclude_each_other = {("shift", "affine"), ("flip", "affine"), ("mix", "cutmix")}
    for first, second in itertools.combinations(values, 2):
        for pair in itertools.product(values[first], values[second]):
            if pair != (True, True) or (first, second) not in exclude_each_other:
                assert ((first, pair[0]), (second, pair[1])) in seen, (first, second, pair)


@pytest.mark.parametrize(
    "case", COMBINATIONS, ids=lambda case: "-".join(map(str, [*sorted(case[0]), *case[1:]]))
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_reference_with_every_combination_of_steps(kernel: str, case: tuple) -> None:
    steps, zero, channels, (height, width), dtype = case
    images = random_images((4, height, width, channels))
    tables = random_tables(5, 4, 2, height, width, channels, set(steps))
    args = arguments(images, [1, 3], tables, zero=zero, dtype=dtype)
    assert_kernel_equals_reference(kernel, args)


@pytest.mark.parametrize("zero", [False, True], ids=["reflect", "zero"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_reference_at_every_shift(kernel: str, zero: bool) -> None:
    height, width = 3, 4
    every = list(itertools.product(range(-2, 3), range(-3, 4), (False, True)))
    images = random_images((len(every), height, width, 3))
    tables = {
        "shift": torch.tensor([[dy, dx] for dy, dx, _ in every], dtype=torch.int32),
        "flip": torch.tensor([mirrored for _, _, mirrored in every]),
    }
    assert_kernel_equals_reference(
        kernel, arguments(images, list(range(len(every))), tables, zero=zero)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_pixel_value_is_normalized_alike(kernel: str, dtype: torch.dtype) -> None:
    images = torch.arange(256).to(torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    assert_kernel_equals_reference(kernel, arguments(images, [0], dtype=dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_batch_of_one_of_a_data_set_of_one_and_an_empty_batch(kernel: str) -> None:
    images = random_images((1, 5, 4, 3))
    tables = random_tables(6, 1, 1, 5, 4, 3, {"shift", "flip", "cutout", "cutmix"})
    assert_kernel_equals_reference(kernel, arguments(images, [0], tables))
    empty = run(kernel, arguments(images, torch.zeros(0, dtype=torch.int64)))
    assert empty.shape == (0, 3, 5, 4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(*[st.integers(1, most) for most in (4, 4, 10, 10, 4)]),
    geometry=st.sampled_from(GEOMETRY),
    rest=st.sets(st.sampled_from(["color", "cutout", "mix"])),
    zero=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_reference_on_random_arguments(
    kernel: str,
    seed: int,
    sizes: tuple[int, ...],
    geometry: set[str],
    rest: set[str],
    zero: bool,
    dtype: torch.dtype,
) -> None:
    count, batch, height, width, channels = sizes
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, count, (batch,), generator=generator)
    tables = random_tables(seed, count, batch, height, width, channels, geometry | rest)
    images = random_images((count, height, width, channels), seed)
    args = arguments(images, indices, tables, zero=zero, dtype=dtype)
    face.check_arguments(*args, check=True)
    assert_kernel_equals_reference(kernel, args)


@pytest.mark.parametrize("kernel", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_unchecked_values_out_of_range_read_some_pixel_of_the_images(kernel: str) -> None:
    images = random_images((3, 4, 5, 3))
    far = torch.tensor([[99, -(2**30)], [-99, 7], [2**30, 0]], dtype=torch.int32)
    assert_kernel_equals_reference(kernel, arguments(images, [0, 1, 2], {"shift": far}))
    beyond = run(kernel, arguments(images, [-7, 3, 2**40]))
    assert torch.equal(beyond, reference.augment(*arguments(images, [0, 2, 2])))


@pytest.mark.parametrize("kernel", KERNELS)
def test_images_past_the_range_of_int32_are_found(kernel: str) -> None:
    count = 2**31 // (32 * 32 * 3) + 2
    images = torch.empty((count, 32, 32, 3), dtype=torch.uint8)  # pages are taken when touched
    assert (count - 1) * images.stride(0) > 2**31
    for row in (0, count - 2, count - 1):
        images[row] = random_images((32, 32, 3), seed=row)
    tables = {"partner": torch.tensor([count - 2, 0]), "weight": torch.tensor([1.0, 0.0])}
    tables["box"] = torch.tensor([[0, 0, 9, 9], [0, 0, 0, 0]], dtype=torch.int32)
    assert_kernel_equals_reference(kernel, arguments(images, [count - 1, 0], tables))


@pytest.mark.gpu
def test_results_past_the_range_of_int32_are_written() -> None:
    images = random_images((7, 32, 32, 3)).cuda()
    batch = 2**31 // (32 * 32 * 3) + 8
    indices = torch.arange(batch, device="cuda") % 7
    *args, dtype = arguments(images, indices, dtype=torch.bfloat16)
    args = [value.cuda() if isinstance(value, Tensor) else value for value in args]
    result = torch.ops.resfast.augment(*args, dtype, False)
    assert result.numel() > 2**31
    args[1] = torch.arange(7, device="cuda")
    whole = reference.augment(*args, dtype)
    for start in range(0, batch - 7, batch // 9):
        first = start - start % 7
        assert torch.equal(result[first : first + 7], whole)
    assert torch.equal(result[-1], whole[(batch - 1) % 7])


# The operators as torch sees them.


def _all_steps(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple]:
    """Arguments with everything but affine, with affine, and with nothing."""
    images = random_images((5, 6, 8, 3))
    moved = random_tables(7, 5, 3, 6, 8, 3, {"shift", "flip", "color", "cutout", "mix"})
    turned = random_tables(8, 5, 3, 6, 8, 3, {"affine", "color"})
    every = [arguments(images, [4, 0, 2], tables, dtype=dtype) for tables in (moved, turned, {})]
    return [
        tuple(value.to(device) if isinstance(value, Tensor) else value for value in args)
        for args in every
    ]


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("device", DEVICES)
def test_augment_passes_opcheck(device: str) -> None:
    for args in _all_steps(device):
        torch.library.opcheck(torch.ops.resfast.augment.default, (*args, False))
    torch.library.opcheck(
        torch.ops.resfast.augment.default,
        (*_all_steps(device, torch.bfloat16)[0], True),
        test_utils=("test_schema", "test_autograd_registration"),  # check reads the values
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("device", DEVICES)
def test_operators_work_under_torch_compile(device: str, backend: str) -> None:
    args = _all_steps(device, torch.bfloat16)[0]
    images, indices, tables = args[0], args[1], dict(zip(TABLES, args[4:12], strict=True))
    params = AugmentParams(**{name: tables[name] for name in ("shift", "flip", "color", "cutout")})
    mix = MixParams(*(tables[name] for name in ("partner", "weight", "box")))
    mean, std = torch.full((2, 3), 0.25, device=device)

    def step(indices: Tensor) -> Tensor:
        batch = augment(
            images, indices, params, mean, std, mix=mix, dtype=torch.bfloat16, check=False
        )
        words = philox_face.philox(indices, seed=2**63 + 1, epoch=2, stream=3)
        return batch.float() * philox_face.uniform(words)[0, :, None, None, None]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for rows in (indices, indices.flip(0)):
        result = compiled(rows)
        torch.testing.assert_close(result, step(rows), rtol=0, atol=0)
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_cuda_graph_replay_equals_eager() -> None:
    for args in _all_steps("cuda", torch.float16):
        indices = args[1].clone()
        args = (args[0], indices, *args[2:], False)
        torch.ops.resfast.augment(*args)  # compiles
        torch.ops.resfast.philox(indices, 1, 2, 3)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            batch = torch.ops.resfast.augment(*args)
            words = torch.ops.resfast.philox(indices, 1, 2, 3)
        for rows in ([1, 1, 3], [0, 4, 2]):
            indices.copy_(torch.tensor(rows))
            graph.replay()
            assert torch.equal(batch, torch.ops.resfast.augment(*args))
            assert torch.equal(words, torch.ops.resfast.philox(indices, 1, 2, 3))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    images, indices, _, _, shift, flip, _, color, cutout, *mixing, _, _ = _all_steps("cuda")[0]
    params = AugmentParams(shift, flip, None, color, cutout)
    mean, std = torch.full((2, 3), 0.25, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(images, indices, params, mean, std, mix=MixParams(*mixing), check=False)
        philox_face.philox(indices, seed=1, epoch=2, stream=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_one_kernel_is_launched() -> None:
    args = (*_all_steps("cuda")[0], False)
    torch.ops.resfast.augment(*args)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.ops.resfast.augment(*args)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    assert ["_augment_kernel" in event.name for event in kernels] == [True]


# Wrong arguments, named before anything is read.

NAMES = ("images", "indices", "offset", "scale", *TABLES, "zero_padding", "dtype")


def _good() -> dict[str, Any]:
    """Arguments that are right, by name; 5 images of 6x8 pixels, a batch of 3."""
    return dict(zip(NAMES, _all_steps()[0], strict=True))


def _set(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


def _turned(**changes: float) -> dict[str, Any]:
    identity = torch.eye(2, 3).repeat(5, 1, 1)
    affine = _set(identity, (4, changes["row"], 2), changes["value"]) if changes else identity
    return {"shift": None, "flip": None, "affine": affine}


def _wrong() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    good = _good()
    images, shift, weight = good["images"], good["shift"], good["weight"]
    nan = float("nan")
    cases: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "images dtype": ({"images": images.float()}, TypeError, "images are torch.float32.*uint8"),
        "images rank": ({"images": images[0]}, ValueError, r"\[6, 8, 3\]; expected \[N, H, W, C\]"),
        "no images": ({"images": images[:0]}, ValueError, r"\[0, 6, 8, 3\].*none of them 0"),
        "images channels": (
            {"images": torch.zeros(5, 6, 8, 5, dtype=torch.uint8)},
            ValueError,
            "5 channels; expected 1 to 4",
        ),
        "images layout": (
            {"images": images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)},
            ValueError,
            "images are not contiguous",
        ),
        "result dtype": ({"dtype": torch.float64}, TypeError, "[Ff]loat64|[Dd]ouble"),
        "indices rank": ({"indices": torch.zeros(3, 1).long()}, ValueError, r"indices is \[3, 1\]"),
        "shift layout": (
            {"shift": torch.zeros(2, 5, dtype=torch.int32).T},
            ValueError,
            "shift is not contiguous",
        ),
        "affine and shift": (
            {"affine": torch.eye(2, 3).repeat(5, 1, 1)},
            ValueError,
            "affine is given together with shift or flip",
        ),
        "partner alone": (
            {"weight": None, "box": None},
            ValueError,
            "partner, weight and box together",
        ),
        "index low": ({"indices": torch.tensor([0, -1, 2])}, ValueError, "index -1 .*5 images.* 4"),
        "index high": ({"indices": torch.tensor([0, 5, 2])}, ValueError, "index 5 .*5 images.* 4"),
        "partner high": (
            {"partner": torch.tensor([0, 1, 99])},
            ValueError,
            "partner 99 is out of range for 5 images; expected 0 to 4",
        ),
        "weight low": ({"weight": _set(weight, (1,), -0.5)}, ValueError, "weight -0.5.* 0.* to 1"),
        "weight high": ({"weight": _set(weight, (1,), 1.5)}, ValueError, "weight 1.5.* 0.* to 1"),
        "weight nan": ({"weight": _set(weight, (1,), nan)}, ValueError, "weight -?nan.* 0.* to 1"),
        "shift rows": (
            {"shift": _set(shift, (4, 0), 6)},
            ValueError,
            "shift 6 leaves the padded image of 6x8 pixels; expected -5 to 5",
        ),
        "shift columns": (
            {"shift": _set(shift, (4, 1), -8)},
            ValueError,
            "shift -8 leaves the padded image of 6x8 pixels; expected -7 to 7",
        ),
        "affine rows": (
            _turned(row=0, value=5.5),
            ValueError,
            "affine coordinate 10.5.* leaves the padded image of 6x8 pixels; expected -5.*to 10",
        ),
        "affine columns": (
            _turned(row=1, value=-7.5),
            ValueError,
            "affine coordinate -7.5.* leaves the padded image of 6x8 pixels; expected -7.*to 14",
        ),
        "affine nan": (_turned(row=1, value=nan), ValueError, "affine coordinate -?nan"),
        "affine infinite": (
            _turned(row=1, value=float("inf")),
            ValueError,
            "affine coordinate (inf|-?nan)",
        ),
    }
    shapes = {
        "offset": "[3]",
        "scale": "[3]",
        "shift": "[5, 2]",
        "flip": "[5]",
        "affine": "[5, 2, 3]",
        "color": "[5, 3, 4]",
        "cutout": "[5, 4]",
        "partner": "[3]",
        "weight": "[3]",
        "box": "[3, 4]",
    }
    turned = {**good, **_turned()}
    for name, shape in shapes.items():
        around = _turned() if name == "affine" else {}
        value = turned[name] if name == "affine" else good[name]
        longer = torch.cat([value, value])
        message = re.escape(f"{name} is {list(longer.shape)}; expected {shape}")
        cases[f"{name} shape"] = ({**around, name: longer}, ValueError, message)
    for name in ("indices", *shapes):
        around = _turned() if name == "affine" else {}
        value = turned[name] if name == "affine" else good[name]
        cases[f"{name} dtype"] = (
            {**around, name: value.double()},
            TypeError,
            f"{name} is .*expect",
        )
    return cases


WRONG = _wrong()


def _call(arguments: dict[str, Any], check: bool = True) -> Tensor:
    """The public function with the operator's arguments (whose mean and std these come from)."""
    values = arguments.copy()
    params = AugmentParams(*(values[name] for name in TABLES[:5]))
    mixing = [values[name] for name in TABLES[5:]]
    mix = None if all(value is None for value in mixing) else MixParams(*mixing)
    return augment(
        values["images"],
        values["indices"],
        params,
        values["offset"] / 255,
        1 / (values["scale"] * 255),
        mix=mix,
        dtype=values["dtype"],
        check=check,
    )


@pytest.mark.parametrize(
    "case", [name for name in WRONG if name not in ("offset dtype", "scale dtype")]
)
def test_public_function_says_what_is_wrong(case: str) -> None:
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        _call({**_good(), **changes})


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("device", DEVICES)
def test_operator_says_what_is_wrong(device: str, case: str) -> None:
    """Where the C++ kernel checks, every error is a RuntimeError with the same message."""
    changes, error, message = WRONG[case]
    values = [
        value.to(device) if isinstance(value, Tensor) else value
        for value in {**_good(), **changes}.values()
    ]
    with pytest.raises((error, RuntimeError), match=message):
        torch.ops.resfast.augment(*values, True)


@pytest.mark.parametrize("name", [name for name in NAMES[1:-2] if name != "affine"])
def test_public_function_names_a_tensor_on_another_device(name: str) -> None:
    good = _good()
    with pytest.raises(ValueError, match=f"{name} is on meta; expected cpu, like images"):
        _call({**good, name: good[name].to("meta")})


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in NAMES[1:-2] if name != "affine"])
def test_operator_names_a_tensor_on_another_device(name: str) -> None:
    cuda = dict(zip(NAMES, _all_steps("cuda")[0], strict=True))
    values = {**cuda, name: cuda[name].cpu()}
    with pytest.raises((ValueError, RuntimeError), match=f"{name} is on cpu; expected cuda:0"):
        torch.ops.resfast.augment(*values.values(), False)


def test_right_arguments_pass_the_check() -> None:
    assert _call(_good()).shape == (3, 3, 6, 8)
    assert _call({**_good(), **_turned()}).shape == (3, 3, 6, 8)


def test_padding_that_does_not_exist_is_named() -> None:
    images = random_images((1, 4, 4, 3))
    with pytest.raises(ValueError, match="padding 'edge' is unknown; expected reflect or zero"):
        augment(images, torch.tensor([0]), None, torch.zeros(3), torch.ones(3), padding="edge")


def test_rows_of_images_outside_the_batch_are_not_checked() -> None:
    good = _good()
    unused = _set(good["shift"], (1, 0), 1000)  # the batch is 4, 0, 2 with partners of its own
    partner = torch.tensor([0, 2, 4])
    _call({**good, "shift": unused, "partner": partner})


# Compiled for each architecture, which needs no GPU.

POINTERS = dict(zip(TABLES, "i32 i1 fp32 fp32 i32 i64 fp32 i32".split(), strict=True))
VARIANTS = {
    "plain": (torch.bfloat16, ("shift", "flip"), False),
    "plain float32": (torch.float32, ("shift", "flip"), True),
    "everything": (torch.float16, TABLES[2:], False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_augment_compiles_for_the_architecture(capability: int, variant: str) -> None:
    kernels = triton_kernels("augment")
    dtype, present, zero = VARIANTS[variant]
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    signature = {"out": f"*{element}", "images": "*u8", "indices": "*i64", "count": "i32"}
    signature |= {"offset": "*fp32", "scale": "*fp32"}
    signature |= {name: f"*{POINTERS[name]}" for name in present}
    constants = kernels.layout(32, 32, 3, zero, dtype)
    constants |= {name: None for name in TABLES if name not in present}
    made = compiled(kernels._augment_kernel, signature, constants, capability, kernels.OPTIONS)
    assert made.asm["cubin"]
    if "plain" in variant:
        sass = made.asm["sass"]
        stores = re.findall(r"\bSTG\.E\S*", sass)
        assert stores
        assert all(".128" in store for store in stores), stores
        assert not re.findall(r"\b(?:STL|LDL)\b", sass), "registers are spilled"
    if dtype == torch.bfloat16:  # two at a time, to the nearest
        conversions = set(re.findall(r"cvt\S*bf16\S*", made.asm["ptx"]))
        assert conversions == {"cvt.rn.bf16x2.f32"}


def test_a_size_is_split_into_blocks_that_cover_it() -> None:
    kernels = triton_kernels("augment")
    for height, width, channels in (
        (32, 32, 3),
        (28, 28, 1),
        (33, 31, 3),
        (224, 224, 3),
        (1, 1, 1),
    ):
        for dtype in DTYPES:
            constants = kernels.layout(height, width, channels, False, dtype)
            block = constants["CHUNKS"] * constants["VECTOR"]
            covered = block * constants["STEPS"] * constants["PARTS"]
            size = height * width * channels
            assert block == kernels.BLOCK
            assert size <= covered < size + block * constants["STEPS"] + block
            assert constants["STEPS"] <= kernels.MAX_STEPS
            assert constants["VECTOR"] * dtype.itemsize in (2, 4, 8, 16)


def test_an_image_too_large_to_address_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"an image has 2147483648 bytes; expected less than 2\^31"
    ):
        triton_kernels("augment").layout(2**15, 2**14, 4, False, torch.float32)
