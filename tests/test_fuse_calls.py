"""What a call of a network does around its forward, and what goes in and out, after fusion."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional
from torch.nn.modules import module as module_hooks
from torchvision.ops import StochasticDepth

import resfast
from resfast.errors import ResfastError
from resfast.inference import fuse as fusion
from resfast.inference.fuse import inputs
from resfast.layers.fused import ConvBNAddReLU, ConvBNReLU
from tests.test_fuse import images, trained_like


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())


# -- layers ------------------------------------------------------------------------------------

OVERRIDES: dict[str, Callable[[nn.Module], None]] = {
    "_conv_forward": lambda m: setattr(
        m.conv,
        "_conv_forward",
        types.MethodType(lambda self, *args: nn.Conv2d._conv_forward(self, *args) + 1, m.conv),
    ),
    "norm forward": lambda m: setattr(
        m.bn, "forward", lambda x: nn.BatchNorm2d.forward(m.bn, x) * 2
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_layer_runs_a_method_that_its_child_overrides(name: str):
    torch.manual_seed(0)
    layer = trained_like(ConvBNReLU(3, 8))
    x = images(2, 3, 8, 8)
    with torch.no_grad():
        before = layer(x)
    OVERRIDES[name](layer)
    expected = layer(x)  # with gradients, the children run
    with torch.no_grad():
        assert relative_error(layer(x), expected) < 1e-5
    assert relative_error(before, expected) > 0.1


def test_layer_runs_global_hooks_on_its_children():
    torch.manual_seed(0)
    layer = trained_like(ConvBNReLU(3, 8))
    x = images(2, 3, 8, 8)
    handle = module_hooks.register_module_forward_hook(
        lambda module, args, out: out + 1 if isinstance(module, nn.BatchNorm2d) else None
    )
    try:
        expected = layer(x)
        with torch.no_grad():
            assert relative_error(layer(x), expected) < 1e-5
    finally:
        handle.remove()
    assert relative_error(layer(x), expected) > 0.1


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 1, 1), (3, 2, 8, 8, 8), (2, 8, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_broadcasts_alike_with_and_without_gradients(
    shape: tuple[int, ...], dtype: torch.dtype
):
    torch.manual_seed(0)
    layer = trained_like(ConvBNAddReLU(3, 8))
    x, residual = images(2, 3, 8, 8), images(*shape).to(dtype)
    expected = layer(x, residual)
    with torch.no_grad():
        actual = layer(x, residual)
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected) < 1e-5


# -- calls of a network --------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution, its norm and activation, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)))


def small(kind: type[nn.Module] = Small) -> nn.Module:
    torch.manual_seed(0)
    return trained_like(kind())


@torch.no_grad()
def check(model: nn.Module, *args: Any, example: Any = None, **named: Any) -> fusion.FusedModel:
    """Compares the fused network in float32 and bfloat16 with the original in float64."""
    x = inputs.map_tensors(lambda x: x.double() if x.is_floating_point() else x, (args, named))
    expected = copy.deepcopy(model).double()(*x[0], **x[1])
    half = resfast.fuse(model, torch.bfloat16, example=example)(*args, **named)
    network = resfast.fuse(model, torch.float32, example=example)
    for out, limit in ((network(*args, **named), 1e-5), (half, 3e-2)):
        for a, b in zip(inputs.tensors(out), inputs.tensors(expected), strict=True):
            assert a.dtype == torch.float32
            assert relative_error(a, b) < limit
    return network


def scaled(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((args[0] - 0.5) / 0.2,)


def scaled_by_name(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict) -> tuple:
    return ((args[0] - 0.5) / 0.2,), kwargs


NETWORK_HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "pre": lambda m: m.register_forward_pre_hook(scaled),
    "pre with kwargs": lambda m: m.register_forward_pre_hook(scaled_by_name, with_kwargs=True),
    "post": lambda m: m.register_forward_hook(lambda module, args, out: out.softmax(1)),
}


@pytest.mark.parametrize("wrap", ["none", "nn.DataParallel", "torch.compile", "both"])
@pytest.mark.parametrize("name", NETWORK_HOOKS)
def test_hooks_of_the_network_are_part_of_it(name: str, wrap: str):
    model = small()
    plain = model(images(2, 3, 8, 8))
    NETWORK_HOOKS[name](model)
    wrapped = nn.DataParallel(model).eval() if wrap in ("nn.DataParallel", "both") else model
    if wrap in ("torch.compile", "both"):
        wrapped = torch.compile(wrapped, backend="eager")
    network = check(model, images(2, 3, 8, 8))
    assert relative_error(network(images(2, 3, 8, 8)), plain) > 0.1
    out = resfast.fuse(wrapped, torch.float32)(images(2, 3, 8, 8))
    torch.testing.assert_close(out, network(images(2, 3, 8, 8)))


def test_wrapper_inside_a_network_is_taken_off():
    model = nn.Sequential(nn.Identity(), torch.compile(small(), backend="eager")).eval()
    network = resfast.fuse(model, torch.float32)
    assert relative_error(network(images(2, 3, 8, 8)), model(images(2, 3, 8, 8))) < 1e-5
    assert network.report.convolutions == network.report.batch_norms == 1


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_hooks_of_a_wrapper_are_refused(wrap: Callable[[nn.Module], nn.Module]):
    model = wrap(small()).eval()
    model.register_forward_hook(lambda module, args, out: out + 1)
    with pytest.raises(ResfastError, match=r"wrapper .* has forward hooks; register them on the"):
        resfast.fuse(model)
    with pytest.raises(ResfastError, match=r"wrapper .* has forward hooks; register them on the"):
        resfast.fuse(nn.Sequential(model).eval())


def test_hooks_of_all_modules_are_refused():
    handle = module_hooks.register_module_forward_pre_hook(lambda module, args: None)
    try:
        with pytest.raises(ResfastError, match="hooks are registered for all modules"):
            resfast.fuse(small())
    finally:
        handle.remove()


def bound(module: nn.Module, name: str, function: Callable) -> None:
    setattr(module, name, types.MethodType(function, module))


def circular(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


def tripled(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, x) * 3


INSTANCE_METHODS: dict[str, Callable[[nn.Module], None]] = {
    "conv._conv_forward": lambda m: bound(m.conv, "_conv_forward", circular),
    "conv.forward": lambda m: bound(m.conv, "forward", tripled),
    "bn.forward": lambda m: bound(m.bn, "forward", tripled),
    "act.forward": lambda m: bound(m.act, "forward", tripled),
    "net.forward": lambda m: bound(m, "forward", tripled),
    "partial": lambda m: setattr(m.conv, "forward", functools.partial(tripled, m.conv)),
    "partial of the network": lambda m: setattr(m, "forward", functools.partial(tripled, m)),
}


@pytest.mark.parametrize("name", INSTANCE_METHODS)
def test_methods_replaced_on_an_instance_are_part_of_the_network(name: str):
    model = small()
    plain = model(images(2, 3, 8, 8))
    INSTANCE_METHODS[name](model)
    network = check(model, images(2, 3, 8, 8), example=images(2, 3, 8, 8))
    assert relative_error(network(images(2, 3, 8, 8)), plain) > 0.01


def test_class_with_its_own_call_is_called():
    class Doubled(nn.Conv2d):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    model = small()
    model.conv = Doubled(3, 8, 3).eval()
    check(model, images(2, 3, 8, 8))


# -- inputs and outputs --------------------------------------------------------------------------


class Parts(Small):
    """Several inputs, nested outputs."""

    def forward(
        self, batch: dict[str, Tensor], views: list[Tensor], *, scale: Tensor, flip: bool = False
    ) -> OrderedDict[str, Any]:
        x = super().forward(batch["image"] * scale)
        y = [super(Parts, self).forward(views[i]) for i in (0, 1)]
        return OrderedDict(b=x.flip(1) if flip else x, a={"views": y})


def parts() -> tuple[dict[str, Tensor], list[Tensor]]:
    return {"image": images(2, 3, 8, 8)}, [images(2, 3, 8, 8) + 1, images(2, 3, 6, 6)]


def test_dicts_lists_keywords_and_ordered_dicts_are_those_of_the_original():
    batch, views = parts()
    network = check(small(Parts), batch, views, scale=torch.tensor(2.0))
    out = network(views=views, scale=torch.tensor(2.0), batch=batch, flip=False)
    assert type(out) is OrderedDict
    assert list(out) == ["b", "a"]
    assert type(out["a"]) is dict
    copied = pickle.loads(pickle.dumps(network))(batch, views, scale=torch.tensor(2.0))
    assert type(copied) is OrderedDict
    torch.testing.assert_close(copied, out)


def test_nested_inputs_and_outputs_pass_through_export():
    class Branching(Parts):
        def forward(self, batch, views, *, scale, flip=False):
            if batch["image"].shape[2] > 4:  # torch.fx cannot trace this
                return super().forward(batch, views, scale=scale)
            return None

    batch, views = parts()
    scale = torch.tensor(2.0)
    model = small(Branching)
    network = check(model, batch, views, scale=scale, example=(batch, views, scale))
    assert network.report.traced_by == "torch.export"
    with pytest.raises(ResfastError, match=r"input 1 has shape \[2, 3, 9, 9\]"):
        network(batch, [images(2, 3, 9, 9), views[1]], scale=scale)


@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((), {}, "input 'batch' is missing"),
        ((1, 2, 3), {}, r"fused for 2 inputs \(batch, views\), not 3"),
        ((1, 2), {"scale": 1, "flip": True}, "with the default of 'flip', which is part of it"),
        ((1, 2), {"batch": 1}, "input 'batch' is given by position and by name"),
        ((1, 2), {"scale": 1, "zoom": 1}, "without an input 'zoom', for batch, views, scale"),
    ],
)
def test_other_arguments_are_refused(args: tuple, named: dict, message: str):
    network = resfast.fuse(small(Parts), torch.float32)
    with pytest.raises(ResfastError, match=message):
        network(*args, **named)


def test_input_of_another_name_is_not_taken_for_the_first():
    class Named(Small):
        def forward(self, images: Tensor, x: Tensor) -> Tensor:
            return super().forward(images) * x

    check(small(Named), x=torch.tensor(3.0), images=images(2, 3, 8, 8))


def test_one_image_needs_no_batch():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()
    check(nn.Sequential(*layers).eval(), images(3, 12, 12))


def test_network_moves_but_keeps_its_dtype():
    model = resfast.fuse(small(), torch.bfloat16)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    expected = model(images(2, 3, 8, 8))
    for same in (model.to("cpu"), model.to(torch.bfloat16), model.bfloat16(), model.cpu()):
        assert {name: tensor.dtype for name, tensor in same.state_dict().items()} == before
        assert torch.equal(same(images(2, 3, 8, 8)), expected)
    for convert in (model.float, model.half, model.double, lambda: model.to(torch.float16)):
        with pytest.raises(ResfastError, match=r"cannot be converted to torch.*fuse the original"):
            convert()


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (images(2, 3, 8, 8), "dtype is a Tensor; expected .*; pass inputs as example="),
        ({"image": images(2, 3, 8, 8)}, "dtype is a dict; expected .*; pass inputs as example="),
        ("float16", "dtype is a str; expected torch.bfloat16"),
    ],
)
def test_argument_in_place_of_the_dtype_is_refused(dtype: Any, message: str):
    with pytest.raises(ResfastError, match=message):
        resfast.fuse(small(), dtype)


def test_example_with_too_many_inputs_is_refused():
    with pytest.raises(ResfastError, match="example has 2 inputs, but Small takes 1"):
        resfast.fuse(small(), example=(images(2, 3, 8, 8), images(2, 3, 8, 8)))


def test_success_logs_no_error():
    class Position(Small):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 8, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x) + self.position)

    messages: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = messages.append
    loggers = [logging.getLogger(), logging.getLogger("torch")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        check(small(Position), images(2, 3, 8, 8))
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not messages


# -- memory --------------------------------------------------------------------------------------


class Changed(nn.Module):
    """A function changes the output of the first convolution, which the second one reads."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        self.change(y)
        return self.last(y)


def _scale_half(y: Tensor) -> Tensor:
    return y[:, :4].mul_(3)  # torch.fx does not see what is in here


torch.fx.wrap("_scale_half")

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "tensor_split": lambda y: torch.tensor_split(y, 2, 1)[0].mul_(3),
    "hsplit": lambda y: torch.hsplit(y, 2)[1].mul_(2),
    "split_with_sizes": lambda y: torch.split_with_sizes(y, [4, 4], 1)[1].mul_(2),
    "moveaxis": lambda y: y.moveaxis(1, 3).mul_(2),
    "as_strided": lambda y: y.as_strided(y.size(), y.stride()).mul_(2),
    "broadcast_to": lambda y: y.broadcast_to(y.shape).mul_(2),
    "getitem": lambda y: y[:, :4].mul_(2),
    "data": lambda y: y.data.mul_(2),
    "float": lambda y: y.float().mul_(2),
    "atleast_3d": lambda y: torch.atleast_3d(y).mul_(2),
    "einsum": lambda y: torch.einsum("nchw->nhwc", y).mul_(2),
    "type_as": lambda y: y.type_as(y).mul_(2),
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y, y[:1])[0].mul_(2),
    "positive": lambda y: (+y).mul_(2),
    "operator": lambda y: torch.ops.aten.mul_.Tensor(y, torch.full((1,), 2.0)),
    "dropout": lambda y: F.dropout(y, training=False).mul_(2),
}


REFUSED = {"data", "einsum", "as_strided"}
"""torch.export fails or does not know that the result is a view, or it depends on the layout."""


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_change_in_place_through_a_view_is_right_or_refused(name: str):
    torch.manual_seed(0)
    model = trained_like(Changed(CHANGES[name]))
    x = images(2, 3, 8, 8)
    expected = model(x)
    without = trained_like(Changed(lambda y: None))
    without.load_state_dict(model.state_dict())
    assert relative_error(without(x), expected) > 0.1
    outcomes = []
    for example in (None, x):
        try:
            network = resfast.fuse(model, torch.float32, example=example)
        except ResfastError as error:
            outcomes.append("refused")
            refusals = ("torch.fx cannot", "neither torch.fx", "the network calls")
            assert str(error).startswith(refusals)  # noqa: PT017
        else:
            outcomes.append("right")
            assert relative_error(network(x), expected) < 1e-5
    assert outcomes[1] == ("refused" if name in REFUSED else "right")


class Gated(Small):
    """Squeeze and excitation: values computed from the map are changed in place, the map is not."""

    def __init__(self, squeeze: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.squeeze = nn.Conv2d(8, 8, 1), squeeze

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        n = y.shape[0]
        gate = F.relu(self.gate(self.squeeze(y).relu_()), inplace=True)
        return self.fc((y * gate).view(n, 8, -1).mean(2))


SQUEEZES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.mean((2, 3), keepdim=True),
    "amax": lambda y: torch.amax(y, (2, 3), keepdim=True),
    "max_pool2d": lambda y: F.max_pool2d(y, 8),
    "module": nn.AdaptiveAvgPool2d(1),
}


@pytest.mark.parametrize("name", SQUEEZES)
def test_values_that_share_no_memory_are_changed_without_an_example(name: str):
    network = check(small(lambda: Gated(SQUEEZES[name])), images(2, 3, 8, 8))
    assert network.report.traced_by == "torch.fx"


def test_example_tells_what_shares_no_memory():
    model = small(lambda: Gated(lambda y: F.interpolate(y, size=8).mean((2, 3), keepdim=True)))
    check(model, images(2, 3, 8, 8))
    model = small(lambda: Gated(lambda y: F.adaptive_avg_pool2d(y, 1)))
    network = check(model, images(2, 3, 8, 8), example=images(2, 3, 8, 8))
    assert network.report.traced_by == "torch.fx"
    with pytest.raises(ResfastError, match="relu_ changes adaptive_avg_pool2d in place, whose"):
        resfast.fuse(model)


# -- modules -------------------------------------------------------------------------------------


def test_networks_of_volumes_keep_their_3d_convolutions():
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.time, self.norm = nn.Conv3d(8, 4, (2, 1, 1)), nn.BatchNorm3d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(self.conv(x)))
            return self.norm(self.time(x[None].transpose(1, 2)))

    network = check(small(Video), images(2, 3, 8, 8))
    assert network.report.convolutions == 1
    assert ("time", "convolution that is not nn.Conv2d") in network.report.left


def test_values_kept_from_training_are_no_obstacle():
    class Keeps(Small):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = {"x": [self.conv(x)]}
            self.kept["loss"] = super().forward(x).sum()
            return super().forward(x)

    model = small(Keeps)
    model(images(2, 3, 8, 8)).sum().backward()
    nn.utils.weight_norm(model.fc)
    model.fc(torch.ones(1, 8))  # leaves fc.weight, computed from other parameters
    x = images(2, 3, 8, 8)
    for example in (None, x):
        network = resfast.fuse(model, torch.float32, example=example)
        assert relative_error(network(x), model(x)) < 1e-5
    assert model.kept["loss"].requires_grad


def test_modules_made_in_forward_are_part_of_the_network():
    class Makes(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.ReLU()(self.bn(self.conv(nn.ZeroPad2d(1)(x))))
            return self.fc(nn.Flatten()(nn.AdaptiveAvgPool2d(1)(x)))

    network = check(small(Makes), images(2, 3, 8, 8))
    assert network.report.activations == network.report.batch_norms == 1


def test_weights_made_in_forward_are_refused():
    class Random(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.Conv2d(3, 3, 1)(x))

    with pytest.raises(ResfastError, match="a Conv2d with weights is called that is not a submod"):
        resfast.fuse(small(Random))


def test_float_functional_is_an_addition_and_the_quantised_one_is_refused():
    class Added(Small):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.add = torch.ao.quantization.QuantStub(), FloatFunctional()
            self.skip = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            x = self.act(self.add.add(self.bn(self.conv(x)), self.skip(x)))
            return self.fc(x.mean((2, 3)))

    model = small(Added)
    network = check(model, images(2, 3, 8, 8))
    assert (network.report.convolutions, network.report.residuals) == (2, 1)
    model.add = torch.ao.nn.quantized.QFunctional().eval()
    with pytest.raises(ResfastError, match=r"add \(QFunctional\) is quantised"):
        resfast.fuse(model)


def test_stochastic_depth_does_nothing_in_eval_mode():
    class Deep(Small):
        def __init__(self) -> None:
            super().__init__()
            self.depth, self.skip = StochasticDepth(0.5, "row"), nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.depth(self.bn(self.conv(x))) + self.skip(x))
            return self.fc(x.mean((2, 3)))

    network = check(small(Deep), images(2, 3, 8, 8))
    assert network.report.residuals == network.report.activations == 1
