"""The own forward of a module as a graph of calls of its submodules: :func:`trace`.

``torch.fx`` records what one call does, so anything that a forward decides by other means than its
inputs would be part of the graph for ever. :func:`trace` therefore refuses a forward that does more
than call submodules and PyTorch's functions, and returns each plain value that it has read as a
:class:`Guard`: the graph holds as long as these are the same. It is not for whole networks
(:mod:`resfast.inference.fuse.trace`): submodules are called, not traced into, so that their hooks
and their own behaviour remain.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import enum
import inspect
import math
import operator
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from resfast.inference.fuse.nodes import UntraceableError
from resfast.inference.fuse.proxy import Proxy

_SIMPLE = (
    *(type(None), bool, int, float, str, enum.Enum),
    *(torch.dtype, torch.device, torch.memory_format, torch.Size),
)
_PURE = ("builtins", "collections", "functools", "math", "_operator", "torch", "typing")
"""Home of functions whose result depends on their arguments only."""
_MODULES = (torch, nn, F, math, operator)
"""Python modules whose functions depend on their arguments only, but for what the mode refuses."""
_BUILTINS = frozenset(
    "abs all any bool dict enumerate float getattr hasattr int len list map max min range reversed "
    "round slice sorted str sum super tuple zip AssertionError NotImplementedError RuntimeError "
    "TypeError ValueError".split()
)
_EFFECTS = frozenset(
    "STORE_ATTR STORE_GLOBAL STORE_NAME DELETE_ATTR DELETE_GLOBAL IMPORT_NAME BEFORE_WITH "
    "SETUP_WITH YIELD_VALUE".split()
)
"""Instructions that change more than local variables, or that enter a context."""
_CONTEXTS = ("torch.amp", "torch.autograd", "torch.cuda", "torch.jit", "torch.utils.checkpoint")
_CONTEXTS += ("torch.distributed", "torch.random", "torch.profiler")
"""PyTorch's own modules in Python whose calls a graph would lose."""
_STATES = frozenset(
    "is_autocast_enabled is_autocast_cpu_enabled get_autocast_dtype get_autocast_cpu_dtype "
    "get_autocast_gpu_dtype get_default_dtype initial_seed seed manual_seed get_rng_state".split()
)
"""Functions that read or change the state of PyTorch."""
_HARMLESS = ("is_tracing", "is_scripting")
_MISSING = object()


@dataclass(frozen=True)
class Guard:
    """A value that a forward reads: an attribute of a module, or a global variable.

    Attributes:
        owner: path of the submodule, "" for the module itself; None for a global variable.
        name: of the attribute or variable.
        value: what it was.
        variables: the dictionary of the variable; None for an attribute.
    """

    owner: str | None
    name: str
    value: Any
    variables: dict[str, Any] | None = None

    def holds(self, module: nn.Module) -> bool:
        """Whether the value is still the same."""
        if self.owner is None:
            found = self.variables.get(self.name, _MISSING)
        else:
            owner = module.get_submodule(self.owner) if self.owner else module
            found = owner.__dict__.get(self.name, _MISSING)
        if found is self.value:
            return True
        return (
            type(found) is type(self.value) and isinstance(found, _SIMPLE) and (found == self.value)
        )


@dataclass(frozen=True)
class Trace:
    """The graph of a forward and what it depends on.

    Attributes:
        graph: ``call_module`` nodes name the submodules; inputs are the required arguments.
        inputs: number of inputs, all of them tensors.
        guards: values that the forward reads.
        children: of the module and of each list of modules, its path and the names of its children.
    """

    graph: fx.Graph
    inputs: int
    guards: tuple[Guard, ...]
    children: tuple[tuple[str, tuple[str, ...]], ...]

    def holds(self, module: nn.Module) -> bool:
        """Whether a trace would give the same graph now."""
        for path, names in self.children:
            owner = module.get_submodule(path) if path else module
            if names_of_children(owner) != names:
                return False
        # torch.compile breaks the graph at all() of a generator.
        for guard in self.guards:  # noqa: SIM110
            if not guard.holds(module):
                return False
        return True


def names_of_children(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's children that are not None."""
    return tuple([name for name, child in module._modules.items() if child is not None])


def trace(module: nn.Module) -> Trace:
    """Traces the forward of a module's class, in training mode.

    Raises:
        UntraceableError: the forward does something that the graph would not do.
    """
    kind = type(module)
    forward = kind.forward
    if not isinstance(forward, types.FunctionType):
        raise UntraceableError("its forward is not a Python function")
    home = forward.__globals__.get("__name__", "")
    if home.startswith("torch.") and not issubclass(kind, nn.Sequential):
        raise UntraceableError(f"its forward is decorated by {home}")
    if kind.__getattribute__ is not nn.Module.__getattribute__:
        raise UntraceableError("its class has its own __getattribute__")
    watch = _Watch(module)
    modes = [(child, child.training) for child in module.modules()]
    for child, _ in modes:
        child.training = True
    tracer = _Tracer()
    try:
        with torch.enable_grad(), watch, _OnlyInputs():
            graph = tracer.trace(module)
    except UntraceableError:
        raise
    except Exception as error:  # tracing runs the user's code
        lines = str(error).strip().splitlines()
        raise UntraceableError(f"{type(error).__name__}: {lines[0] if lines else ''}") from error
    finally:
        for child, mode in modes:
            child.training = mode
    lists = {""}
    for node in graph.nodes:
        if node.op == "call_module":
            parts = str(node.target).split(".")
            lists.update(".".join(parts[:count]) for count in range(1, len(parts)))
    children = tuple(
        (path, names_of_children(module.get_submodule(path))) for path in sorted(lists)
    )
    return Trace(graph, tracer.inputs, watch.guards(), children)


class _Tracer(fx.Tracer):
    """Calls every submodule instead of tracing into it."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        kinds = inspect.Parameter
        names = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
                continue
            if parameter.default is kinds.empty:
                if parameter.kind is kinds.KEYWORD_ONLY:
                    raise UntraceableError(f"argument {parameter.name!r} is by keyword only")
                names.append(parameter.name)
        self.inputs = len(names)
        return root_fn, [self.root, *(self.create_proxy("placeholder", n, (), {}) for n in names)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)


class _OnlyInputs(TorchFunctionMode):
    """Refuses functions of no traced value, such as random numbers, which a graph would hold."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            raise UntraceableError(f"it calls {getattr(func, '__name__', func)} without its inputs")
        return func(*args, **kwargs)


class _Watch:
    """Watches the user's code in a traced call: attributes and variables read, and side effects."""

    def __init__(self, module: nn.Module) -> None:
        self.paths = {child: name for name, child in module.named_modules()}
        self.found: dict[tuple[Any, str], Guard] = {}
        self.codes: set[types.CodeType] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Watch:
        self._stack.enter_context(self._attributes())
        self._stack.enter_context(self._calls())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def guards(self) -> tuple[Guard, ...]:
        return tuple(self.found.values())

    @contextlib.contextmanager
    def _attributes(self) -> Iterator[None]:
        plain = nn.Module.__getattribute__

        def read(module: nn.Module, name: str) -> Any:
            value = plain(module, name)
            if name in plain(module, "__dict__") and _is_users(sys._getframe(1)):
                self._attribute(module, name, value)
            return value

        nn.Module.__getattribute__ = read  # type: ignore[method-assign]
        try:
            yield
        finally:
            del nn.Module.__getattribute__

    @contextlib.contextmanager
    def _calls(self) -> Iterator[None]:
        before = sys.getprofile()
        refused: list[UntraceableError] = []

        def called(frame: types.FrameType, event: str, _: Any) -> None:
            if event != "call" or refused:
                return
            try:
                self._check_call(frame)
            except UntraceableError as error:
                refused.append(error)

        sys.setprofile(called)
        try:
            yield
        finally:
            sys.setprofile(before)
        if refused:
            raise refused[0]

    def _attribute(self, module: nn.Module, name: str, value: Any) -> None:
        if name == "__dict__" or module not in self.paths:
            raise UntraceableError(f"it reads {name} of a {type(module).__name__}")
        if not _is_constant(value):
            raise UntraceableError(f"it reads {name}, a {type(value).__name__}")
        path = self.paths[module]
        self.found[path, name] = Guard(path, name, value)

    def _check_call(self, frame: types.FrameType) -> None:
        home = frame.f_globals.get("__name__", "")
        name = frame.f_code.co_name
        is_context = any(home == one or home.startswith(f"{one}.") for one in _CONTEXTS)
        if is_context and name not in _HARMLESS and not _is_of_tracing(frame):
            raise UntraceableError(f"it calls {name} of {home}")
        if not _is_users(frame) or frame.f_code in self.codes or _is_of_proxy(frame):
            return
        self.codes.add(frame.f_code)
        for instruction in dis.get_instructions(frame.f_code):
            if instruction.opname in _EFFECTS and frame.f_code.co_name != "<genexpr>":
                what = instruction.argval or instruction.opname.lower()
                raise UntraceableError(f"it has effects of its own ({what})")
            if instruction.argval in _STATES:
                raise UntraceableError(f"it reads {instruction.argval}")
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._variable(frame.f_globals, instruction.argval)
        for name in frame.f_code.co_freevars:
            if name != "__class__" and not _is_constant(frame.f_locals.get(name)):
                raise UntraceableError(f"it reads {name} of an outer function")

    def _variable(self, variables: dict[str, Any], name: str) -> None:
        if name not in variables:
            if name not in _BUILTINS and hasattr(builtins, name):
                raise UntraceableError(f"it calls {name}")
            return
        value = variables[name]
        if isinstance(value, types.ModuleType):
            if value not in _MODULES:
                raise UntraceableError(f"it uses the module {value.__name__}")
        elif not _is_constant(value):
            raise UntraceableError(f"it reads the variable {name}, a {type(value).__name__}")
        if not isinstance(value, types.ModuleType | type):
            self.found[id(variables), name] = Guard(None, name, value, variables)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    if isinstance(value, types.BuiltinFunctionType | types.MethodType):
        owner = value.__self__
        if isinstance(owner, types.ModuleType):
            return owner.__name__.partition(".")[0] in _PURE
        return owner is None or isinstance(owner, type)
    if isinstance(value, types.FunctionType):
        home = (value.__module__ or "").partition(".")[0]
        return home in _PURE or home not in sys.stdlib_module_names
    return isinstance(value, (*_SIMPLE, type))


def _is_of_tracing(frame: types.FrameType) -> bool:
    """Whether ``torch.fx`` has called a frame for its own purposes, not for the user's code."""
    caller = frame.f_back
    while caller is not None and not _is_users(caller):
        if caller.f_globals.get("__name__", "").startswith("torch.fx"):
            return True
        caller = caller.f_back
    return False


def _is_of_proxy(frame: types.FrameType) -> bool:
    """Whether a proxy of ``torch.fx`` has called a frame: DALI replaces functions that it calls."""
    caller = frame.f_back
    while caller is not None and not _is_users(caller):
        if caller.f_globals.get("__name__", "") == "torch.fx.proxy":
            return True
        caller = caller.f_back
    return False


def _is_users(frame: types.FrameType) -> bool:
    """Whether code that runs is neither PyTorch's nor ours."""
    home = frame.f_globals.get("__name__", "")
    top = home.partition(".")[0]
    return top == "__main__" or top not in ("torch", "resfast", *sys.stdlib_module_names)
