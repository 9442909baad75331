"""The whitening of a first convolution, against plain linear algebra."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from resfast.config.schema import Config
from resfast.data import batches as feed
from resfast.data.dataset import Files, Shards
from resfast.errors import ResfastError
from resfast.layers import whitening
from resfast.layers.whitening import EPS, prepare_model, whitening_weight
from resfast.models.presets import create_model
from resfast.models.speednet import SpeedNet, SpeedNetSpec
from resfast.training.loop import train
from tests.conftest import change

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def images(count: int = 40, size: int = 10, seed: int = 0) -> Tensor:
    """Normalized images whose neighbouring pixels and channels are alike, as in photographs."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    mixed = torch.einsum("ncij,kc->nkij", noise, torch.tensor([[1, 0, 0.2], [1, 1, 0], [0, 1, 1]]))
    smooth = F.avg_pool2d(mixed, 3, 1, 1)
    return (smooth - smooth.mean((0, 2, 3), keepdim=True)) / smooth.std((0, 2, 3), keepdim=True)


def patches(x: Tensor, kernel: int) -> np.ndarray:
    """Every patch as a row, by loops."""
    _, _, height, width = x.shape
    rows = [
        x[:, :, i : i + kernel, j : j + kernel].reshape(len(x), -1)
        for i in range(height - kernel + 1)
        for j in range(width - kernel + 1)
    ]
    return torch.cat(rows).double().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kernel", "width"), [(1, 0), (2, 0), (2, 5), (3, 0), (3, 12)])
def test_filters_are_scaled_eigenvectors_of_the_covariance(device: str, kernel: int, width: int):
    x = images()
    weight = whitening_weight(x.to(device), kernel, width=width).cpu()
    kept = width or 3 * kernel**2
    assert weight.shape == (2 * kept, 3, kernel, kernel)
    assert weight.dtype == torch.float32
    rows = patches(x, kernel)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values[::-1][:kept], vectors[:, ::-1].T[:kept]
    flat = weight.flatten(1).double().numpy()
    for filters, value, vector in zip(flat[:kept], values, vectors, strict=True):
        expected = vector / np.sqrt(value + EPS)
        expected *= np.sign(expected[np.abs(expected).argmax()])
        np.testing.assert_allclose(filters, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight[kept:], -weight[:kept], rtol=0, atol=0)


def test_what_comes_out_is_uncorrelated_and_of_unit_variance():
    x = images()
    out = F.conv2d(x, whitening_weight(x, 2, eps=0.0)[:12])
    flat = out.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(
        flat @ flat.T / flat.shape[1], torch.eye(12, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_batches_give_what_one_tensor_gives(monkeypatch: pytest.MonkeyPatch):
    x = images(600)
    whole = whitening_weight(x, 2)
    torch.testing.assert_close(whitening_weight(iter(x.split(170)), 2), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whitening_weight(x, 2), whole, rtol=0, atol=0)
    monkeypatch.setattr(whitening, "_CHUNK", 7)
    torch.testing.assert_close(whitening_weight(x, 2), whole, rtol=1e-5, atol=1e-6)


def test_directions_without_variance_repeat_those_with():
    grey = images()[:, :1].expand(-1, 3, -1, -1)
    weight = whitening_weight(grey, 2)
    for part, sign in ((weight[:12], 1), (weight[12:], -1)):
        torch.testing.assert_close(part, sign * weight[torch.arange(12) % 4], rtol=0, atol=0)
    assert F.conv2d(grey, weight).std((0, 2, 3)).min() > 0.9


@pytest.mark.parametrize(
    ("x", "kernel", "width", "message"),
    [
        (torch.empty(0, 3, 8, 8), 2, 0, "there are none"),
        (torch.zeros(2, 3, 8, 2), 3, 0, "images of 8x2 pixels are smaller than a patch of 3x3"),
        (torch.full((2, 3, 8, 8), torch.nan), 2, 0, "infinite or NaN"),
        (torch.zeros(2, 3, 8, 8), 2, 13, "width 13 is out of range: expected 1 to 12"),
    ],
)
def test_what_cannot_be_whitened_is_refused(x: Tensor, kernel: int, width: int, message: str):
    with pytest.raises(ResfastError, match=message):
        whitening_weight(x, kernel, width=width)


def test_a_model_is_prepared_from_the_first_images_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(whitening, "IMAGES", 25)
    model = create_model("speednet-94").to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = images(40)
    labels = torch.zeros(40)
    taken = []

    def batches():
        for part in zip(x.split(10), labels.split(10), strict=True):
            taken.append(len(part[0]))
            yield part

    prepare_model(model, batches())
    assert taken == [10, 10, 10]
    expected = whitening_weight(x[:25].split(10), 2, width=8)
    torch.testing.assert_close(model.whitening.weight, expected, rtol=0, atol=0)
    assert not model.whitening.weight.requires_grad
    for name, value in model.state_dict().items():
        assert (name == "whitening.weight") != torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "model",
    [create_model("resnet-member1m"), SpeedNet(SpeedNetSpec((4,), (1,), whitening=False))],
    ids=["resnet", "speednet"],
)
def test_a_network_without_whitening_is_left_and_no_image_read(model: nn.Module):
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def batches():
        raise AssertionError("read")
        yield

    prepare_model(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_are_taken_at_even_distances():
    labels = torch.arange(10)
    pixels = torch.zeros(10, 4, 4, 3, dtype=torch.uint8)
    taken = feed.spread((pixels, labels), 4)
    assert taken[1].tolist() == [0, 2, 5, 7]
    assert len(taken[0]) == 4
    assert feed.spread((pixels, labels), 10)[1] is labels
    files = feed.spread(Files(tuple("abcdefghij"), labels), 3)
    assert (files.paths, files.labels.tolist()) == (("a", "d", "g"), [0, 3, 6])
    shards = Shards(("x.tar",), 10)
    assert feed.spread(shards, 3) is shards


@pytest.fixture
def tiny_speednet(tiny: Config) -> Config:
    model = replace(
        tiny.model, model="speednet", convolutions=(1, 3), blocks=(), stem=None, residual=True
    )
    return replace(tiny, model=model)


def whitened(model: nn.Module) -> Tensor:
    return model.whitening.weight.detach().cpu()


def test_a_run_whitens_before_it_trains_and_counts_the_time(tiny_speednet: Config):
    result = train(tiny_speednet)
    again = train(change(tiny_speednet, name="again", seed=1))
    torch.testing.assert_close(whitened(again.model), whitened(result.model), rtol=0, atol=0)
    assert result.summary.whitening_seconds > 0
    norms = whitened(result.model).flatten(1).norm(dim=1)
    assert torch.all(norms[:11] <= norms[1:12] * 1.0001)  # eigenvalues fall
    plain = train(change(tiny_speednet, name="plain", whitening=False))
    assert plain.summary.whitening_seconds == 0
    assert "whitening.weight" not in plain.model.state_dict()


@pytest.mark.parametrize("loader", ["resident", "dali"])
def test_the_weight_is_that_of_the_training_images(tiny_speednet: Config, loader: str):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    run = train(change(tiny_speednet, loader=loader, epochs=1))
    folder = Path(tiny_speednet.data.data.removeprefix("folder:")) / "train"
    pixels = np.stack([np.asarray(Image.open(file)) for file in folder.glob("*/*.png")]).astype(
        float
    )
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    x = torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(whitened(run.model), whitening_weight(x, 2), rtol=2e-3, atol=1e-4)
