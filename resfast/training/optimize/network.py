"""Replaces the modules of a network by this project's training kernels: :func:`optimize`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from resfast import runtime
from resfast.errors import ResfastError
from resfast.inference.fuse.nodes import UntraceableError
from resfast.layers import fused, norm, replaced
from resfast.layers.conv import Conv2d
from resfast.ops.conv.cpu import TILES
from resfast.training.optimize import calls
from resfast.training.optimize.blocks import Block, is_batch_norm, rewrite
from resfast.training.optimize.optimizers import fuse_step, restore_step
from resfast.training.optimize.report import OptimizationReport
from resfast.training.optimize.root import Root

DTYPES = (torch.bfloat16, torch.float32)
OURS = "it calls the kernels itself"
_LAYOUT = {"view", "view_as", "as_strided", "stride", "storage", "untyped_storage", "data_ptr"}
"""Methods of tensors whose result depends on the memory format."""
_ROOTS: WeakKeyDictionary[type, Root] = WeakKeyDictionary()
"""How a network is called, by its new class."""

Network = TypeVar("Network", bound=nn.Module)
Step = TypeVar("Step", bound="torch.optim.Optimizer | None")


def optimize(
    model: Network,
    optimizer: Step = None,  # type: ignore[assignment]
    dtype: torch.dtype = torch.bfloat16,
    *,
    winograd_tile: int = 2,
) -> tuple[Network, Step]:
    """Makes a network train faster, with this project's kernels for training.

    Both arguments are changed in place and returned. The modules stay the same objects, with the
    same tensors, state dict and hooks; those that train faster get another class, a subclass of
    their own. Evaluation, and everything that no kernel of ours computes, remains as it was. A
    pickle holds the original classes; a ``copy.deepcopy`` is optimized too. Wrap the network with
    ``DistributedDataParallel`` or ``torch.compile`` before or after.

    In training mode, the network runs under autocast to ``dtype`` and returns float32, unless the
    caller's autocast is on, which then decides. Parameters stay float32. Contiguous images are
    converted to ``channels_last``, which the kernels need, where the network's own code cannot tell
    the difference.

    Args:
        model: any network of images.
        optimizer: its optimizer, or None. SGD, Adam and AdamW are switched to their fused step.
        dtype: compute dtype in training, ``torch.bfloat16`` or ``torch.float32``. On a processor
            without instructions for bfloat16 it is float32.
        winograd_tile: largest side of the tiles of 3x3 convolutions, 2 to 4. Those of 3 and 4 need
            0.69 and 0.56 times as many multiplications and have 2 to 3 times the rounding error.

    Returns:
        ``model`` and ``optimizer``. :func:`optimization_report` says what was replaced.

    Raises:
        ResfastError: an argument of another kind.
    """
    if not isinstance(model, nn.Module):
        raise ResfastError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    if dtype not in DTYPES:
        raise ResfastError(f"dtype is {dtype}; expected torch.bfloat16 or torch.float32")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ResfastError(
            f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer or None"
        )
    if winograd_tile not in TILES:
        raise ResfastError(f"winograd_tile is {winograd_tile}; expected 2, 3 or 4")
    network = _inner(model)
    replaced.restore(network)
    plan = _Plan(network, dtype, winograd_tile)
    plan.make()
    step = "none was given" if optimizer is None else fuse_step(optimizer)
    plan.apply(step)
    return model, optimizer


def restore(model: Network, optimizer: torch.optim.Optimizer | None = None) -> Network:
    """Undoes :func:`optimize`: gives modules their classes and the optimizer its step back.

    Args:
        model: the network; nothing happens if it is not optimized.
        optimizer: its optimizer, if that was given to :func:`optimize`.

    Returns:
        ``model``.

    Raises:
        ResfastError: an argument of another kind.
    """
    if not isinstance(model, nn.Module):
        raise ResfastError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    replaced.restore(model)
    if optimizer is not None:
        restore_step(optimizer)
    return model


def optimization_report(model: nn.Module) -> OptimizationReport:
    """What :func:`optimize` replaced in a network, or in what a copy was made of.

    Raises:
        ResfastError: the network is not optimized.
    """
    root = _ROOTS.get(type(_inner(model)))
    if root is None:
        raise ResfastError(f"this {type(model).__name__} is not optimized; call resfast.optimize")
    return root.report


def _inner(model: nn.Module) -> nn.Module:
    """The network inside of ``torch.compile``, ``DistributedDataParallel`` and the like."""
    while True:
        if type(model).__module__.startswith("torch._dynamo") and hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@dataclass
class _Plan:
    """What to replace in a network.

    Attributes:
        methods: of the new class of each module that gets one.
        blocks: path and rewritten forward of modules.
        left: name and reason of what stays.
    """

    network: nn.Module
    dtype: torch.dtype
    tile: int
    methods: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"conv": 0, "norm": 0})
    channels_last: bool = True

    def make(self) -> None:
        reason = self._why_not_at_all()
        modules = dict(self.network.named_modules())
        owners = {child: module for module in modules.values() for child in module.children()}
        for name, module in modules.items():
            if isinstance(module, nn.Conv2d):
                self._convolution(name, module, reason)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                self._batch_norm(name, module, owners.get(module), reason)
            elif has_own_forward(module):
                self._block(name, module, reason)
            elif isinstance(module, nn.Unflatten):
                self.channels_last = False
        self.channels_last &= reason is None and self.counts["conv"] + self.counts["norm"] > 0

    def _why_not_at_all(self) -> str | None:
        """Why no kernel of ours is used in the whole network, or None."""
        from resfast.ops.norm_act import op as norm_act

        devices = {parameter.device.type for parameter in self.network.parameters()}
        if devices == {"cpu"} and not runtime.cpu_has_bf16():
            self.dtype = torch.float32
            return "the processor has no instructions for bfloat16"
        if devices != {"cpu"}:
            places = ", ".join(sorted(devices)) or "no device"
            return f"on {places}: faster kernels are known for the CPU only"
        if self.dtype != torch.bfloat16:
            return f"computed in {self.dtype}: the kernels are for bfloat16"
        if not norm_act.AVAILABLE:
            return "the kernels are not built, or the processor lacks AVX512-BF16"
        return None

    def _convolution(self, name: str, conv: nn.Conv2d, reason: str | None) -> None:
        if isinstance(conv, Conv2d):
            reason = OURS
        elif type(conv).forward is not nn.Conv2d.forward or (
            type(conv)._conv_forward is not nn.Conv2d._conv_forward
        ):
            reason = f"a {type(conv).__name__} with a forward of its own"
        reason = reason or _why_not_plain(conv) or calls.why_not_conv(conv)
        if reason is not None:
            self.left.append((name, reason))
            return
        self.methods[conv] = {"_conv_forward": calls.conv_forward, "tile": self.tile}
        self.counts["conv"] += 1

    def _batch_norm(
        self, name: str, module: nn.Module, owner: nn.Module | None, reason: str | None
    ) -> None:
        if owner is not None and _is_ours(owner):
            reason = OURS
        elif not is_batch_norm(module):
            reason = f"a {type(module).__name__}"
        reason = reason or _why_not_plain(module)
        if reason is None and module.num_features < norm.LEAST_CHANNELS:
            reason = f"batch norm of fewer than {norm.LEAST_CHANNELS} channels"
        if reason is None and (module.running_mean is None or module.momentum is None):
            reason = "batch norm without running statistics or with their mean"
        if reason is not None:
            self.left.append((name, reason))
            return
        self.methods[module] = {"forward": calls.norm_forward}
        self.counts["norm"] += 1

    def _block(self, name: str, module: nn.Module, reason: str | None) -> None:
        if _is_ours(module) or isinstance(module, torch.jit.ScriptModule):
            return
        reason = reason or _why_not_plain(module)
        block = None
        if reason is None:
            try:
                block = rewrite(module)
            except UntraceableError as error:
                reason = f"forward as it is: {error}"
        if reason is not None:
            if any(is_batch_norm(child) for child in module.children()):
                self.left.append((name or "(the network)", reason))
            self.channels_last &= not depends_on_layout(module)
        if block is not None:
            self.blocks[name] = block
            self.methods[module] = {"forward": _forward(type(module).forward, block)}

    def apply(self, step: str) -> None:
        """Gives the modules their new classes."""
        made: list[tuple[nn.Module, type[nn.Module]]] = []
        root = self._root(step)
        methods = self.methods.setdefault(self.network, {})
        inner = methods.get("forward", type(self.network).forward)
        methods["forward"] = functools.wraps(inner)(root.forward(inner))
        for module, namespace in self.methods.items():
            made.append((module, replaced.subclass(type(module), namespace)))
        for module, kind in made:
            replaced.replace_class(module, kind)
        _ROOTS[type(self.network)] = root

    def _root(self, step: str) -> Root:
        blocks = self.blocks.values()
        report = OptimizationReport(
            convolutions=self.counts["conv"],
            batch_norms=self.counts["norm"],
            activations=sum(block.activations for block in blocks),
            residuals=sum(block.residuals for block in blocks),
            blocks=sum(bool(block.fused) for block in blocks),
            dtype=str(self.dtype).removeprefix("torch."),
            channels_last=self.channels_last,
            optimizer=step,
            left=tuple(self.left),
        )
        views = tuple((name, block) for name, block in self.blocks.items() if block.views)
        return Root(self.dtype, self.channels_last, views, report)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward can be rewritten: it is not one of PyTorch's layers."""
    home = getattr(type(module).forward, "__module__", "")
    return isinstance(module, nn.Sequential) or home.partition(".")[0] != "torch"


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "resfast"


def _why_not_plain(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "parametrized"
    if fused.overridden(module):
        return "with a method of its own or a class with its own __call__"
    dtypes = {x.dtype for x in module.parameters(recurse=False)}
    if dtypes - {torch.float32}:
        return f"with parameters of {', '.join(sorted(map(str, dtypes)))}"
    return None


def depends_on_layout(module: nn.Module) -> bool:
    """Whether the code of a module's class has a call that depends on the memory format."""
    return any(_LAYOUT & set(code.co_names) for code in _codes(type(module)))


def _codes(kind: type) -> Iterator[Any]:
    """The code of a class's methods, and of the functions that these name."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for method in vars(base).values():
            code = getattr(method, "__code__", None)
            if code is None:
                continue
            yield code
            for name in code.co_names:
                called = getattr(method.__globals__.get(name), "__code__", None)
                if called is not None:
                    yield called


def _forward(original: Callable[..., Any], block: Block) -> Callable[..., Any]:
    """The rewritten forward where it applies, else the original one."""

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if block.applies(self, args, kwargs):
            return block.forward(self, *args)
        return original(self, *args, **kwargs)

    return forward
