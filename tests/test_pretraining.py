"""Self-supervised pre-training with Barlow Twins, and fine-tuning from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import resfast
from resfast.config.schema import Config
from resfast.config.validate import check
from resfast.data.augment import parse_augment
from resfast.data.device_batches import DeviceBatches
from resfast.data.resident import ResidentLoader
from resfast.data.two_views import TwoViews
from resfast.errors import ResfastError
from resfast.models.presets import build_model
from resfast.models.resnet import ResNet, ResNetSpec
from resfast.models.speednet import SpeedNetSpec
from resfast.models.vgg import VGGSpec
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.training.loop import Interrupted, train
from resfast.training.losses import criterion
from resfast.training.pretraining import (
    add_projector,
    barlow_twins,
    barlow_twins_loss,
    two_headed,
)
from tests.conftest import change, interrupt_at
from tests.test_training import assert_same_weights, weights

SPECS = [
    ResNetSpec((1, 1), (8, 16), stem=8, head=(12,), dropout=0.1),
    VGGSpec((8, 16), (1, 1), "batch", head=(12,)),
    SpeedNetSpec((16, 16), (2, 1), whitening_width=4),
]


@pytest.fixture
def pretrained(tiny: Config) -> Config:
    return change(
        tiny, pretrain="barlow_twins", projector=(24, 16), augment=parse_augment(
            "crop=2,flip=random,brightness=0.3,noise=0.05"), name="pretrained",
    )  # fmt: skip


def test_the_loss_is_that_of_the_paper():
    random = np.random.default_rng(0)
    first = random.normal(size=(20, 6)) * 3 + 1
    second = first + random.normal(size=(20, 6))
    one, two = ((v - v.mean(0)) / np.sqrt(v.var(0) + 1e-5) for v in (first, second))
    expected = 0.0
    for i in range(6):
        for j in range(6):
            c = sum(one[b, i] * two[b, j] for b in range(20)) / 20
            expected += (1 - c) ** 2 if i == j else 0.01 * c**2
    found = barlow_twins_loss(torch.tensor(first), torch.tensor(second), 0.01)
    assert float(found) == pytest.approx(expected / 6, rel=1e-9)


def test_equal_views_of_independent_dimensions_have_no_loss():
    values = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64))[0]
    centred = torch.linalg.qr(values - values.mean(0))[0]
    # Scaled, so that the constant added to the variance is small.
    assert barlow_twins_loss(1e3 * centred, 1e3 * centred, 1.0) < 1e-6
    assert barlow_twins_loss(centred, -centred, 1.0) > 1


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_a_network_is_its_features_and_its_last_layer(spec: object):
    model = build_model(spec, 4, 16).eval()
    images = torch.randn(3, 3, 16, 16)
    features = model.embed(images)
    assert features.shape == (3, model.last_layer.in_features)
    assert torch.equal(model.classify(features), model(images))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_labels_train_the_last_layer_alone(spec: object):
    model = build_model(spec, 4, 16)
    add_projector(model, (10, 6))
    layers = [type(layer) for layer in model.projector]
    assert layers == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    logits, projections = two_headed(model)(torch.randn(8, 3, 16, 16))
    assert (logits.shape, projections.shape) == ((4, 4), (8, 6))
    labels = torch.arange(4)
    hard = criterion("cross_entropy", 0.0)
    hard(None, logits, labels, "mean").backward()
    last = {id(parameter) for parameter in model.last_layer.parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in last), name
    both = barlow_twins(hard, 0.1)(None, logits, labels, "mean", projections)
    twins = barlow_twins_loss(projections[:4], projections[4:], 0.1)
    torch.testing.assert_close(both, twins + hard(None, logits, labels, "mean"))
    model.zero_grad()
    twins.backward()
    for name, parameter in model.named_parameters():
        expected = id(parameter) not in last and parameter.requires_grad
        assert (parameter.grad is not None) == expected, name


def batches() -> tuple[TwoViews, DeviceBatches]:
    images = torch.randint(0, 256, (10, 8, 8, 3), dtype=torch.uint8)
    loader = ResidentLoader(
        images, torch.arange(10), torch.full((3,), 0.5), torch.full((3,), 0.2), batch_size=4,
        classes=10, augment=parse_augment("crop=2,flip=alternating,brightness=0.4"),
    )  # fmt: skip
    return TwoViews(DeviceBatches(loader)), DeviceBatches(loader)


@pytest.mark.parametrize("order", [None, torch.tensor([3, 1, 4, 0, 5, 9])])
def test_views_are_of_the_same_images_and_differ(order: Tensor | None):
    views, plain = batches()
    for epoch in (0, 1):
        views.begin(epoch, first=2, order=order)
        plain.begin(epoch, first=2, order=order)
        found, single = views.next(4, 8), plain.next(4, 8)
        assert found.images.shape == (8, 3, 8, 8)
        assert found.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found.images[:4], single.images)
        assert torch.equal(found.labels, single.labels)
        assert torch.equal(found.indices, single.indices)
        assert all(not torch.equal(a, b) for a, b in zip(*found.images.chunk(2), strict=True))
        again = DeviceBatches(plain.loader)
        shuffled = plain.loader.order(epoch) if order is None else order
        again.begin(epoch + 2**31 + 1, first=2, order=shuffled)
        assert torch.equal(found.images[4:], again.next(4, 8).images)


def test_a_run_saves_a_network_that_can_be_used_and_fine_tuned(
    pretrained: Config, tiny: Config, tmp_path: Path
):
    first = train(change(pretrained, epochs=4))
    tensors = weights(first.path)
    assert not [name for name in tensors if name.startswith("projector")]
    run = resfast.load(first.path, device="cpu")
    raw = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert run.probabilities(raw).shape == (2, 2)
    assert first.summary.params == sum(p.numel() for p in run.model.parameters())
    tuned = train(change(tiny, init_from=first.path, freeze=("stem", "stages"), name="tuned"))
    after = weights(tuned.path)
    for name in tensors:
        assert torch.equal(tensors[name], after[name]) != name.startswith("head"), name


def test_the_views_of_an_image_become_alike_and_its_features_useful(pretrained: Config):
    config = change(
        pretrained, data="digits", batch_size=64, epochs=5, ema=0.0, lr=0.1, projector=(32, 32),
        augment=parse_augment("crop=2,brightness=0.3"), channels=(16, 32), stem=16, name="digits",
    )  # fmt: skip
    result = train(config)
    assert result.summary.test_accuracy > 0.4  # of a linear classifier after 110 steps
    data = resfast.load_dataset("digits", data_dir=config.data.data_dir, image_size=16)
    loader = ResidentLoader(
        data.train_images, data.train_labels, torch.tensor(result.summary.mean),
        torch.tensor(result.summary.std), batch_size=512, classes=10, augment=config.data.augment,
    )  # fmt: skip
    views = TwoViews(DeviceBatches(loader))
    views.begin(50)
    images = views.next(512, 16).images
    fresh = ResNet(ResNetSpec((1, 1), (16, 32), stem=16))
    add_projector(fresh, (32, 32))
    with torch.no_grad():
        before = barlow_twins_loss(*two_headed(fresh)(images)[1].chunk(2), 0.0051)
        state = checkpoint.load_state(result.path / records.CHECKPOINT)["training"]["model"]
        fresh.load_state_dict(state)
        after = barlow_twins_loss(*two_headed(fresh)(images)[1].chunk(2), 0.0051)
    assert after < 0.6 * before


def test_all_layers_but_the_last_are_the_same_with_other_labels(pretrained: Config):
    config = change(pretrained, epochs=2, ema=0.0)
    right = train(config).path
    noisy = train(change(config, label_noise=0.9, name="noisy")).path
    first, second = weights(right), weights(noisy)
    for name in first:
        assert torch.equal(first[name], second[name]) != name.startswith("head"), name


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"precision": "bf16", "drop_last": False, "batch_size": 20, "sizes": ((12, 0.5),)},
        {"fuse": True, "lookahead": 2, "ema": 0.0, "record": ("gradients", "smoothness")},
    ],
    ids=lambda values: "-".join(values) or "plain",
)
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    pretrained: Config, monkeypatch: pytest.MonkeyPatch, values: dict
):
    config = change(pretrained, **values)
    whole = train(change(config, name="whole"))
    assert whole.summary.tta_accuracy is not None
    interrupt_at(monkeypatch, 5)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    monkeypatch.undo()
    assert_same_weights(train(resume=stopped.value.path).path, whole.path)


def test_every_seed_is_pretrained_as_alone(pretrained: Config):
    both = resfast.train(change(pretrained, runs=2, epochs=1)).path
    for seed in (0, 1):
        alone = train(change(pretrained, seed=seed, epochs=1, name=f"alone{seed}"))
        assert_same_weights(both / f"seed{seed}", alone.path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"accumulate": 2}, "--accumulate cannot be combined with --pretrain"),
        ({"filter_keep": 0.5}, "--filter-keep cannot be combined"),
        ({"augment": parse_augment("cutmix=1")}, "--augment mixup and cutmix cannot"),
        ({"teacher": Path("x")}, "--teacher cannot be combined"),
        ({"compile": "on"}, "--compile on cannot be combined"),
        ({"projector": ()}, r"--projector \(none\) is out of range"),
        ({"pretrain": "none"}, "--projector needs --pretrain barlow_twins"),
        ({"redundancy_weight": 0.0}, "--redundancy-weight 0.0 is out of range"),
    ],
)
def test_what_does_not_go_together_is_refused(pretrained: Config, values: dict, message: str):
    with pytest.raises(ResfastError, match=message):
        check(change(pretrained, **values))


def test_streamed_images_have_one_view(pretrained: Config):
    pytest.importorskip("nvidia.dali")
    with pytest.raises(ResfastError, match="--pretrain needs --loader resident"):
        train(change(pretrained, loader="dali"))
