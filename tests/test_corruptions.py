"""The fifteen corruptions: each does what its name says, more at each severity, and repeatably."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import resfast
from resfast.cli.evaluate import main as evaluate_command
from resfast.config.schema import Config
from resfast.data.corruptions.apply import KINDS, corrupt
from resfast.data.corruptions.filters import disk, gaussian_blur, motion_blur, zoomed
from resfast.data.corruptions.weather import plasma
from resfast.data.sources import load_dataset
from resfast.errors import ResfastError
from resfast.training.seeds import train
from tests.conftest import change


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Sixteen smooth images with an edge, uint8 ``[16, 32, 32, 3]``."""
    random = np.random.default_rng(0)
    smooth = ndimage.zoom(random.uniform(0, 1, (16, 5, 5, 3)), (1, 6.4, 6.4, 1), order=1)
    smooth[:, 8:24, 12:20] = 1 - smooth[:, 8:24, 12:20]
    return torch.from_numpy((20 + 200 * smooth).astype(np.uint8))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_is_stronger_at_the_highest_severity(kind: str, images: torch.Tensor):
    made = [corrupt(images, kind, severity, seed=1) for severity in (1, 3, 5)]
    distances = [distance(images, one) for one in made]
    assert distances[0] > 1
    if kind != "elastic_transform":  # its affine part gets smaller as the rest grows
        assert distances[0] < distances[2]
    for one in made:
        assert one.dtype == torch.uint8
        assert one.shape == images.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_is_a_function_of_the_seed(kind: str, images: torch.Tensor):
    before = images.clone()
    first = corrupt(images, kind, 4, seed=1)
    assert torch.equal(corrupt(images, kind, 4, seed=1), first)
    assert torch.equal(images, before)
    random = kind not in (
        "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"
    )  # fmt: skip
    assert torch.equal(corrupt(images, kind, 4, seed=2), first) != random


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "channels"), [(8, 3), (33, 1), (80, 3)])
def test_corruptions_take_any_size_and_grey_images(kind: str, side: int, channels: int):
    random = np.random.default_rng(side)
    pixels = torch.from_numpy(random.integers(0, 256, (2, side, side, channels), np.uint8))
    for severity in (1, 5):
        assert corrupt(pixels, kind, severity).shape == pixels.shape
    assert corrupt(pixels[:0], kind, 1).shape == (0, side, side, channels)


def test_the_noise_has_the_strength_of_the_paper():
    grey = torch.full((64, 32, 32, 3), 128, dtype=torch.uint8)
    for severity, deviation in ((1, 0.04), (5, 0.10)):
        values = corrupt(grey, "gaussian_noise", severity).double() / 255
        assert float(values.std()) == pytest.approx(deviation, rel=0.02)
        assert float(values.mean()) == pytest.approx(128 / 255, abs=0.003)
    for severity, photons in ((1, 500), (5, 50)):
        values = corrupt(grey, "shot_noise", severity).double() / 255
        assert float(values.var()) == pytest.approx(128 / 255 / photons, rel=0.05)
    noisy = corrupt(grey, "impulse_noise", 5)
    assert float((noisy == 0).double().mean()) == pytest.approx(0.035, rel=0.1)
    assert float((noisy == 255).double().mean()) == pytest.approx(0.035, rel=0.1)


def test_contrast_and_brightness_are_what_the_paper_says(images: torch.Tensor):
    values = images.double() / 255
    means = values.mean((1, 2), keepdim=True)
    expected = (means + 0.15 * (values - means)) * 255
    assert (corrupt(images, "contrast", 5).double() - expected).abs().max() <= 1.001
    import colorsys

    made = corrupt(images, "brightness", 3)
    for row, column in ((0, 0), (10, 15), (31, 31)):
        h, s, v = colorsys.rgb_to_hsv(*values[3, row, column].tolist())
        wanted = torch.tensor(colorsys.hsv_to_rgb(h, s, min(v + 0.15, 1))) * 255
        assert (made[3, row, column] - wanted).abs().max() <= 1.001
    black = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    assert corrupt(black, "brightness", 1).unique().tolist() == [12]


def test_jpeg_and_coarse_pixels_are_those_of_pillow(images: torch.Tensor):
    buffer = io.BytesIO()
    Image.fromarray(images[2].numpy()).save(buffer, "JPEG", quality=40)
    expected = np.asarray(Image.open(buffer))
    assert np.array_equal(corrupt(images, "jpeg_compression", 5)[2].numpy(), expected)
    small = Image.fromarray(images[2].numpy()).resize((20, 20), Image.Resampling.BOX)
    expected = np.asarray(small.resize((32, 32), Image.Resampling.BOX))
    assert np.array_equal(corrupt(images, "pixelate", 5)[2].numpy(), expected)


def test_filters_are_those_of_scipy(images: torch.Tensor):
    values = images.float().permute(0, 3, 1, 2) / 255
    plane = values[1, 2].numpy()
    blurred = gaussian_blur(values, 1.3)[1, 2].numpy()
    assert np.allclose(blurred, ndimage.gaussian_filter(plane, 1.3, mode="nearest"), atol=1e-5)
    zoom = zoomed(values, 1.25)[1, 2].numpy()
    centre = plane[3:29, 3:29]
    assert np.allclose(zoom, ndimage.zoom(centre, 32 / 26, order=1, grid_mode=False), atol=0.03)
    point = torch.zeros(2, 1, 33, 33)
    point[:, :, 16, 16] = 1
    trail = motion_blur(point, 6, 2, torch.tensor([0.0, 90.0]))
    assert trail[0, 0].sum() == pytest.approx(1, abs=1e-3)
    assert trail[0, 0, 16].sum() == pytest.approx(1, abs=1e-3)  # along the row
    assert trail[1, 0, :, 16].sum() == pytest.approx(1, abs=1e-3)  # along the column
    assert torch.equal(trail[0, 0], trail[1, 0].T)
    for radius, sigma in ((0.3, 0.4), (1.5, 0.1), (6.0, 1.2)):
        kernel = disk(radius, sigma)
        assert kernel.sum() == pytest.approx(1, abs=1e-4)
        assert torch.allclose(kernel, kernel.T)


def test_glass_moves_pixels_to_their_neighbours_only():
    """Without the two blurs, which do nothing at the first severity."""
    rows = torch.arange(32, dtype=torch.uint8).view(1, 32, 1, 1).expand(1, 32, 32, 3).clone()
    moved = rows.int() - corrupt(rows, "glass_blur", 1).int()
    assert set(moved.unique().tolist()) == {0, 1}
    assert 0.3 < float((moved == 1).double().mean()) < 0.5  # half of the pixels inside


def test_an_elastic_transform_bends_lines_except_at_the_first_severity():
    ramp = torch.arange(64).view(1, 64, 1, 1).mul(4).to(torch.uint8).expand(4, 64, 64, 3).clone()
    bent = []
    for severity in (1, 5):
        inner = corrupt(ramp, "elastic_transform", severity)[:, 16:48, 16:48, 0].double()
        bent.append(float((inner.diff(dim=1).diff(dim=1)).abs().mean()))
    assert bent[0] < 0.7  # rounding alone
    assert bent[1] > 2 * bent[0]


def test_a_plasma_fills_its_range_and_is_smoother_with_a_faster_decay():
    random = torch.Generator().manual_seed(0)
    maps = {decay: plasma(20, 32, decay, random) for decay in (1.75, 3)}
    for one in maps.values():
        assert one.shape == (20, 1, 32, 32)
        assert one.amin((1, 2, 3)).abs().max() == 0
        assert torch.allclose(one.amax((1, 2, 3)), torch.ones(20))
    rough = {decay: float(one.diff(dim=2).abs().mean()) for decay, one in maps.items()}
    assert rough[3] < rough[1.75]


def test_wrong_corruptions_are_one_sentence(images: torch.Tensor):
    with pytest.raises(ResfastError, match=r"'snwo' is unknown; choose gaussian.*mean 'snow'"):
        corrupt(images, "snwo", 1)
    with pytest.raises(ResfastError, match="severity 6 is out of range: expected 1 to 5"):
        corrupt(images, "snow", 6)
    with pytest.raises(ResfastError, match=r"torch.float32 .*expected uint8 \[N, H, W, 1 or 3\]"):
        corrupt(images.float(), "snow", 1)


def test_a_run_is_scored_under_corruptions(tiny: Config, tmp_path: Path, capsys):
    result = train(change(tiny, epochs=3))
    out = tmp_path / "out"
    options = [str(result.path), "--out", str(out), "--corrupt", "contrast", "fog"]
    assert evaluate_command(options) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "corruptions.json").read_text())
    assert record["clean_accuracy"] == pytest.approx(result.summary.test_accuracy)
    assert record["clean_tta_accuracy"] == pytest.approx(result.summary.tta_accuracy)
    data = load_dataset(tiny.data.data, data_dir=tiny.data.data_dir, image_size=16)
    run = resfast.load(result.path)
    with open(out / "corruptions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["none"] + ["fog"] * 5 + ["contrast"] * 5
    for row in rows[1:]:
        made = corrupt(data.test_images, row["kind"], int(row["severity"]))
        wrong = run.logits(made).argmax(1) != data.test_labels
        assert float(row["error"]) == pytest.approx(float(wrong.double().mean()))
    mean = np.mean([float(row["error"]) for row in rows[1:]])
    assert record["mean_accuracy"] == pytest.approx(1 - mean)
    assert f"mean accuracy under corruption {1 - mean:.2%}" in printed
    assert (out / "corruptions.png").is_file()
    first = (out / "corruptions.csv").read_bytes()
    assert evaluate_command([*options, "--batch-size", "5"]) == 0
    assert json.loads((out / "corruptions.json").read_text())["error"] == record["error"]
    assert evaluate_command([*options, "--corrupt-seed", "1"]) == 0
    assert (out / "corruptions.csv").read_bytes() != first
    capsys.readouterr()
    assert evaluate_command([*options[:3], "--corrupt", "rain"]) == 2
    assert "corruption 'rain' is unknown; choose gaussian_noise" in capsys.readouterr().err
