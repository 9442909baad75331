"""The training step: averages, the captured form of it, starting anew and going on."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from resfast.config.schema import Config, OptimConfig
from resfast.cuda_graph import CudaGraph
from resfast.errors import ResfastError
from resfast.layers.conv import set_winograd_tile
from resfast.layers.norm import in_captured_step
from resfast.optim.averaging import Average, ema_weight, lookahead_weight
from resfast.optim.optimizers import build_optimizer
from resfast.optim.schedules import Schedule
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.training.loop import Interrupted, train
from resfast.training.step import TrainStep
from resfast.training.step_graphs import _capturable, why_not_captured
from resfast.training.warm_up import warm_up_step
from tests.conftest import change, interrupt_at
from tests.test_training import assert_same_weights

EPOCHS, STEPS_PER_EPOCH = 4, 5
STEPS = EPOCHS * STEPS_PER_EPOCH

MUON = {
    "optimizer": "muon",
    "lr": 0.02,
    "bias_lr": 0.1,
    "sgd_momentum": 0.8,
    "weight_decay": 0.1,
    "normalize_filters": True,
    "schedule": "linear",
    "lookahead": 3,
    "whitening_bias_epochs": 1.2,
}
OF_TINY = {"ema": 0.0, "whitening_bias_epochs": 0.0}
"""What the tiny network, which has no whitening, wants otherwise."""
CONFIGS = {
    "sgd": {},
    "sgd, accumulated": {"accumulate": 2},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "adamw, ema": {"optimizer": "adamw", "lr": 0.01, "ema": 0.9},
    "muon, lookahead, whitening": MUON,
    "muon, ema, clipped": {"optimizer": "muon", "lr": 0.02, "ema": 0.9, "clip_norm": 1.0},
    "lookahead, no momentum": {"lookahead": 4, "schedule": "cosine", "momentum": 0.0},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 8, 2)
        self.whitening.weight.requires_grad_(False)
        self.conv1 = nn.Conv2d(8, 16, 3, bias=False)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(F.relu(self.whitening(x))))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


def make_step(
    captured: bool = False,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    image_losses: bool = False,
    **values: object,
) -> TrainStep:
    torch.manual_seed(0)
    model = Net().to(device, memory_format=torch.channels_last)
    config = OptimConfig(**values)
    optimizer = build_optimizer(model, config)
    return TrainStep(
        model,
        optimizer,
        config,
        device=torch.device(device),
        dtype=dtype,
        compile=compile,
        schedule=Schedule(optimizer, config, EPOCHS, STEPS_PER_EPOCH),
        captured=captured,
        image_losses=image_losses,
    )


def batch(step: int, size: int = 8, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(6, 3, size, size, generator=generator).to(device)
    labels = torch.randint(3, (6,), generator=generator).to(device)
    return images.contiguous(memory_format=torch.channels_last), labels


def run(step: TrainStep, first: int = 0, last: int = STEPS) -> list[float]:
    """Steps ``first`` to ``last``; their losses."""
    losses = []
    for number in range(first, last):
        losses.append(step(*batch(number, device=str(step.device)))[0].clone())
        step.schedule.step(number)
    return [float(loss) for loss in losses]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(first: TrainStep, second: TrainStep) -> None:
    for model in ("model", "evaluated_model"):
        one, other = (getattr(step, model).state_dict() for step in (first, second))
        for name, value in one.items():
            assert torch.equal(value, other[name]), (model, name)


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """Names of the attributes of every module that is not one of resfast's."""
    return {
        name: set(vars(module))
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("resfast.")
    }


@pytest.mark.parametrize("captured", [False, True])
def test_training_writes_no_attribute_onto_the_modules_of_others(captured: bool):
    step = make_step(captured, **CONFIGS["adamw, ema"])
    before = attributes(Net())
    assert {"", "norm", "conv1", "head"} <= set(before)
    set_winograd_tile(step.model, 4)
    warm_up_step(step, *batch(99), fall_back=False)
    run(step, last=2)
    assert attributes(step.model) == attributes(step.evaluated_model) == before


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_only_the_networks_of_captured_steps_are_run_as_such(captured: bool, compile: bool):
    step, seen = make_step(captured, compile=compile, accumulate=2), []
    call = step._loss

    def watched(*args: Tensor) -> tuple[Tensor, ...]:
        seen.append(in_captured_step())
        return call(*args)

    step._loss = watched
    run(step, last=2)
    assert set(seen) == {captured}
    assert not in_captured_step()


# -- averages -----------------------------------------------------------------------------------


def test_the_memory_of_an_average_is_short_at_first():
    assert [ema_weight(0.9, done) for done in (0, 1, 8, 90, 1000)] == pytest.approx(
        [1.0, 9 / 11, 0.5, 0.1, 0.1]
    )


def test_slow_weights_keep_more_towards_the_end():
    config = OptimConfig(lookahead=5, lookahead_decay=0.95, lookahead_power=3.0)
    assert lookahead_weight(config, 0, 100) == 1.0
    assert lookahead_weight(config, 50, 100) == pytest.approx(1 - 0.95**5 / 8)
    assert lookahead_weight(config, 100, 100) == pytest.approx(1 - 0.95**5)
    constant = replace(config, lookahead_power=0.0)
    assert lookahead_weight(constant, 1, 100) == pytest.approx(1 - 0.95**5)


def test_lookahead_moves_every_few_steps_and_after_the_last():
    step = make_step(lookahead=3, lookahead_decay=0.8)
    plain = make_step()
    slow = values_of(step.model)
    for number in range(STEPS):
        plain.model.load_state_dict(step.model.state_dict())
        plain.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        step(*batch(number))
        plain(*batch(number))
        done = number + 1
        fast = values_of(plain.model)
        if done % 3 == 0 or done == STEPS:
            kept = 0.8**3 * (done / STEPS) ** 3
            for name, value in slow.items():
                moved = value + (1 - kept) * (fast[name] - value)
                slow[name] = moved if value.is_floating_point() else fast[name]
            fast = slow
        for name, value in step.model.state_dict().items():
            torch.testing.assert_close(value, fast[name], msg=f"{name} after {done} steps")
        for name, value in step.evaluated_model.state_dict().items():
            torch.testing.assert_close(value, slow[name], msg=f"slow {name} after {done} steps")
        step.schedule.step(number)
        plain.schedule.step(number)


def test_slow_weights_begin_at_the_weights_of_the_first_step():
    step = make_step(lookahead=3)
    with torch.no_grad():
        step.model.whitening.weight.fill_(2.0)  # computed after the step was made
    step(*batch(0))
    assert torch.equal(step.evaluated_model.whitening.weight, torch.full((8, 3, 2, 2), 2.0))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("write_back", [False, True])
def test_a_weight_that_is_a_tensor_moves_an_average_alike(weight: float, write_back: bool):
    torch.manual_seed(0)
    models = [Net() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    averages = [Average(model) for model in models]
    for model in models:
        torch.manual_seed(1)
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape) * 10)
    averages[0].move(weight, write_back=write_back)
    averages[1].move(torch.tensor(weight), write_back=write_back)
    for one, other in zip(averages, averages[::-1], strict=True):
        torch.testing.assert_close(one.module.state_dict(), other.module.state_dict())
        torch.testing.assert_close(one.model.state_dict(), other.model.state_dict())
        if write_back:
            assert torch.equal(one.model.conv1.weight, one.module.conv1.weight)


# -- accumulation -------------------------------------------------------------------------------


def without_norm(accumulate: int, **values: object) -> TrainStep:
    step = make_step(image_losses=True, accumulate=accumulate, label_smoothing=0.1, **values)
    step.model.norm = nn.Identity()
    return step


@pytest.mark.parametrize("images", [6, 5])  # in equal parts, and not
@pytest.mark.parametrize("accumulate", [2, 4, 6])
def test_the_parts_of_a_batch_do_what_it_does_at_once(accumulate: int, images: int):
    whole, parts = without_norm(1), without_norm(accumulate)
    for number in range(4):
        values, labels = (tensor[:images] for tensor in batch(number))
        results = [step(values, labels) for step in (whole, parts)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(whole.image_losses, parts.image_losses)
        for step in (whole, parts):
            step.schedule.step(number)
    torch.testing.assert_close(whole.model.state_dict(), parts.model.state_dict())


def test_batch_norm_sees_a_part_at_a_time():
    step = make_step(accumulate=3)
    seen = []
    step.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    step(*batch(0))
    assert seen == [2, 2, 2]
    assert int(step.model.norm.num_batches_tracked) == 3


def test_the_parts_are_compiled_once():
    step = make_step(accumulate=3, compile=True)
    warm_up_step(step, *batch(9), fall_back=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = run(step)
    assert compiled == pytest.approx(run(make_step(accumulate=3)), rel=1e-3)


# -- the whitening bias -------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
def test_the_whitening_bias_is_trained_for_its_epochs_and_then_frozen(captured: bool):
    step = make_step(captured, whitening_bias_epochs=1.2, bias_lr=0.1)
    biases = [step.model.whitening.bias.detach().clone()]
    for number in range(10):
        step(*batch(number))
        step.schedule.step(number)
        biases.append(step.model.whitening.bias.detach().clone())
    moved = [not torch.equal(a, b) for a, b in pairwise(biases)]
    assert moved == [True] * 6 + [False] * 4
    assert not step.model.whitening.bias.requires_grad


# -- the captured step --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_captured_step_does_what_the_plain_one_does(name: str):
    plain, captured = make_step(**CONFIGS[name]), make_step(True, **CONFIGS[name])
    for step in (plain, captured):  # a rate of another last bit could round an update otherwise
        step.optimizer.product_dtype = torch.float32
    warm_up_step(captured, *batch(99), fall_back=False)
    assert run(captured) == pytest.approx(run(plain), rel=1e-5)
    for model in ("model", "evaluated_model"):
        torch.testing.assert_close(
            getattr(captured, model).state_dict(),
            getattr(plain, model).state_dict(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_learning_rates_are_read_from_the_table():
    captured = make_step(True, head_lr=0.3, warmup=0.4)
    rows = [group["lr"] for group in captured.optimizer.param_groups]
    for number in range(STEPS):
        captured(*batch(number))
        expected = captured.schedule.rates(number)
        assert [float(rate) for rate in rows] == pytest.approx(expected)
        captured.schedule.step(number)
        for group, rate in zip(captured.optimizer.param_groups, rows, strict=True):
            assert group["lr"] is rate


def test_a_batch_is_copied_before_it_is_used():
    plain, captured = make_step(), make_step(True)
    warm_up_step(captured, *batch(0), fall_back=False)
    (graph,) = captured.graphs.captured.values()
    places = [value.data_ptr() for value in graph.inputs]
    for number in range(3):
        images, labels = batch(number)
        expected = plain(images, labels)
        loss, correct = captured(images, labels)
        assert torch.equal(loss, expected[0])
        assert torch.equal(correct, expected[1])
        assert torch.equal(graph.inputs[0], images)
        assert graph.inputs[0].is_contiguous(memory_format=torch.channels_last)
        plain.schedule.step(number)
    assert [value.data_ptr() for value in graph.inputs] == places


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_warm_up_changes_nothing(name: str, captured: bool):
    step, plain = (make_step(captured, **CONFIGS[name]) for _ in range(2))
    run(step, 0, 2)
    run(plain, 0, 2)
    generator = torch.get_rng_state()
    warm_up_step(step, *batch(99, size=10), fall_back=False)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert_same(step, plain)
    assert run(step, 2) == run(plain, 2)
    assert_same(step, plain)


def test_every_kind_of_step_is_captured_ahead(monkeypatch: pytest.MonkeyPatch):
    step = make_step(True, **MUON)
    for size in (8, 10):
        warm_up_step(step, *batch(0, size=size), fall_back=False)
    kinds = {(kind.trains_whitening_bias, kind.moves_average) for kind, *_ in step.graphs.captured}
    assert kinds == {(True, False), (True, True), (False, False), (False, True)}
    assert len(step.graphs.captured) == 2 * 4

    def late(*_: object, **__: object) -> None:
        raise AssertionError("captured during the training")

    monkeypatch.setattr(CudaGraph, "__init__", late)
    for number in range(STEPS):
        step(*batch(number, size=8 + 2 * (number % 2)))


def test_a_step_that_is_compiled_ahead_is_not_compiled_again():
    step = make_step(compile=True, **MUON)
    for size in (8, 10):
        warm_up_step(step, *batch(0, size=size), fall_back=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(STEPS):
            step(*batch(number, size=8 + 2 * (number % 2)))
            step.schedule.step(number)


def test_a_capture_comes_after_steps_on_its_own_stream(monkeypatch: pytest.MonkeyPatch):
    """The calls of a capture, on stand-ins for what only CUDA has."""
    log: list[str] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            log.append("wait")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def on(name: str):
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    def capture(graph: Graph, *, pool: object, stream: Stream, capture_error_mode: str):
        assert isinstance(graph, Graph)
        assert (pool, capture_error_mode) == ((1, 2), "thread_local")
        assert stream is made[1]
        return on("capture")

    made = [Stream()]  # the current one
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made[0])
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(Stream()) or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on("side stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)

    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        log.append("capturable step" if group["capturable"] else "step")
        return images.sum(), labels.sum()

    graph = CudaGraph.__new__(CudaGraph)
    graph.inputs, graph.graph = [torch.zeros(2), torch.zeros(2)], None
    graph._capture(step, (1, 2), _capturable(optimizer))
    before = ["wait", "side stream begins", "step", "step", "step", "side stream ends", "wait"]
    assert log[:7] == before
    assert log[7:] == ["capture begins", "capturable step", "capture ends"]
    assert not group["capturable"]
    log.clear()
    out = graph.replay(torch.ones(2), torch.full((2,), 3.0))
    assert log == ["replay"]
    assert out is graph.outputs
    assert [value.tolist() for value in graph.inputs] == [[1.0, 1.0], [3.0, 3.0]]


@pytest.mark.parametrize(
    ("values", "dtype", "reason"),
    [
        ({}, torch.float16, "float16"),
        ({"schedule": "plateau"}, torch.float32, "plateau"),
        ({"cycle_momentum": True}, torch.float32, "--cycle-momentum"),
    ],
)
def test_what_the_host_decides_is_not_captured(values: dict, dtype: torch.dtype, reason: str):
    assert reason in str(why_not_captured(OptimConfig(**values), dtype))
    with pytest.raises(ValueError, match=reason):
        make_step(True, dtype=dtype, **values)
    assert why_not_captured(OptimConfig(), torch.bfloat16) is None


def test_only_the_kinds_of_step_that_a_shape_gets_are_compiled(monkeypatch: pytest.MonkeyPatch):
    compiled = []
    step = make_step(whitening_bias_epochs=1.2)
    frozen = step.schedule.whitening_bias_steps
    monkeypatch.setattr(
        step, "backward", lambda *_: compiled.append(step.model.whitening.bias.requires_grad)
    )
    for steps, expected in (
        (range(frozen), [True]),
        (range(frozen, step.schedule.total), [False]),
        (range(step.schedule.total), [True, False]),
        (None, [True, False]),
    ):
        compiled.clear()
        warm_up_step(step, *batch(0), fall_back=False, steps=steps)
        assert compiled == expected


@pytest.mark.parametrize("values", [{"lookahead": 2}, {"whitening_bias_epochs": 1.0}])
def test_what_needs_a_schedule_says_so(values: dict):
    model, config = Net(), OptimConfig(**values)
    with pytest.raises(ValueError, match="schedule is None"):
        TrainStep(
            model,
            build_optimizer(model, config),
            config,
            device=torch.device("cpu"),
            dtype=torch.float32,
            compile=False,
        )


def test_a_failing_capture_falls_back_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no graph today")

    step = make_step(True)
    monkeypatch.setattr(CudaGraph, "__init__", broken)
    with pytest.raises(ResfastError, match="no graph today"):
        warm_up_step(step, *batch(0), fall_back=False)
    with caplog.at_level(logging.WARNING, "resfast"):
        warm_up_step(step, *batch(0), fall_back=True)
    assert "no graph today" in caplog.text
    assert run(step) == run(make_step())


# -- losses of images ---------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
def test_the_loss_of_each_image_is_kept_where_asked_for(captured: bool):
    step = make_step(captured, image_losses=True, label_smoothing=0.1)
    plain = make_step(label_smoothing=0.1)
    assert plain.image_losses is None
    step.model.train()
    images, labels = batch(0)
    logits = copy.deepcopy(step.model)(images)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    loss, _ = step(images, labels)
    torch.testing.assert_close(step.image_losses, expected.detach())
    torch.testing.assert_close(loss, expected.mean().detach())
    assert not step.image_losses.requires_grad


# -- starting anew and going on -----------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_is_reset_trains_like_a_new_one(name: str, captured: bool):
    used, new = make_step(captured, **CONFIGS[name]), make_step(captured, **CONFIGS[name])
    run(used, 0, 7)
    torch.manual_seed(5)
    state = Net().to(memory_format=torch.channels_last).state_dict()
    new.model.load_state_dict(state)
    used.reset(state)
    assert used.schedule.lr == new.schedule.lr
    assert run(used) == run(new)
    assert_same(used, new)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("stop", [1, 6, 13])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_goes_on_from_its_state(name: str, stop: int, captured: bool):
    whole, first = (make_step(captured, **CONFIGS[name]) for _ in range(2))
    run(whole)
    run(first, 0, stop)
    state = copy.deepcopy((first.state_dict(), first.schedule.state_dict()))
    second = make_step(captured, **CONFIGS[name])
    second.load_state_dict(state[0])
    second.schedule.load_state_dict(state[1])
    run(second, stop)
    assert_same(second, whole)


def test_a_state_that_does_not_count_steps_is_taken_up_by_the_schedule():
    whole, second = make_step(), make_step(True)
    run(whole, 0, 8)
    state = copy.deepcopy(whole.state_dict())
    del state["steps"]
    second.load_state_dict(state)
    second.schedule.load_state_dict({"per_batch": {"last_epoch": 8}, "plateau": None})
    assert run(second, 8) == pytest.approx(run(whole, 8), rel=1e-5)


@pytest.mark.parametrize("stop", [2, 5, 6, 9])
def test_a_run_with_muon_and_lookahead_that_is_stopped_ends_with_the_same_weights(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, stop: int
):
    tiny = change(tiny, **MUON | OF_TINY, eval_every=3, tta="none")
    whole = train(change(tiny, name="whole"))
    interrupt_at(monkeypatch, stop - 1)
    with pytest.raises(Interrupted) as stopped:
        train(tiny)
    monkeypatch.undo()
    state = checkpoint.load_state(stopped.value.path / records.CHECKPOINT)
    assert state["training"]["steps"] == stop
    assert_same_weights(train(resume=stopped.value.path).path, whole.path)


@pytest.mark.parametrize("stop", [None, 5])
def test_a_captured_run_ends_like_a_plain_one(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, stop: int | None
):
    tiny = change(
        tiny, **MUON | OF_TINY, tta="none", sizes=((12, 0.5),), filter_start=0.3, filter_keep=0.5
    )
    plain = train(change(tiny, name="plain"))
    monkeypatch.setattr("resfast.training.resolve._resolve_cuda_graph", lambda *_: ("auto", None))
    captured: list[CudaGraph] = []
    call = CudaGraph.replay
    monkeypatch.setattr(
        CudaGraph, "replay", lambda self, *a: captured.append(self) or call(self, *a)
    )

    def stop_here(number: int, _: Tensor) -> None:
        if number == stop:
            signal.raise_signal(signal.SIGINT)

    if stop is None:
        path = train(tiny).path
    else:
        with pytest.raises(Interrupted) as stopped:
            train(tiny, after_step=stop_here)
        path = train(resume=stopped.value.path).path
    steps = plain.summary.epochs * 4 - 2 * 2  # the last two epochs train on half the images
    assert len(captured) == steps
    assert len(set(captured)) > 1
    ours, theirs = (load_file(folder / records.WEIGHTS) for folder in (path, plain.path))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for row, other in zip(metrics(path), metrics(plain.path), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert row["train_accuracy"] == other["train_accuracy"]


def metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / records.METRICS).read_text().splitlines()]


# -- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cuda_graph_does_what_the_plain_step_does(name: str, compile: bool):
    plain = make_step(device="cuda", compile=compile, **CONFIGS[name])
    captured = make_step(True, device="cuda", compile=compile, **CONFIGS[name])
    warm_up_step(captured, *batch(99, device="cuda"), fall_back=False)
    assert all(graph.graph is not None for graph in captured.graphs.captured.values())
    assert run(captured, 0, 8) == pytest.approx(run(plain, 0, 8), rel=2e-2)
    for model in ("model", "evaluated_model"):
        torch.testing.assert_close(
            getattr(captured, model).state_dict(),
            getattr(plain, model).state_dict(),
            rtol=5e-2,
            atol=2e-2,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_captured_step_never_waits_for_the_device(name: str):
    step = make_step(True, device="cuda", dtype=torch.bfloat16, **CONFIGS[name])
    batches = [batch(number, device="cuda") for number in range(STEPS)]
    losses = torch.zeros(STEPS, device="cuda")
    warm_up_step(step, *batches[0], fall_back=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, (images, labels) in enumerate(batches):
            losses[number] = step(images.to(torch.bfloat16), labels)[0]
            step.schedule.step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(losses).all()
    assert losses[-5:].mean() < losses[:5].mean()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cuda_graph_serves_a_training_that_begins_anew(name: str):
    used, new = (make_step(True, device="cuda", **CONFIGS[name]) for _ in range(2))
    run(used, 0, 7)
    graphs = dict(used.graphs.captured)
    torch.manual_seed(5)
    state = Net().cuda().state_dict()
    new.model.load_state_dict(state)
    used.reset(state)
    assert run(used, 0, 8) == pytest.approx(run(new, 0, 8), rel=2e-2)
    assert all(used.graphs.captured[key] is graph for key, graph in graphs.items())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_captured_run_on_cuda_learns_and_is_resumed(tiny: Config, precision: str):
    config = change(tiny, **MUON | OF_TINY, device="cuda", precision=precision, cuda_graph="on")
    config = change(config, epochs=8)
    result = train(config)
    assert result.summary.test_accuracy >= 0.9

    def stop(number: int, _: Tensor) -> None:
        if number == 17:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted) as stopped:
        train(change(config, name="stopped"), after_step=stop)
    assert train(resume=stopped.value.path).summary.test_accuracy >= 0.9
