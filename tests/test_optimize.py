"""``resfast.optimize``: values and gradients of each replaced pattern, and training as a whole."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resfast
from resfast.ops.add_relu import op as add_relu
from resfast.ops.conv_train import op as conv_train
from resfast.ops.norm_act import op as norm_act
from resfast.training.optimize import calls

pytestmark = pytest.mark.skipif(
    not norm_act.AVAILABLE, reason="needs the C++ kernels and AVX512-BF16"
)
LAST = torch.channels_last
LIMIT = 0.03
"""Largest RMS error relative to float64: several roundings to bfloat16 in a row."""


@pytest.fixture(autouse=True)
def by_rule(monkeypatch) -> None:
    """Convolutions are not measured and no map is too small: the same kernels run in each test."""
    monkeypatch.setattr(calls, "MEASURES", False)
    monkeypatch.setattr(calls, "MIN_VALUES", 0)
    monkeypatch.setattr(calls, "MIN_VALUES_ALONE", 0)


@pytest.fixture
def kernels(monkeypatch) -> Counter[str]:
    """How often each training kernel was called."""
    count: Counter[str] = Counter()

    def counted(module, name: str, label: str) -> None:
        own = getattr(module, name)

        def call(*args, **kwargs):
            count[label] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(conv_train, "conv2d", "conv")
    counted(norm_act, "batch_norm_act", "norm")
    counted(add_relu, "add_relu", "add_relu")
    return count


class Residual(nn.Module):
    """A residual block, of which subclasses write the end."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.end(x, self.bn2(self.conv2(self.relu(self.bn1(x)))))

    def end(self, x: Tensor, out: Tensor) -> Tensor:
        raise NotImplementedError


class InPlace(Residual):
    def end(self, x: Tensor, out: Tensor) -> Tensor:
        out += x
        return self.relu(out)


class Functional(Residual):
    def end(self, x: Tensor, out: Tensor) -> Tensor:
        return F.relu(x + out)


class Skipping(Residual):
    def end(self, x: Tensor, out: Tensor) -> Tensor:
        out = self.skip(out)
        out = out + x
        return F.silu(self.skip(out))


class Linear(Residual):
    def end(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.add(out, x)


class Scaled(Residual):
    """The norm is not next to the addition, which runs with its ReLU alone."""

    def end(self, x: Tensor, out: Tensor) -> Tensor:
        return F.relu(out * 0.5 + x)


class Preactivated(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        out = F.leaky_relu(self.bn1(x), 0.2)
        return x + self.conv2(torch.relu_(self.bn2(out)))


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(24, 32, 3, padding=1), *layers)


PATTERNS = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(24, 32, 3, padding=1)), {"conv": 1}),
    "strided conv": (lambda: chain(nn.Conv2d(32, 16, 3, stride=2, bias=False)), {"conv": 2}),
    "strided 1x1": (lambda: chain(nn.Conv2d(32, 16, 1, stride=2)), {"conv": 1}),
    "to one pixel": (
        lambda: chain(nn.AvgPool2d(4), nn.Conv2d(32, 24, 3, stride=2, padding=1)),
        {"conv": 2},
    ),
    "norm": (lambda: chain(nn.BatchNorm2d(32)), {"conv": 1, "norm": 1}),
    "norm without scale": (
        lambda: chain(nn.BatchNorm2d(32, affine=False), nn.ReLU()),
        {"conv": 1, "norm": 1},
    ),
    "norm relu": (lambda: chain(nn.BatchNorm2d(32), nn.ReLU(True)), {"conv": 1, "norm": 1}),
    "norm gelu": (lambda: chain(nn.BatchNorm2d(32), nn.GELU()), {"conv": 1, "norm": 1}),
    "norm leaky relu": (
        lambda: chain(nn.BatchNorm2d(32), nn.Identity(), nn.LeakyReLU(0.3)),
        {"conv": 1, "norm": 1},
    ),
    "norm relu6": (lambda: chain(nn.BatchNorm2d(32), nn.ReLU6()), {"conv": 1, "norm": 1}),
    "in place": (InPlace, {"conv": 2, "norm": 2}),
    "functional": (Functional, {"conv": 2, "norm": 2}),
    "skipping": (Skipping, {"conv": 2, "norm": 2}),
    "linear": (Linear, {"conv": 2, "norm": 2}),
    "scaled": (Scaled, {"conv": 2, "norm": 2, "add_relu": 1}),
    "preactivated": (Preactivated, {"conv": 2, "norm": 2}),
}


def error(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    assert got.isfinite().all()
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-12))


def results(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output, all gradients and all buffers after one step forward and backward."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(grad.to(out.dtype))
    found = {"out": out.detach(), "x": x.grad}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_gradients_and_statistics_are_those_of_float64(pattern, layout, kernels):
    torch.manual_seed(0)
    make, expected = PATTERNS[pattern]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    exact = copy.deepcopy(model).double()
    plain = copy.deepcopy(model)
    x = torch.randn(6, 24, 9, 8).contiguous(memory_format=layout)
    grad = torch.randn_like(exact(x.double()).detach())
    exact = copy.deepcopy(plain).double()
    wide = results(exact, x.double(), grad)
    resfast.optimize(model)
    ours = results(model, x, grad)
    assert kernels == expected
    with torch.autocast("cpu", torch.bfloat16):
        theirs = results(plain, x, grad)
    assert ours["out"].dtype == torch.float32
    for name, value in wide.items():
        if name.startswith("gradient of") and "conv" in name and name.endswith("bias"):
            continue
        if value.dtype == torch.int64:
            assert torch.equal(ours[name], value), name
            continue
        # Exactly zero gradients, of a bias before a norm, are rounding errors in both.
        if value.norm() < 1e-6 * grad.norm():
            continue
        found = error(ours[name], value)
        # An activation at 0 that rounding turns on or off changes the gradient around it.
        assert found < max(LIMIT, 3 * error(theirs[name], value)), name


def test_the_sum_that_is_written_over_its_residual_changes_it_as_before():
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)
            self.bn = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = y * 1
            z += self.bn(y)
            return F.relu(z) + z

    torch.manual_seed(1)
    model, x = Keeps(), torch.randn(4, 16, 6, 6).contiguous(memory_format=LAST)
    with torch.autocast("cpu", torch.bfloat16):
        expected = copy.deepcopy(model)(x)
    assert error(resfast.optimize(model)[0](x), expected.double()) < LIMIT


class Small(nn.Module):
    """A network as people write them: functional ReLU, ``+=``, ``view`` before the classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.first = InPlace(width)
        self.down = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
        )
        self.second = Functional(2 * width)
        self.drop = 0.0
        self.fc = nn.Linear(2 * width * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.second(self.down(self.first(x)))
        if self.drop > 0:
            x = F.dropout(x, self.drop, self.training)
        return self.fc(x.view(x.size(0), -1))


def losses(model: nn.Module, steps: int, optimized: bool) -> list[float]:
    """Losses of training on a fixed set of images in bfloat16."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(128, 3, 8, 8, generator=random)
    labels = (images.mean((2, 3)) * 20).long().sum(1).remainder(10)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    if optimized:
        model, optimizer = resfast.optimize(model, optimizer)
    found = []
    for step in range(steps):
        rows = torch.arange(32) + step % 4 * 32
        with torch.autocast("cpu", torch.bfloat16, enabled=not optimized):
            loss = F.cross_entropy(model(images[rows]).float(), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_losses_of_50_steps_agree_as_those_of_two_seeds_of_rounding_do(kernels):
    """A seed of rounding is a relative change of the first weights by half a unit of bfloat16."""
    torch.manual_seed(3)
    model = Small()
    plain = torch.tensor(losses(copy.deepcopy(model), 50, False))
    ours = torch.tensor(losses(copy.deepcopy(model), 50, True))
    assert kernels["norm"] == 50 * 6
    differences = []
    for seed in range(4):
        changed = copy.deepcopy(model)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in changed.parameters():
                noise = torch.rand(parameter.shape, generator=random) - 0.5
                parameter *= 1 + noise * 2**-8
        other = torch.tensor(losses(changed, 50, False))
        differences.append((other - plain).abs().mean())
    assert plain[-10:].mean() < 0.5 * plain[:4].mean()  # it learns
    assert (ours - plain).abs().mean() < 1.5 * max(differences)


def test_in_float32_only_additions_are_ours_and_values_are_nearly_the_same(kernels):
    torch.manual_seed(4)
    model, x = Scaled(), torch.randn(4, 24, 8, 8)
    expected = copy.deepcopy(model)(x)
    model, _ = resfast.optimize(model, dtype=torch.float32)
    out = model(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    assert not kernels["norm"]
    assert not kernels["conv"]


def test_evaluation_is_what_it_was(kernels):
    torch.manual_seed(5)
    model, x = Small(), torch.randn(4, 3, 8, 8)
    model(x)
    expected = copy.deepcopy(model).eval()(x)
    resfast.optimize(model)
    model.eval()
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert not kernels
    model.train()(x)
    assert kernels["norm"] == 6


def test_without_gradients_in_training_mode_values_are_those_of_pytorch(kernels):
    torch.manual_seed(6)
    model, x = Small(), torch.randn(4, 3, 8, 8)
    plain = copy.deepcopy(model)
    resfast.optimize(model)
    with torch.no_grad():
        out = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            expected = plain(x)
    assert torch.equal(out, expected.float())
    assert not kernels
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name))


def test_second_derivatives_are_refused():
    model = chain(nn.BatchNorm2d(32), nn.ReLU())
    resfast.optimize(model)
    x = torch.randn(2, 24, 6, 6).contiguous(memory_format=LAST).requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|not have been used"):
        torch.autograd.grad(first.square().sum(), x)
    (first,) = torch.autograd.grad(model(x).square().sum(), model[1].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_small_maps_are_left_to_pytorch(kernels, monkeypatch):
    """Their norms take less time than the Python code around a kernel."""
    monkeypatch.setattr(calls, "MIN_VALUES", 2 * 24 * 64)
    monkeypatch.setattr(calls, "MIN_VALUES_ALONE", 4 * 24 * 64)
    torch.manual_seed(9)
    model, alone = resfast.optimize(InPlace())[0], resfast.optimize(Scaled())[0]
    for count, expected in ((1, [0, 0]), (2, [2, 1]), (4, [2, 2])):
        x = torch.randn(count, 24, 8, 8).contiguous(memory_format=LAST)
        found = []
        for network in (model, alone):
            kernels.clear()
            network(x)
            found.append(kernels["norm"])
        assert found == expected


@contextmanager
def changed(module: nn.Module, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    yield
    setattr(module, name, before)


def test_a_forward_follows_the_values_that_it_reads(kernels):
    """A rewritten forward has no dropout: with ``drop`` above 0 the network runs its own."""
    torch.manual_seed(7)
    model = resfast.optimize(Small())[0]
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=LAST)
    first, again = model(x), model(x)
    assert torch.equal(first, again)
    with changed(model, "drop", 0.9), pytest.raises(RuntimeError, match="view"):
        model(x)  # as without optimize, for the view of channels_last maps
    with changed(model, "drop", 0.9):
        contiguous = model(x.contiguous())
    assert not torch.equal(contiguous, first)
    assert torch.equal(model(x), first)


def test_contiguous_maps_reach_code_that_depends_on_it(kernels):
    """``Unknown`` cannot be traced and views its maps: images are not converted."""

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x.flatten(1)
            return x.view(len(x), -1)

    torch.manual_seed(8)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), Unknown())
    resfast.optimize(model)
    assert not resfast.optimization_report(model).channels_last
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert not kernels
    with pytest.raises(RuntimeError, match="view"):
        model(torch.randn(2, 3, 8, 8).contiguous(memory_format=LAST))
