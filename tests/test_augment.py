from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from resfast.data.augment import (
    POLICIES,
    Augment,
    affine_maps,
    check_augment,
    generator,
    image_statistics,
    mixed_labels,
    mixing,
    needs_statistics,
    order,
    parse_augment,
    sample,
    sample_mix,
    statistics,
)
from resfast.errors import ResfastError
from resfast.ops.augment.op import AugmentParams, MixParams, augment

PIXELS = torch.zeros(3), torch.full((3,), 1 / 255)  # mean and std that leave pixels as they are
ALL = Augment(
    crop=3,
    flip="random",
    resize=0.5,
    rotate=20,
    cutout=7,
    brightness=0.3,
    contrast=0.4,
    saturation=0.5,
    hue=0.1,
    autocontrast=0.5,
    grey=0.3,
    noise=0.1,
    mixup=0.4,
    cutmix=0.7,
)
COUNT = 40_000


def draw(policy: Augment, count: int = COUNT, size: tuple[int, int] = (32, 32), **values: object):
    options = {"size": size, "channels": 3, "seed": 5, "epoch": 0, **values}
    if needs_statistics(policy) and "statistics" not in options:
        options["statistics"] = torch.tensor([0.0, 255, 128]).expand(count, options["channels"], 3)
    return sample(policy, torch.arange(count), **options)


def same(first: AugmentParams | MixParams | None, second: AugmentParams | MixParams | None) -> bool:
    if first is None or second is None:
        return first is second
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in fields(first)]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def follows(values: Tensor, cdf: object) -> bool:
    return stats.kstest(values.double().numpy(), cdf).pvalue > 1e-3


def alike(values: Tensor, others: np.ndarray) -> bool:
    return stats.ks_2samp(values.double().numpy(), others).pvalue > 1e-3


def uniform_cells(cells: Tensor, count: int) -> bool:
    return stats.chisquare(torch.bincount(cells.long(), minlength=count)).pvalue > 1e-3


def has_probability(hits: Tensor, probability: float) -> bool:
    return stats.binomtest(int(hits.sum()), len(hits), probability).pvalue > 1e-3


# The policy and its text.


def policies() -> st.SearchStrategy[Augment]:
    part = st.floats(0, 1)
    pixels = st.integers(0, 10_000)
    alpha = st.floats(0, 1e6)
    return st.builds(
        Augment,
        crop=pixels,
        padding=st.sampled_from(["reflect", "zero"]),
        flip=st.sampled_from(["none", "random", "alternating"]),
        resize=st.floats(0, 1, exclude_min=True),
        rotate=st.floats(0, 30) | st.integers(0, 30),
        cutout=pixels,
        brightness=part,
        contrast=part,
        saturation=part,
        hue=st.floats(0, 0.5),
        autocontrast=part,
        grey=part,
        noise=part,
        mixup=alpha,
        cutmix=alpha,
    )


@settings(deadline=None, max_examples=300)
@given(policies())
def test_the_text_of_a_policy_reads_back_as_the_policy(policy: Augment):
    assert parse_augment(str(policy)) == policy
    assert parse_augment(str(parse_augment(str(policy)))) == policy


@pytest.mark.parametrize("name", POLICIES)
def test_a_named_policy_is_read_by_name_and_by_text_and_fits_cifar(name: str):
    assert parse_augment(name) == parse_augment(str(POLICIES[name])) == POLICIES[name]
    check_augment(POLICIES[name], 32, 32)


def test_the_text_has_what_differs_from_doing_nothing():
    assert str(Augment()) == "none"
    assert str(Augment(rotate=15.0, crop=4, mixup=0.2)) == "crop=4,rotate=15,mixup=0.2"
    assert str(POLICIES["standard"]) == "crop=4,flip=alternating,cutout=8"


def test_values_override_the_policy_named_first():
    read = parse_augment(" standard , cutout=0, mixup=.2 ")
    assert read == Augment(crop=4, flip="alternating", mixup=0.2)
    assert parse_augment("crop=4,padding=zero") == Augment(crop=4, padding="zero")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("standart", "'standart' is not a policy; .*did you mean 'standard'"),
        ("", "'' is not a policy; expected one of none, light, standard, strong, report-001"),
        ("crop", "give crop a value, crop=2"),
        ("padding", "give padding a value, padding=zero"),
        ("crop=4,standard", "the name of a policy must come first"),
        ("crop=4,", "'' is not a policy"),
        ("corp=4", "'corp' is unknown; .*did you mean 'crop'"),
        ("=4", "'' is unknown"),
        ("crop=4,flip=random,crop=2", "crop is given twice"),
        ("crop=4.5", "crop=4.5 is not a whole number; for example, use crop=2"),
        ("crop=", "crop= is not a whole number"),
        ("mixup=much", "mixup=much is not a number; for example, use mixup=0.2"),
        ("crop=-1", "crop=-1 is out of range: expected a whole number of pixels"),
        ("cutout=-3", "cutout=-3 is out of range"),
        ("flip=alternate", "flip=alternate is unknown: .*did you mean 'alternating'"),
        ("padding=mirror", "padding=mirror is unknown: expected reflect, zero"),
        ("rotate=31", "rotate=31.0 is out of range: expected 0 to 30"),
        ("resize=0", "resize=0.0 is out of range: expected above 0"),
        ("resize=1.1", "resize=1.1 is out of range: expected 0 to 1"),
        ("brightness=1.5", "brightness=1.5 is out of range: expected 0 to 1"),
        ("grey=nan", "grey=nan is out of range"),
        ("mixup=-1", "mixup=-1.0 is out of range: expected a number of at least 0"),
        ("cutmix=inf", "cutmix=inf is out of range: expected a number of at least 0"),
    ],
)
def test_bad_text_is_refused_with_what_was_expected(text: str, message: str):
    with pytest.raises(ResfastError, match=message) as caught:
        parse_augment(text)
    assert "--augment" in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"crop": 2.0}, {"crop": True}, {"rotate": "9"}, {"grey": True}, {"flip": ["none"]}]
)
def test_a_value_of_a_wrong_type_is_refused(values: dict[str, object]):
    with pytest.raises(ResfastError, match="--augment"):
        Augment(**values)


@pytest.mark.parametrize(
    ("policy", "size", "message"),
    [
        (Augment(crop=31), (33, 31), "crop=31 does not fit images of 33x31 .*choose crop=0 to 30"),
        (Augment(cutout=32), (33, 31), "cutout=32 does not fit .*choose cutout=0 to 31"),
        (Augment(rotate=30), (8, 31), "rotate=30 rotates images of 8x31 pixels beyond"),
        (Augment(rotate=30), (224, 8), "rotate=30 rotates images of 224x8 pixels beyond"),
    ],
)
def test_a_policy_that_does_not_fit_the_images_is_refused(
    policy: Augment, size: tuple[int, int], message: str
):
    for check in (lambda: check_augment(policy, *size), lambda: draw(policy, 2, size)):
        with pytest.raises(ResfastError, match=message):
            check()


def test_the_largest_values_that_fit_are_taken():
    check_augment(Augment(crop=30, cutout=31, rotate=30, resize=0.01), 33, 31)
    check_augment(Augment(crop=30, cutout=31, rotate=30, resize=0.01), 31, 33)
    check_augment(Augment(rotate=5), 8, 64)


def test_mixing_policies_say_so():
    mixing = {name for name, policy in POLICIES.items() if policy.mixes}
    assert mixing == {"strong", "report-001"}
    assert Augment(mixup=0.1).mixes
    assert Augment(cutmix=0.1).mixes


# What a draw depends on.


def test_generator_depends_on_seed_and_every_number_of_the_stream():
    def number(*values: int) -> int:
        return int(torch.randint(2**62, (), generator=generator(*values)))

    drawn = [number(*v) for v in ((0,), (1,), (0, 0), (0, 1), (0, 1, 0), (0, 0, 1), (-1,))]
    assert len(set(drawn)) == len(drawn)
    assert number(7, 3, 2) == number(7, 3, 2)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 2**32 - 2),
    indices=st.lists(st.integers(0, 199), min_size=1, max_size=40),
    name=st.sampled_from(["standard", "strong", "report-001", "all"]),
)
def test_a_row_depends_on_seed_epoch_and_index_alone(
    seed: int, epoch: int, indices: list[int], name: str
):
    policy = POLICIES.get(name, ALL)
    table = torch.rand(200, 3, 3, generator=torch.Generator().manual_seed(1)).sort(2).values * 255
    table = table[..., [0, 2, 1]]  # least, greatest, mean
    shape = {"size": (33, 31), "channels": 3, "seed": seed, "epoch": epoch}
    torch.manual_seed(epoch)
    everything = sample(policy, torch.arange(200), statistics=table, **shape)
    chosen = torch.tensor(indices)
    assert same(sample(policy, chosen, statistics=table[chosen], **shape), everything[chosen])


def test_ranks_draw_together_what_one_process_draws():
    everyone = order(96, seed=3, epoch=2, device="cpu")
    values = {"size": (32, 32), "seed": 3, "epoch": 2}
    whole = sample(POLICIES["standard"], everyone, channels=3, **values)
    partners = sample_mix(POLICIES["strong"], everyone, count=96, **values).partner
    for world in (1, 3, 4):
        parts = everyone.tensor_split(world)
        drawn = [sample(POLICIES["standard"], part, channels=3, **values) for part in parts]
        for name in ("shift", "flip", "cutout"):
            assert torch.equal(torch.cat([getattr(d, name) for d in drawn]), getattr(whole, name))
        mixed = [sample_mix(POLICIES["strong"], part, count=96, **values) for part in parts]
        assert torch.equal(torch.cat([mix.partner for mix in mixed]), partners)


def test_another_seed_or_epoch_draws_anew():
    base = draw(ALL, 200)
    for other in (draw(ALL, 200, seed=6), draw(ALL, 200, epoch=1), draw(ALL, 200, seed=5 + 2**32)):
        for name in ("affine", "color", "cutout"):
            rows = (getattr(base, name) != getattr(other, name)).flatten(1).any(1)
            assert rows.float().mean() > 0.9


def test_what_is_off_is_none():
    assert same(draw(Augment()), AugmentParams())
    on = {"crop": "shift", "flip": "flip", "cutout": "cutout", "rotate": "affine"}
    on |= {"resize": "affine", "brightness": "color", "contrast": "color", "saturation": "color"}
    on |= {"autocontrast": "color", "grey": "color"}
    for name, field in on.items():
        drawn = draw(replace(Augment(), **{name: getattr(ALL, name)}), 5)
        assert [f.name for f in fields(drawn) if getattr(drawn, f.name) is not None] == [field]
    assert (
        sample_mix(ALL_BUT_MIXING, torch.arange(4), count=4, size=(8, 8), seed=0, epoch=0) is None
    )


ALL_BUT_MIXING = replace(ALL, mixup=0, cutmix=0)


def test_one_augmentation_does_not_change_the_draws_of_another():
    alone = {
        name: draw(Augment(**{name: getattr(ALL, name)}), 500, (33, 31))
        for name in ("crop", "flip", "cutout", "rotate", "resize")
    }
    exact = draw(replace(ALL, rotate=0, resize=1), 500, (33, 31))
    assert torch.equal(exact.shift, alone["crop"].shift)
    assert torch.equal(exact.flip, alone["flip"].flip)
    together = draw(ALL, 500, (33, 31))
    assert torch.equal(together.cutout, alone["cutout"].cutout)
    angle, window = angles(alone["rotate"]), windows(alone["resize"], (33, 31))
    expected = affine_maps((33, 31), exact.shift, exact.flip, angle, window)
    torch.testing.assert_close(together.affine, expected, atol=2e-4, rtol=0)


def test_one_color_step_does_not_change_the_draws_of_another_and_they_run_in_order():
    table = torch.tensor([[40.0, 180, 99], [10, 250, 130], [90, 111, 100]]).expand(500, 3, 3)
    names = ("autocontrast", "brightness", "contrast", "saturation", "hue", "grey")
    product = torch.eye(3)
    for name in names:
        alone = draw(Augment(**{name: getattr(ALL, name)}), 500, statistics=table)
        product = alone.color[:, :, :3] @ product
    together = draw(ALL, 500, statistics=table).color[:, :, :3]
    torch.testing.assert_close(together, product, atol=1e-4, rtol=1e-5)


def test_mixup_and_cutmix_together_draw_what_each_draws_alone():
    both, mixup, cutmix = (
        batches(Augment(**values), 200)
        for values in ({"mixup": 0.4, "cutmix": 0.7}, {"mixup": 0.4}, {"cutmix": 0.7})
    )
    assert torch.equal(both.partner, mixup.partner)
    assert torch.equal(both.partner, cutmix.partner)
    cuts = both.weight == 1
    assert 60 < cuts.sum() < 140
    assert torch.equal(both.weight[~cuts], mixup.weight[~cuts])
    assert torch.equal(both.box[cuts], cutmix.box[cuts])
    assert not both.box[~cuts].any()


# Distributions. Each test also checks that it rejects a similar distribution.


def test_shifts_are_uniform_over_the_square():
    shift = draw(Augment(crop=3)).shift
    assert shift.dtype == torch.int32
    cells = (shift[:, 0] + 3) * 7 + shift[:, 1] + 3
    assert uniform_cells(cells, 49)
    assert not uniform_cells(torch.where(torch.arange(COUNT) % 20 == 0, 24, cells), 49)


def test_random_flip_is_even_and_drawn_anew_each_epoch():
    first, second = (draw(Augment(flip="random"), epoch=e).flip for e in (0, 1))
    assert first.dtype == torch.bool
    for hits in (first, second, first ^ second):
        assert has_probability(hits, 0.5)
        assert not has_probability(hits, 0.53)


def test_alternating_flip_mirrors_each_image_every_other_epoch():
    epochs = [draw(Augment(flip="alternating"), epoch=e).flip for e in range(4)]
    assert has_probability(epochs[0], 0.5)
    assert torch.equal(epochs[0], draw(Augment(flip="random")).flip)
    assert torch.equal(epochs[1], ~epochs[0])
    assert torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], ~epochs[0])


def angles(params: AugmentParams) -> Tensor:
    return torch.atan2(params.affine[:, 0, 1].double(), params.affine[:, 0, 0].double())


def windows(params: AugmentParams, size: tuple[int, int]) -> Tensor:
    """Top, left, height and width of what maps that only stretch show, in pixels."""
    maps = params.affine.double()
    assert not maps[:, 0, 1].any()
    assert not maps[:, 1, 0].any()
    stretch = torch.stack([maps[:, 0, 0], maps[:, 1, 1]], 1)
    start = maps[:, :, 2] - stretch / 2 + 0.5
    return torch.cat([start, stretch * torch.tensor(size)], 1)


def test_angles_are_uniform_either_way():
    angle = torch.rad2deg(angles(draw(Augment(rotate=15))))
    assert follows(angle, stats.uniform(-15, 30).cdf)
    assert not follows(angle, stats.uniform(-15.5, 31).cdf)
    assert angle.abs().max() <= 15 + 1e-5


def test_windows_have_the_stated_area_ratio_and_place():
    def expected(least: float, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        area = random.uniform(least, 1, COUNT) * 40 * 28
        ratio = np.exp(random.uniform(math.log(3 / 4), math.log(4 / 3), COUNT))
        height = np.minimum(np.sqrt(area / ratio), 40)
        width = np.minimum(np.sqrt(area * ratio), 28)
        top, left = random.uniform(0, 1, (2, COUNT)) * np.stack([40 - height, 28 - width])
        return np.stack([top, left, height, width, height * width, height / width])

    drawn = windows(draw(Augment(resize=0.3), size=(40, 28)), (40, 28))
    top, left, height, width = drawn.unbind(1)
    values = torch.stack([top, left, height, width, height * width, height / width])
    # The map is rounded to float32: without this, a clipped side would not be a tie.
    values = (values * 1000).round() / 1000
    right, wrong = np.round(expected(0.3, 0), 3), np.round(expected(0.33, 1), 3)
    assert all(alike(value, other) for value, other in zip(values, right, strict=True))
    assert not alike(values[4], wrong[4])
    assert torch.stack([top, left]).min() > -1e-4
    assert (top + height).max() < 40 + 1e-4
    assert (left + width).max() < 28 + 1e-4


@pytest.mark.parametrize("side", [7, 8])
def test_cutout_is_a_square_about_a_uniform_pixel_cut_at_the_border(side: int):
    box = draw(Augment(cutout=side), size=(20, 26)).cutout
    assert box.dtype == torch.int32
    top, left, bottom, right = box.long().unbind(1)
    row = torch.where(bottom < 20, bottom - (side - side // 2), top + side // 2)
    column = torch.where(right < 26, right - (side - side // 2), left + side // 2)
    assert torch.equal(top, (row - side // 2).clamp(min=0))
    assert torch.equal(bottom, (row - side // 2 + side).clamp(max=20))
    assert torch.equal(left, (column - side // 2).clamp(min=0))
    assert torch.equal(right, (column - side // 2 + side).clamp(max=26))
    cells = row * 26 + column
    assert uniform_cells(cells, 520)
    assert not uniform_cells(cells.clamp(0, 500), 520)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_color_factors_are_uniform_about_one(name: str):
    color = draw(Augment(**{name: 0.2})).color
    factor = color[:, 0, 0] if name != "saturation" else 1 - color[:, 1, 0] / 0.299
    assert follows(factor, stats.uniform(0.8, 0.4).cdf)
    assert not follows(factor, stats.uniform(0.79, 0.42).cdf)


def hue_angles(color: Tensor) -> Tensor:
    """Angle in the plane of I and Q that red was rotated by."""

    def angle(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
        y = 0.299 * red + 0.587 * green + 0.114 * blue
        i = 0.735514 * (red - y) - 0.267962 * (blue - y)
        return torch.atan2(0.477648 * (red - y) + 0.412626 * (blue - y), i)

    one = torch.ones(len(color))
    turned = angle(*color[:, :, 0].unbind(1)) - angle(one, 0 * one, 0 * one)
    return torch.remainder(turned + math.pi, 2 * math.pi) - math.pi


@pytest.mark.parametrize("part", [0.05, 0.4])
def test_hues_are_rotated_uniformly_either_way(part: float):
    angles_of_red = hue_angles(draw(Augment(hue=part)).color)
    width = 2 * math.pi * part
    assert follows(angles_of_red, stats.uniform(-width, 2 * width).cdf)
    assert not follows(angles_of_red, stats.uniform(-width, 1.96 * width).cdf)


def test_a_rotation_of_the_hue_is_that_of_yiq_space():
    """Python's ``colorsys`` has coefficients of two digits."""
    colors = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    color = draw(Augment(hue=0.2), 50).color
    assert not color[:, :, 3].any()
    turned = torch.einsum("bdc,bc->bd", color[:, :, :3], colors)
    for rgb, result, angle in zip(
        colors.tolist(), turned.tolist(), hue_angles(color).tolist(), strict=True
    ):
        y, i, q = colorsys.rgb_to_yiq(*rgb)
        cos, sin = math.cos(angle), math.sin(angle)
        expected = colorsys.yiq_to_rgb(y, cos * i - sin * q, sin * i + cos * q)
        assert result == pytest.approx(expected, abs=0.02)
    grey = torch.einsum("bdc,c->bd", color[:, :, :3], torch.full((3,), 100.0))
    torch.testing.assert_close(grey, torch.full_like(grey, 100.0))


def test_a_small_rotation_is_close_to_torchvisions():
    images = smooth_images(30, 8, 8, 60, 200)
    params = draw(Augment(hue=0.05), 30)
    result = augment(images, torch.arange(30), params, *PIXELS)
    parts = -hue_angles(params.color) / (2 * math.pi)  # from red to yellow is positive there
    for got, image, part in zip(result, images, parts.tolist(), strict=True):
        plain = image.permute(2, 0, 1)
        moved, expected = got - plain, tv.adjust_hue(plain / 255, part) * 255 - plain
        assert torch.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.4
        assert 0.5 < moved.norm() / expected.norm() < 2


# Noise, which is a separate pass.


def noisy(amount: float = 0.1, **values: object) -> Tensor:
    images = torch.full((300, 16, 16, 3), 128, dtype=torch.uint8)
    params = draw(Augment(noise=amount), 300, (16, 16), **values)
    return augment(images, torch.arange(300), params, *PIXELS, noise=amount) / 255


def test_noise_is_normal_with_the_given_deviation_and_independent():
    values = noisy() - 128 / 255
    assert follows(values.flatten() / 0.1, stats.norm.cdf)
    assert not follows(values.flatten() / 0.097, stats.norm.cdf)
    rows = values.flatten(1)
    assert uncorrelated([rows[:, index] for index in (0, 1, 2, 3, 8, 9, 400, 767)])
    assert uncorrelated([rows[index] for index in (0, 1, 2, 299)])
    torch.testing.assert_close(noisy(0.2) - 128 / 255, 2 * values)


def test_noise_depends_on_image_epoch_and_seed_and_on_no_other_step():
    values = noisy()
    assert torch.equal(values, noisy())
    for other in (noisy(epoch=1), noisy(seed=6)):
        assert (other != values).float().mean() > 0.99
    images = torch.randint(0, 256, (300, 16, 16, 3), dtype=torch.uint8)
    with_noise = replace(Augment(crop=2, flip="random", cutout=5), noise=0.1)
    params = draw(with_noise, 300, (16, 16))
    indices = torch.tensor([7, 299, 7])
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    plain = augment(images, indices, replace(params, noise=None), mean, std)
    result = augment(images, indices, params, mean, std, noise=0.1)
    expected = (values - 128 / 255)[indices] / std[:, None, None]
    torch.testing.assert_close(result - plain, expected, atol=1e-5, rtol=0)
    assert result.is_contiguous(memory_format=torch.channels_last)
    half = augment(images, indices, params, mean, std, noise=0.1, dtype=torch.bfloat16)
    assert torch.equal(half, result.to(torch.bfloat16))  # rounded once
    assert augment(images, indices[:0], params, mean, std, noise=0.1).shape == (0, 3, 16, 16)
    with pytest.raises(ValueError, match=r"noise is \[3\]; expected \[300\]"):
        augment(images, indices, AugmentParams(noise=params.noise[:3]), mean, std, noise=0.1)


def test_the_same_noise_comes_from_the_python_generator(monkeypatch: pytest.MonkeyPatch):
    from resfast.ops.augment import noise, reference

    keys = torch.tensor([5, 2**62, 1])
    found = noise.normal(keys, 61)
    monkeypatch.setattr(noise, "philox", reference.philox)
    assert torch.equal(noise.normal(keys, 61), found)
    assert torch.equal(noise.normal(keys[1:], 8), found[1:, :8])


def uncorrelated(draws: list[Tensor]) -> bool:
    count = len(draws[0])
    ranks = np.corrcoef([stats.rankdata(part.double().numpy()) for part in draws])
    return np.abs(ranks - np.eye(len(draws))).max() < 4.5 / math.sqrt(count)


def test_all_draws_of_an_image_are_independent_of_each_other():
    size = (32, 32)
    table = torch.tensor([20.0, 120, 50]).expand(COUNT, 3, 3)
    alone = {
        f.name: draw(Augment(**{f.name: getattr(ALL, f.name)}), size=size, statistics=table)
        for f in fields(ALL)
        if f.name not in ("padding", "mixup", "cutmix")
    }
    top, left, height, width = windows(alone["resize"], size).unbind(1)
    partner = sample_mix(ALL, torch.arange(COUNT), count=COUNT, size=size, seed=5, epoch=0).partner
    draws = [
        *alone["crop"].shift.unbind(1),
        alone["flip"].flip,
        angles(alone["rotate"]),
        height * width,
        height / width,
        top / (size[0] - height),
        left / (size[1] - width),
        *alone["cutout"].cutout.unbind(1)[:2],
        alone["brightness"].color[:, 0, 0],
        alone["contrast"].color[:, 0, 0],
        -alone["saturation"].color[:, 1, 0],
        alone["autocontrast"].color[:, 0, 0] != 1,
        alone["grey"].color[:, 0, 1] != 0,
        hue_angles(alone["hue"].color),
        alone["noise"].noise,
        partner,
    ]
    unclipped = height * width < 0.74 * size[0] * size[1]  # whatever the ratio
    draws = [part[unclipped] for part in draws]
    assert len(draws[0]) > 10_000
    assert uncorrelated(draws)
    assert not uncorrelated([draws[0], draws[0] + 20 * draws[1]])


def test_the_mix_of_a_batch_is_independent_of_its_partner():
    mix = batches(Augment(mixup=1.0, cutmix=0.01), 1500, (600, 400))
    cuts = mix.weight == 1
    assert uncorrelated([mix.partner, cuts])
    assert uncorrelated([mix.partner[~cuts], mix.weight[~cuts]])
    shown = cuts & (mix.box[:, 2] > mix.box[:, 0])  # lambda near 0: the border tells the centre
    assert shown.sum() > 200
    centre = (mix.box[:, :2] + mix.box[:, 2:])[shown]
    assert uncorrelated([mix.partner[shown], *centre.unbind(1)])


@pytest.mark.parametrize("probability", [0.0001, 0.3, 1.0])
def test_autocontrast_and_grey_have_their_probability(probability: float):
    table = torch.tensor([20.0, 120, 50]).expand(COUNT, 3, 3)
    stretched = draw(Augment(autocontrast=probability), statistics=table).color[:, 0, 0] != 1
    grey = draw(Augment(grey=probability)).color[:, 0, 1] != 0
    for hits in (stretched, grey):
        assert has_probability(hits, probability)
        assert not has_probability(hits, probability * 0.9 + 0.01)
    if probability == 0.3:
        assert has_probability(stretched & grey, 0.09)


def batches(policy: Augment, count: int, size: tuple[int, int] = (32, 32), **values: object):
    """What ``count`` batches of one image are mixed with."""
    options = {"count": 1000, "size": size, "seed": 2, "epoch": 0, **values}
    drawn = [sample_mix(policy, torch.tensor([index]), **options) for index in range(count)]
    names = ("partner", "weight", "box")
    return MixParams(**{n: torch.cat([getattr(mix, n) for mix in drawn]) for n in names})


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lambda_of_mixup_is_from_the_beta_distribution(alpha: float):
    mix = batches(Augment(mixup=alpha), 1500)
    assert not mix.box.any()
    assert follows(mix.weight, stats.beta(alpha, alpha).cdf)
    assert not follows(mix.weight, stats.beta(alpha * 1.6, alpha * 1.6).cdf)


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.2, 1.0, 5.0, 1e6])
def test_the_table_of_quantiles_follows_the_beta_distribution(alpha: float):
    chance = (torch.arange(2**20, dtype=torch.float32) + 0.5) / 2**20
    drawn = mixing._beta(chance, alpha)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    # Within one step of the table, in probability.
    exact = stats.beta(alpha, alpha)
    for value in (0.001, 0.1, 0.25, 0.5, 0.6, 0.999):
        below = (drawn < value).double().mean().item()
        assert exact.cdf(value - 1e-7) - 1 / 4096 <= below <= exact.cdf(value + 1e-7) + 1 / 4096
    if alpha == 1.0:
        torch.testing.assert_close(drawn, chance, atol=1e-6, rtol=0)


def test_boxes_of_cutmix_have_area_one_minus_lambda_and_are_cut_at_the_border():
    size = (600, 400)
    mix = batches(Augment(cutmix=0.7), 1500, size)
    assert torch.equal(mix.weight, torch.ones(1500))
    assert mix.box.dtype == torch.int32
    random = np.random.default_rng(0)
    side = np.sqrt(1 - random.beta(0.7, 0.7, 20_000))
    centre = random.uniform(0, 1, (2, 20_000))
    cut = [np.clip(c + side / 2, 0, 1) - np.clip(c - side / 2, 0, 1) for c in centre]
    other = 1 - mix.label_weights(*size)
    assert alike(other, cut[0] * cut[1])
    assert not alike(other, side**2)
    top, left, bottom, right = mix.box.double().unbind(1)
    inside = (top > 0) & (left > 0) & (bottom < 600) & (right < 400)
    assert inside.sum() > 200
    torch.testing.assert_close(
        ((bottom - top) / 600)[inside], ((right - left) / 400)[inside], atol=0.003, rtol=0
    )
    assert top.min() >= 0
    assert left.min() >= 0
    assert bottom.max() <= 600
    assert right.max() <= 400


def test_a_batch_takes_mixup_or_cutmix_evenly():
    cuts = batches(Augment(mixup=1.0, cutmix=1.0), 1500).weight == 1
    assert has_probability(cuts, 0.5)
    assert not has_probability(cuts, 0.6)


def test_partners_are_uniform_over_the_data_set_and_change_with_the_epoch():
    def partners(epoch: int) -> Tensor:
        policy, indices = Augment(mixup=1.0), torch.arange(COUNT)
        values = {"count": 101, "size": (8, 8), "seed": 0, "epoch": epoch}
        return sample_mix(policy, indices, **values).partner

    first, second = partners(0), partners(1)
    assert uniform_cells(first, 101)
    assert not uniform_cells(first.clamp(max=99), 101)
    assert has_probability(first == second, 1 / 101)


def test_a_batch_shares_its_mix_which_depends_on_its_first_index():
    indices = torch.tensor([7, 3, 9, 9, 0])
    values = {"count": 10, "size": (32, 32), "seed": 0, "epoch": 0}
    mix = sample_mix(ALL, indices, **values)
    assert len(mix.weight.unique()) == 1
    assert len(mix.box.unique(dim=0)) == 1
    again = sample_mix(ALL, torch.tensor([7, 1]), **values)
    assert mix.weight[0] == again.weight[0]
    assert torch.equal(mix.box[0], again.box[0])
    assert same(sample_mix(ALL, indices[:0], **values), MixParams(*EMPTY_MIX))
    images = torch.zeros(10, 32, 32, 3, dtype=torch.uint8)
    augment(images, indices, None, *PIXELS, mix=mix)  # layout and range are what it takes


EMPTY_MIX = (
    torch.empty(0, dtype=torch.int64),
    torch.empty(0),
    torch.empty(0, 4, dtype=torch.int32),
)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 2000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000))
def test_an_order_has_every_index_once(count: int, seed: int, epoch: int):
    assert torch.equal(
        order(count, seed=seed, epoch=epoch, device="cpu").sort().values, torch.arange(count)
    )


def test_every_permutation_is_equally_likely():
    drawn = torch.stack([order(4, seed=1, epoch=epoch, device="cpu") for epoch in range(2400)])
    numbers = drawn @ torch.tensor([64, 16, 4, 1])
    _, cells = numbers.unique(return_inverse=True)
    assert uniform_cells(cells, 24)
    assert not uniform_cells(torch.where(torch.arange(2400) % 10 == 0, 0, cells), 24)


# Geometry and color, through the operator.


@pytest.mark.parametrize("padding", ["reflect", "zero"])
@pytest.mark.parametrize("size", [(9, 7), (8, 8)])
def test_a_map_without_rotation_and_stretch_is_the_exact_shift_and_flip(
    size: tuple[int, int], padding: str
):
    height, width = size
    most = min(size) - 1
    moves = torch.cartesian_prod(*[torch.arange(-most, most + 1, dtype=torch.int32)] * 2)
    shift, flip = moves.repeat(2, 1), torch.arange(2 * len(moves)) >= len(moves)
    count = len(flip)
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    still = torch.zeros(count, dtype=torch.float64)
    whole = torch.tensor([0.0, 0, height, width], dtype=torch.float64).expand(count, 4)
    maps = affine_maps(size, shift, flip, still, whole)
    by_map, exact = (
        augment(images, torch.arange(count), params, *PIXELS, padding=padding)
        for params in (AugmentParams(affine=maps), AugmentParams(shift=shift, flip=flip))
    )
    assert torch.equal(by_map, exact)


@pytest.mark.parametrize("size", [(33, 31), (31, 33), (8, 8), (8, 30), (224, 224), (1024, 1024)])
@pytest.mark.parametrize("resize", [1.0, 0.02])
def test_no_coordinate_leaves_the_padded_image(size: tuple[int, int], resize: float):
    policy = Augment(crop=min(size) - 1, flip="random", rotate=30, resize=resize)
    maps = draw(policy, 5000, size).affine
    corners = torch.tensor([[0, 0], [0, size[1] - 1], [size[0] - 1, 0], [size[0] - 1, size[1] - 1]])
    reached = maps @ torch.cat([corners, torch.ones(4, 1)], 1).T  # in float32, as the operator does
    reached_least, reached_most = reached.amin((0, 2)), reached.amax((0, 2))
    for axis, side in enumerate(size):
        assert reached_least[axis] >= 1 - side - 1e-3
        assert reached_most[axis] <= 2 * (side - 1) + 1e-3
        # The limit is nearly reached, so the crop is not cut short for nothing.
        if max(size) - min(size) <= 2:
            assert reached_most[axis] > 1.7 * (side - 1)


def test_the_operator_takes_every_drawn_map():
    policy = Augment(crop=30, flip="random", rotate=30, resize=0.1)
    images = torch.randint(0, 256, (300, 33, 31, 3), dtype=torch.uint8)
    result = augment(images, torch.arange(300), draw(policy, 300, (33, 31)), *PIXELS, check=True)
    assert result.isfinite().all()


def smooth_images(count: int, height: int, width: int, least: int = 0, most: int = 255) -> Tensor:
    noise = torch.rand(count, 3, height // 3 + 1, width // 3 + 1)
    large = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return (least + (most - least) * large).round().byte().permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("degrees", [-25.0, 7.5, 30.0])
def test_rotation_is_torchvisions(degrees: float):
    images = smooth_images(2, 33, 31)
    angle = torch.full((2,), math.radians(degrees), dtype=torch.float64)
    params = AugmentParams(affine=affine_maps((33, 31), angle=angle))
    result = augment(images, torch.arange(2), params, *PIXELS)
    expected = tv.rotate(
        images.permute(0, 3, 1, 2).float(), degrees, interpolation=InterpolationMode.BILINEAR
    )
    middle = (..., slice(7, -7), slice(7, -7))  # without what the rotation brings in
    torch.testing.assert_close(result[middle], expected[middle], atol=0.02, rtol=0)
    mirrored = tv.rotate(images.permute(0, 3, 1, 2).float(), -degrees)
    assert (result[middle] - mirrored[middle]).abs().mean() > 1


@pytest.mark.parametrize("flip", [False, True])
def test_a_window_is_torchvisions_resized_crop(flip: bool):
    images = smooth_images(2, 33, 31)
    window = torch.tensor([[4.0, 9, 21, 17]] * 2, dtype=torch.float64)
    maps = affine_maps((33, 31), flip=torch.tensor([flip] * 2), window=window)
    result = augment(images, torch.arange(2), AugmentParams(affine=maps), *PIXELS)
    expected = tv.resized_crop(
        images.permute(0, 3, 1, 2).float(), 4, 9, 21, 17, [33, 31], antialias=False
    )
    expected = expected.flip(-1) if flip else expected
    middle = (..., slice(2, -2), slice(2, -2))  # torchvision does not look beyond the window
    torch.testing.assert_close(result[middle], expected[middle], atol=0.02, rtol=0)


def test_the_order_is_rotation_window_shift_mirror():
    size, moved = (16, 16), torch.tensor([[2, -3]])
    angle, mirrored = torch.tensor([0.3], dtype=torch.float64), torch.tensor([True])
    window = torch.tensor([[1.0, 5, 9, 8]], dtype=torch.float64)
    turn, cut, shift, flip = (
        torch.cat([affine_maps(size, **step).double(), torch.tensor([[[0.0, 0, 1]]])], 1)
        for step in (
            {"angle": angle},
            {"window": window},
            {"shift": moved},
            {"flip": mirrored},
        )
    )
    together = affine_maps(size, moved, mirrored, angle, window)
    # A map leads from the result to the source, so the first step stands last.
    expected = (turn @ shift @ cut @ flip)[:, :2]
    torch.testing.assert_close(together.double(), expected, atol=1e-5, rtol=0)


def test_color_is_torchvisions_where_nothing_is_clamped():
    policy = Augment(autocontrast=0.5, brightness=0.3, contrast=0.4, saturation=0.5, grey=0.3)
    count = 400
    images = smooth_images(count, 12, 10, 40, 200)
    table = statistics(images)
    names = ("brightness", "contrast", "saturation", "autocontrast", "grey")
    alone = {
        name: draw(Augment(**{name: getattr(policy, name)}), count, statistics=table).color
        for name in names
    }
    brightness, contrast = alone["brightness"][:, 0, 0], alone["contrast"][:, 0, 0]
    saturation = 1 - alone["saturation"][:, 1, 0] / 0.299
    stretched, grey = alone["autocontrast"][:, 0, 0] != 1, alone["grey"][:, 1, 0] != 0
    # Factors below 1 keep every step between 0 and 255 even after auto-contrast.
    kept = ((brightness < 1) & (contrast < 1) & (saturation < 1)).nonzero()[:, 0]
    assert {(bool(stretched[i]), bool(grey[i])) for i in kept} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    params = draw(policy, count, statistics=table)
    result = augment(images, kept, params, *PIXELS)
    for got, index in zip(result, kept.tolist(), strict=True):
        expected = images[index].permute(2, 0, 1) / 255
        if stretched[index]:
            expected = tv.autocontrast(expected)
        expected = tv.adjust_brightness(expected, brightness[index].item())
        expected = tv.adjust_contrast(expected, contrast[index].item())
        expected = tv.adjust_saturation(expected, saturation[index].item())
        if grey[index]:
            expected = tv.rgb_to_grayscale(expected, num_output_channels=3)
        # torchvision's weight of red is 0.2989: up to 0.03 of 255 at each grey.
        torch.testing.assert_close(got, expected * 255, atol=0.1, rtol=0)


def test_a_channel_of_one_value_is_left_by_autocontrast():
    images = smooth_images(3, 8, 8)
    images[..., 1] = 77
    color = draw(Augment(autocontrast=1), 3, statistics=statistics(images)).color
    result = augment(images, torch.arange(3), AugmentParams(color=color), *PIXELS)
    assert (result[:, 1] == 77).all()
    for channel in (0, 2):
        assert (result[:, channel].amin((1, 2)).abs() < 1e-3).all()
        assert ((result[:, channel].amax((1, 2)) - 255).abs() < 1e-3).all()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_saturation_and_grey_do_nothing_without_three_channels(channels: int):
    assert draw(Augment(saturation=0.5, grey=0.5), 9, channels=channels).color is None
    full = draw(Augment(brightness=0.2, contrast=0.3, saturation=0.5), 9, channels=channels)
    plain = draw(Augment(brightness=0.2, contrast=0.3), 9, channels=channels)
    assert full.color.shape == (9, channels, channels + 1)
    assert torch.equal(full.color, plain.color)


def test_contrast_of_one_channel_is_torchvisions():
    images = smooth_images(40, 9, 9, 60, 190)[..., :1].contiguous()
    params = draw(Augment(contrast=0.4), 40, channels=1, statistics=statistics(images))
    result = augment(images, torch.arange(40), params, torch.zeros(1), torch.full((1,), 1 / 255))
    for got, image, factor in zip(result, images, params.color[:, 0, 0].tolist(), strict=True):
        expected = tv.adjust_contrast(image.permute(2, 0, 1) / 255, factor) * 255
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


# Statistics and labels.


@pytest.mark.parametrize("chunk", [1, 5000, 1 << 20])
@pytest.mark.parametrize("shape", [(7, 9, 5, 3), (20, 16, 16, 1), (1, 1, 1, 4), (0, 4, 4, 3)])
def test_statistics_are_least_greatest_and_mean(
    chunk: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(image_statistics, "_CHUNK_BYTES", chunk)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    pixels = images.flatten(1, 2).double()
    result = statistics(images)
    assert result.dtype == torch.float32
    assert result.shape == (shape[0], shape[3], 3)
    expected = torch.stack([pixels.amin(1), pixels.amax(1), pixels.mean(1)], 2).float()
    torch.testing.assert_close(result, expected, atol=0, rtol=1e-7)


def test_only_autocontrast_and_contrast_need_statistics():
    assert needs_statistics(Augment(contrast=0.1))
    assert needs_statistics(Augment(autocontrast=0.1))
    assert not needs_statistics(replace(ALL, contrast=0, autocontrast=0))


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"float32; expected torch\.uint8"):
        statistics(torch.zeros(2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"expected \[N, H, W, C\]"):
        statistics(torch.zeros(8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"statistics is None; .* need \[4, 3, 3\]"):
        draw(Augment(contrast=0.1), 4, statistics=None)
    with pytest.raises(ValueError, match=r"statistics is \[5, 3, 3\]; expected \[4, 3, 3\]"):
        draw(Augment(contrast=0.1), 4, statistics=torch.zeros(5, 3, 3))
    short = torch.arange(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="int32; expected int64"):
        sample(Augment(crop=1), short, size=(8, 8), channels=3, seed=0, epoch=0)
    with pytest.raises(ValueError, match="epoch -1 is out of range"):
        draw(Augment(crop=1), 4, epoch=-1)
    for count in (0, 2**31):
        with pytest.raises(ValueError, match=f"count {count} is out of range"):
            sample_mix(ALL, torch.arange(3), count=count, size=(8, 8), seed=0, epoch=0)


def test_mixed_labels_are_the_parts_of_the_classes():
    result = mixed_labels(
        torch.tensor([0, 2, 1]), torch.tensor([1, 2, 0]), torch.tensor([0.25, 0.3, 1.0]), 4
    )
    assert result.dtype == torch.float32
    expected = torch.tensor([[0.25, 0.75, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]])
    torch.testing.assert_close(result, expected)


# CUDA draws what the CPU draws.


def drawn_on(device: str, policy: Augment, epoch: int) -> Iterator[tuple[str, Tensor]]:
    indices = torch.arange(20_000, device=device)
    generated = torch.rand(20_000, 3, 3, generator=torch.Generator().manual_seed(0))
    table = (generated.sort(2).values * 255)[..., [0, 2, 1]].to(device)
    values = {"size": (33, 31), "seed": 2**63 + 5, "epoch": epoch}
    params = sample(policy, indices, channels=3, statistics=table, **values)
    yield from ((f.name, getattr(params, f.name)) for f in fields(params))
    for first in range(0, 2000, 100):
        mix = sample_mix(policy, indices[first : first + 100], count=20_000, **values)
        if mix is not None:
            yield from ((f.name, getattr(mix, f.name)) for f in fields(mix))
    yield "order", order(20_000, seed=2**63 + 5, epoch=epoch, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [*POLICIES.values(), ALL], ids=[*POLICIES, "all"])
def test_cuda_draws_what_the_cpu_draws(policy: Augment):
    for epoch in (0, 3):
        for (name, cpu), (_, cuda) in zip(
            drawn_on("cpu", policy, epoch), drawn_on("cuda", policy, epoch), strict=True
        ):
            if cpu is None:
                assert cuda is None
                continue
            assert cuda.device.type == "cuda"
            if cpu.is_floating_point():
                torch.testing.assert_close(cuda.cpu(), cpu, atol=1e-6, rtol=1e-6, msg=name)
            else:
                assert torch.equal(cuda.cpu(), cpu), name


@pytest.mark.gpu
def test_cuda_statistics_are_the_cpus():
    images = torch.randint(0, 256, (500, 33, 31, 3), dtype=torch.uint8)
    assert torch.equal(statistics(images.cuda()).cpu(), statistics(images))


@pytest.mark.gpu
def test_drawing_does_not_wait_for_the_device():
    indices = torch.arange(1000, device="cuda")
    table = torch.rand(1000, 3, 3, device="cuda")
    values = {"size": (33, 31), "seed": 0, "epoch": 0}

    def everything() -> None:
        sample(ALL, indices, channels=3, statistics=table, **values)
        mix = sample_mix(ALL, indices, count=1000, **values)
        mixed_labels(indices % 10, mix.partner % 10, mix.label_weights(33, 31), 10)
        order(1000, seed=0, epoch=0, device="cuda")

    everything()  # compiles the kernels and moves the table of quantiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
