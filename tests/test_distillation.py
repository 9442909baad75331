"""Distillation: its loss, what the teacher sees, and runs with a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import resfast
from resfast.cli.train import command_line
from resfast.config.schema import Config
from resfast.config.validate import check
from resfast.data.augment import parse_augment
from resfast.errors import ResfastError
from resfast.ops.augment.op import augment
from resfast.training.loop import Interrupted, train
from resfast.training.losses import criterion
from resfast.training.teacher import Distillation, Teacher, soft_target_loss
from tests.conftest import change, interrupt_at
from tests.test_training import assert_same_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that classifies almost all images correctly."""
    folder = tmp_path_factory.mktemp("teacher")
    options = command_line(
        [
            *("--data", f"folder:{image_tree}", "--data-dir", str(folder), "--out", str(folder)),
            *("--model", "resnet", "--blocks", "1,1", "--channels", "8,16", "--stem", "8"),
            *("--image-size", "16", "--batch-size", "12", "--epochs", "16", "--lr", "0.05"),
            *("--ema", "0", "--label-smoothing", "0", "--tta", "none", "--seed", "3"),
            *("--augment", "crop=1"),  # no flips, which turn one class into the other
            *("--precision", "fp32", "--device", "cpu", "--threads", "1", "--compile", "off"),
        ]
    )[1]
    return train(options).path


def logits() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, target = (3 * torch.randn(5, 4, generator=generator) for _ in range(2))
    return student.requires_grad_(), target, torch.tensor([0, 3, 1, 1, 2])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_and_its_gradient_are_those_of_the_paper(temperature: float):
    student, target, _ = logits()
    loss = soft_target_loss(student, target, temperature)
    p, q = (torch.softmax(values / temperature, 1) for values in (target, student))
    expected = temperature**2 * (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(gradient, temperature * (q - p).detach())  # T^2 (q - p) / T


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_labels_and_teacher_are_weighted(weight: float):
    student, target, labels = logits()
    loss = criterion("cross_entropy", 0.1)
    both = Distillation(loss, lambda images: target, temperature=2.0, weight=weight)
    images = torch.zeros(5, 3, 4, 4)
    each = both(images, student, labels, "none")
    hard = loss(images, student, labels, "none")
    soft = soft_target_loss(student, target, 2.0)
    torch.testing.assert_close(each, (1 - weight) * hard + weight * soft)
    torch.testing.assert_close(both(images, student, labels, "mean"), each.mean())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]
)
def test_the_teacher_sees_the_images_as_it_was_trained_to(
    teacher: Path, tiny: Config, dtype: torch.dtype, tolerance: float
):
    run = resfast.load(teacher, device="cpu", precision="fp32")
    raw = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.3, 0.5, 0.6]), torch.tensor([0.4, 0.2, 0.3])
    config = change(tiny, batch_size=6)
    taught = Teacher(teacher, config, run.classes, mean, std, CPU, dtype)
    expected = run.logits(raw)
    for statistics in ((mean, std), (run.mean, run.std)):
        taught.normalized_by(*statistics)
        images = augment(raw, torch.arange(6), None, *statistics, dtype=dtype)
        found = taught(images)
        assert (found.dtype, found.requires_grad) == (torch.float32, False)
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error < tolerance
        half = taught(images[:, :, :8, :8])  # --sizes
        assert half.shape == (6, 2)


def test_a_student_with_the_teachers_weights_has_no_loss(teacher: Path, tiny: Config):
    """Without norms, which differ in training, on images that are augmented and mixed."""
    vgg = change(
        tiny, model="vgg", blocks=(), stem=None, convolutions=(1, 1), channels=(8, 16), head=(12,),
        mean=(0.4, 0.4, 0.4), std=(0.3, 0.3, 0.3), augment=parse_augment("crop=1,mixup=0.4"),
        label_smoothing=0.0, ema=0.0,
    )  # fmt: skip
    first = train(change(vgg, name="first")).path
    student = change(vgg, init_from=first, teacher=first, distill_weight=1.0, name="student")
    result = train(student)
    rows = (result.path / "metrics.jsonl").read_text()
    assert max(train_losses(rows)) < 1e-6
    other = train(change(student, teacher=first, init_from=None, name="other"))
    assert max(train_losses((other.path / "metrics.jsonl").read_text())) > 1e-3


def train_losses(rows: str) -> list[float]:
    return [json.loads(line)["train_loss"] for line in rows.splitlines()]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"precision": "bf16", "accumulate": 2, "sizes": ((12, 0.5),), "loss": "mse"},
        {"filter_start": 0.3, "filter_keep": 0.5, "drop_last": False, "batch_size": 20},
    ],
    ids=lambda values: "-".join(values),
)
def test_a_student_learns_from_predictions_alone_and_resumes(
    teacher: Path, tiny: Config, values: dict, monkeypatch: pytest.MonkeyPatch
):
    taught = change(
        tiny, teacher=teacher, distill_weight=1.0, distill_temperature=1.0, epochs=10,
        label_noise=0.5, ema=0.0, **values,
    )  # fmt: skip
    whole = train(change(taught, name="whole"))
    losses = train_losses((whole.path / "metrics.jsonl").read_text())
    assert losses[-1] < 0.8 * losses[0]
    if not values:
        assert whole.summary.test_accuracy >= 0.75  # half of its labels are wrong
    interrupt_at(monkeypatch, 6)
    with pytest.raises(Interrupted) as stopped:
        train(taught)
    monkeypatch.undo()
    assert_same_weights(train(resume=stopped.value.path).path, whole.path)


def test_every_seed_learns_from_the_teacher_as_alone(teacher: Path, tiny: Config):
    taught = change(tiny, teacher=teacher, epochs=1, val_fraction=0.25)
    both = resfast.train(change(taught, runs=2)).path
    for seed in (0, 1):
        alone = train(change(taught, seed=seed, name=f"alone{seed}"))
        assert_same_weights(both / f"seed{seed}", alone.path)


def test_the_compiled_step_asks_the_teacher_too(teacher: Path, tiny: Config):
    taught = change(tiny, teacher=teacher, epochs=1, filter_start=1.0, drop_last=True)
    plain = train(change(taught, name="plain"))
    compiled = train(change(taught, name="compiled", compile="on"))
    losses = [
        train_losses((result.path / "metrics.jsonl").read_text()) for result in (plain, compiled)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_teachers_that_do_not_fit_are_refused(teacher: Path, tiny: Config):
    with pytest.raises(ResfastError, match="there is no run"):
        train(change(tiny, teacher=teacher / "no"))
    with pytest.raises(ResfastError, match=r"images of 16 pixels, not 20; .* --image-size 16"):
        train(change(tiny, teacher=teacher, image_size=20, name="size"))
    with pytest.raises(ResfastError, match="was trained on the classes left, right, not on 0, 1"):
        train(change(tiny, teacher=teacher, data="digits", name="classes"))
    for option in ("distill_temperature", "distill_weight"):
        with pytest.raises(
            ResfastError, match=f"--{option.replace('_', '-')} needs --teacher; give both"
        ):
            check(change(tiny, **{option: 0.5}))
