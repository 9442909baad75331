"""A network as a graph without in-place operations, by ``torch.fx`` or ``torch.export``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from resfast.errors import ResfastError
from resfast.inference.fuse.nodes import UntraceableError, aten
from resfast.inference.fuse.out_of_place import make_out_of_place


class _Tracer(fx.Tracer):
    """Traces into every module except those whose forward is defined by ``torch.nn``."""

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        home = getattr(type(m).forward, "__module__", "")
        return home.startswith("torch.nn") and not isinstance(m, nn.Sequential)


def _traced(model: nn.Module, inputs: int) -> fx.Graph:
    """The graph for the first ``inputs`` arguments; others with a default are fixed to it."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    defaults = {
        p.name: p.default
        for p in parameters[inputs:]
        if p.default is None or isinstance(p.default, bool | int | float | str)
    }
    graph = _Tracer().trace(model, concrete_args=defaults or None)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, parameter in zip(placeholders, parameters, strict=False):
        if parameter.name in defaults:  # only torch.fx's assertion on its value reads it
            for user in list(node.users):
                for check in (*user.users, user):
                    graph.erase_node(check)
            graph.erase_node(node)
    return graph


def trace(
    model: nn.Module, example: tuple[Tensor, ...] | None
) -> tuple[fx.GraphModule, tuple[tuple[int | None, ...], ...] | None, str]:
    """Traces a network.

    Returns:
        The graph, without in-place operations; the input shapes it is specialized for, with None
        for a dimension of any size, or None for no restriction; the name of the tracer.

    Raises:
        ResfastError: the network cannot be traced.
    """
    try:
        network = fx.GraphModule(model, _traced(model, 1 if example is None else len(example)))
        make_out_of_place(network)
        return network, None, "torch.fx"
    except Exception as error:  # noqa: BLE001 - tracing runs the user's code
        first = _sentence(error)
    if example is None:
        raise ResfastError(
            f"torch.fx cannot trace {type(model).__name__} ({first}); pass example=, a batch of at "
            "least 2 inputs, to trace it with torch.export"
        )
    dynamic = [{0: torch.export.Dim.DYNAMIC} if x.ndim and len(x) > 1 else {} for x in example]
    second = ""
    for shapes in (dynamic, [{} for _ in example]):
        try:
            program = torch.export.export(model, example, dynamic_shapes=_by_name(model, shapes))
            network = from_export(program.run_decompositions({}).module())
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
        "fuse only the submodule with the convolutions"
    )


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip(": ")


def _by_name(model: nn.Module, shapes: list[dict[int, Any]]) -> tuple[Any, ...]:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    variadic = bool(kinds) and kinds[0] is inspect.Parameter.VAR_POSITIONAL
    return (tuple(shapes),) if variadic else tuple(shapes)


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
