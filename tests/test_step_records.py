"""``--record``: a row for each step, with what is measured of its gradients."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import resfast
from resfast.cli.train import command_line
from resfast.config import files
from resfast.config.schema import Config
from resfast.config.validate import RECORDED, check
from resfast.data.augment import parse_augment
from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs import plots
from resfast.training.gradient_probe import COLUMNS, DISTANCES, GradientProbe
from resfast.training.loop import Interrupted, train
from tests.conftest import change, interrupt_at
from tests.test_more_epochs import continued
from tests.test_training import assert_same_weights

ALL = ("loss", "gradients", "smoothness")


def table(path: Path) -> list[dict[str, float]]:
    lines = (path / records.STEPS).read_text().splitlines()
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]


def probe(model: nn.Module, names: tuple[str, ...], loss, rate: float = 0.1) -> GradientProbe:
    return GradientProbe(
        model, names, loss=loss, learning_rate=lambda: rate, device=torch.device("cpu")
    )


def test_the_options_are_the_columns():
    assert tuple(COLUMNS) == RECORDED


def test_smoothness_of_a_quadratic_is_that_by_hand():
    """L = (3 u^2 + v^2) / 2 at (1, 2): g = (3, 2), and the Hessian times g is (9, 2)."""
    model = nn.Linear(2, 1, bias=False)
    curvature = torch.tensor([3.0, 1.0])

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (curvature * model.weight**2).sum()

    model.weight.data = torch.tensor([[1.0, 2.0]])
    measured = probe(model, ("smoothness",), loss)
    for scale in (1.0, 1024.0):
        measured.measure(torch.zeros(1), torch.zeros(1), scale)
        found, low, high = measured.rows[-1].tolist()
        assert found == pytest.approx(math.sqrt(85 / 13), rel=1e-5)
        along = [
            0.5 * (3 * (1 - 3 * step) ** 2 + (2 - 2 * step) ** 2)
            for step in (0.1 * distance for distance in DISTANCES)
        ]
        assert (low, high) == pytest.approx((min(along), max(along)), rel=1e-5)
        assert torch.equal(model.weight.data, torch.tensor([[1.0, 2.0]]))
        assert model.weight.grad is None


def test_smoothness_is_the_largest_over_the_distances():
    """L = u^4: |g(u - d r g) - g| / |d r g| with g = 4 u^3, at u = 1."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    measured = probe(model, ("smoothness",), lambda images, labels: model.weight.sum() ** 4, 0.05)
    measured.measure(torch.zeros(1), torch.zeros(1), 1.0)
    steps = [0.05 * distance * 4 for distance in DISTANCES]
    expected = max(abs(4 * (1 - step) ** 3 - 4) / step for step in steps)
    assert measured.rows[0][0].item() == pytest.approx(expected, rel=1e-5)


def test_norm_and_change_of_the_gradient_are_those_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    measured = probe(model, ("gradients",), lambda images, labels: model(images).sum())
    gradients = [torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, -8.0]]), torch.tensor([[0.0, 0]])]
    for gradient in gradients:
        model[1].weight.grad = gradient * 8
        measured.measure(torch.zeros(1), torch.zeros(1), 8.0)
    found = measured.values()
    torch.testing.assert_close(found[:, 0], torch.tensor([5.0, math.sqrt(73), 0.0]))
    assert math.isnan(found[0, 1])
    torch.testing.assert_close(found[1:, 1], torch.tensor([12.0, math.sqrt(73)]))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"accumulate": 3, "clip_norm": 0.1, "augment": parse_augment("crop=1,mixup=0.4")},
        {"precision": "bf16", "lookahead": 2, "ema": 0.0},
        {"filter_start": 0.3, "filter_keep": 0.5, "drop_last": False, "batch_size": 20},
    ],
    ids=lambda values: "-".join(values),
)
def test_recording_changes_nothing_and_is_complete(tiny: Config, values: dict):
    config = change(tiny, dropout=0.2, head=(6,), **values)
    plain = train(change(config, name="plain"))
    assert not (plain.path / records.STEPS).exists()
    recorded = train(change(config, name="recorded", record=ALL))
    assert_same_weights(plain.path, recorded.path)
    found = table(recorded.path)
    assert list(found[0]) == [
        *("step", "epoch", "learning_rate", "loss", "gradient_norm", "gradient_change"),
        *("smoothness", "loss_ahead_min", "loss_ahead_max"),
    ]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert found[-1]["epoch"] == 3
    assert all(math.isfinite(value) for row in found[1:] for value in row.values())
    assert all(row["smoothness"] > 0 for row in found)


def test_gradients_are_those_before_clipping_of_the_batch(tiny: Config):
    """Of the first step, whose network and batch are known."""
    config = change(tiny, clip_norm=1e-3, ema=0.0, epochs=1, record=("gradients",))
    seen: list[tuple[Tensor, Tensor]] = []
    from resfast.training.step import TrainStep

    step = TrainStep.backward

    def noted(self: TrainStep, images: Tensor, labels: Tensor):
        out = step(self, images, labels)
        gradient = self.model.head[-1].weight.grad
        seen.append((out[0].clone(), gradient.clone()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "backward", noted)
        path = train(config).path
    found = table(path)
    assert len(found) == len(seen) == 4
    for row, (loss, gradient) in zip(found, seen, strict=True):
        assert row["loss"] == pytest.approx(float(loss), rel=1e-6)
        assert row["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    change_of_last = float((seen[3][1] - seen[2][1]).norm())
    assert found[3]["gradient_change"] == pytest.approx(change_of_last, rel=1e-5)


@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
@pytest.mark.parametrize("step", [3, 5])
def test_a_run_that_was_stopped_has_the_same_rows(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, schedule: str, step: int
):
    config = change(tiny, record=ALL, dropout=0.1, schedule=schedule, patience=0)
    whole = train(change(config, name="whole")).path
    interrupt_at(monkeypatch, step)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    monkeypatch.undo()
    resumed = train(resume=stopped.value.path).path
    assert (resumed / records.STEPS).read_bytes() == (whole / records.STEPS).read_bytes()


def test_rates_are_those_of_every_step_also_after_a_run_became_longer(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[list[tuple[float, float]]] = []
    monkeypatch.setattr(plots, "save_curves", lambda *args: drawn.append(args[3]))
    config = change(tiny, record=("loss",), epochs=2)
    short = train(config).path
    expected = [row["learning_rate"] for row in table(short)]
    assert len(set(expected)) == 8
    longer = continued(short, 3)
    whole = train(change(config, epochs=3, name="whole")).path
    found = [row["learning_rate"] for row in table(longer)]
    assert found == expected + [row["learning_rate"] for row in table(whole)][8:]
    assert [len(rates) for rates in drawn] == [8, 12, 12]
    ends, rates = zip(*drawn[1], strict=True)
    assert (ends[3], ends[11]) == (1.0, 3.0)
    assert rates == pytest.approx(found)


def test_a_limit_of_time_leaves_the_rows_so_far(tiny: Config):
    path = train(change(tiny, record=("loss",), max_seconds=1e-6)).path
    assert len(table(path)) == 1
    saved = files.load(path / records.CONFIG)
    longer = train(change(saved, max_seconds=None), resume=path).path
    assert [row["step"] for row in table(longer)] == list(range(1, 13))


def test_each_seed_has_a_file_of_its_own(tiny: Config):
    both = resfast.train(change(tiny, runs=2, record=("gradients",), epochs=1)).path
    for seed in (0, 1):
        alone = train(change(tiny, seed=seed, name=f"{seed}", record=("gradients",), epochs=1)).path
        found = (both / f"seed{seed}" / records.STEPS).read_bytes()
        assert found == (alone / records.STEPS).read_bytes()


def test_what_cannot_be_recorded_is_refused(tiny: Config):
    with pytest.raises(ResfastError, match=r"--record gradient is unknown; did you mean"):
        check(change(tiny, record=("gradient",)))
    with pytest.raises(ResfastError, match="last dense layer, which is not trained"):
        train(change(tiny, record=("gradients",), freeze=("head",)))
    assert command_line(["--record", "loss,smoothness"])[1].run.record == ("loss", "smoothness")
