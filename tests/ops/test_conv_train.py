"""``conv2d_train``: result and gradients against float64, errors, and the layer that uses it."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resfast
from resfast.layers.conv import Conv2d, set_winograd_tile
from resfast.ops.conv import cpu as conv_cpu
from resfast.ops.conv_train import op as conv_train

pytestmark = pytest.mark.skipif(
    not conv_train.AVAILABLE, reason="needs the C++ kernels and AVX512-BF16"
)
needs_amx = pytest.mark.skipif(not conv_train.AMX, reason="needs AMX")
LAST = torch.channels_last
LIMIT = {2: 6e-3, 3: 2e-2, 4: 2e-2}
"""Root mean square error over that of the exact values, by tile: a few roundings to bfloat16."""
FORMS = ((1, 2), (1, 3), (1, 4), (2, 2))
"""Strides and tiles."""


@pytest.fixture(params=["transformed", pytest.param("direct", marks=needs_amx)])
def algorithm(request, monkeypatch):
    """With and without the direct kernels, which accept batches of any size here."""
    monkeypatch.setattr(conv_train, "AMX", request.param == "direct")
    monkeypatch.setattr(conv_train, "MAX_PADDED_RATIO", float("inf"))


def tensors(n: int, c: int, k: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, c, h, w).to(torch.bfloat16, memory_format=LAST).requires_grad_()
    weight = torch.randn(k, c, 3, 3) / (9 * c) ** 0.5
    return x, weight.contiguous(memory_format=LAST).requires_grad_()


def error(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    assert got.isfinite().all()
    return float((got.double() - exact).norm() / exact.norm())


def assert_right(x: Tensor, weight: Tensor, stride: int, padding: int, tile: int) -> None:
    y = conv_train.conv2d(x, weight, stride, padding, tile)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=LAST)
    grad = torch.randn(y.shape).bfloat16()
    y.backward(grad)
    assert weight.grad.dtype == torch.float32
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    wide = F.conv2d(*exact, None, stride, padding)
    wide.backward(grad.double())
    assert error(y.detach(), wide.detach()) < LIMIT[tile]
    assert error(x.grad, exact[0].grad) < LIMIT[tile]
    assert error(weight.grad, exact[1].grad) < LIMIT[tile]


SHAPES = (
    (1, 64, 64, 8, 8), (3, 32, 48, 7, 9), (2, 33, 35, 5, 4), (1, 96, 130, 4, 4), (5, 3, 20, 6, 5),
    (64, 16, 24, 4, 4), (2, 250, 60, 3, 3), (1, 8, 512, 2, 13), (9, 128, 64, 16, 16),
    (2, 40, 24, 1, 1), (3, 20, 40, 2, 1),
)  # fmt: skip


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize(("stride", "tile"), FORMS)
def test_result_and_gradients_are_those_of_float64(stride, tile, padding, algorithm, poisoned):
    torch.manual_seed(0)
    for shape in SHAPES:
        if min(shape[3:]) + 2 * padding >= 3:
            assert_right(*tensors(*shape), stride, padding, tile)


@pytest.mark.parametrize("tile", [2, 3, 4])
def test_weight_gradient_sums_over_many_chunks_of_tiles(tile, algorithm):
    torch.manual_seed(1)
    assert_right(*tensors(60, 32, 32, 32, 32), 1, 1, tile)  # 15,360 tiles of 2x2


# Of the second, the tiles of weight gradients are dealt to 2 to 8 lanes.
@pytest.mark.parametrize("shape", [(7, 40, 72, 9, 9), (90, 24, 40, 13, 13)])
@pytest.mark.parametrize(("stride", "tile"), FORMS)
def test_bits_do_not_depend_on_the_number_of_threads(stride, tile, shape, algorithm):
    torch.manual_seed(2)
    before = torch.get_num_threads()
    results = []
    x, weight = tensors(*shape)
    grad = None
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            y = conv_train.conv2d(x, weight, stride, 1, tile)
            grad = torch.randn_like(y) if grad is None else grad
            results.append((y, *torch.autograd.grad(y, (x, weight), grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_any_strides_are_accepted_and_only_what_is_needed_is_computed():
    torch.manual_seed(3)
    x, weight = tensors(2, 32, 32, 8, 6)
    expected = conv_train.conv2d(x, weight, 1, 1)
    grad = torch.randn_like(expected)
    both = torch.autograd.grad(expected, (x, weight), grad)
    forms = x.detach().contiguous(), weight.detach().contiguous()
    for needed in ((True, False), (False, True)):
        a, b = (f.clone().requires_grad_(on) for f, on in zip(forms, needed, strict=True))
        y = conv_train.conv2d(a, b, 1, 1)
        assert torch.equal(y, expected)
        y.backward(grad.contiguous())
        for got, want, on in zip((a.grad, b.grad), both, needed, strict=True):
            assert (got is not None) == on
            assert not on or torch.equal(got, want)


def test_operator_passes_opcheck():
    for stride, tile in FORMS:
        x, weight = tensors(2, 32, 36, 6, 5)
        arguments = x, weight, stride, 1, tile
        torch.library.opcheck(torch.ops.resfast.conv2d_train.default, arguments)


WRONG = {
    "x dtype": ({"x": torch.zeros(1, 8, 4, 4)}, TypeError, "x is torch.float32; expected"),
    "weight dtype": (
        {"weight": torch.zeros(8, 8, 3, 3, dtype=torch.bfloat16)},
        TypeError,
        "weight is torch.bfloat16; expected torch.float32",
    ),
    "weight shape": ({"weight": torch.zeros(8, 8, 1, 1)}, ValueError, r"expected \[K, C, 3, 3\]"),
    "channels": ({"weight": torch.zeros(8, 4, 3, 3)}, ValueError, "x has 8 channels"),
    "x shape": ({"x": torch.zeros(8, 4, 4).bfloat16()}, ValueError, r"expected \[N, C, H, W\]"),
    "stride": ({"stride": 3}, ValueError, "stride is 3; expected 1 or 2"),
    "padding": ({"padding": 3}, ValueError, "padding is 3; expected 0, 1 or 2"),
    "small": (
        {"x": torch.zeros(1, 8, 2, 4).bfloat16(), "padding": 0},
        ValueError,
        "images of 2x4 with padding 0 are smaller than the kernel of 3x3",
    ),
    "tile": ({"tile": 5}, ValueError, "tile is 5; expected 2, or 3 or 4 where the stride is 1"),
    "tile of stride 2": ({"stride": 2, "tile": 3}, ValueError, "tile is 3; expected 2, or 3 or 4"),
    "device": ({"weight": torch.zeros(8, 8, 3, 3, device="meta")}, ValueError, "on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_value_and_what_was_expected(case):
    change, kind, message = WRONG[case]
    good = {
        "x": torch.zeros(1, 8, 4, 4).bfloat16(),
        "weight": torch.zeros(8, 8, 3, 3),
        "stride": 1,
        "padding": 1,
    }
    with pytest.raises(kind, match=message):
        conv_train.conv2d(**(good | change))


@needs_amx
def test_direct_kernels_are_taken_where_their_groups_are_filled(monkeypatch):
    """Groups are of 32 images where the result has an odd number of columns, of 2 where 16."""
    real, taken = torch.ops.resfast.conv_direct_weight_gradient, []
    monkeypatch.setattr(
        torch.ops.resfast,
        "conv_direct_weight_gradient",
        lambda *args: taken.append(args[0].shape[0]) or real(*args),
    )
    for batch, side in ((25, 7), (26, 7), (33, 7), (60, 7), (1, 16), (2, 16), (500, 3)):
        x, weight = tensors(batch, 32, 32, side, side)
        conv_train.conv2d(x, weight, 1, 1).sum().backward()
    assert taken == [26, 60, 2, 500]
    conv_train.conv2d(*tensors(32, 32, 16, 95, 95), 1, 1).sum().backward()  # 18 MiB a group
    assert taken == [26, 60, 2, 500]


@needs_amx
def test_direct_kernels_refuse_what_they_cannot_read():
    ops = torch.ops.resfast
    weight = torch.zeros(4, 8, 3, 3).contiguous(memory_format=LAST)
    x = torch.zeros(2, 8, 6, 6).to(torch.bfloat16, memory_format=LAST)
    grad = torch.zeros(2, 4, 6, 6).to(torch.bfloat16, memory_format=LAST)
    gradient = ops.conv_direct_weight_gradient
    gradient(x, grad, 1, 1)
    for call, message in (
        (lambda: ops.conv_direct_train_pack(weight.contiguous(), False), "in channels_last memory"),
        (lambda: ops.conv_direct_train_pack(weight.bfloat16(), True), "expected torch.float32"),
        (lambda: gradient(x, grad, 3, 1), "stride is 3"),
        (lambda: gradient(x, grad, 2, 1), r"grad is \[2, 4, 6, 6\]"),
        (lambda: gradient(x, grad, 1, -1), "padding is -1"),
        (lambda: gradient(x.float(), grad, 1, 1), "x is torch.float32"),
        (lambda: gradient(x.contiguous(), grad, 1, 1), "x is not in channels_last"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_kernels_refuse_what_they_cannot_read():
    pack = torch.ops.resfast.conv_train_pack
    gradient = torch.ops.resfast.conv_train_weight_gradient
    weight = torch.zeros(4, 8, 3, 3).contiguous(memory_format=LAST)
    x = torch.zeros(2, 8, 6, 6).to(torch.bfloat16, memory_format=LAST)
    grad = torch.zeros(2, 4, 6, 6).to(torch.bfloat16, memory_format=LAST)
    gradient(x, grad, 1, 1)
    transposed = torch.ops.resfast.conv_winograd_transposed
    packed = pack(weight, 2, True)
    transposed(grad, packed, [8, 12, 12, 4])
    for call, message in (
        (lambda: pack(weight.contiguous(), 1, False), "in channels_last memory"),
        (lambda: pack(weight, 3, False), "stride is 3"),
        (lambda: pack(weight, 1, False, 5), "tile is 5; expected 2, or 3 or 4 where the stride is"),
        (lambda: gradient(x, grad, 1, 1, 6), "tile is 6"),
        (lambda: transposed(grad, packed, [8, 12, 12, 5]), r"x is \[2, 4, 6, 6\]"),
        (lambda: transposed(grad, packed, [8, 13, 12, 4]), r"x is \[2, 4, 6, 6\]"),
        (lambda: transposed(grad, packed[1:], [8, 12, 12, 4]), "packed weights of"),
        (lambda: transposed(grad, packed, [8, 12, 0, 4]), r"geometry is \[8, 12, 0, 4\]"),
        (lambda: gradient(x.contiguous(), grad, 1, 1), "x is not in channels_last"),
        (lambda: gradient(x, grad, 2, 1), r"grad is \[2, 4, 6, 6\]"),
        (lambda: gradient(x, grad, 1, -1), "padding is -1"),
        (lambda: gradient(x.float(), grad, 1, 1), "x is torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# The layer


@functools.cache
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return resfast.create_model("resnet-narrow").to(memory_format=LAST)


def calls_of(run, monkeypatch) -> int:
    """How many convolutions a function makes by Winograd."""
    seen = []
    own = conv_train.conv2d
    monkeypatch.setattr(conv_train, "conv2d", lambda *args: seen.append(1) or own(*args))
    run()
    return len(seen)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_layer_takes_it_only_where_gradients_are_recorded_in_bfloat16(autocast, grad, monkeypatch):
    layer = Conv2d(32, 40, 3).to(memory_format=LAST)
    x = torch.randn(2, 32, 6, 6)

    def run() -> None:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        exact = F.conv2d(x.double(), layer.weight.double(), None, 1, 1)
        assert error(out.detach(), exact.detach()) < LIMIT[2]
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)

    assert calls_of(run, monkeypatch) == (autocast and grad)


def test_small_or_other_kernels_stay_with_pytorch(monkeypatch):
    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in (
                Conv2d(3, 64, 3),
                Conv2d(64, 15, 3),
                Conv2d(64, 64, 1, 2),
                Conv2d(64, 64, 5),
            ):
                layer(torch.randn(1, layer.in_channels, 8, 8)).sum().backward()

    assert calls_of(run, monkeypatch) == 0


@pytest.mark.parametrize("sides", [(8, 8), (7, 5)])
def test_strided_kernels_of_one_pixel_have_the_gradients_of_float64(sides):
    torch.manual_seed(4)
    layer = Conv2d(24, 40, 1, 2).to(memory_format=LAST)
    x = torch.randn(3, 24, *sides).to(torch.bfloat16, memory_format=LAST).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=LAST)
    grad = torch.randn(y.shape).bfloat16()
    y.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight)]
    wide = F.conv2d(*exact, None, 2)
    wide.backward(grad.double())
    assert error(y.detach(), wide.detach()) < LIMIT[2]
    assert error(x.grad, exact[0].grad) < LIMIT[2]
    assert error(layer.weight.grad, exact[1].grad) < LIMIT[2]


def test_layer_uses_the_requested_tile_where_that_saves_multiplications(monkeypatch):
    model = torch.nn.Sequential(Conv2d(32, 32, 3), Conv2d(32, 32, 3, 2))
    seen = []
    own = conv_train.conv2d
    monkeypatch.setattr(
        conv_train, "conv2d", lambda *args: seen.append((args[0].shape[2], args[4])) or own(*args)
    )
    for tile in (2, 3, 4):
        set_winograd_tile(model, tile)
        with torch.autocast("cpu", torch.bfloat16):
            for side in (16, 6, 3):
                model(torch.randn(1, 32, side, side).contiguous(memory_format=LAST))
    assert seen == [
        (16, 2), (16, 2), (6, 2), (6, 2), (3, 2), (3, 2),
        (16, 3), (16, 2), (6, 3), (6, 2), (3, 3), (3, 2),
        (16, 4), (16, 2), (6, 3), (6, 2), (3, 3), (3, 2),
    ]  # fmt: skip


def test_network_has_nearly_the_gradients_of_float32():
    """As near as PyTorch's own bfloat16 convolutions get, or twice as far."""
    model, images = network(), torch.randn(16, 3, 16, 16).contiguous(memory_format=LAST)

    def gradients(dtype: torch.dtype | None) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(images).float(), torch.arange(16) % 10)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    exact = gradients(None)
    ours = error(gradients(torch.bfloat16), exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_train, "AVAILABLE", False)
        theirs = error(gradients(torch.bfloat16), exact)
    assert ours < 2 * theirs


@pytest.mark.parametrize("tile", conv_cpu.TILES)
def test_compiled_network_is_one_graph_with_the_same_result(tile: int):
    model, images = network(), torch.randn(4, 3, 16, 16).contiguous(memory_format=LAST)
    set_winograd_tile(model, tile)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code.count("resfast.conv2d_train"))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    expected = forward(images)
    assert torch.equal(compiled(images), expected)
    assert len(graphs) == 1
    assert graphs[0] > 0
