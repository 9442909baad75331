"""What ``resfast.optimize`` leaves as it was: hooks, state dicts, copies, wrappers, optimizers."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import resfast
from resfast.inference.fuse.nodes import UntraceableError
from resfast.layers.replaced import is_replaced
from resfast.ops.norm_act import op as norm_act
from resfast.training.optimize.tracing import trace
from tests.test_optimize import LAST, InPlace, Small, by_rule, chain, kernels

__all__ = ["by_rule", "kernels"]

needs_kernels = pytest.mark.skipif(
    not norm_act.AVAILABLE, reason="needs the C++ kernels and AVX512-BF16"
)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """Trains on a batch; returns the loss."""
    loss = F.cross_entropy(model(images()), torch.arange(4))
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def seeded(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def test_objects_names_and_values_stay():
    model = seeded()
    before = dict(model.named_modules()), dict(model.named_parameters())
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result = resfast.optimize(model, optimizer)
    assert result[0] is model
    assert result[1] is optimizer
    for name, module in model.named_modules():
        assert module is before[0][name]
    for name, parameter in model.named_parameters():
        assert parameter is before[1][name]
    assert repr(model) == text
    assert isinstance(model, Small)
    assert isinstance(model.bn, nn.BatchNorm2d)
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@needs_kernels
def test_restore_undoes_everything():
    model = seeded()
    kinds = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    optimizer = torch.optim.AdamW(model.parameters())
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    resfast.optimize(model, optimizer)
    assert [type(module) for module in model.modules()] != kinds
    assert [set(vars(module)) for module in model.modules()] == attributes
    step(model, optimizer)
    assert resfast.restore(model, optimizer) is model
    assert [type(module) for module in model.modules()] == kinds
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == (
        options
    )
    plain = seeded()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(images()), model(images()))
    with pytest.raises(resfast.ResfastError, match="not optimized"):
        resfast.optimization_report(model)


def test_optimizing_twice_is_optimizing_once():
    model = seeded()
    resfast.optimize(model)
    first = [type(module).__mro__[2:] for module in model.modules()]
    resfast.optimize(model)
    assert [type(module).__mro__[2:] for module in model.modules()] == first


@needs_kernels
def test_state_goes_round_in_the_middle_of_training():
    """A checkpoint of an optimized training continues with the same bits, also without optimize."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = seeded()
        return model, torch.optim.Adam(model.parameters(), 1e-3)

    model, optimizer = resfast.optimize(*make())
    step(model, optimizer)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    expected = [step(model, optimizer) for _ in range(2)]
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other, again = resfast.optimize(*make())
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert [step(other, again) for _ in range(2)] == expected
    plain, unfused = make()
    plain.load_state_dict(states[0])
    unfused.load_state_dict(states[1])
    assert step(plain, unfused) == pytest.approx(expected[0].item(), rel=0.05)


@needs_kernels
def test_a_copy_is_optimized_and_a_pickle_is_the_original(kernels):
    model = resfast.optimize(seeded())[0]
    copied = copy.deepcopy(model)
    assert all(a is not b for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    expected = step(model)
    first = kernels["norm"]
    assert step(copied) == expected
    assert kernels["norm"] == 2 * first
    assert resfast.optimization_report(copied) == resfast.optimization_report(model)
    for loaded in (
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(model, protocol=0)),
    ):
        assert type(loaded) is Small
        assert not any(map(is_replaced, loaded.modules()))
        assert torch.equal(loaded.eval()(images()), copy.deepcopy(model).eval()(images()))
    assert b"resfast" not in pickle.dumps(resfast.optimize(chain(nn.BatchNorm2d(32)))[0])


@needs_kernels
@pytest.mark.parametrize("path", ["", "first", "first.bn1", "first.relu", "down.1", "fc"])
@pytest.mark.parametrize("early", [True, False])
def test_hooks_run_as_before(path, early):
    """On any module, registered before or after; what they see is what PyTorch computes."""

    def calls(optimized: bool) -> list[tuple[float, ...]]:
        model, seen = seeded(), []
        hooked = model.get_submodule(path)

        def register() -> None:
            hooked.register_forward_pre_hook(lambda m, args: seen.append(("in", args[0].shape, 0)))
            hooked.register_forward_hook(
                lambda m, args, out: seen.append(("out", out.shape, float(out.float().mean())))
            )

        if early:
            register()
        if optimized:
            resfast.optimize(model)
        if not early:
            register()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images())
        out.float().sum().backward()
        return seen

    ours, theirs = calls(True), calls(False)
    assert [one[:2] for one in ours] == [one[:2] for one in theirs]
    assert [one[2] for one in ours] == pytest.approx([one[2] for one in theirs], abs=0.02)


@needs_kernels
def test_a_hook_that_changes_a_value_is_obeyed():
    model = resfast.optimize(seeded())[0]
    model.first.bn1.register_forward_hook(lambda m, args, out: out * 0)
    model.first.bn2.register_forward_hook(lambda m, args, out: out * 0)
    seen = []
    model.first.register_forward_hook(lambda m, args, out: seen.append(out))
    inputs = []
    model.first.conv1.register_forward_hook(lambda m, args, out: inputs.append(out))
    model(images())
    assert torch.equal(seen[0], inputs[0].relu())


def test_what_is_not_plain_is_left_and_named():
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(x)) if random.random() < 0.5 else x

    patched = nn.BatchNorm2d(16)
    patched.forward = lambda x: x * 3
    model = nn.Sequential(
        Own(16, 16, 3, padding=1),
        parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1)),
        patched,
        Chooses(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(16, momentum=None),
        nn.SyncBatchNorm(16),
        nn.Conv2d(16, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 5, padding=2),
    )
    resfast.optimize(model)
    report = resfast.optimization_report(model)
    left = dict(report.left)
    assert set(left) >= {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"}
    if norm_act.AVAILABLE:
        assert len(left) == 11
        assert left["0"] == "a Own with a forward of its own"
        assert left["1"] == "parametrized"
        assert "method of its own" in left["2"]
        assert "random" in left["3"]
        assert "groups" in left["4"]
        assert "reflect" in left["5"]
        assert "statistics" in left["6"]
        assert left["7"] == "a SyncBatchNorm"
        assert "fewer than 16" in left["8"]
        assert "fewer than 16" in left["9"]
        assert "other than" in left["10"]
        assert (report.convolutions, report.batch_norms) == (0, 1)  # of Chooses
    x = torch.randn(2, 16, 8, 8)
    assert model(x).shape == (2, 16, 6, 6)
    assert "left" in str(report)


SIDE_EFFECTS = {
    "writes an attribute": "self.seen = x; return self.bn(x)",
    "prints": "print('x'); return self.bn(x)",
    "random numbers": "return self.bn(x) if torch.rand(1) < 2 else x",
    "a list": "return self.bn(x) * self.values[0]",
    "a context": "\n    with torch.no_grad():\n        return self.bn(x)",
    "a checkpoint": "return checkpoint(self.bn, x, use_reentrant=False)",
    "types": "return self.bn(x) if isinstance(x, Tensor) else x",
    "its input": "return self.bn(x) if x.sum() > 0 else x",
    "a module": "return self.bn(x) * random.random()",
    "autocast": "return self.bn(x) if torch.is_autocast_enabled('cpu') else x",
}


@pytest.mark.parametrize("case", SIDE_EFFECTS)
def test_a_forward_with_effects_of_its_own_is_not_traced(case):
    names: dict = {"torch": torch, "checkpoint": checkpoint, "Tensor": Tensor, "random": random}
    names["__name__"] = "users"
    exec(f"def forward(self, x):\n    {SIDE_EFFECTS[case]}", names)
    module = type("Users", (nn.Module,), {"forward": names["forward"]})()
    module.bn, module.values = nn.BatchNorm2d(16), [1.0]
    with pytest.raises(UntraceableError):
        trace(module)
    assert module.training
    assert not nn.Module.__dict__.get("__getattribute__")


@needs_kernels
def test_a_forward_follows_children_that_are_replaced_added_or_removed(kernels):
    torch.manual_seed(1)
    model = resfast.optimize(InPlace(16))[0]
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=LAST)
    model(x)
    assert kernels.pop("norm") == 2
    model.bn1 = nn.Identity()
    model(x)
    assert kernels.pop("norm") == 1
    model.bn2 = nn.GroupNorm(4, 16)
    out = model(x)
    assert not kernels["norm"]
    assert torch.equal(out, resfast.restore(copy.deepcopy(model))(x)) or out.dtype == torch.float32
    sequential = resfast.optimize(chain(nn.BatchNorm2d(32), nn.ReLU()))[0]
    part = sequential[:2]
    y = torch.randn(2, 24, 6, 6).contiguous(memory_format=LAST)
    with torch.autocast("cpu", torch.bfloat16):
        assert (part(y) < 0).any()  # no ReLU
    sequential.append(nn.Tanh())
    assert sequential(y).max() <= 1


@needs_kernels
def test_frozen_parameters_get_no_gradient_and_frozen_norms_keep_their_statistics():
    model = seeded()
    for parameter in (*model.first.parameters(), model.bn.weight):
        parameter.requires_grad_(False)
    resfast.optimize(model)
    step(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
    model.first.bn1.eval()
    before = model.first.bn1.running_mean.clone()
    step(model)
    assert torch.equal(model.first.bn1.running_mean, before)


@needs_kernels
def test_a_module_that_is_used_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)
            self.bn = nn.BatchNorm2d(16)
            self.other = self.bn

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.other(self.conv(F.relu(self.bn(self.conv(x))))))

    torch.manual_seed(2)
    model, x = Twice(), torch.randn(4, 16, 6, 6).contiguous(memory_format=LAST)
    plain = copy.deepcopy(model)
    resfast.optimize(model)
    model(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        plain(x).float().sum().backward()
    assert model.bn is model.other
    assert model.bn.num_batches_tracked == 2
    torch.testing.assert_close(model.bn.running_var, plain.bn.running_var, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(model.bn.bias.grad, plain.bn.bias.grad, rtol=0.05, atol=0.5)


@needs_kernels
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_the_same(reentrant):
    class Checkpointed(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(self.conv(x)))
            x = checkpoint(self.first, x, use_reentrant=reentrant)
            return self.fc(torch.flatten(self.second(self.down(x)), 1))

    def gradients(kind: type[Small], dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(3)
        model = kind().to(dtype)
        if dtype == torch.float32:
            resfast.optimize(model)
        x = images().to(dtype).contiguous(memory_format=LAST)
        F.cross_entropy(model(x), torch.arange(4)).backward()
        return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])

    class Plain(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(F.relu(self.bn(self.conv(x))))
            return self.fc(torch.flatten(self.second(self.down(x)), 1))

    expected, found = gradients(Plain), gradients(Checkpointed)
    if not reentrant:
        assert torch.equal(found, expected)
        return
    # Its first pass has no gradients, so that PyTorch computes it: other roundings.
    exact = gradients(Plain, torch.float64)
    assert (found - exact).norm() < 2 * (expected - exact).norm()


@needs_kernels
@pytest.mark.parametrize("wrap_first", [True, False])
def test_distributed_training_of_one_process_has_the_same_bits(wrap_first, tmp_path: Path):
    expected = resfast.optimize(seeded())[0]
    step(expected)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = seeded()
        if wrap_first:
            wrapped = nn.parallel.DistributedDataParallel(model)
            assert resfast.optimize(wrapped)[0] is wrapped
        else:
            wrapped = nn.parallel.DistributedDataParallel(resfast.optimize(model)[0])
        assert resfast.optimization_report(wrapped).batch_norms == 6
        step(wrapped)
        for one, other in zip(expected.parameters(), wrapped.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
        resfast.restore(wrapped)
        assert not any(map(is_replaced, model.modules()))
    finally:
        dist.destroy_process_group()


@needs_kernels
@pytest.mark.parametrize("compile_first", [True, False])
def test_a_compiled_network_is_one_graph_with_the_same_values(compile_first):
    model, graphs = seeded(), []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    expected = step(resfast.optimize(seeded())[0])
    if compile_first:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert resfast.optimize(compiled)[0] is compiled
    else:
        compiled = torch.compile(resfast.optimize(model)[0], backend=backend, fullgraph=True)
    assert step(compiled) == expected
    assert len(graphs) == 1
    assert graphs[0].count("resfast.batch_norm_act") == 6
    assert graphs[0].count("resfast.conv2d_train") == 5
    compiled.eval()
    with torch.no_grad():
        assert torch.equal(compiled(images()), copy.deepcopy(model)(images()))


def test_fuse_takes_an_optimized_network():
    plain, model = seeded().eval(), resfast.optimize(seeded())[0].eval()
    expected, fused = resfast.fuse(plain, torch.float32), resfast.fuse(model, torch.float32)
    assert fused.report == expected.report
    assert torch.equal(fused(images()), expected(images()))
    assert resfast.optimization_report(model).optimizer == "none was given"


# Optimizers


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_a_fused_step_has_the_state_and_nearly_the_values_of_the_plain_one(kind):
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        more = {"momentum": 0.9} if kind == "SGD" else {}
        return model, getattr(torch.optim, kind)(model.parameters(), 0.01, **more)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for number in range(steps):
            optimizer.zero_grad()
            model(torch.full((2, 5), number + 1.0)).square().sum().backward()
            optimizer.step()

    pairs = [make(), make()]
    for model, optimizer in pairs:
        train(model, optimizer, 2)
    _, optimizer = resfast.optimize(*pairs[0], dtype=torch.float32)
    assert optimizer is pairs[0][1]
    assert "fused" in resfast.optimization_report(pairs[0][0]).optimizer
    for model, optimizer in pairs:
        train(model, optimizer, 3)
    for one, other in zip(*(model.parameters() for model, _ in pairs), strict=True):
        torch.testing.assert_close(one, other)
    states = [optimizer.state_dict() for _, optimizer in pairs]
    assert [*states[0]["state"][0]] == [*states[1]["state"][0]]
    assert [*states[0]["param_groups"][0]] == [*states[1]["param_groups"][0]]
    pairs[1][1].load_state_dict(states[0])
    resfast.restore(*pairs[0])
    train(*pairs[0], 1)


def test_other_optimizers_are_left_and_named():
    class Own(torch.optim.SGD):
        pass

    model = nn.Linear(2, 2)
    for optimizer, reason in (
        (torch.optim.RMSprop(model.parameters()), "have a fused step"),
        (Own(model.parameters()), "have a fused step"),
        (torch.optim.SGD(model.parameters(), foreach=True), "foreach=True was chosen"),
        (torch.optim.Adam(model.parameters(), fused=False), "fused=False was chosen"),
        (torch.optim.Adam(model.parameters(), fused=True), "fused already"),
    ):
        before = [dict(group) for group in optimizer.param_groups]
        resfast.optimize(model, optimizer)
        assert reason in resfast.optimization_report(model).optimizer
        assert [dict(group) for group in optimizer.param_groups] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet18",), "model is a str; expected a torch.nn.Module"),
        ((nn.Linear(1, 1), None, torch.float16), "dtype is torch.float16; expected"),
        ((nn.Linear(1, 1), None, torch.bfloat16, 5), "winograd_tile is 5; expected 2, 3 or 4"),
        ((nn.Linear(1, 1), "sgd"), "optimizer is a str; expected a torch.optim.Optimizer"),
    ],
)
def test_errors_name_the_value_and_what_was_expected(arguments, message):
    tile = {"winograd_tile": arguments[3]} if len(arguments) > 3 else {}
    with pytest.raises(resfast.ResfastError, match=message):
        resfast.optimize(*arguments[:3], **tile)
    with pytest.raises(resfast.ResfastError, match="expected a torch"):
        resfast.restore("resnet18")


@needs_kernels
def test_a_forward_is_traced_after_dali_has_replaced_functions():
    """Importing DALI replaces builtin functions by its own, which PyTorch's proxies then call."""
    pytest.importorskip("nvidia.dali")
    code = """
import nvidia.dali.fn
import torch.nn.functional as F
from torch import nn
import resfast

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x)

net = Net()
resfast.optimize(net)
report = str(resfast.optimization_report(net))
assert "1 rewritten forward" in report, report
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
