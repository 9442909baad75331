"""The residual basic block as one kernel.

The kernel's source is compiled for the host (tests/cuda_on_host), where it runs one cluster of
thread blocks after the other under the address and undefined-behaviour sanitizers, and its results
are compared with two float64 convolutions. The module and the rewriting of networks run on the CPU.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision

import resfast
from resfast.inference import fuse as fusion
from resfast.inference.fuse import FusedModel
from resfast.inference.fuse.blocks import group_blocks
from resfast.ops.basic_block import op as basic_block
from resfast.ops.conv import choice as conv_choice
from resfast.ops.conv import cuda as conv_cuda
from resfast.ops.conv.op import ConvBiasAct
from tests.ops.test_conv_cuda_source import ROOT, cuda_build, host_program, raw

DTYPES = (torch.bfloat16, torch.float16)
SM_80, SM_90 = 166912, 232448
"""Bytes of shared memory that a block can have."""
TILES = (
    (256, 64),
    (128, 128),
    (128, 64),
    (64, 128),
    (64, 64),
    (64, 32),
    (16, 128),
    (16, 32),
    (256, 32),
)
"""Pixels and filters of each tile shape of csrc/cuda/basic_block/basic_block_plan.h."""


@pytest.fixture(scope="session")
def host_block() -> Path:
    """The program that runs the kernel on the host."""
    return host_program("basic_block", "run_block")


@dataclass(frozen=True)
class Case:
    """A block in the order of the fields that tests/cuda_on_host/basic_block.cpp reads."""

    type: int
    tile: int
    cluster: int
    order: int
    activation: int  # 1: relu, 2: leaky_relu
    slope: int  # in thousandths
    has_bias: int
    batch: int
    height: int
    width: int
    channels: int
    shared: int = SM_90


def exact_block(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    slope: float,
    accumulated: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block in float64, and a bound of the error of each value.

    ``accumulated`` is the relative error of a sum in float32. The intermediate is rounded to x's
    dtype here too, and what its sums' errors can do to that rounding is in the bound.
    """
    eps = torch.finfo(x.dtype).eps
    w1, w2 = (weight.double() for weight in weights)
    b1, b2 = (torch.zeros(len(x[0])).double() if bias is None else bias.double() for bias in biases)
    wide = x.double()
    sums = F.conv2d(wide, w1, b1, padding=1)
    magnitude = F.conv2d(wide.abs(), w1.abs(), b1.abs(), padding=1)
    exact = F.leaky_relu(sums, slope)
    h = exact.to(x.dtype).double()
    # A sum that is a little off may be rounded to the neighbour.
    off = accumulated * magnitude
    off = torch.where((off > 0), off + 1.01 * eps * (exact.abs() + off), 0)
    near = (exact - off).to(x.dtype) == (exact + off).to(x.dtype)
    off = off * ~near
    sums = F.conv2d(h, w2, b2, padding=1) + wide
    error = F.conv2d(off, w2.abs(), padding=1)
    magnitude = F.conv2d(h.abs(), w2.abs(), b2.abs(), padding=1) + wide.abs()
    exact = F.leaky_relu(sums, slope)
    return exact, error + accumulated * magnitude + 0.51 * eps * exact.abs() + 1e-7


def check(program: Path, folder: Path, cases: list[Case]) -> None:
    """Runs the cases with random values; every output must be written and right."""
    seed = torch.seed() % 2**31
    random = torch.Generator().manual_seed(seed)
    values, written = [], []
    for case in cases:
        c, dtype = case.channels, DTYPES[case.type]
        x = torch.randn(case.batch, case.height, case.width, c, generator=random).to(dtype)
        weights = [
            (torch.randn(c, 3, 3, c, generator=random) / (9 * c) ** 0.5).to(dtype) for _ in "12"
        ]
        biases = [torch.randn(c, generator=random) for _ in "12"]
        values.append((x, weights, biases))
        parts = [torch.tensor(astuple(case), dtype=torch.int32), x, *weights]
        written += [raw(part) for part in parts + biases * case.has_bias]
    (folder / "cases").write_bytes(b"".join(written))
    done = subprocess.run(
        [str(program), str(folder / "cases"), str(folder / "outputs")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{cases}\n{done.stderr}"

    found, start = (folder / "outputs").read_bytes(), 0
    for case, (x, weights, biases) in zip(cases, values, strict=True):
        size = x.numel() * x.element_size()
        y = torch.frombuffer(bytearray(found[start : start + size]), dtype=x.dtype)
        start += size
        exact, bound = exact_block(
            x.permute(0, 3, 1, 2),
            tuple(weight.permute(0, 3, 1, 2) for weight in weights),
            tuple(bias if case.has_bias else None for bias in biases),
            case.slope / 1000 if case.activation == 2 else 0.0,
            2.0**-19,
        )
        error = (y.view(x.shape).permute(0, 3, 1, 2).double() - exact).abs()
        assert bool((error <= bound).all()), (
            f"{case}, seed {seed}: error {error.max():.3g}, "
            f"{int((~(error <= bound)).sum())} of {error.numel()} values beyond the bound"
        )
    assert start == len(found)


# N, H, W, C: odd maps, channels that do and do not fill a stage of weights or a tile of filters,
# batches that do not fill a tile.
SHAPES = [
    (5, 4, 4, 64),
    (2, 5, 7, 48),
    (1, 7, 7, 16),
    (3, 2, 3, 128),
    (2, 8, 8, 32),
    (9, 1, 5, 80),
    (1, 16, 13, 64),
    (2, 7, 9, 16),
]


@pytest.mark.parametrize("tile", range(len(TILES)))
@pytest.mark.parametrize("type_", range(2), ids=("bf16", "fp16"))
def test_every_tile_shape_equals_two_float64_convolutions(host_block, tmp_path, type_, tile):
    cases = []
    for i, (n, h, w, c) in enumerate(SHAPES):
        if TILES[tile][0] == 16 and h * w * c > 4096:  # takes long
            continue
        j = i + type_ + tile
        cluster = 2 if c % 32 == 0 and j % 2 else 1
        cases.append(Case(type_, tile, cluster, j, 1 + j % 2, 10, j // 2 % 2, n, h, w, c))
    check(host_block, tmp_path, cases)


@pytest.mark.parametrize("channels", [16, 48, 64, 128, 256, 512])
def test_channels_from_16_to_512_are_right(host_block, tmp_path, channels):
    """With the tile shapes of 16 and of 64 pixels, and the least shared memory of both."""
    cases = [Case(0, 6, 1, 0, 1, 0, 1, 1, 3, 4, channels, SM_80)]
    if channels < 512:  # takes long; that size is one of those of clusters
        cases.append(Case(1, 4, 1, 1, 2, 100, 1, 3, 4, 5, channels, SM_80))
    check(host_block, tmp_path, cases)


@pytest.mark.parametrize(
    ("cluster", "channels"), [(1, 256), (2, 96), (4, 64), (4, 192), (8, 128), (8, 512)]
)
def test_blocks_of_a_cluster_share_the_filters(host_block, tmp_path, cluster, channels):
    """Three clusters, the last with fewer images, in several orders of execution."""
    tile = 7 if channels == 512 else 5
    batch = 3 if channels == 512 else 5
    orders = range(1) if channels >= 128 else range(4)
    check(
        host_block,
        tmp_path,
        [Case(0, tile, cluster, order, 1, 0, 1, batch, 4, 4, channels) for order in orders],
    )


@pytest.mark.parametrize("type_", range(2), ids=("bf16", "fp16"))
def test_every_activation_and_bias_is_right(host_block, tmp_path, type_):
    cases = [
        Case(type_, 5, 1, slope, activation, slope, has_bias, 2, 3, 3, 32)
        for activation, slope in ((1, 0), (2, 10), (2, 100), (2, -500))
        for has_bias in (0, 1)
    ]
    check(host_block, tmp_path, cases)


@pytest.mark.parametrize(("tile", "cluster"), [(0, 1), (3, 2), (7, 1)])
def test_images_of_one_tile_do_not_see_each_other(host_block, tmp_path, tile, cluster):
    """One image of each is NaN: it stays so, and the others are what they are without it."""
    case = Case(0, tile, cluster, 0, 1, 0, 0, 5, 3, 4, 64)
    x = torch.randn(5, 3, 4, 64).bfloat16()
    weights = [(torch.randn(64, 3, 3, 64) / 24).bfloat16() for _ in "12"]
    outputs = []
    for bad in (None, 2):
        if bad is not None:
            x[bad] = torch.nan
        parts = [torch.tensor(astuple(case), dtype=torch.int32), x, *weights]
        (tmp_path / "cases").write_bytes(b"".join(map(raw, parts)))
        names = [str(tmp_path / "cases"), str(tmp_path / "outputs")]
        subprocess.run([str(host_block), *names], check=True)
        found = bytearray((tmp_path / "outputs").read_bytes())
        outputs.append(torch.frombuffer(found, dtype=torch.bfloat16).view(x.shape))
    clean, with_nan = outputs
    assert bool(with_nan[2].isnan().all())
    others = [0, 1, 3, 4]
    assert torch.equal(clean[others], with_nan[others])


# -- the choice ------------------------------------------------------------------------------------


def candidates(
    program: Path, folder: Path, shape: tuple[int, int, int, int], gpu: tuple[int, int, int]
) -> list[tuple[int, int]]:
    """(tile, cluster) of a GPU of so many multiprocessors, shared bytes and blocks a cluster."""
    header = torch.tensor(astuple(Case(0, 0, 1, 0, 1, 0, 0, *shape)), dtype=torch.int32)
    (folder / "cases").write_bytes(raw(header))
    names = [str(folder / "cases"), str(folder / "outputs"), *map(str, gpu)]
    subprocess.run([str(program), *names], check=True)
    numbers = torch.frombuffer(bytearray((folder / "outputs").read_bytes()), dtype=torch.int32)
    assert len(numbers) == 1 + 2 * int(numbers[0])
    return [tuple(pair) for pair in numbers[1:].view(-1, 2).tolist()]


@pytest.mark.parametrize("gpu", [(132, SM_90, 8), (108, SM_80, 1)], ids=("sm_90", "sm_80"))
@pytest.mark.parametrize(("side", "channels"), [(16, 32), (16, 64), (8, 128), (8, 256), (4, 512)])
def test_candidates_exist_and_fit(host_block, tmp_path, side, channels, gpu):
    for batch in (1, 8, 64, 512, 2048):
        found = candidates(host_block, tmp_path, (batch, side, side, channels), gpu)
        assert len(set(found)) == len(found)
        for tile, cluster in found:
            assert 0 <= tile < len(TILES)
            assert cluster <= gpu[2]
            assert channels % (16 * cluster) == 0
            # x, h and one stage of weights
            maps = 2 * side * side * 2 * (channels + 8)
            assert maps + TILES[tile][1] * 128 <= gpu[1]


def test_candidates_are_left_out_where_two_launches_are_sure_to_win(host_block, tmp_path):
    h200 = (132, SM_90, 8)
    for shape in (
        (1, 4, 4, 512),  # 9 MB of weights through one cluster
        (1, 8, 8, 40),  # not a multiple of 16
        (1, 32, 32, 64),  # two maps of 144 KiB
        (0, 8, 8, 64),
    ):
        assert candidates(host_block, tmp_path, shape, h200) == []
    assert candidates(host_block, tmp_path, (8, 4, 4, 64), (132, 4096, 8)) == []  # no room
    assert candidates(host_block, tmp_path, (64, 8, 8, 64), h200)
    # One image would leave all but one multiprocessor of a GPU without clusters idle.
    assert candidates(host_block, tmp_path, (1, 8, 8, 128), (132, SM_90, 1)) == []
    assert all(c > 1 for _, c in candidates(host_block, tmp_path, (1, 8, 8, 128), h200))


# -- the operator ----------------------------------------------------------------------------------


def arguments(
    shape: tuple[int, int, int, int] = (2, 16, 5, 7),
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "relu",
    device: str = "cpu",
) -> tuple:
    """Of the operator, for x [N, C, H, W]."""
    c = shape[1]
    weights = [(torch.randn(c, c, 3, 3) / (9 * c) ** 0.5).to(dtype) for _ in "12"]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    tensors = (x, weights[0], torch.randn(c), weights[1], torch.randn(c))
    return (*(tensor.to(device) for tensor in tensors), activation, 0.1)


def two_layers(args: tuple) -> tuple[ConvBiasAct, ConvBiasAct]:
    _, weight1, bias1, weight2, bias2, activation, slope = args
    options = {"padding": 1, "activation": activation, "negative_slope": slope}
    return ConvBiasAct(weight1, bias1, **options), ConvBiasAct(weight2, bias2, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", basic_block.ACTIVATIONS)
def test_the_operator_is_two_convolutions(dtype, activation):
    args = arguments(dtype=dtype, activation=activation)
    x, weight1, bias1, weight2, bias2, *epilogue = args
    geometry = ([1, 1], [1, 1])
    convolve = torch.ops.resfast.conv2d_bias_act
    h = convolve(x, weight1, bias1, None, *geometry, *epilogue)
    expected = convolve(h, weight2, bias2, x, *geometry, *epilogue)
    y = torch.ops.resfast.basic_block(*args)
    assert torch.equal(y, expected)
    slope = 0.1 if activation == "leaky_relu" else 0.0
    exact, bound = exact_block(x, (weight1, weight2), (bias1, bias2), slope, 2.0**-16)
    assert bool(((y.double() - exact).abs() <= bound).all())
    named = {"activation": activation, "negative_slope": 0.1}
    assert torch.equal(basic_block.basic_block(*args[:5], **named), expected)


@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (0, 16, 4, 4), (1, 5, 4, 4)])
def test_opcheck(shape):
    args = arguments(shape)
    torch.library.opcheck(torch.ops.resfast.basic_block.default, args)
    no_bias = (args[0], args[1], None, args[3], None, "relu")
    torch.library.opcheck(torch.ops.resfast.basic_block.default, no_bias)


def test_wrong_arguments_are_refused_with_their_names():
    good = arguments()
    x, weight1, bias1, weight2, bias2, *_ = good
    bad = {
        0: [(x.double(), "x is torch.float64"), (x[0], r"expected \[N, C, H, W\]")],
        1: [
            (weight1.float(), "first convolution: weight is torch.float32"),
            (weight1[..., :1], r"first convolution: weight is \[16, 16, 3, 1\]; expected \["),
        ],
        2: [(bias1[:4], r"first convolution: bias is \[4\]")],
        3: [(weight2[:, :8], "second convolution: x has 16 channels")],
        4: [(bias2.bfloat16(), "second convolution: bias is torch.bfloat16")],
        5: [("silu", "'silu' is not in the block"), ("rleu", "did you mean")],
        6: [(float("nan"), "negative_slope is nan")],
    }
    for index, changes in bad.items():
        for value, words in changes:
            args = (*good[:index], value, *good[index + 1 :])
            with pytest.raises((TypeError, ValueError), match=words):
                torch.ops.resfast.basic_block(*args)


def test_a_tensor_that_requires_grad_is_refused():
    args = arguments()
    with pytest.raises(RuntimeError, match="weight2 requires grad, and the fused"):
        torch.ops.resfast.basic_block(*args[:3], args[3].clone().requires_grad_(), *args[4:])


# -- the module ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", basic_block.ACTIVATIONS)
def test_the_module_is_its_two_layers_in_every_copy(activation, monkeypatch):
    monkeypatch.setenv("RESFAST_CONV", "oneDNN")  # as in graphs
    args = arguments(activation=activation)
    x, (first, second) = args[0], two_layers(args)
    block = basic_block.BasicBlock(first, second)
    expected = second(first(x), x)
    assert set(block.state_dict()) == {f"conv{i}.{n}" for i in (1, 2) for n in ("weight", "bias")}
    other = basic_block.BasicBlock(*two_layers(arguments(activation=activation)))
    other.load_state_dict(block.state_dict())
    copies = (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block)), other)
    for one in copies:
        assert torch.equal(one(x), expected)
    assert torch.equal(torch.compile(block, backend="eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.export.export(block, (x,)).module()(x), expected)
    half = copy.deepcopy(block).to(torch.float16)
    layers = half.conv1, half.conv2
    assert torch.equal(half(x.half()), layers[1](layers[0](x.half()), x.half()))


def test_pairs_that_are_no_block_are_refused():
    args = arguments()
    weight, bias = args[1], args[2]

    def layer(weight: torch.Tensor = weight, **options: object) -> ConvBiasAct:
        return ConvBiasAct(weight, bias[: len(weight)], **{"padding": 1, **RELU, **options})

    assert basic_block.applies(layer(), layer())
    leaky = {"activation": "leaky_relu", "negative_slope": 0.1}
    assert basic_block.applies(layer(**leaky), layer(**leaky))
    for other in (
        layer(activation="none"),
        layer(activation="silu"),
        layer(activation="leaky_relu"),
        layer(stride=2),
        layer(padding=0),
        layer(weight[:8]),
        layer(weight[..., :1]),
        layer(weight.half()),
        layer().to("meta"),
        torch.nn.Conv2d(16, 16, 3),
    ):
        assert not basic_block.applies(layer(), other)
        assert not basic_block.applies(other, layer())
        with pytest.raises(ValueError, match="are not a basic block"):
            basic_block.BasicBlock(layer(), other)
    assert not basic_block.applies(layer(activation="silu"), layer(activation="silu"))
    assert not basic_block.applies(layer(weight.float()), layer(weight.float()))
    assert not basic_block.applies(layer(**leaky), layer(**{**leaky, "negative_slope": 0.2}))
    odd = [ConvBiasAct(weight[:10, :10], padding=1, **RELU) for _ in "12"]
    assert not basic_block.applies(*odd)


RELU = {"activation": "relu"}


# -- networks --------------------------------------------------------------------------------------


def blocks_of(network: torch.nn.Module) -> list[basic_block.BasicBlock]:
    return [m for m in network.modules() if isinstance(m, basic_block.BasicBlock)]


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet-2111", 2), ("resnet-222-identity", 4), ("resnet-narrow-skip3", 4)],
)
def test_blocks_of_our_networks_are_found(name, count):
    """Those with an identity shortcut, of two 3x3 convolutions."""
    model = resfast.create_model(name).eval()
    assert resfast.fuse(model).report.blocks == count
    fused = fuse_ungrouped(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = fused(x)
        assert group_blocks(fused.network) == count == len(blocks_of(fused))
        assert torch.equal(fused(x), expected)
    assert group_blocks(fused.network) == 0


def test_blocks_of_torchvision_are_found_and_survive_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("RESFAST_CONV", "oneDNN")  # as in graphs
    torch.manual_seed(0)
    fused = fuse_ungrouped(torchvision.models.resnet18(num_classes=10).eval())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = fused(x)
        before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
        assert group_blocks(fused.network) == 5
        state = fused.state_dict()
        assert len(state) == len(before)
        assert not any(node.target.endswith("layer1.0.conv1") for node in calls(fused.network))
        copied, pickled = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
        torch.save(state, tmp_path / "state.pt")
        for parameter in (*copied.parameters(), *copied.buffers()):
            parameter.zero_()
        copied.load_state_dict(torch.load(tmp_path / "state.pt"))
        for one in (fused, copied, pickled):
            assert len(blocks_of(one)) == 5
            assert torch.equal(one(x), expected)
        exported = torch.export.export(fused, (x,)).module()
        assert torch.equal(exported(x), expected)
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
    copied.network.to(torch.float16)  # a fused network itself keeps its dtype
    assert all(layer.weight.dtype == torch.float16 for layer in blocks_of(copied)[0].children())


def fuse_ungrouped(model: torch.nn.Module) -> FusedModel:
    """``resfast.fuse`` without the grouping."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resfast.inference.fuse.pipeline.group_blocks", lambda network: 0)
        return fusion.fuse(model)


def calls(network: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in network.graph.nodes if node.op == "call_module"]


class Variant(torch.nn.Module):
    """A pair of layers with something about it that makes it no block, but for ``plain``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = two_layers(arguments())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        match self.kind:
            case "h is read twice":
                return self.b(h, x) + h
            case "another residual":
                return self.b(h, x + 1)
            case "the residual is h":
                return self.b(h, h)
            case "no residual":
                return self.b(h)
            case "the first has a residual":
                return self.b(self.a(x, x), x)
            case "something between":
                return self.b(h * 2, x)
        return self.b(h, x)


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "h is read twice",
        "another residual",
        "the residual is h",
        "no residual",
        "the first has a residual",
        "something between",
    ],
)
def test_only_whole_blocks_are_grouped(kind):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, qualname: str) -> bool:
            return isinstance(m, ConvBiasAct)

    model = Variant(kind)
    network = torch.fx.GraphModule(model, Tracer().trace(model))
    x = arguments()[0]
    with torch.inference_mode():
        expected = model(x)
        assert group_blocks(network) == (kind == "plain")
        assert torch.equal(network(x), expected)


def test_names_of_blocks_do_not_collide():
    """Two blocks in a row under one parent, and a module that has the name already."""

    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = two_layers(arguments())
            self.c, self.d = two_layers(arguments())
            self.basic_block = torch.nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(self.a(x), x)
            return self.basic_block(self.d(self.c(x), x))

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, qualname: str) -> bool:
            return not isinstance(m, Chain)

    model, x = Chain(), arguments()[0]
    network = torch.fx.GraphModule(model, Tracer().trace(model))
    with torch.inference_mode():
        assert group_blocks(network) == 2
        assert torch.equal(network(x), model(x))
    assert len({node.target for node in calls(network)}) == 3


# -- the choice on CUDA ----------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A GPU in name only: two variants of the kernel that compute the right result on the CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RESFAST_CONV", raising=False)
    state = SimpleNamespace(
        seconds={basic_block.SEPARATE: 3.0, "block:5,1": 2.0, "block:3,2": 1.0},
        wrong=None,
        may_measure=True,
        measurements=0,
    )

    def kernel(*args):
        out = basic_block._two_convolutions(*args[:7])
        return out + 1 if state.wrong == args[7:] else out

    def seconds(calls, fresh):
        state.measurements += 1
        assert fresh().shape
        return {name: [state.seconds[name]] * 3 for name in calls}

    monkeypatch.setattr(basic_block, "_plans", {})
    monkeypatch.setattr(
        basic_block, "_candidates", lambda x: {"block:5,1": (5, 1), "block:3,2": (3, 2)}
    )
    monkeypatch.setattr(basic_block, "_kernel", kernel)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(conv_cuda, "seconds", seconds)
    monkeypatch.setattr(conv_cuda, "may_measure", lambda: state.may_measure)
    monkeypatch.setattr(conv_cuda, "machine", lambda device: "a GPU")
    monkeypatch.setattr(conv_cuda, "CHOICES", conv_choice.Choices("conv-cuda.json"))
    return state


def test_the_fastest_way_is_measured_once_and_kept(measured, monkeypatch):
    args = arguments()
    assert basic_block.plan(*args) == basic_block.plan(*args) == (3, 2)
    assert measured.measurements == 1
    monkeypatch.setattr(basic_block, "_plans", {})  # another process
    monkeypatch.setattr(conv_cuda, "CHOICES", conv_choice.Choices("conv-cuda.json"))
    assert basic_block.plan(*args) == (3, 2)
    assert measured.measurements == 1
    basic_block.plan(*arguments(dtype=torch.float16))
    basic_block.plan(*arguments((3, 16, 5, 7)))
    assert measured.measurements == 3


def test_two_convolutions_stay_where_they_are_faster(measured):
    measured.seconds[basic_block.SEPARATE] = 0.5
    assert basic_block.plan(*arguments()) is None
    assert basic_block.plan(*arguments()) is None
    assert measured.measurements == 1


def test_a_wrong_result_is_never_chosen(measured):
    measured.wrong = (3, 2)
    assert basic_block.plan(*arguments()) == (5, 1)


def test_nothing_is_measured_in_a_capture_or_where_a_way_is_named(measured, monkeypatch):
    args = arguments()
    measured.may_measure = False
    assert basic_block.plan(*args) is None
    measured.may_measure = True
    monkeypatch.setenv("RESFAST_CONV", "cudnn")
    assert basic_block.plan(*args) is None
    assert measured.measurements == 0
    monkeypatch.setenv("RESFAST_CONV", "gemm")  # of the CPU
    assert basic_block.plan(*args) == (3, 2)


def test_what_cannot_be_measured_is_asked_again(measured, monkeypatch):
    """Results that are not finite, and too little memory."""
    args = arguments()
    bad = args[0].clone()
    bad[0, 0, 0, 0] = torch.inf
    assert basic_block.plan(bad, *args[1:]) is None
    with monkeypatch.context() as patch:

        def seconds(calls, fresh):
            raise torch.OutOfMemoryError

        patch.setattr(conv_cuda, "seconds", seconds)
        assert basic_block.plan(*args) is None
    assert measured.measurements == 0
    assert basic_block.plan(*args) == (3, 2)


# -- the real kernel -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cuda_kernel_compiles_without_register_spills():
    reason = cuda_build.obstacle()
    if reason is not None:
        pytest.skip(reason)
    outputs = cuda_build.compile_objects(
        [ROOT / "csrc" / "cuda" / "basic_block" / "basic_block.cu"],
        nvcc=cuda_build.find_nvcc(),
        names=cuda_build.ARCHITECTURES,
    )
    kernels = re.findall(
        r"entry function '\w*basic_block_kernel\w+' for '(sm_\w+)'"
        r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        "".join(outputs.values()),
        re.DOTALL,
    )
    for architecture in ("sm_80", "sm_90a"):
        found = [kernel for kernel in kernels if kernel[0] == architecture]
        assert len(found) == len(TILES) * len(DTYPES)
        assert all(kernel[1:3] == ("0", "0") for kernel in found)
        assert max(int(kernel[3]) for kernel in found) * 256 <= 65536


@pytest.mark.skipif(
    not hasattr(torch.ops.resfast, "basic_block_cuda"), reason="the CUDA kernels are not built"
)
def test_the_cuda_operator_refuses_wrong_arguments():
    """It is called with tensors of the CPU, whose device is what it checks last."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    good = (*arguments(), 5, 1)
    x, weight, bias, *_ = good
    for index, value, words in (
        (0, x.double(), "x is torch.float64"),
        (0, x[0], "x is .*expected .N, C, H, W"),
        (0, x[:, :8], "x has 8 channels"),
        (1, weight.half(), "weight is torch.float16"),
        (1, weight[..., :1], "weight is .*expected 3x3"),
        (2, bias[:3], "bias is .3.; expected .16."),
        (3, weight[:8], "bias is .16.; expected .8."),
        (5, "silu", "'silu' is not in the block"),
        (6, float("inf"), "negative_slope is inf"),
        (7, len(TILES), "tile 9 is unknown; expected 0 to 8"),
        (7, -1, "tile -1 is unknown"),
        (7, 0, "x is not on a CUDA device"),
    ):
        args = [value if i == index else argument for i, argument in enumerate(good)]
        with pytest.raises(RuntimeError, match=words):
            torch.ops.resfast.basic_block_cuda.default.redispatch(cuda, *args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(5, 64, 4, 4), (2, 48, 5, 7), (3, 128, 8, 8), (9, 80, 1, 5), (2, 512, 4, 4), (1, 64, 16, 13)],
)
def test_every_way_is_right_on_the_gpu(dtype, shape):
    """Every tile and cluster that fits, in a stream of its own, with each activation."""
    if not hasattr(torch.ops.resfast, "basic_block_cuda"):
        pytest.fail("the CUDA kernels are not built: pip install -v . says why")
    count = 0
    for activation, slope in (("relu", 0.0), ("leaky_relu", 0.1)):
        args = arguments(shape, dtype, activation, "cuda")
        wide = [tensor.cpu() for tensor in args[:5]]
        exact, bound = exact_block(wide[0], wide[1::2], wide[2::2], slope, 2.0**-16)
        clusters = (1, 2, 4, 8) if torch.cuda.get_device_capability() >= (9, 0) else (1,)
        for tile in range(len(TILES)):
            for cluster in (one for one in clusters if shape[1] % (16 * one) == 0):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                try:
                    with torch.cuda.stream(stream):
                        y = torch.ops.resfast.basic_block_cuda(*args, tile, cluster)
                except RuntimeError as error:
                    if "more shared memory" not in str(error):
                        raise
                    continue
                stream.synchronize()
                error = (y.cpu().double() - exact).abs()
                assert bool((error <= bound).all()), (tile, cluster, float(error.max()))
                count += 1
    assert count >= 8


@pytest.mark.gpu
def test_the_block_can_be_captured_and_compiled_on_the_gpu():
    args = arguments((8, 64, 8, 8), device="cuda")
    first, second = two_layers(args)
    block, x = basic_block.BasicBlock(first, second), args[0]
    with torch.inference_mode():
        exact, bound = exact_block(
            x.cpu(), (args[1].cpu(), args[3].cpu()), (args[2].cpu(), args[4].cpu()), 0.0, 2.0**-16
        )
        compiled = torch.compile(block, fullgraph=True)
        for y in (block(x), compiled(x), torch.ops.resfast.basic_block(*args)):
            assert bool(((y.cpu().double() - exact).abs() <= bound).all())
        expected, graph = block(x), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block(x)
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)
    for change in ({0: x.float()}, {7: 99}, {8: 3}, {1: args[1][:, :16]}):
        bad = [change.get(i, value) for i, value in enumerate((*args, 0, 1))]
        with pytest.raises(RuntimeError, match=r"expected|must be the same"):
            torch.ops.resfast.basic_block_cuda(*bad)
