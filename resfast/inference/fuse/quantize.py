"""Fused convolutions in int8: ranges from calibration images, and the rewrite of the graph.

Each convolution reads and, where only convolutions and max pools follow, writes uint8. The range of
a map is the one with the smallest squared error on the calibration images; it clips the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from resfast.errors import ResfastError
from resfast.inference.fuse.inputs import Inputs, map_tensors, tensors
from resfast.inference.fuse.nodes import MAX_POOLS, arguments
from resfast.layers import fused
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.conv_int8.maps import LEVELS, Quantization, max_pool
from resfast.ops.conv_int8.op import Int8Conv, available

MOST_IMAGES = 1024
"""Calibration images that are used; more hardly change a range."""
BATCH = 64
"""Images that a calibration tensor is divided into."""
BINS = 2048
"""Of the histogram of a map."""
FRACTIONS = 40
"""Candidates for a range: this many fractions of the one that holds all values."""
SMALLEST_FRACTION = 0.2

Ranges = dict[fx.Node, tuple[float, float]]


class Quantize(nn.Module):
    """float ``[N, C, H, W]`` to uint8 of the same shape."""

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization

    def forward(self, x: Tensor) -> Tensor:
        return self.quantization.quantize(x)


class Dequantize(Quantize):
    """uint8 ``[N, C, H, W]`` to float32 of the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return self.quantization.dequantize(x)


class MaxPool(nn.Module):
    """``F.max_pool2d`` of uint8 ``[N, C, H, W]`` or ``[C, H, W]``; the options are its own."""

    def __init__(
        self,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
    ) -> None:
        super().__init__()
        self.options = kernel, stride, padding, dilation, ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return max_pool(x[None], *self.options)[0]
        return max_pool(x, *self.options)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


class NotFinite(nn.Module):
    """NaN for images with NaN or infinity, which uint8 does not have, and 0 for others.

    Shape: float ``[N, C, H, W]`` to float32 ``[N]``; another shape to a number.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 0 * (x.sum((1, 2, 3)) if x.ndim == 4 else x.sum())


class MarkNotFinite(nn.Module):
    """The output of a network, NaN for the images that :class:`NotFinite` found."""

    def forward(self, output: Any, *marks: Tensor) -> Any:
        return map_tensors(lambda y: self._marked(y, marks), output)

    def _marked(self, y: Tensor, marks: tuple[Tensor, ...]) -> Tensor:
        if not y.is_floating_point():
            return y
        for mark in marks:
            each = mark.ndim and y.ndim and y.shape[0] == mark.shape[0]
            y = y + (mark.view(-1, *[1] * (y.ndim - 1)) if each else mark.sum())
        return y


def check_device(device: torch.device) -> None:
    """Refuses devices without int8 convolutions.

    Raises:
        ResfastError: not a CPU, or torch has no oneDNN there.
    """
    if device.type != "cpu":
        raise ResfastError(f"int8 runs on the CPU, not on {device}; pass device='cpu', or bfloat16")
    if not available():
        raise ResfastError("int8 needs a torch with oneDNN, which this one lacks; use bfloat16")


def batches_of(calibration: Any, inputs: Inputs) -> list[tuple[Any, ...]]:
    """The inputs of calls from calibration images.

    Args:
        calibration: a batch, a tuple with all inputs of a network, or an iterable of either; values
            after the network's inputs, such as the labels of a ``DataLoader``, are ignored.
        inputs: of the network.

    Returns:
        Inputs with float32 tensors, 4-dimensional ones in ``channels_last``; at most about
        :data:`MOST_IMAGES` images.

    Raises:
        ResfastError: no images, or images that are not finite numbers.
    """
    if calibration is None:
        raise ResfastError(
            "int8 needs calibration=, some hundred images as the network sees them (normalized)"
        )
    found: list[tuple[Any, ...]] = []
    images = 0
    for batch in _batches(calibration):
        values = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        values = inputs.bound(values[: len(inputs.names)], {})
        first = next(tensors(values), None)
        if first is None or first.ndim == 0:
            raise ResfastError(
                f"calibration has a {type(batch).__name__}; expected tensors of images"
            )
        if not all(x.isfinite().all() for x in tensors(values) if x.is_floating_point()):
            raise ResfastError("calibration images have NaN or infinite values; leave these out")
        found.append(map_tensors(_as_float32, values))
        images += len(first)
        if images >= MOST_IMAGES:
            break
    if not images:
        raise ResfastError("calibration has no images; pass some hundred")
    return found


def _batches(calibration: Any) -> Iterator[Any]:
    if isinstance(calibration, Tensor):
        return iter(calibration[:MOST_IMAGES].split(BATCH) if calibration.ndim else ())
    if isinstance(calibration, tuple):
        return iter([calibration])
    if isinstance(calibration, Iterable) and not isinstance(calibration, dict | str):
        return iter(calibration)
    raise ResfastError(
        f"calibration is a {type(calibration).__name__}; expected a batch of images, or an "
        "iterable of batches"
    )


def _as_float32(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    layout = torch.channels_last if x.ndim == 4 else torch.preserve_format
    return x.to("cpu", torch.float32, memory_format=layout)


def quantize(network: fx.GraphModule, batches: list[tuple[Any, ...]]) -> int:
    """Rewrites the fused convolutions of a float32 network to int8, in place.

    Args:
        network: from the rewriter, on the CPU.
        batches: of :func:`batches_of`.

    Returns:
        The number of convolutions.
    """
    return _Quantizer(network, batches).run()


# -- ranges ----------------------------------------------------------------------------------------


class _Observer(fx.Interpreter):
    """Runs a network and calls ``observe`` with some of its values."""

    def __init__(self, network: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(network)
        self.nodes = nodes
        self.extremes: Ranges = {}
        self.histograms: dict[fx.Node, Tensor] | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self.nodes or not isinstance(value, Tensor) or not value.numel():
            return value
        if self.histograms is None:
            low, high = self.extremes.get(n, (0.0, 0.0))
            smallest, largest = (float(end) for end in value.aminmax())
            self.extremes[n] = min(low, smallest), max(high, largest)
        else:
            low, high = self.extremes[n]
            counts = torch.histc(value.float(), BINS, low, high) if high > low else 0
            self.histograms[n] = self.histograms.get(n, torch.zeros(BINS)) + counts
        return value


def _ranges(
    network: fx.GraphModule, nodes: set[fx.Node], batches: list[tuple[Any, ...]]
) -> dict[fx.Node, Quantization]:
    """How to represent the values of nodes."""
    observer = _Observer(network, nodes)
    for histograms in (None, {}):
        observer.histograms = histograms
        for batch in batches:
            observer.run(*batch)
    assert observer.histograms is not None
    found = {}
    for node, (low, high) in observer.extremes.items():
        found[node] = best_range(observer.histograms[node], low, high)
    return found


def best_range(histogram: Tensor, low: float, high: float) -> Quantization:
    """The quantization with the smallest squared error.

    Args:
        histogram: counts in equal bins from ``low`` to ``high``, float32 ``[BINS]``.
        low: smallest value, at most 0.
        high: largest value, at least 0.
    """
    width = (high - low) / len(histogram)
    centers = low + width * (torch.arange(len(histogram)) + 0.5)
    best, smallest = Quantization.of_range(low, high), float("inf")
    for fraction in torch.linspace(SMALLEST_FRACTION, 1, FRACTIONS).tolist():
        candidate = Quantization.of_range(fraction * low, fraction * high)
        zero, scale = candidate.zero_point, candidate.scale
        clipped = centers.clamp(-zero * scale, (LEVELS - zero) * scale)
        # Within the range, an error is uniform over one step.
        error = float((histogram * ((centers - clipped).square() + scale**2 / 12)).sum())
        if error < smallest:
            best, smallest = candidate, error
    return best


# -- rewrite ---------------------------------------------------------------------------------------


class _Quantizer:
    """The state of :func:`quantize`."""

    def __init__(self, network: fx.GraphModule, batches: list[tuple[Any, ...]]) -> None:
        self.network, self.graph = network, network.graph
        self.convolutions = [node for node in self.graph.nodes if self._conv(node) is not None]
        operands = {value for node in self.convolutions for value in node.all_input_nodes}
        self.ranges = _ranges(network, {*self.convolutions, *operands}, batches)
        self.convolutions = [
            node
            for node in self.convolutions
            if all(value in self.ranges for value in (node, *node.all_input_nodes))
        ]
        self.quantized: dict[fx.Node, tuple[fx.Node, Quantization]] = {}
        """Each value that exists as uint8: its node, and how it is represented."""
        self.not_finite: list[fx.Node] = []
        self.count = 0

    def run(self) -> int:
        done = [self._rewrite(node) for node in self.convolutions]
        if self.not_finite:
            self._mark_output()
        self.graph.eliminate_dead_code()
        order = {node: position for position, node in enumerate(self.graph.nodes)}
        for node in done:
            module = self.network.get_submodule(str(node.target))
            # A residual that nothing reads later.
            module.overwrites = len(node.args) > 1 and node.args[0] is not node.args[1]
            module.overwrites &= all(order[user] <= order[node] for user in node.args[-1].users)
        self.network.delete_all_unused_submodules()
        self.graph.lint()
        self.network.recompile()
        return len(done)

    def _conv(self, node: fx.Node) -> ConvBiasAct | None:
        if node.op != "call_module" or node.kwargs:
            return None
        module = self.network.get_submodule(str(node.target))
        return module if type(module) is ConvBiasAct else None

    def _pool(self, node: fx.Node) -> MaxPool | None:
        """A max pool, which the representation of its input commutes with."""
        names = "input kernel_size stride padding dilation ceil_mode return_indices"
        if node.op == "call_module":
            module = self.network.get_submodule(str(node.target))
            if type(module) is not nn.MaxPool2d or not fused.is_plain(module):
                return None
            options = {name: getattr(module, name) for name in names.split()[1:]}
        elif node.target in MAX_POOLS:
            options = arguments(node, names)
        else:
            return None
        if options.get("return_indices") or any(isinstance(v, fx.Node) for v in node.args[1:]):
            return None
        kernel = options["kernel_size"]
        return MaxPool(
            _pair(kernel),
            _pair(options.get("stride") or kernel),
            _pair(options.get("padding", 0)),
            _pair(options.get("dilation", 1)),
            bool(options.get("ceil_mode", False)),
        )

    def _is_read_as_uint8(self, node: fx.Node) -> bool:
        return any(
            user in self.convolutions
            or (self._pool(user) is not None and self._is_read_as_uint8(user))
            for user in node.users
        )

    def _rewrite(self, node: fx.Node) -> fx.Node:
        conv = self._conv(node)
        assert conv is not None
        operands = [self._as_uint8(value) for value in node.args]
        result = self.ranges[node] if self._is_read_as_uint8(node) else None
        module = Int8Conv(conv, operands[0][1], result, operands[1][1] if operands[1:] else None)
        self.network.set_submodule(str(node.target), module)
        with self.graph.inserting_before(node):
            new = self.graph.call_module(str(node.target), tuple(value for value, _ in operands))
            read = new
            if result is not None:
                read = self._call("dequantize", Dequantize(result), new)
                self.quantized[read] = new, result
        node.replace_all_uses_with(read)
        self.graph.erase_node(node)
        return new

    def _as_uint8(self, value: Any) -> tuple[fx.Node, Quantization]:
        if value in self.quantized:
            return self.quantized[value]
        pool, source = self._pool(value), value.args[0] if value.args else None
        if pool is not None and source in self.quantized:
            read, quantization = self.quantized[source]
            with self.graph.inserting_after(value):
                new = self._call("max_pool", pool, read)
        else:
            quantization = self.ranges[value]
            with self.graph.inserting_after(value):
                new = self._call("quantize", Quantize(quantization), value)
            with self.graph.inserting_after(value):
                self.not_finite.append(self._call("not_finite", NotFinite(), value))
        self.quantized[value] = new, quantization
        return self.quantized[value]

    def _call(self, name: str, module: nn.Module, *values: Any) -> fx.Node:
        while hasattr(self.network, f"{name}_{self.count}"):
            self.count += 1
        self.network.add_submodule(f"{name}_{self.count}", module)
        return self.graph.call_module(f"{name}_{self.count}", values)

    def _mark_output(self) -> None:
        output = next(node for node in self.graph.nodes if node.op == "output")
        with self.graph.inserting_before(output):
            marked = self._call("output", MarkNotFinite(), output.args[0], *self.not_finite)
        output.args = (marked,)
