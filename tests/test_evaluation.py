"""Evaluation: test-time augmentation, its selective use, held-out images and fused networks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import resfast
from resfast.config.schema import Config
from resfast.data.resident import resident_batches
from resfast.errors import ResfastError
from resfast.inference import scoring as evaluation
from resfast.inference.scoring import evaluate, evaluate_both, predict
from resfast.training.loop import train
from tests.conftest import change

COUNT, CLASSES = 53, 4
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


@pytest.fixture
def images() -> Tensor:
    """uint8 ``[53, 8, 8, 3]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (COUNT, 8, 8, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(COUNT) % CLASSES


class Small(nn.Module):
    """A network that sees where things are, and counts what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3 * 8 * 8, CLASSES)
        self.shown: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(len(x))
        return self.linear(x.flatten(1))


def batches(images: Tensor, labels: Tensor, batch_size: int = 10) -> list[tuple[Tensor, Tensor]]:
    return list(resident_batches(images, labels, MEAN, STD, batch_size=batch_size))


def mirrored(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) + model(x.flip(3))) / 2


@torch.no_grad()
def reference(model: nn.Module, images: Tensor, tta: str) -> Tensor:
    """Test-time augmentation spelled out, of all images in one batch."""
    (x, _), *_ = batches(images, torch.zeros(len(images)), len(images))
    if tta == "none":
        return model(x)
    logits = mirrored(model, x)
    if tta == "flip":
        return logits
    frame = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    corners = {"shift": [(0, 0), (2, 2)], "multi-crop": [(0, 0), (2, 2), (0, 2), (2, 0)]}[tta]
    views = [mirrored(model, frame[:, :, y : y + 8, z : z + 8]) for y, z in corners]
    return logits / 2 + sum(views) / len(views) / 2


@pytest.mark.parametrize(
    ("tta", "views"), [("none", 1), ("flip", 2), ("shift", 6), ("multi-crop", 10)]
)
def test_views_are_averaged(images: Tensor, tta: str, views: int):
    model = Small().eval()
    torch.testing.assert_close(
        predict(model, images, MEAN, STD, batch_size=20, tta=tta), reference(model, images, tta)
    )
    model.shown.clear()
    predict(model, images, MEAN, STD, batch_size=20, tta=tta)
    assert sum(model.shown) == views * COUNT


@pytest.mark.parametrize("tta", ["none", "flip", "shift", "multi-crop"])
def test_both_results_come_from_the_same_views(images: Tensor, labels: Tensor, tta: str):
    model = Small()
    plain, augmented = evaluate_both(model, batches(images, labels), tta=tta)
    views = {"none": 1, "flip": 2, "shift": 6, "multi-crop": 10}[tta]
    assert sum(model.shown) == views * COUNT
    for found, kind in ((plain, "none"), (augmented, tta)):
        logits = reference(model, images, kind)
        assert found.accuracy == float((logits.argmax(1) == labels).double().mean())
        assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    assert torch.equal(plain.confusion, evaluate(model, batches(images, labels)).confusion)


def test_the_least_confident_images_get_the_other_views(images: Tensor, labels: Tensor):
    model = Small()
    select = 0.3
    found = evaluate(model, batches(images, labels), tta="shift", tta_select=select)
    chosen = math.ceil(select * COUNT)
    assert sum(model.shown) == 2 * COUNT + 4 * chosen
    logits = reference(model, images, "flip")
    least = logits.softmax(1).amax(1).argsort()[:chosen]
    logits[least] = reference(model, images, "shift")[least]
    assert found.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    every = reference(model, images, "shift")
    assert found.loss != pytest.approx(float(nn.functional.cross_entropy(every, labels)))


@pytest.mark.parametrize("select", [0.2, 0.6])  # above the mirrored part: all of these
@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_the_least_confident_images_get_the_mirrored_view(
    images: Tensor, labels: Tensor, tta: str, select: float
):
    model = Small()
    options = {"tta": tta, "tta_select": select, "tta_mirror": 0.45}
    plain, found = evaluate_both(model, batches(images, labels), **options)
    mirrored, moved = math.ceil(0.45 * COUNT), math.ceil(min(0.45, select) * COUNT)
    assert sum(model.shown) == COUNT + mirrored + (4 * moved if tta == "shift" else 0)
    logits = reference(model, images, "none")
    assert plain.accuracy == float((logits.argmax(1) == labels).double().mean())
    least = logits.softmax(1).amax(1).argsort()[:mirrored]
    logits[least] = reference(model, images, "flip")[least]
    if tta == "shift":
        least = least[logits[least].softmax(1).amax(1).argsort()[:moved]]
        logits[least] = reference(model, images, "shift")[least]
    assert found.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))


@pytest.mark.parametrize("batch_size", [1, 7, 53, 60])
@pytest.mark.parametrize("mirror", [0.7, 1.0])
@pytest.mark.parametrize("select", [0.01, 0.5, 0.99])
def test_the_choice_does_not_depend_on_the_batches(
    images: Tensor, labels: Tensor, batch_size: int, select: float, mirror: float
):
    options = {"tta": "multi-crop", "tta_select": select, "tta_mirror": mirror}
    one = evaluate(Small(), batches(images, labels, COUNT), **options)
    model = Small()
    other = evaluate(model, batches(images, labels, batch_size), **options)
    assert torch.equal(one.confusion, other.confusion)
    assert other.loss == pytest.approx(one.loss)
    assert max(model.shown) <= batch_size


def test_selecting_all_is_no_selection(images: Tensor, labels: Tensor):
    given = batches(images, labels)
    one = evaluate(Small(), given, tta="shift", tta_select=1.0)
    other = evaluate(Small(), iter(given), tta="shift")
    assert torch.equal(one.confusion, other.confusion)
    assert one.loss == other.loss


def test_what_cannot_be_selected_from_is_refused(images: Tensor, labels: Tensor):
    given = batches(images, labels)
    with pytest.raises(ValueError, match=r"tta_select is 0"):
        evaluate(Small(), given, tta="shift", tta_select=0)
    with pytest.raises(ValueError, match=r"tta_mirror is 2"):
        evaluate(Small(), given, tta="shift", tta_mirror=2)
    for option in ("tta_select", "tta_mirror"):
        with pytest.raises(ValueError, match="iterate twice"):
            evaluate(Small(), iter(given), tta="shift", **{option: 0.5})
    evaluate(Small(), iter(given), tta="flip", tta_select=0.5)  # nothing to select for


def test_the_mode_of_the_network_is_put_back(images: Tensor, labels: Tensor):
    model = nn.Sequential(Small(), nn.BatchNorm1d(CLASSES))
    before = model[1].running_mean.clone()
    evaluate_both(model.train(), batches(images, labels), tta="shift", tta_select=0.5)
    assert model.training
    assert torch.equal(model[1].running_mean, before)


# -- of a run -------------------------------------------------------------------------------------


def test_a_held_out_part_is_scored_with_and_without_augmentation(tiny: Config):
    summary = train(change(tiny, hold_out=12, epochs=2)).summary
    assert (summary["train_images"], summary["val_images"], summary["test_images"]) == (36, 12, 16)
    assert summary["scored_on"] == "test"
    for name in ("val_accuracy", "val_tta_accuracy"):
        assert summary[name] * 12 == pytest.approx(round(summary[name] * 12))
    for name in ("test_accuracy", "tta_accuracy"):
        assert summary[name] * 16 == pytest.approx(round(summary[name] * 16))


def test_without_a_held_out_part_there_is_no_such_accuracy(tiny: Config):
    summary = train(change(tiny, epochs=1)).summary
    assert summary["val_accuracy"] is summary["val_tta_accuracy"] is None
    assert summary["val_images"] == 0


def test_the_test_images_are_not_looked_at_where_they_are_not_to_be_scored(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    shown = []
    score = evaluation.evaluate_both

    def watched(model: nn.Module, batches: object, **options: object):
        shown.append(sum(len(images) for images, _ in batches))
        return score(model, batches, **options)

    monkeypatch.setattr("resfast.training.evaluator.evaluate_both", watched)
    result = train(change(tiny, hold_out=12, epochs=2, score_test=False))
    assert set(shown) == {12}
    summary = json.loads((result.path / "summary.json").read_text())
    for name in ("test_accuracy", "test_loss", "tta_accuracy"):
        assert summary[name] is None
    assert summary["test_images"] == 0
    assert summary["scored_on"] == "val"
    assert sum(map(sum, summary["confusion"])) == 12
    assert summary["val_accuracy"] == summary["best_accuracy"] or summary["best_epoch"] == 1


def test_the_last_epoch_scores_each_set_once(tiny: Config, monkeypatch: pytest.MonkeyPatch):
    calls = []
    score = evaluation.evaluate_both

    def watched(model: nn.Module, batches: object, **options: object):
        calls.append(options["tta"])
        return score(model, batches, **options)

    monkeypatch.setattr("resfast.training.evaluator.evaluate_both", watched)
    train(change(tiny, epochs=3))
    assert calls == ["none", "none", "flip"]


def test_many_small_batches_score_like_one_large_batch():
    torch.manual_seed(0)
    images, labels = torch.randn(300, 3, 8, 8), torch.randint(5, (300,))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    many = list(zip(images.split(2), labels.split(2), strict=True))
    assert len(many) > evaluation._Rows.INITIAL_BATCHES
    options = {"tta": "multi-crop", "tta_select": 0.3, "tta_mirror": 0.6}
    for ours, theirs in zip(
        evaluate_both(model, many, **options),
        evaluate_both(model, [(images, labels)], **options),
        strict=True,
    ):
        assert torch.equal(ours.confusion, theirs.confusion)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


def test_what_a_batch_leaves_behind_goes_to_one_place():
    kept, places = evaluation._Rows(), set()
    for _ in range(evaluation._Rows.INITIAL_BATCHES):
        kept.add(torch.randn(3, 10))
        places.add(kept.all().data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("tta_select", [1.0, 0.4])
def test_a_fused_evaluation_agrees(tiny: Config, tta_select: float):
    options = {"epochs": 3, "tta": "shift", "tta_select": tta_select, "tune_allocator": False}
    plain = train(change(tiny, **options))
    fused = train(change(tiny, name="fused", fuse=True, **options))
    for name in ("test_accuracy", "tta_accuracy", "best_accuracy"):
        assert fused.summary[name] == plain.summary[name]
    assert fused.summary.test_loss == pytest.approx(plain.summary.test_loss, rel=1e-3)
    assert fused.summary.compile_seconds > 0
    assert not any(type(module).__name__ == "FusedModel" for module in fused.model.modules())
    for name, value in plain.model.state_dict().items():
        assert torch.equal(fused.model.state_dict()[name], value), name


def test_evaluating_a_run_again_gives_its_accuracy(tiny: Config):
    result = train(change(tiny, epochs=2, tta="multi-crop", tta_select=0.5, tta_mirror=0.7))
    again = resfast.evaluate(result.path)
    assert again.accuracy == result.summary.test_accuracy
    assert again.with_tta.accuracy == result.summary.tta_accuracy
    assert again.record["tta_select"] == 0.5
    assert again.record["tta_mirror"] == 0.7


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [False, True])
def test_an_evaluation_on_cuda_agrees_with_the_cpu(tiny: Config, tmp_path: Path, fuse: bool):
    options = {"device": "cuda", "precision": "bf16", "tta": "multi-crop", "tta_select": 0.5}
    result = train(change(tiny, epochs=6, fuse=fuse, **options))
    again = resfast.evaluate(result.path, device="cpu", precision="fp32")
    assert again.with_tta.accuracy == pytest.approx(result.summary.tta_accuracy, abs=2 / 16)
    with pytest.raises(ResfastError):
        train(change(tiny, name="bad", tta_select=-1.0))
