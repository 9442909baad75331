from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from resfast.config.schema import Config, OptimConfig, RuntimeConfig
from resfast.config.validate import check
from resfast.errors import ResfastError
from resfast.optim.muon import Muon
from resfast.optim.optimizers import build_optimizer, parameter_groups
from resfast.optim.schedules import Schedule
from resfast.training.resolve import resolve
from resfast.training.step_graphs import why_not_captured


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


def test_onecycle_has_the_bits_of_torchs():
    chance = random.Random(0)
    for _ in range(20):
        total, warmup = chance.randint(10, 200), chance.uniform(0.2, 0.9)
        values = {
            "lr": chance.uniform(0.01, 1),
            "anneal": chance.choice(["cos", "linear"]),
            "start_factor": chance.uniform(0.01, 1),
            "end_factor": 10 ** chance.uniform(-6, -1),
        }
        config = OptimConfig(**values, warmup=warmup, cycle_momentum=True)
        ours = build_optimizer(nn.Linear(2, 2), config)
        schedule = Schedule(ours, config, 1, total)
        theirs = torch.optim.SGD(nn.Linear(2, 2).parameters(), 1.0, momentum=0.9)
        other = torch.optim.lr_scheduler.OneCycleLR(
            theirs,
            config.lr,
            total_steps=total,
            pct_start=warmup,
            anneal_strategy=config.anneal,
            div_factor=1 / config.start_factor,
            final_div_factor=config.start_factor / config.end_factor,
        )
        for step in range(total):
            for name in ("lr", "momentum"):
                assert ours.param_groups[0][name] == theirs.param_groups[0][name]
            schedule.step(step)
            theirs.step()
            if step + 1 < total:
                other.step()


def test_onecycle_with_a_warm_up_of_one_step_begins_at_the_peak():
    values = rates(1, 5, warmup=0.2, anneal="linear", end_factor=0.1)
    assert values == pytest.approx([0.4, 0.31, 0.22, 0.13, 0.04])


def test_linear_goes_straight_from_the_peak_to_the_end():
    values = rates(4, 5, schedule="linear", end_factor=0.0)
    assert values == pytest.approx([0.4 * (1 - step / 20) for step in range(20)])
    values = rates(2, 10, schedule="linear", warmup=0.5, start_factor=0.5, end_factor=0.1)
    assert values[5] == pytest.approx(0.3)
    assert values[10] == pytest.approx(0.4)
    assert values[15] == pytest.approx(0.22)


def test_cosine_follows_the_formula():
    values = rates(4, 25, schedule="cosine", end_factor=0.01)
    for step, value in enumerate(values):
        expected = 0.004 + (0.4 - 0.004) * (1 + math.cos(math.pi * step / 100)) / 2
        assert value == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "plateau"])
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


def test_milestones_may_be_steps():
    values = rates(10, 5, schedule="multistep", milestone_steps=(7, 30), gamma=0.1, warmup=0.0)
    assert values[6] == pytest.approx(0.4)
    assert values[7] == values[29] == pytest.approx(0.04)
    assert values[30] == pytest.approx(0.004)


@pytest.mark.parametrize("epochs", [5, 10, 40])
def test_the_length_of_a_cosine_is_its_own(epochs: int):
    """As of ``CosineAnnealingLR`` with ``T_max`` 10, but without a new rise after the end."""
    values = rates(epochs, 4, schedule="cosine", schedule_epochs=10, end_factor=0.0, warmup=0.0)
    for step, value in enumerate(values):
        expected = 0.2 * (1 + math.cos(math.pi * min(step / 40, 1)))
        assert value == pytest.approx(expected, abs=1e-12)


def test_a_cosine_per_epoch_is_that_of_torch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    options = {"schedule": "cosine", "rate_per_epoch": True, "end_factor": 0.0, "warmup": 0.0}
    values = rates(10, 7, **options)
    for epoch in range(10):
        (lr,) = theirs.get_last_lr()
        assert values[7 * epoch : 7 * epoch + 7] == [pytest.approx(lr)] * 7
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", ["onecycle", "linear", "multistep"])
def test_a_rate_per_epoch_is_that_of_its_first_step(schedule: str):
    options = {"schedule": schedule, "milestone_steps": (7,), "warmup": 0.3}
    every = rates(6, 5, **options)
    per_epoch = rates(6, 5, rate_per_epoch=True, **options)
    for step, value in enumerate(per_epoch):
        assert value == every[step // 5 * 5]


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


@pytest.mark.parametrize(("every", "falls"), [(1, [6, 12]), (2, [6, 12]), (4, [8, 16])])
def test_the_patience_of_plateau_counts_epochs_however_often_it_is_evaluated(
    every: int, falls: list[int]
):
    config = OptimConfig(lr=0.4, schedule="plateau", patience=5, gamma=0.5, warmup=0.0)
    schedule = Schedule(build_optimizer(nn.Linear(2, 2), config), config, 40, 5)
    schedule.evaluated(0.9)
    fell = []
    for epoch in range(every, 17, every):
        before = schedule.lr
        schedule.evaluated(0.5, every)
        fell += [epoch] if schedule.lr < before else []
    assert fell == falls
    schedule.evaluated(0.95, every)
    assert schedule.plateau.num_bad_epochs == 0


@pytest.mark.parametrize(
    "schedule", ["onecycle", "cosine", "linear", "plateau", "multistep", "constant"]
)
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
    decayed, others = parameter_groups(model, OptimConfig(weight_decay=0.1))
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
    assert others["weight_decay"] == 0.0
    _, others = parameter_groups(model, OptimConfig(weight_decay=0.1, decay_norm_bias=True))
    assert others["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_but_for_muon_optimizers_are_torchs_fused_ones(name: str, kind: type):
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer=name, momentum=0.8))
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group["fused"]
        assert group["nesterov"] if name == "sgd" else group["betas"] == (0.8, 0.999)


class Whitened(nn.Module):
    """Every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 4, 2)
        self.whitening.weight.requires_grad_(False)
        self.conv = nn.Conv2d(4, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.norm.weight.requires_grad_(False)
        self.head = nn.Linear(8, 2)


def named_groups(model: nn.Module, config: OptimConfig) -> dict[str, tuple[list[str], dict]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["name"]: ([names[id(p)] for p in group["params"]], group)
        for group in build_optimizer(model, config).param_groups
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_each_group_has_its_own_rate_and_decay(optimizer: str):
    config = OptimConfig(
        optimizer=optimizer,
        lr=0.1,
        head_lr=0.2,
        bias_lr=0.3,
        weight_decay=0.01,
        head_weight_decay=0.02,
        bias_weight_decay=0.03,
        whitening_bias_epochs=1,
    )
    groups = named_groups(Whitened(), config)
    found = {name: (p, g["lr"], g["weight_decay"]) for name, (p, g) in groups.items()}
    assert found == {
        "filters": (["conv.weight"], 0.1, 0.01),
        "head": (["head.weight"], 0.2, 0.02),
        "biases": (["norm.bias", "head.bias"], 0.3, 0.03),
        "whitening_bias": (["whitening.bias"], 0.3, 0.03),
    }


def test_without_values_of_their_own_groups_are_as_they_were():
    groups = named_groups(Whitened(), OptimConfig(lr=0.1, weight_decay=0.01))
    assert groups["filters"][0] == ["conv.weight", "head.weight"]
    assert groups["biases"][0] == ["norm.bias", "head.bias"]
    assert groups["biases"][1]["weight_decay"] == 0.0
    assert set(groups) == {"filters", "biases"}


def test_muon_is_for_filters_and_sgd_for_the_rest():
    config = OptimConfig(optimizer="muon", momentum=0.6, sgd_momentum=0.85, newton_schulz_steps=3)
    model = Whitened()
    assert isinstance(build_optimizer(model, config), Muon)
    groups = named_groups(model, config)
    assert {name: g["muon"] for name, (_, g) in groups.items()} == {
        "filters": True,
        "head": False,
        "biases": False,
    }
    assert {name: g["momentum"] for name, (_, g) in groups.items()} == {
        "filters": 0.6,
        "head": 0.85,
        "biases": 0.85,
    }
    assert groups["filters"][1]["newton_schulz_steps"] == 3
    tied = named_groups(model, replace(config, sgd_momentum=None))
    assert tied["head"][1]["momentum"] == 0.6


def test_a_whitening_bias_that_is_never_trained_is_frozen():
    model = Whitened()
    build_optimizer(model, OptimConfig(whitening_bias_epochs=0.5))
    assert model.whitening.bias.requires_grad
    build_optimizer(model, OptimConfig())
    assert not model.whitening.bias.requires_grad


def test_a_whitening_bias_that_is_not_there_cannot_be_trained():
    with pytest.raises(
        ResfastError, match=r"--whitening-bias-epochs 2 .* omit the option or choose"
    ):
        build_optimizer(nn.Linear(2, 2), OptimConfig(whitening_bias_epochs=2.0))


@pytest.mark.parametrize(
    ("options", "like"),
    [
        ({"optimizer": "adagrad"}, lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.01)),
        ({"optimizer": "adadelta"}, lambda p: torch.optim.Adadelta(p, 0.1, weight_decay=0.01)),
        ({"optimizer": "rmsprop"}, lambda p: torch.optim.RMSprop(p, 0.1, weight_decay=0.01)),
        (
            {"optimizer": "sgd", "nesterov": False, "momentum": 0.8},
            lambda p: torch.optim.SGD(p, 0.1, 0.8, weight_decay=0.01),
        ),
        (
            {"optimizer": "sgd", "momentum": 0.8},
            lambda p: torch.optim.SGD(p, 0.1, 0.8, weight_decay=0.01, nesterov=True),
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_steps_are_those_of_torch_with_its_defaults(options: dict[str, Any], like: Any):
    torch.manual_seed(0)
    ours = nn.Linear(6, 4, bias=False)
    theirs = copy.deepcopy(ours)
    x = torch.randn(5, 6)
    optimizers = (
        build_optimizer(ours, OptimConfig(lr=0.1, weight_decay=0.01, **options)),
        like(theirs.parameters()),
    )
    for _ in range(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("optimizer", ["adagrad", "adadelta", "rmsprop"])
def test_such_steps_are_not_captured(optimizer: str):
    why = why_not_captured(OptimConfig(optimizer=optimizer), torch.bfloat16)
    assert why is not None
    assert optimizer in why


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ResfastError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "linear", "multistep", "constant"])
def test_all_groups_follow_the_same_curve(schedule: str):
    config = OptimConfig(
        lr=0.1, head_lr=0.2, bias_lr=6.0, schedule=schedule, milestones=(2,), warmup=0.2
    )
    optimizer = build_optimizer(Whitened(), config)
    steered = Schedule(optimizer, config, 3, 7)
    for step in range(21):
        filters, head, biases = (group["lr"] for group in optimizer.param_groups)
        assert head == pytest.approx(2 * filters)
        assert biases == pytest.approx(60 * filters)
        assert steered.rates(step) == [filters, head, biases]
        steered.step(step)


def test_the_rate_of_the_whitening_bias_falls_to_zero_over_its_epochs():
    config = OptimConfig(bias_lr=0.3, whitening_bias_epochs=1.5, warmup=0.3)
    schedule = Schedule(build_optimizer(Whitened(), config), config, 4, 4)
    assert schedule.whitening_bias_steps == 6
    found = [schedule.rates(step)[-1] for step in range(16)]
    assert found == pytest.approx([0.3 * (1 - step / 6) for step in range(6)] + [0.0] * 10)


def test_steps_that_are_not_alike_get_the_rate_of_their_part_of_the_training():
    config = OptimConfig(lr=0.4, schedule="linear", warmup=0.0, end_factor=0.1)
    alike = build_optimizer(nn.Linear(2, 2), config), config, 2, 5
    progress = [step / 10 for step in range(10)]
    whole = Schedule(*alike).table()
    torch.testing.assert_close(Schedule(*alike, progress=progress).table(), whole)
    uneven = Schedule(*alike, progress=[0.0, 0.5, 0.75])
    assert uneven.total == 3
    assert [uneven.rates(step)[0] for step in range(3)] == pytest.approx([0.4, 0.22, 0.13])


def test_the_table_holds_the_rates_of_every_step():
    config = OptimConfig(lr=0.1, head_lr=0.2, warmup=0.3)
    schedule = Schedule(build_optimizer(Whitened(), config), config, 2, 6)
    table = schedule.table()
    assert table.dtype == torch.float32
    assert table.shape == (12, 3)
    for step, row in enumerate(table):
        assert row.tolist() == pytest.approx(schedule.rates(step))


@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
def test_a_schedule_that_is_reset_begins_anew(schedule: str):
    config = OptimConfig(schedule=schedule, patience=0, warmup=0.2)
    steered = Schedule(build_optimizer(nn.Linear(2, 2), config), config, 3, 5)
    seen = []
    for _ in range(2):
        seen.append([])
        for step in range(15):
            seen[-1].append(steered.lr)
            steered.step(step)
            if step % 5 == 4:
                steered.evaluated(0.5)
        steered.reset()
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 2


def test_a_schedule_takes_up_the_state_of_version_01():
    config = OptimConfig(warmup=0.3)
    schedule = Schedule(build_optimizer(nn.Linear(2, 2), config), config, 2, 10)
    schedule.load_state_dict({"per_batch": {"last_epoch": 7}, "plateau": None})
    assert schedule.lr == schedule.rates(7)[0]
    assert schedule.optimizer.param_groups[0]["lr"] == schedule.rates(7)[0]


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_lr": 0.0}, "--head-lr 0.0 is out of range: expected a positive number"),
        ({"bias_lr": -1.0}, "--bias-lr"),
        ({"bias_lr": math.nan}, "--bias-lr"),
        ({"head_weight_decay": -0.1}, "--head-weight-decay"),
        ({"bias_weight_decay": -0.1}, "--bias-weight-decay"),
        ({"optimizer": "muon", "sgd_momentum": 1.0}, "--sgd-momentum"),
        ({"optimizer": "muon", "newton_schulz_steps": 0}, "--newton-schulz-steps"),
        (
            {"sgd_momentum": 0.9},
            "--sgd-momentum is an option of muon.*leave it out or choose --optimizer",
        ),
        (
            {"optimizer": "adam", "normalize_filters": True},
            "--normalize-filters is an option of muon",
        ),
        ({"whitening_bias_epochs": -1}, "--whitening-bias-epochs"),
        ({"lookahead": -1}, "--lookahead"),
        ({"lookahead_decay": 1.0}, "--lookahead-decay"),
        ({"lookahead_power": -1.0}, "--lookahead-power"),
        ({"lookahead": 5, "ema": 0.9}, "--ema and --lookahead are both set; choose one"),
        ({"schedule": "onecycle", "end_factor": 0.0}, "--end-factor 0.0.*above 0"),
        ({"schedule": "linear", "end_factor": -0.1}, "--end-factor"),
    ],
)
def test_bad_values_are_refused(values: dict, message: str):
    with pytest.raises(ResfastError, match=message):
        check(Config(optim=OptimConfig(**values)))


def test_good_values_are_taken():
    check(Config(optim=OptimConfig(optimizer="muon", sgd_momentum=0.85, normalize_filters=True)))
    check(Config(optim=OptimConfig(schedule="linear", end_factor=0.0, lookahead=5)))


class Digits:
    """What ``resolve`` asks of a data set."""

    name, image_size = "digits", 32


@pytest.mark.parametrize(
    ("optimizer", "lr", "head_lr"), [("sgd", 0.05, 0.1), ("adam", 0.07071, 0.1414)]
)
def test_an_adapted_batch_size_scales_every_rate(
    optimizer: str, lr: float, head_lr: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("resfast.training.resolve.choose_loader", lambda *_: "resident")
    asked = OptimConfig(optimizer=optimizer, lr=0.1, head_lr=0.2)
    config = Config(optim=asked, runtime=RuntimeConfig(device="cpu"))
    optim = resolve(config, Digits(), 1000)[0].optim
    assert (optim.batch_size, optim.lr, optim.head_lr) == (64, lr, head_lr)
    assert optim.bias_lr is None
    muon = replace(config, optim=replace(asked, optimizer="muon"))
    optim = resolve(muon, Digits(), 1000)[0].optim
    assert (optim.lr, optim.head_lr) == (0.07071, 0.1)


@pytest.mark.parametrize("asked", ["auto", "off"])
def test_there_is_no_cuda_graph_on_the_cpu(asked: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resfast.training.resolve.choose_loader", lambda *_: "resident")
    config = Config(runtime=RuntimeConfig(device="cpu", cuda_graph=asked))
    resolved, notes = resolve(config, Digits(), 50_000)
    assert resolved.runtime.cuda_graph == "off"
    assert not any("CUDA" in note for note in notes)


def test_a_cuda_graph_that_is_not_possible_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resfast.training.resolve.choose_loader", lambda *_: "resident")
    config = Config(runtime=RuntimeConfig(device="cpu", cuda_graph="on"))
    with pytest.raises(
        ResfastError, match=r"--cuda-graph on.*device is cpu; use --cuda-graph auto"
    ):
        resolve(config, Digits(), 50_000)
