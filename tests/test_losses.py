"""Training losses: their values, gradients and labels, and runs with each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resfast.config.schema import Config
from resfast.training.loop import Interrupted, train
from resfast.training.losses import LOSSES, targets
from tests.conftest import change, interrupt_at
from tests.test_training import assert_same_weights

MODULES = {
    "cross_entropy": nn.CrossEntropyLoss(),
    "mse": nn.MSELoss(),
    "smooth_l1": nn.SmoothL1Loss(),
    "bce_with_logits": nn.BCEWithLogitsLoss(),
}
"""torch's losses; all but the first take one-hot labels."""


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 4, generator=generator)
    return logits.requires_grad_(), torch.tensor([3, 0, 2, 2, 1])


def test_every_loss_has_a_module_of_torch() -> None:
    assert MODULES.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_torch(name: str) -> None:
    logits, labels = batch()
    one_hot = F.one_hot(labels, 4).float()
    expected = MODULES[name](logits, labels if name == "cross_entropy" else one_hot)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    for given in (labels, one_hot):
        loss = LOSSES[name](logits, given, 0.0, "mean")
        (grad,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_images_have_the_mean(name: str, smoothing: float) -> None:
    logits, labels = batch()
    each = LOSSES[name](logits, labels, smoothing, "none")
    assert each.shape == (5,)
    torch.testing.assert_close(each.mean(), LOSSES[name](logits, labels, smoothing, "mean"))
    alone = LOSSES[name](logits[2:3], labels[2:3], smoothing, "mean")
    torch.testing.assert_close(each[2], alone)


def test_labels_are_smoothed_as_cross_entropy_does() -> None:
    logits, labels = batch()
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(F.cross_entropy(logits, targets(logits, labels, 0.2)), expected)
    mixed = torch.softmax(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), 1)
    expected = F.cross_entropy(logits, mixed, label_smoothing=0.2)
    torch.testing.assert_close(F.cross_entropy(logits, targets(logits, mixed, 0.2)), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_learns_with_each_loss_and_resumes(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also with mixed labels, on a part of the images, and stopped in the middle."""
    augment = tiny.data.augment
    mixed = change(tiny, loss=name, epochs=4, augment=augment.__class__(crop=1, mixup=0.2))
    mixed = change(mixed, filter_start=0.5, filter_keep=0.5)
    whole = train(change(mixed, name="whole"))
    interrupt_at(monkeypatch, 5)
    with pytest.raises(Interrupted) as stopped:
        train(mixed)
    monkeypatch.undo()
    assert_same_weights(train(resume=stopped.value.path).path, whole.path)

    learned = train(change(tiny, loss=name, epochs=8, lr=0.1, ema=0.0, name="learned"))
    assert learned.summary.test_accuracy >= 0.75
