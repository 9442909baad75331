"""A network as a graph without in-place operations, by ``torch.fx`` or ``torch.export``."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from resfast.errors import ResfastError
from resfast.inference.fuse.inputs import Inputs, map_tensors, tensors
from resfast.inference.fuse.memory import SharedMemory
from resfast.inference.fuse.nodes import UntraceableError, aten, quiet
from resfast.inference.fuse.out_of_place import make_out_of_place
from resfast.inference.fuse.proxy import Proxy
from resfast.layers import fused


@dataclass(frozen=True)
class Traced:
    """A network as a graph.

    Attributes:
        network: the graph, without in-place operations.
        inputs: how the arguments of the original become its inputs.
        shapes: of each tensor in the inputs, if the graph is specialized for them; None for a
            dimension of any size.
        output: what the original returns, with None for all but containers, if it has an
            ``OrderedDict`` that the graph returns as a dict.
        by: ``torch.fx`` or ``torch.export``.
    """

    network: fx.GraphModule
    inputs: Inputs
    shapes: tuple[tuple[int | None, ...], ...] | None
    output: Any
    by: str


class _Tracer(fx.Tracer):
    """Traces a call of a network, hooks included, for some of its inputs.

    Traces into every module except those whose forward is defined by ``torch.nn``. Without inputs
    it takes those of forward, as ``fx.GraphModule`` does when it is unpickled.
    """

    def __init__(self, inputs: Inputs | None = None) -> None:
        super().__init__()
        self.inputs = inputs
        self.output: Any = None

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        home = getattr(type(m).forward, "__module__", "")
        is_torch = home.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return is_torch and m is not self.root and not fused.overridden(m)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        inputs = self.inputs
        if inputs is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        values = [self.create_proxy("placeholder", name, (), {}) for name in inputs.names]

        def call(root: nn.Module, *values: fx.Proxy) -> Any:
            positional, keywords = inputs.split(values)
            out = root(*positional, **keywords)
            self.output = _containers(out)
            return out

        return call, [self.root, *values]

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if m in self.submodule_paths:
            return super().call_module(m, forward, args, kwargs)
        if any(True for _ in (*m.parameters(), *m.buffers())):
            raise UntraceableError(
                f"a {type(m).__name__} with weights is called that is not a submodule"
            )
        return forward(*args, **kwargs)  # made in a forward

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)


def _containers(value: Any) -> Any:
    """The value with None for all but lists, tuples and dicts.

    Raises:
        UntraceableError: a dict of another class, which torch.fx would replace by a dict.
    """
    match value:
        case dict():
            if type(value) not in (dict, OrderedDict):
                raise UntraceableError(f"it returns a {type(value).__name__}")
            return type(value)((name, _containers(item)) for name, item in value.items())
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*map(_containers, value))
        case list() | tuple():
            return type(value)(map(_containers, value))
    return None


def _has_ordered(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value or ()
    return isinstance(value, OrderedDict) or any(map(_has_ordered, items))


class _Unchanged:
    """Checks that tracing changes no tensor of a network, and gives it back as it was.

    ``torch.fx`` runs what a forward does with buffers only, so that changes of them are lost.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.versions = self._versions()
        self.values = {name: x.clone() for name, x in self.model.named_buffers()}

    def __exit__(self, kind: Any, *_: Any) -> None:
        found = self._versions()
        changed = [name for name, version in self.versions.items() if found.get(name) != version]
        for name in changed:
            owner, _, last = name.rpartition(".")
            if name in self.values:
                self.model.get_submodule(owner)._buffers[last] = self.values[name]
        if changed and kind is None:
            raise UntraceableError(f"forward changes {changed[0]}")

    def _versions(self) -> dict[str, tuple[int, int]]:
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: (id(x), 0 if x.is_inference() else x._version) for name, x in tensors}


def trace(model: nn.Module, example: tuple[Any, ...] | None) -> Traced:
    """Traces a network.

    Raises:
        ResfastError: the network cannot be traced.
    """
    inputs = Inputs.of(model, example)
    try:
        tracer = _Tracer(inputs)
        with _Unchanged(model):
            graph = tracer.trace(model)
        network = fx.GraphModule(model, graph)
        make_out_of_place(network, example)
        output = tracer.output if _has_ordered(tracer.output) else None
        return Traced(network, inputs, None, output, "torch.fx")
    except Exception as error:  # noqa: BLE001 - tracing runs the user's code
        first = _sentence(error)
    if example is None:
        raise ResfastError(
            f"torch.fx cannot trace {type(model).__name__} ({first}); pass example=, a batch of at "
            "least 2 inputs, to trace it with torch.export"
        )
    args, kwargs = inputs.split(example)
    second = ""
    for dynamic in (True, False):
        free = map_tensors(_free_batch if dynamic else _fixed, example)
        try:
            with quiet():
                program = torch.export.export(
                    model, args, kwargs, dynamic_shapes=_by_name(model, free)
                )
                SharedMemory(program.module(), example).check_export()
                network = from_export(program.run_decompositions({}).module())
        except Exception as error:  # noqa: BLE001 - so does export
            second = second or _sentence(error)
            continue
        bound = tuple(
            tuple(
                None if dynamic and d == 0 and size > 1 else size for d, size in enumerate(x.shape)
            )
            for x in tensors(example)
        )
        return Traced(network, inputs, bound, None, "torch.export")
    raise ResfastError(
        f"neither torch.fx ({first}) nor torch.export ({second}) can trace {type(model).__name__}; "
        "fuse only the submodule with the convolutions"
    )


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip(": ")


def _free_batch(x: Tensor) -> dict[int, Any]:
    """The dynamic dimensions of an input; a batch of 1 would be fixed anyway."""
    return {0: torch.export.Dim.DYNAMIC} if x.ndim and len(x) > 1 else {}


def _fixed(x: Tensor) -> dict[int, Any]:
    return {}


def _by_name(model: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    variadic = bool(kinds) and kinds[0] is inspect.Parameter.VAR_POSITIONAL
    return (shapes,) if variadic else shapes


def from_export(exported: fx.GraphModule) -> fx.GraphModule:
    """An exported graph as an ordinary module, with one call per batch norm."""
    graph = exported.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            x, weight, bias, mean, var, momentum, eps = node.args
            outputs = list(node.users)
            if any(user.args[1] != 0 for user in outputs if user.users):
                raise UntraceableError("a batch norm's saved statistics are read")
            with graph.inserting_before(node):
                args = (x, weight, bias, mean, var, False, momentum, eps, False)
                norm = graph.call_function(aten.batch_norm.default, args)
            for user in outputs:
                user.replace_all_uses_with(norm)
                graph.erase_node(user)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return fx.GraphModule(exported, graph)
