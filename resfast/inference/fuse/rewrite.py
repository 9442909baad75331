"""A trained network as a chain of fused convolutions: :func:`fuse`.

The network is traced with ``torch.fx``, or with ``torch.export`` where Python's control flow looks
at the data, and its in-place operations are made out of place, so that an operation can move to
where its operands are ready. Every convolution then takes in what follows it and nobody else
reads: the batch norm (folded into the weights, Jacob et al., arXiv:1712.05877, section 3.2), the
addition of a residual and the activation. A max pool moves behind a norm and an activation that
keep the order of numbers, so that these stand behind the convolution.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from resfast.errors import ResfastError
from resfast.inference.fuse.blocks import group_blocks
from resfast.layers import fused
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.conv.reference import NEGATIVE_SLOPE

aten = torch.ops.aten

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = (*DTYPES, torch.float64)
GUESSED_SIZE = 224
"""Height and width, in pixels, of the images that shapes are worked out for without an example."""

_RELUS = (F.relu, torch.relu, aten.relu.default, "relu")
_SILUS = (F.silu, aten.silu.default)
_GELUS = (F.gelu, aten.gelu.default)
_LEAKY = (F.leaky_relu, aten.leaky_relu.default)
_ADDS = (operator.add, torch.add, aten.add.Tensor, "add")
_CONVS = (F.conv2d, torch.conv2d, aten.conv2d.default)
_NORMS = (F.batch_norm, aten.batch_norm.default)
_LINEARS = (F.linear, aten.linear.default)
_MAX_POOLS = (F.max_pool2d, torch.max_pool2d, aten.max_pool2d.default)
_SCALINGS = (operator.mul, torch.mul, aten.mul.Tensor, aten.mul.Scalar, "mul")
_IN_PLACE = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow")
}
_STATEFUL = (operator.setitem, operator.iand, operator.ior, operator.ixor, operator.imatmul)
_VIEWS = {
    *("view", "reshape", "flatten", "transpose", "permute", "t", "squeeze", "unsqueeze", "expand"),
    *("narrow", "select", "chunk", "split", "unbind", "getitem", "contiguous", "to", "type"),
    *("detach", "unflatten", "view_as", "reshape_as", "expand_as", "float", "half", "bfloat16"),
    *("Flatten", "Unflatten", "movedim", "swapaxes", "getattr", "T", "mT", "diagonal", "unfold"),
}
_FOREIGN = {
    *("gelu", "leaky_relu", "relu6", "elu", "selu", "celu", "mish", "hardswish", "hardtanh"),
    *("sigmoid", "tanh", "hardsigmoid", "softplus", "prelu", "rrelu", "logsigmoid", "clamp"),
}
"""Activations that the fused kernel does not have."""
_CASTS = {"float", "double", "half", "bfloat16"}
_SHAPE_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)


class _UntraceableError(Exception):
    """The graph cannot say what this network does."""


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse` did; ``str`` of it is the text.

    Attributes:
        convolutions: convolutions that became one kernel each.
        batch_norms: batch norms folded into a convolution, those of ``left`` ones among them.
        residuals: additions of a residual that a convolution's kernel does.
        activations: activations that a convolution's kernel does.
        left: name of each convolution, batch norm, addition or activation that was left, and why.
        traced_by: ``torch.fx`` or ``torch.export``.
        blocks: pairs of those convolutions that are a residual block, which a GPU can run as one
            kernel (:class:`~resfast.ops.basic_block.op.BasicBlock`).
    """

    convolutions: int
    batch_norms: int
    residuals: int
    activations: int
    left: tuple[tuple[str, str], ...]
    traced_by: str
    blocks: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.convolutions} convolutions are one kernel each ({self.residuals} with the "
            f"addition of a residual, {self.activations} with an activation); {self.batch_norms} "
            f"batch norms were folded; traced by {self.traced_by}"
        ]
        if self.blocks:
            lines.append(f"{self.blocks} pairs of them are a residual block")
        reasons: dict[str, list[str]] = {}
        for name, why in self.left:
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            lines.append(f"left {len(names)}: {why} ({shown})")
        return "\n".join(lines)


class FusedModel(nn.Module):
    """A network that :func:`fuse` made: for inference only.

    Takes what the original takes: floating-point tensors are brought to :attr:`dtype` and, if they
    are images, to ``channels_last``, once. What comes out in floating point is float32. Copies,
    pickles, ``torch.compile`` and ``torch.export`` work as for any module.

    Attributes:
        network: the rewritten graph.
        dtype: what it computes in.
        report: what was fused and what was left.
        cuda_graph: whether each shape of input is captured as a CUDA graph by its first call and
            replayed by later ones. They keep their memory; call it from one stream at a time.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        dtype: torch.dtype,
        report: FusionReport,
        cuda_graph: bool,
        shapes: tuple[tuple[int | None, ...], ...] | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.report = report
        self.cuda_graph = cuda_graph
        self._shapes = shapes
        self._captured: dict[Any, _Captured] = {}
        self._pool: Any = None
        super().train(False)

    def train(self, mode: bool = True) -> FusedModel:
        """Does nothing for ``mode=False``.

        Raises:
            ResfastError: ``mode=True``.
        """
        if mode:
            raise ResfastError(
                "a fused network cannot be trained: its batch norms are folded into the weights; "
                "train the original and fuse it again"
            )
        return self

    def forward(self, x: Any, *others: Any) -> Any:
        inputs = (x, *others)
        if self._shapes is not None:
            self._check_shapes(inputs)
        if self.cuda_graph and not torch.compiler.is_compiling():
            return self._replay(inputs)
        return self._run(*map(self._converted, inputs))

    def _run(self, *inputs: Any) -> Any:
        kind = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _floats(self.network(*inputs))
        return _floats(self.network(*inputs))

    def _converted(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if x.ndim == 4:
            return x.to(dtype=self.dtype, memory_format=torch.channels_last)
        return x.to(self.dtype)

    def _check_shapes(self, inputs: tuple[Any, ...]) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        for index, (x, shape) in enumerate(zip(tensors, self._shapes, strict=False)):
            if len(x.shape) != len(shape) or any(
                want is not None and have != want for have, want in zip(x.shape, shape, strict=True)
            ):
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                raise ResfastError(
                    f"input {index} is {list(x.shape)}; this network was traced by torch.export "
                    f"for [{wanted}]; fuse it again with an example of the other shape"
                )

    def _replay(self, inputs: tuple[Any, ...]) -> Any:
        if not all(isinstance(x, Tensor) and x.is_cuda for x in inputs):
            raise ResfastError(
                "cuda_graph=True needs every input to be a CUDA tensor; move the inputs to the "
                "network's device, or fuse with cuda_graph=False"
            )
        key = tuple((tuple(x.shape), x.dtype, x.device) for x in inputs)
        captured = self._captured.get(key)
        if captured is None:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            # Static tensors must not be inference tensors: those cannot be written to outside.
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(inputs[0].device):
                captured = _Captured(self._run, [*map(self._converted, inputs)], self._pool)
            self._captured[key] = captured
        return captured.replay(inputs)

    def _apply(self, *args: Any, **kwargs: Any) -> FusedModel:
        self._captured = {}
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._captured = {}
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": {}, "_pool": None}

    def extra_repr(self) -> str:
        return str(self.report)


class _Captured:
    """One CUDA graph: its inputs, its outputs."""

    def __init__(self, run: Callable[..., Any], inputs: list[Tensor], pool: Any) -> None:
        self.inputs = [torch.empty_like(x).copy_(x) for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate, and kernels are chosen, beforehand
            for _ in range(3):
                run(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = run(*self.inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Any:
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.graph.replay()
        return _map(lambda x: x.clone(), self.output)


def fuse(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    *,
    example: Tensor | tuple[Tensor, ...] | None = None,
    device: torch.device | str | None = None,
    cuda_graph: bool = False,
    report: Callable[[str], object] | None = None,
) -> FusedModel:
    """A network for inference, its convolutions fused with what follows them.

    Conv → batch norm → (+ residual) → activation becomes one
    :class:`~resfast.ops.conv.op.ConvBiasAct`, for ReLU, leaky ReLU, SiLU and GELU (of erf). What
    cannot be fused stays as it is, in ``dtype`` (batch norms, and a linear layer that ends the
    network, in float32), and is named in the report. A convolution whose output something else
    reads too keeps what follows it outside.

    Args:
        model: any network in eval mode: resfast's, torchvision's, timm's, your own. It is left
            untouched and shares no memory with the result.
        dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        example: the network's positional inputs, on its device. Needed where ``torch.fx`` cannot
            trace it (then only the batch size may differ later); otherwise it tells the shapes of
            its maps, which are worked out for 224x224 images without it.
        device: where to put the result; None for where the model is.
        cuda_graph: capture and replay each shape of input, for latency at small batches.
        report: called with the report's text, for example ``print``.

    Returns:
        The fused network. Its ``report`` says what was done.

    Raises:
        ResfastError: the model is in training mode, quantised, without weights, fused already or
            cannot be traced; another dtype; ``cuda_graph`` without a CUDA device.
    """
    model = _checked(model, dtype)
    example = (example,) if isinstance(example, Tensor) else example
    where = torch.device(device) if device is not None else _device(model)
    if cuda_graph and (where.type != "cuda" or not torch.cuda.is_available()):
        raise ResfastError(
            f"cuda_graph=True needs a CUDA device, and the network would be on {where}; choose "
            "device='cuda' on a machine with one, or cuda_graph=False"
        )
    with torch.inference_mode(False), torch.no_grad():
        model = copy.deepcopy(model).requires_grad_(False)
        network, shapes, traced_by = _trace(model, example)
        made = _Rewriter(network, dtype, example, traced_by).run()
        made = replace(made, blocks=group_blocks(network))
        network = network.to(where)
    result = FusedModel(network, dtype, made, cuda_graph, shapes)
    if report is not None:
        report(str(made))
    return result


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with the function applied to every tensor in it."""
    match value:
        case Tensor():
            return function(value)
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*(_map(function, item) for item in value))
        case list() | tuple():
            return type(value)(_map(function, item) for item in value)
        case dict():
            return type(value)((name, _map(function, item)) for name, item in value.items())
    return value


def _floats(value: Any) -> Any:
    return _map(lambda x: x.float() if x.is_floating_point() else x, value)


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _checked(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network itself, out of wrappers around it, after a look at whether it can be fused."""
    if not isinstance(model, nn.Module):
        hint = "; pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise ResfastError(f"cannot fuse a {type(model).__name__}; expected an nn.Module{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ResfastError("cannot fuse a TorchScript module; fuse the nn.Module it was made from")
    if dtype not in DTYPES:
        raise ResfastError(f"dtype {dtype} is not supported; choose {', '.join(map(str, DTYPES))}")
    if hasattr(model, "_orig_mod"):
        model = model._orig_mod
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    for name, module in model.named_modules():
        what = f"{name or 'the network'} ({type(module).__name__})"
        if isinstance(module, FusedModel | ConvBiasAct):
            raise ResfastError(f"{what} is fused already; fuse the network it was made from")
        if type(module).__module__.startswith(("torch.ao.", "torch.quantization", "torchao.")):
            raise ResfastError(f"{what} is quantised; fuse the network before its quantisation")
        if module.training:
            raise ResfastError(
                f"{what} is in training mode; call model.eval() first, since batch norms are "
                "folded with their running statistics"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_quantized or tensor.is_complex():
            raise ResfastError(f"{name} is {tensor.dtype}; expected a floating-point network")
        if tensor.is_meta:
            raise ResfastError(f"{name} is on the meta device; load the weights first")
    return model


class _Tracer(fx.Tracer):
    """Goes into every module but those with a forward of ``torch.nn``'s own."""

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        home = getattr(type(m).forward, "__module__", "")
        return home.startswith("torch.nn") and not isinstance(m, nn.Sequential)


def _traced(model: nn.Module, given: int) -> fx.Graph:
    """The graph for so many inputs; arguments beyond them that have a default have that value."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    defaults = {
        p.name: p.default
        for p in parameters[given:]
        if p.default is None or isinstance(p.default, bool | int | float | str)
    }
    graph = _Tracer().trace(model, concrete_args=defaults or None)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, parameter in zip(placeholders, parameters, strict=False):
        if parameter.name in defaults:  # it may not be given: nothing reads it but an assertion
            for user in list(node.users):
                for check in (*user.users, user):
                    graph.erase_node(check)
            graph.erase_node(node)
    return graph


def _trace(
    model: nn.Module, example: tuple[Tensor, ...] | None
) -> tuple[fx.GraphModule, tuple[tuple[int | None, ...], ...] | None, str]:
    """The network as a graph without in-place operations, the input shapes it is bound to, and
    by what it was traced."""
    try:
        network = fx.GraphModule(model, _traced(model, 1 if example is None else len(example)))
        _make_out_of_place(network)
        return network, None, "torch.fx"
    except Exception as error:  # noqa: BLE001 - tracing runs the user's code
        first = _sentence(error)
    if example is None:
        raise ResfastError(
            f"torch.fx cannot trace {type(model).__name__} ({first}); pass example=(a batch of at "
            "least 2 of its inputs), so that torch.export can"
        )
    dynamic = [{0: torch.export.Dim.DYNAMIC} if x.ndim and len(x) > 1 else {} for x in example]
    second = ""
    for shapes in (dynamic, [{} for _ in example]):
        try:
            program = torch.export.export(model, example, dynamic_shapes=_by_name(model, shapes))
            network = _from_export(program.run_decompositions({}).module())
        except Exception as error:  # noqa: BLE001 - so does export
            second = second or _sentence(error)
            continue
        bound = tuple(
            tuple(None if d in free else size for d, size in enumerate(x.shape))
            for x, free in zip(example, shapes, strict=True)
        )
        return network, bound, "torch.export"
    raise ResfastError(
        f"neither torch.fx ({first}) nor torch.export ({second}) can trace {type(model).__name__}; "
        "fuse the part of it that holds the convolutions"
    )


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip(": ")


def _by_name(model: nn.Module, shapes: list[dict[int, Any]]) -> tuple[Any, ...]:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    variadic = bool(kinds) and kinds[0] is inspect.Parameter.VAR_POSITIONAL
    return (tuple(shapes),) if variadic else tuple(shapes)


def _from_export(exported: fx.GraphModule) -> fx.GraphModule:
    """An exported graph as an ordinary module, its batch norms as one call each."""
    graph = exported.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            x, weight, bias, mean, var, momentum, eps = node.args
            outputs = list(node.users)
            if any(user.args[1] != 0 for user in outputs if user.users):
                raise _UntraceableError("a batch norm's saved statistics are read")
            with graph.inserting_before(node):
                args = (x, weight, bias, mean, var, False, momentum, eps, False)
                norm = graph.call_function(aten.batch_norm.default, args)
            for user in outputs:
                user.replace_all_uses_with(norm)
                graph.erase_node(user)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return fx.GraphModule(exported, graph)


def _kind(node: fx.Node, network: fx.GraphModule) -> str:
    """The name of what a node calls."""
    if node.op == "call_module":
        return type(network.get_submodule(node.target)).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _make_out_of_place(network: fx.GraphModule) -> None:
    """Removes what does nothing in eval mode and makes every in-place operation return a new value.

    After an in-place operation all later readers of the old value read the new one.

    Raises:
        _UntraceableError: an in-place operation on a part of a value that is read elsewhere, or
            one without an out-of-place counterpart.
    """
    graph = network.graph
    for node in list(graph.nodes):
        if _does_nothing(node, network):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is torch._assert:  # as a reader of the value it would keep it from fusing
            graph.erase_node(node)
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if "out" in node.kwargs and node.op.startswith("call_"):
            raise _UntraceableError(f"{node} writes to out=")
        if not _to_out_of_place(node, network):
            continue
        old = node.args[0]
        if not isinstance(old, fx.Node):
            continue
        if old.op == "get_attr":
            raise _UntraceableError(f"{node} changes {old.target}, a part of the network")
        for other in _same_memory(old, graph, network) - {old, node}:
            if any(order[user] > order[node] for user in other.users):
                raise _UntraceableError(f"{node} changes a part of {other} in place")
        old.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    graph.eliminate_dead_code()


def _does_nothing(node: fx.Node, network: fx.GraphModule) -> bool:
    if node.op == "call_module":
        module = network.get_submodule(node.target)
        idle = isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd)
        return idle and not fused.hooked(module) and not node.kwargs
    dropouts = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
    if node.op == "call_function" and node.target in dropouts:
        default = node.target is not torch.dropout
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", default)
        return training is False and bool(node.args)
    return False


def _to_out_of_place(node: fx.Node, network: fx.GraphModule) -> bool:
    """Makes a node that changes its first argument return a new value; whether it was one."""
    if node.op == "call_module":
        return getattr(network.get_submodule(node.target), "inplace", False) is True
    if node.op == "call_method":
        name = node.target
        if not name.endswith("_") or name.endswith("__") or name == "requires_grad_":
            return False
        if not hasattr(Tensor, name[:-1]):
            raise _UntraceableError(f"{name} has no out-of-place counterpart")
        node.target = name[:-1]
        return True
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if node.target in _IN_PLACE:
        node.target = _IN_PLACE[node.target]
        return True
    if node.target in _STATEFUL:
        raise _UntraceableError(f"{node} changes its argument in place")
    if name.endswith("_") and not name.endswith("__") and not hasattr(operator, name):
        node.target = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
        if node.target is None:
            raise _UntraceableError(f"{name} has no out-of-place counterpart")
        return True
    if getattr(node.target, "__module__", None) != F.__name__:
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):
        return False
    if not bound.get("inplace", False):
        return False
    position = list(bound).index("inplace")
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    else:
        node.args = (*node.args[:position], False, *node.args[position + 1 :])
    return True


def _same_memory(node: fx.Node, graph: fx.Graph, network: fx.GraphModule) -> set[fx.Node]:
    """The values that may share memory with a value, as far as views go."""

    def root(value: fx.Node) -> fx.Node:
        while _kind(value, network) in _VIEWS and value.args and isinstance(value.args[0], fx.Node):
            if value.target is getattr and value.args[1] in ("shape", "dtype", "device", "ndim"):
                break
            value = value.args[0]
        return value

    base = root(node)
    return {other for other in graph.nodes if root(other) is base}


class _Shapes(fx.Interpreter):
    """The shape of every value of a graph up to the last addition, as far as it can be known."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        nodes = list(network.graph.nodes)
        added = [index for index, node in enumerate(nodes) if node.target in _ADDS]
        self.wanted = set(nodes[: added[-1] + 1]) if added else set()

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.wanted:
            return None
        try:
            value = super().run_node(n)
        except _SHAPE_ERRORS:  # of an unknown input, or the guessed image does not fit
            return None
        if isinstance(value, Tensor):
            n.meta["shape"] = tuple(value.shape)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if fused.is_norm(self.fetch_attr(target)) and len(args) == 1:
            return args[0]  # of the same shape, and slow to work out
        return super().call_module(target, args, kwargs)


@dataclass
class _Branch:
    """A convolution and the batch norms behind it: ``nodes``, the last of them the value."""

    name: str
    conv: nn.Conv2d
    nodes: list[fx.Node]
    weight: Tensor
    bias: Tensor | None

    @property
    def x(self) -> fx.Node:
        return _arguments(self.nodes[0], "input")["input"]

    @property
    def value(self) -> fx.Node:
        return self.nodes[-1]


class _Rewriter:
    """Rewrites a graph, convolution by convolution."""

    def __init__(
        self,
        network: fx.GraphModule,
        dtype: torch.dtype,
        example: tuple[Tensor, ...] | None,
        traced_by: str,
    ) -> None:
        self.network = network.eval()
        self.graph = network.graph
        self.dtype = dtype
        self.traced_by = traced_by
        self.counts: Counter[str] = Counter()
        self.left: list[tuple[str, str]] = []
        self._find_shapes(example)

    def run(self) -> FusionReport:
        for node in list(self.graph.nodes):
            self._cast(node)
        for node in list(self.graph.nodes):
            self._delay_max_pool(node)
        branches = [branch for node in self.graph.nodes if (branch := self._branch(node))]
        values = {branch.value: branch for branch in branches if self._fits(branch)}
        for branch in branches:
            if self._fits(branch):
                self._fuse(branch, values)
            else:
                self._keep(branch)
        self._report_rest()
        self._convert()
        self.graph.eliminate_dead_code()
        self.network.delete_all_unused_submodules()
        self.graph.lint()
        self.network.recompile()
        return FusionReport(
            convolutions=self.counts["convolution"],
            batch_norms=self.counts["norm"],
            residuals=self.counts["residual"],
            activations=self.counts["activation"],
            left=tuple(dict.fromkeys(self.left)),
            traced_by=self.traced_by,
        )

    # -- reading the graph ---------------------------------------------------------------------

    def _find_shapes(self, example: tuple[Tensor, ...] | None) -> None:
        device = _device(self.network)
        if example is not None:
            inputs = [(x.shape, x.dtype) for x in example]
        else:
            needed = [n for n in self.graph.nodes if n.op == "placeholder" and not n.args]
            convs = (self._conv(node) for node in self.graph.nodes)
            first = next((conv for conv in convs if conv is not None), None)
            if first is None or len(needed) != 1:
                return
            size = (2, first[0].in_channels, GUESSED_SIZE, GUESSED_SIZE)
            inputs = [(size, first[0].weight.dtype)]
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs]
            _Shapes(self.network).run(*fakes, enable_io_processing=False)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.network.get_submodule(node.target) if node.op == "call_module" else None

    def _constant(self, value: Any) -> Tensor | None:
        """The tensor that a node stands for, if it is a parameter or a buffer."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            found = operator.attrgetter(value.target)(self.network)
            return found if isinstance(found, Tensor) else None
        return None

    def _name(self, node: fx.Node) -> str:
        """Where a node comes from: its module, or that of the first parameter it is given."""
        if node.op == "call_module":
            return node.target
        owners = (n.target for n in node.all_input_nodes if n.op == "get_attr")
        return next(owners, node.name).rpartition(".")[0] or node.name

    def _conv(self, node: fx.Node) -> tuple[nn.Conv2d, fx.Node] | None:
        """The convolution that a node calls, as a module, and its input."""
        module = self._module(node)
        if module is not None:
            plain = fused.is_conv(module) and len(node.args) == 1 and not node.kwargs
            return (module, node.args[0]) if plain else None
        if node.op != "call_function" or node.target not in _CONVS:
            return None
        a = _arguments(node, "input weight bias stride padding dilation groups")
        weight, bias = self._constant(a["weight"]), self._constant(a.get("bias"))
        if weight is None or (bias is None and a.get("bias") is not None):
            return None
        options = {
            name: tuple(a[name]) if isinstance(a[name], list) else a[name]
            for name in ("stride", "padding", "dilation", "groups")
            if name in a
        }
        k, c, *size = weight.shape
        channels = c * options.get("groups", 1)
        conv = nn.Conv2d(channels, k, tuple(size), bias=bias is not None, device="meta", **options)
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return conv, a["input"]

    def _norm(self, node: fx.Node, x: fx.Node) -> tuple[Tensor, Tensor] | None:
        """Scale and shift of a batch norm of ``x``."""
        if not node.args or node.args[0] is not x:
            return None
        module = self._module(node)
        if module is not None:
            if not fused.is_norm(module) or len(node.args) != 1 or node.kwargs:
                return None
            tensors = module.weight, module.bias, module.running_mean, module.running_var
            return fused.norm_factors(*tensors, module.eps)
        if node.op != "call_function" or node.target not in _NORMS:
            return None
        stats, affine = "running_mean running_var", "weight bias"
        first, second = (stats, affine) if node.target is F.batch_norm else (affine, stats)
        a = _arguments(node, f"input {first} {second} training momentum eps")
        names = ("weight", "bias", "running_mean", "running_var")
        tensors = [self._constant(a.get(name)) for name in names]
        known = all(t is not None or a.get(n) is None for t, n in zip(tensors, names, strict=True))
        if a.get("training", False) or not known or tensors[2] is None or tensors[3] is None:
            return None
        return fused.norm_factors(*tensors, a.get("eps", 1e-5))

    def _activation(self, node: fx.Node, x: fx.Node) -> dict[str, Any] | None:
        """An activation of ``x`` as arguments of the kernel."""
        if not node.args or node.args[0] is not x:
            return None
        module = self._module(node)
        if module is not None:
            if fused.hooked(module):
                return None
            match module:
                case nn.ReLU():
                    return {"activation": "relu"}
                case nn.SiLU():
                    return {"activation": "silu"}
                case nn.GELU(approximate="none"):
                    return {"activation": "gelu"}
                case nn.LeakyReLU():
                    return _leaky(module.negative_slope)
            return None
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target in _RELUS:
            return {"activation": "relu"}
        if node.target in _SILUS:
            return {"activation": "silu"}
        if node.target in _GELUS:
            a = _arguments(node, "input approximate")
            return {"activation": "gelu"} if a.get("approximate", "none") == "none" else None
        if node.target in _LEAKY:
            a = _arguments(node, "input negative_slope")
            return _leaky(a.get("negative_slope", NEGATIVE_SLOPE))
        return None

    def _residual(self, node: fx.Node, x: fx.Node) -> fx.Node | None:
        """What an addition adds to ``x``, if it is another value of the same shape."""
        if node.op not in ("call_function", "call_method") or node.target not in _ADDS:
            return None
        a = _arguments(node, "input other alpha")
        pair = [a.get("input"), a.get("other")]
        if a.get("alpha", 1) != 1 or pair.count(x) != 1:
            return None
        other = pair[1 - pair.index(x)]
        if not isinstance(other, fx.Node):
            return None
        known = x.meta.get("shape"), other.meta.get("shape")
        if None in known:
            self.left.append((node.name, "addition of unknown shapes; pass an example"))
            return None
        if known[0] != known[1]:
            self.left.append((node.name, "addition that broadcasts"))
            return None
        return other

    def _is_max_pool(self, node: fx.Node) -> bool:
        module = self._module(node)
        if module is not None:
            return type(module) is nn.MaxPool2d and not fused.hooked(module)
        return node.op == "call_function" and node.target in _MAX_POOLS

    def _rises(self, node: fx.Node, x: fx.Node) -> bool:
        """Whether a node is a norm or an activation of ``x`` that keeps the order of numbers."""
        if norm := self._norm(node, x):
            return bool((norm[0] > 0).all())
        found = self._activation(node, x) or {}
        kind, slope = found.get("activation"), found.get("negative_slope", 0)
        return kind == "relu" or (kind == "leaky_relu" and slope >= 0)

    # -- rewriting it --------------------------------------------------------------------------

    def _cast(self, node: fx.Node) -> None:
        """Makes casts to a floating dtype casts to the dtype of the network."""
        if node.op == "call_method" and node.target in _CASTS:
            node.target, node.args, node.kwargs = "to", (node.args[0], self.dtype), {}
        elif node.op.startswith("call_"):

            def change(value: Any) -> Any:
                return self.dtype if value in FLOATS else value

            node.args = _map_leaves(change, node.args)
            node.kwargs = _map_leaves(change, node.kwargs)

    def _delay_max_pool(self, conv: fx.Node) -> None:
        """Moves a max pool of a convolution behind the norms and activations that it commutes with.

        For an increasing function f, max(f(x)) = f(max(x)), also where results are rounded.
        """
        found, pool = self._conv(conv), _only_user(conv)
        if found is None or fused.why_not_fused(found[0]) or not pool:
            return
        if not self._is_max_pool(pool) or pool.args[0] is not conv:
            return
        x = conv
        while (user := _only_user(pool)) and self._rises(user, pool):
            user.replace_all_uses_with(pool)
            user.replace_input_with(pool, x)
            pool.replace_input_with(x, user)
            user.append(pool)
            user.meta = {"shape": x.meta["shape"]} if "shape" in x.meta else {}
            x = user

    def _branch(self, node: fx.Node) -> _Branch | None:
        found = self._conv(node)
        if found is None or not isinstance(found[1], fx.Node):
            return None
        conv = found[0]
        branch = _Branch(self._name(node), conv, [node], conv.weight, conv.bias)
        while (user := _only_user(branch.value)) and (norm := self._norm(user, branch.value)):
            branch.weight, branch.bias = fused.fold(branch.weight, branch.bias, norm)
            branch.nodes.append(user)
        return branch

    def _fits(self, branch: _Branch) -> bool:
        return fused.why_not_fused(branch.conv) is None

    def _fuse(self, branch: _Branch, values: dict[fx.Node, _Branch]) -> None:
        """Replaces a branch, and the addition and activation behind it, by one kernel."""
        self.counts["norm"] += len(branch.nodes) - 1
        value, residual, epilogue = branch.value, None, {}
        user = _only_user(value)
        if user and (other := self._residual(user, value)):
            rival = values.get(other)
            # Of two branches only one can add the other: the one with more work to hide it behind.
            if (
                rival is None
                or _only_user(other) is not user
                or branch.weight.numel() >= rival.weight.numel()
            ):
                residual, value = other, user
                branch.nodes.append(user)
                self.counts["residual"] += 1
        user = _only_user(value)
        if user:
            if found := self._activation(user, value):
                epilogue, value = found, user
                branch.nodes.append(user)
                self.counts["activation"] += 1
            elif why := self._foreign_activation(user, value):
                self.left.append((self._name(user), why))
        conv = ConvBiasAct(
            branch.weight.to(self.dtype),
            branch.bias,
            stride=tuple(branch.conv.stride),
            padding=fused.conv_padding(branch.conv),
            **epilogue,
        )
        self.counts["convolution"] += 1
        self._replace(branch, conv, (branch.x,) if residual is None else (branch.x, residual))

    def _keep(self, branch: _Branch) -> None:
        """Leaves a convolution to PyTorch, with its batch norm folded."""
        why = f"convolution with {fused.why_not_fused(branch.conv)}"
        norms = len(branch.nodes) - 1
        self.left.append((branch.name, f"{why} (its batch norm was folded)" if norms else why))
        if norms:
            self.counts["norm"] += norms
            conv = copy.copy(branch.conv)
            conv._parameters = {
                "weight": nn.Parameter(branch.weight, requires_grad=False),
                "bias": nn.Parameter(branch.bias, requires_grad=False),
            }
            self._replace(branch, conv, (branch.x,))

    def _replace(self, branch: _Branch, module: nn.Module, args: tuple[fx.Node, ...]) -> None:
        with self.graph.inserting_before(branch.value):
            node = self.graph.create_node("call_module", branch.name, args)
        node.meta = dict(branch.value.meta)
        branch.value.replace_all_uses_with(node)
        for old in reversed(branch.nodes):
            constants = [n for n in old.all_input_nodes if n.op == "get_attr"]
            self.graph.erase_node(old)
            for constant in constants:
                if not constant.users:
                    self.graph.erase_node(constant)
        named = (n for n in self.graph.nodes if n.op in ("call_module", "get_attr"))
        taken = [n.target for n in named if n is not node]
        name, count = branch.name, 1
        while any(t == name or t.startswith(f"{name}.") for t in taken):
            name, count = f"{branch.name}_{count}", count + 1
        node.target = name
        self.network.add_submodule(name, module)

    def _foreign_activation(self, node: fx.Node, x: fx.Node) -> str | None:
        """Why an activation of ``x`` is not part of the kernel, if it is one."""
        module = self._module(node)
        name = _kind(node, self.network)
        if module is not None:
            is_one = type(module).__module__ == nn.ReLU.__module__
        else:
            is_one = node.op != "placeholder" and name.partition(".")[0] in _FOREIGN
        return f"{name}: no activation of the fused kernel" if is_one and x in node.args else None

    def _report_rest(self) -> None:
        """Names convolutions and batch norms that no branch took in."""
        named = {name for name, _ in self.left}
        for node in self.graph.nodes:
            module = self._module(node)
            name = self._name(node)
            if name in named or isinstance(module, ConvBiasAct):
                continue
            if isinstance(module, nn.modules.conv._ConvNd):
                plain = isinstance(module, nn.Conv2d)
                why = "with hooks or a call of its own" if plain else "that is not nn.Conv2d"
                self.left.append((name, f"convolution {why}"))
            elif node.target in _CONVS:
                self.left.append((name, "convolution whose weight is computed"))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) or node.target in _NORMS:
                x = node.args[0] if node.args else None
                conv = self._module(x) if isinstance(x, fx.Node) else None
                if isinstance(conv, ConvBiasAct) and (conv.activation != "none" or x.args[1:]):
                    conv = None  # what the norm follows is the activation or the addition
                if isinstance(x, fx.Node) and self._is_max_pool(x):
                    why = "behind a max pool (folded only if its scales are positive)"
                elif not isinstance(conv, ConvBiasAct | nn.Conv2d):
                    why = "that follows no convolution"
                elif len(x.users) > 1:
                    why = "behind a convolution whose output is used elsewhere too"
                else:
                    why = "that cannot be folded (no statistics, hooks or a forward of its own)"
                self.left.append((name, f"batch norm {why}"))

    def _convert(self) -> None:
        """Brings what was left to the dtype; batch norms and a last linear layer to float32."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        exact: set[fx.Node] = set()
        for node in list(self.graph.nodes):
            if isinstance(self._module(node), nn.Linear) or node.target in _LINEARS:
                if _only_scaled(node) is output and isinstance(node.args[0], fx.Node):
                    exact.add(node)
            elif node.target in _NORMS:
                exact.add(node)
        for node in exact:
            if node.target not in _NORMS:
                with self.graph.inserting_before(node):
                    wide = self.graph.call_method("to", (node.args[0], torch.float32))
                node.args = (wide, *node.args[1:])
        calls: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                calls.setdefault(node.target, []).append(node)
        for target, nodes in calls.items():
            if nodes[0].op == "call_module":
                module = self.network.get_submodule(target)
                if isinstance(module, ConvBiasAct):
                    continue
                wide = isinstance(module, nn.modules.batchnorm._BatchNorm) or exact.issuperset(
                    nodes
                )
                dtype = torch.float32 if wide else self.dtype
                module.to(dtype=dtype, memory_format=torch.channels_last)
            elif (tensor := self._constant(nodes[0])) is not None and tensor.is_floating_point():
                users = {user for node in nodes for user in node.users}
                dtype = torch.float32 if exact.issuperset(users) else self.dtype
                owner, _, name = target.rpartition(".")
                place = self.network.get_submodule(owner)
                tensor = tensor.to(dtype)
                if name in place._parameters:
                    tensor = nn.Parameter(tensor, requires_grad=False)
                setattr(place, name, tensor)


def _arguments(node: fx.Node, names: str) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names.split(), node.args, strict=False)) | dict(node.kwargs)


def _leaky(slope: Any) -> dict[str, Any] | None:
    known = isinstance(slope, int | float)
    return {"activation": "leaky_relu", "negative_slope": float(slope)} if known else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _only_scaled(node: fx.Node) -> fx.Node | None:
    """The only reader of a value, past multiplications by a number."""
    user = _only_user(node)
    while user is not None and user.target in _SCALINGS and user.all_input_nodes == [node]:
        node, user = user, _only_user(user)
    return user


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    match value:
        case list() | tuple():
            return type(value)(_map_leaves(function, item) for item in value)
        case dict():
            return {name: _map_leaves(function, item) for name, item in value.items()}
    return function(value)
