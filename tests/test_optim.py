from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from resfast.training.config import OptimConfig
from resfast.training.optim import Schedule, build_optimizer, parameter_groups


def rates(epochs: int, steps: int, **values: object) -> list[float]:
    """The learning rate of each step."""
    config = OptimConfig(**{"optimizer": "sgd", "lr": 0.4, "warmup": 0.0, **values})
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = Schedule(optimizer, config, epochs, steps)
    out = []
    for step in range(epochs * steps):
        out.append(schedule.lr)
        schedule.step(step)
    return out


def test_onecycle_rises_to_the_peak_and_falls_to_the_end():
    values = rates(10, 10, warmup=0.3, start_factor=0.1, end_factor=1e-3, anneal="linear")
    assert values[0] == pytest.approx(0.04)
    assert max(values) == pytest.approx(0.4)
    assert values.index(max(values)) == 29
    assert values[-1] == pytest.approx(0.4e-3)


def test_onecycle_equals_torch_with_its_own_defaults():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.01, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.01, epochs=5, steps_per_epoch=7, cycle_momentum=False
    )
    expected = []
    for _ in range(35):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 35:
            theirs.step()
    ours = rates(5, 7, lr=0.01, warmup=0.3, start_factor=0.04, end_factor=4e-6, anneal="cos")
    assert ours == pytest.approx(expected)


def test_cosine_follows_the_formula():
    values = rates(4, 25, schedule="cosine", end_factor=0.01)
    for step, value in enumerate(values):
        expected = 0.004 + (0.4 - 0.004) * (1 + math.cos(math.pi * step / 100)) / 2
        assert value == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "plateau"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str):
    values = rates(5, 20, schedule=schedule, warmup=0.2, start_factor=0.25)
    assert values[0] == pytest.approx(0.1)
    assert values[10] == pytest.approx(0.25)
    assert values[20] == pytest.approx(0.4)


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_multistep_falls_at_its_milestones(warmup: float):
    values = rates(10, 5, schedule="multistep", milestones=(4, 8), gamma=0.1, warmup=warmup)
    assert values[19] == pytest.approx(0.4)
    assert values[20] == pytest.approx(0.04)
    assert values[40] == pytest.approx(0.004)


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_plateau_falls_after_patience_is_over(warmup: float):
    config = OptimConfig(lr=0.4, schedule="plateau", patience=1, gamma=0.5, warmup=warmup)
    schedule = Schedule(build_optimizer(nn.Linear(2, 2), config), config, 10, 5)
    seen = []
    for epoch, accuracy in enumerate([0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.9, 0.9, 0.9]):
        for step in range(5):
            schedule.step(5 * epoch + step)
        schedule.evaluated(accuracy)
        seen.append(schedule.lr)
    assert seen[2] == pytest.approx(0.4)
    assert seen[4] == pytest.approx(0.2)
    assert seen[6] == pytest.approx(0.1)
    assert seen[8] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "plateau", "multistep", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_a_schedule_goes_on_from_its_state(schedule: str, warmup: float):
    config = OptimConfig(lr=0.4, schedule=schedule, warmup=warmup, milestones=(2, 3), patience=0)

    def make() -> tuple[torch.optim.Optimizer, Schedule]:
        optimizer = build_optimizer(nn.Linear(2, 2), config)
        return optimizer, Schedule(optimizer, config, 4, 6)

    def run(schedule: Schedule, first: int, last: int) -> list[float]:
        out = []
        for step in range(first, last):
            out.append(schedule.lr)
            schedule.step(step)
            if step % 6 == 5:
                schedule.evaluated(0.5)
        return out

    _, whole = make()
    expected = run(whole, 0, 24)
    optimizer, first = make()
    run(first, 0, 10)
    state, optimizer_state = first.state_dict(), optimizer.state_dict()
    optimizer, second = make()
    optimizer.load_state_dict(optimizer_state)
    second.load_state_dict(state)
    assert run(second, 10, 24) == expected[10:]


def test_momentum_cycles_against_the_rate_where_asked():
    config = OptimConfig(lr=0.4, cycle_momentum=True, warmup=0.5)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = Schedule(optimizer, config, 1, 100)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.95)
    for step in range(50):
        schedule.step(step)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.85, abs=0.001)


def test_norms_and_biases_are_not_decayed_by_default():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, others = parameter_groups(model, 0.1, decay_norm_bias=False)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
    assert others["weight_decay"] == 0.0
    _, others = parameter_groups(model, 0.1, decay_norm_bias=True)
    assert others["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_optimizers_are_torchs_fused_ones(name: str, kind: type):
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer=name, momentum=0.8))
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group["fused"]
        assert group["nesterov"] if name == "sgd" else group["betas"] == (0.8, 0.999)
