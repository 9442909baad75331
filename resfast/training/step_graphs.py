"""Training steps captured as CUDA graphs: one for each kind of step and shape of its batch.

A replay repeats the captured operations at the captured addresses. Values that change from step to
step are therefore read from the device: learning rates and averaging weights from a
:class:`~resfast.optim.rate_table.RateTable`, the order of the images and the random parameters from
a :class:`~resfast.data.device_batches.DeviceBatches`. Both count the steps on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from resfast.config.schema import OptimConfig
from resfast.cuda_graph import CudaGraph
from resfast.data.batch import BatchSource
from resfast.optim.rate_table import RateTable
from resfast.training.step_kinds import StepKind
from resfast.training.step_metrics import StepMetrics


def why_not_captured(config: OptimConfig, dtype: torch.dtype) -> str | None:
    """Why a step cannot be captured as a CUDA graph, or None if it can."""
    if dtype == torch.float16:
        return "the loss scale of float16 is decided by the host"
    if config.schedule == "plateau":
        return "the plateau schedule is decided by the host"
    if config.schedule == "onecycle" and config.cycle_momentum:
        return "--cycle-momentum changes the optimizer's momentum on the host"
    if config.optimizer in ("adagrad", "adadelta", "rmsprop"):
        return f"torch's {config.optimizer} reads its learning rate on the host"
    return None


class StepGraphs:
    """The CUDA graphs of a training step, captured when first needed.

    A capture changes no tensor of the training and no random number generator.

    Args:
        train: trains on ``(images, labels, average_weight)``; the weight is None if the average is
            not moved. Returns the mean loss, the number of correct predictions and, where kept, the
            losses of the images.
        networks: the networks that ``train`` changes.
        optimizer: the optimizer that ``train`` uses.
        table: its learning rates and averaging weights.
        device: device of all of these. On the CPU a graph is replaced by a call.

    Attributes:
        captured: the graphs captured so far.
    """

    def __init__(
        self,
        train: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]],
        networks: list[nn.Module],
        optimizer: torch.optim.Optimizer,
        table: RateTable,
        device: torch.device,
    ) -> None:
        self.captured: dict[Any, CudaGraph] = {}
        self.table = table
        self._train, self._networks, self._optimizer = train, networks, optimizer
        self._device = device
        self._memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def for_batch(self, kind: StepKind, images: Tensor, labels: Tensor) -> CudaGraph:
        """The graph of a step on a given batch.

        Args:
            kind: of the step.
            images: ``[B, C, H, W]``, of the shape, dtype and layout to replay with.
            labels: int64 ``[B]`` or float32 ``[B, classes]``.

        Returns:
            A graph of ``(images, labels)`` with the results of ``train``.
        """

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            self.table.advance()
            return self._train(images, labels, self._average_weight(kind))

        key = kind, images.shape, images.dtype, labels.shape
        return self._capture_once(key, step, [images, labels], [])

    def for_source(
        self, kind: StepKind, batches: BatchSource, metrics: StepMetrics, images: int, pixels: int
    ) -> CudaGraph:
        """The graph of a step that makes its own batch and records its metrics.

        Args:
            kind: of the step.
            batches: makes the batch; has to be capturable.
            metrics: records the step.
            images: size of the batch.
            pixels: its height and width.

        Returns:
            A graph without arguments whose only result is the batch's images.
        """

        def step() -> tuple[Tensor, ...]:
            self.table.advance()
            batch = batches.next(images, pixels)
            loss, correct, *rest = self._train(
                batch.images, batch.labels, self._average_weight(kind)
            )
            metrics.add(loss, correct, rest[0] if rest else None, batch.indices)
            return (batch.images,)

        key = kind, images, pixels, id(batches), id(metrics)
        return self._capture_once(key, step, [], [*batches.tensors, *metrics.tensors])

    def forget(self) -> None:
        """Drops the graphs after the optimizer's state has moved, and attaches the table to it."""
        self.captured.clear()
        self.table.attach()

    def close(self) -> None:
        """Drops the graphs and lets the schedule write learning rates as numbers again."""
        self.table.detach()
        self.captured.clear()

    def _average_weight(self, kind: StepKind) -> Tensor | None:
        return self.table.average_weight if kind.moves_average else None

    def _capture_once(
        self,
        key: Any,
        step: Callable[..., tuple[Tensor, ...]],
        inputs: list[Tensor],
        changed: list[Tensor],
    ) -> CudaGraph:
        if key not in self.captured:
            with self._tensors_restored(changed), generators_restored(self._device):
                self.captured[key] = CudaGraph(
                    step,
                    inputs,
                    device=self._device,
                    pool=self._memory,
                    capturing=_capturable(self._optimizer),
                )
        return self.captured[key]

    @contextlib.contextmanager
    def _tensors_restored(self, others: list[Tensor]) -> Iterator[None]:
        """Gives all tensors of the training, and ``others``, their values back at the end.

        They keep their addresses, which the graphs know.
        """
        tensors = [t for net in self._networks for t in (*net.parameters(), *net.buffers())]
        tensors += [*optimizer_tensors(self._optimizer), *others, *self.table.tensors]
        before = [(tensor, tensor.detach().clone()) for tensor in tensors]
        saved = {id(tensor) for tensor in tensors}
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
                for tensor in optimizer_tensors(self._optimizer):
                    if id(tensor) not in saved:
                        tensor.zero_()  # momentum that the steps created


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors in an optimizer's state, such as momentum."""
    state = optimizer.state.values()
    return [value for values in state for value in values.values() if torch.is_tensor(value)]


@contextlib.contextmanager
def generators_restored(device: torch.device) -> Iterator[None]:
    """Restores the random number generators of the CPU and of ``device`` at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Sets ``capturable`` of Adam, without which PyTorch refuses the capture."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
