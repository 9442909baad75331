"""The fused network as a module, optionally replayed as a CUDA graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from resfast.cuda_graph import CudaGraph
from resfast.errors import ResfastError
from resfast.inference.fuse.chains import Chain, first_chain, only_chain, with_chains
from resfast.inference.fuse.inputs import map_tensors, tensors
from resfast.inference.fuse.nodes import FLOATS
from resfast.inference.fuse.report import FusionReport
from resfast.inference.fuse.trace import Traced

_MISSING = object()


class FusedModel(nn.Module):
    """A network returned by :func:`fuse`, for inference only.

    Takes the inputs of the original, by position or by name: floating-point tensors, also those in
    lists, tuples and dicts, are converted to :attr:`input_dtype` and, if 4-dimensional, to
    ``channels_last``. Floating-point outputs are float32. It can be copied, pickled, compiled with
    ``torch.compile`` and exported with ``torch.export``, and moved to another device, but not to
    another dtype.

    Attributes:
        network: the rewritten graph.
        dtype: dtype of the computation.
        input_dtype: that of floating-point inputs: ``dtype``, or float32 for int8.
        report: what was fused and what was not.
        cuda_graph: whether the first call for each input shape captures a CUDA graph that later
            calls replay. Graphs keep their memory; call the module from one stream at a time.
    """

    def __init__(
        self,
        traced: Traced,
        dtype: torch.dtype,
        report: FusionReport,
        cuda_graph: bool,
    ) -> None:
        super().__init__()
        self.network = traced.network
        self.dtype = dtype
        self.input_dtype = torch.float32 if dtype == torch.int8 else dtype
        self.report = report
        self.cuda_graph = cuda_graph
        self._inputs = traced.inputs
        self._shapes = traced.shapes
        self._output = traced.output
        self._captured: dict[Any, CudaGraph] = {}
        self._pool: Any = None
        self._chains = _Chains()
        super().train(False)

    def train(self, mode: bool = True) -> FusedModel:
        """Does nothing: the network is always in eval mode.

        Raises:
            ResfastError: ``mode`` is True.
        """
        if mode:
            raise ResfastError(
                "a fused network cannot be trained: its batch norms are folded into the weights; "
                "train the original and fuse it again"
            )
        return self

    def forward(self, x: Any = _MISSING, /, *others: Any, **named: Any) -> Any:
        args = others if x is _MISSING else (x, *others)
        inputs = self._inputs.bound(args, named)
        if self._shapes is not None:
            self._check_shapes(inputs)
        if not torch.compiler.is_compiling():
            if self.cuda_graph:
                return self._replay(inputs)
            x = inputs[0] if len(inputs) == 1 else None
            if isinstance(x, Tensor) and x.is_cpu:
                chain = self._chains.first(self.network)
                if chain is not None and chain.takes(x):  # of any dtype and memory order
                    if self._output is not None or chain is not self._chains.only(self.network):
                        return self._run(x)
                    with _no_autocast("cpu"):
                        return chain.network(x).float()
        return self._run(*map(self._converted, inputs))

    def _run(self, *inputs: Any) -> Any:
        kind = next((x.device.type for x in tensors(inputs)), "cpu")
        network = self._chains.of(self.network, kind)
        with _no_autocast(kind):
            out = network(*inputs)
        return _floats(out if self._output is None else _ordered(out, self._output))

    def _converted(self, value: Any) -> Any:
        return map_tensors(self._converted_tensor, value)

    def _converted_tensor(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if x.ndim == 4:
            return x.to(dtype=self.input_dtype, memory_format=torch.channels_last)
        return x.to(self.input_dtype)

    def _check_shapes(self, inputs: tuple[Any, ...]) -> None:
        found = list(tensors(inputs))
        if len(found) != len(self._shapes):
            raise ResfastError(
                f"the inputs have {len(found)} tensors, but the network was traced by torch.export "
                f"for {len(self._shapes)}; fuse it again with an example of the new inputs"
            )
        for index, (x, shape) in enumerate(zip(found, self._shapes, strict=True)):
            if len(x.shape) != len(shape) or any(
                expected is not None and actual != expected
                for actual, expected in zip(x.shape, shape, strict=True)
            ):
                sizes = ", ".join("any" if size is None else str(size) for size in shape)
                raise ResfastError(
                    f"input {index} has shape {list(x.shape)}, but the network was traced by "
                    f"torch.export for [{sizes}]; fuse it again with an example of the new shape"
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
            # Input buffers must not be inference tensors, which cannot be written outside
            # inference_mode.
            converted = [*map(self._converted, inputs)]
            with torch.inference_mode(False), torch.no_grad():
                captured = CudaGraph(self._run, converted, device=inputs[0].device, pool=self._pool)
            self._captured[key] = captured
        return map_tensors(lambda x: x.clone(), captured.replay(*inputs))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> FusedModel:
        """Moves the tensors; each keeps its dtype.

        Raises:
            ResfastError: ``fn`` converts to another dtype than :attr:`dtype`.
        """
        place = next(self.buffers(), torch.empty(0)).device
        for kind in FLOATS:
            found = fn(torch.empty(1, dtype=kind, device=place)).dtype
            if found not in (kind, self.input_dtype):
                raise ResfastError(
                    f"a fused network cannot be converted to {found}: it was fused for "
                    f"{self.dtype}; fuse the original with dtype={found}"
                )

        if self.dtype == torch.int8:
            moved = fn(torch.empty(0)).device
            if moved.type not in ("cpu", "meta"):
                raise ResfastError(f"an int8 network runs on the CPU and cannot move to {moved}")

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        self._captured = {}
        return super()._apply(move, *args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._captured = {}
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": {}, "_pool": None}

    def extra_repr(self) -> str:
        return str(self.report)


class _Chains:
    """The network with chains that run as one call; none in a copy, which makes its own.

    It is not a module, so that state dicts have each tensor once.
    """

    def __init__(self) -> None:
        self.made_of: fx.GraphModule | None = None
        self.network: fx.GraphModule | None = None
        self._only: Chain | None = None
        self._first: Chain | None = None

    def of(self, network: fx.GraphModule, device: str) -> fx.GraphModule:
        """What to run in place of a network on a type of device."""
        if device != "cpu" or torch.compiler.is_compiling():
            return network
        self._make(network)
        return network if self.network is None else self.network

    def only(self, network: fx.GraphModule) -> Chain | None:
        """The chain that is all of a network, if one is."""
        self._make(network)
        return self._only

    def first(self, network: fx.GraphModule) -> Chain | None:
        """The chain that alone reads the only input of a network, if one does."""
        self._make(network)
        return self._first

    def _make(self, network: fx.GraphModule) -> None:
        if self.made_of is not network:
            self.network = with_chains(network)
            self._only = None if self.network is None else only_chain(self.network)
            self._first = None if self.network is None else first_chain(self.network)
            self.made_of = network

    def __deepcopy__(self, memo: dict[int, Any]) -> _Chains:
        return _Chains()

    def __reduce__(self) -> tuple[type[_Chains], tuple[()]]:
        return _Chains, ()


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """The layers' own dtypes for what follows, also under a caller's autocast."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _floats(value: Any) -> Any:
    return map_tensors(lambda x: x.float() if x.is_floating_point() else x, value)


def _ordered(value: Any, like: Any) -> Any:
    """The value with its dicts as ``OrderedDict`` where ``like`` has one."""
    match like:
        case dict():
            items = [(name, _ordered(value[name], item)) for name, item in like.items()]
            return OrderedDict(items) if isinstance(like, OrderedDict) else dict(items)
        case tuple() if hasattr(like, "_fields"):
            return type(value)(*map(_ordered, value, like))
        case list() | tuple():
            return type(value)(map(_ordered, value, like))
    return value
