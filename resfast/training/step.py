"""One training step: batch, forward, loss, backward, optimizer and averaging, compiled where asked.

On CUDA the whole of it can be captured as one CUDA graph. What changes from step to step then lives
on the device: learning rates and the weight of an average are rows of a table computed up front,
a :class:`~resfast.data.device_batches.DeviceBatches` has the epoch's order and random parameters,
and the step itself counts where in them it is.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resfast import runtime
from resfast.config.schema import OptimConfig
from resfast.cuda_graph import CudaGraph
from resfast.data.batch import BatchSource
from resfast.layers.norm import captured_step
from resfast.optim.averaging import Average, ema_weight, lookahead_weight, moves_lookahead
from resfast.optim.optimizers import WHITENING_BIAS
from resfast.optim.rate_table import RateTable
from resfast.optim.schedules import Schedule
from resfast.training.losses import LOSSES
from resfast.training.step_metrics import StepMetrics

logger = logging.getLogger("resfast")

_RECOMPILE_LIMIT = 64
"""Limit on compiled variants: image sizes x batch sizes x 2 (whitening bias trained or not)."""


class TrainStep:
    """Trains a model on one batch per call, without synchronizing with the device.

    Args:
        model: the network, in ``channels_last``, on the device.
        optimizer: optimizer of its parameters.
        config: accumulation, clipping, label smoothing, averaging and the training of a whitening
            bias.
        device: device of the model.
        dtype: compute dtype under autocast; fp16 scales the loss.
        compile: whether forward and backward go through torch.compile.
        schedule: schedule of ``optimizer``; needed by Lookahead, the whitening bias and
            ``captured``.
        captured: run each kind of step as one CUDA graph. On the CPU the graph is replaced by a
            call.
        image_losses: whether to keep :attr:`image_losses`.

    Raises:
        ValueError: the schedule is missing, or :func:`why_not_captured` has a reason.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        compile: bool,
        schedule: Schedule | None = None,
        captured: bool = False,
        image_losses: bool = False,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.device, self.dtype = device, dtype
        self.schedule = schedule
        if schedule is None and (captured or config.lookahead or config.whitening_bias_epochs):
            raise ValueError(
                "schedule is None; lookahead, whitening_bias_epochs and captured need it"
            )
        if captured and (reason := why_not_captured(config, dtype)):
            raise ValueError(f"the step cannot be captured: {reason}")
        self.steps: int | None = 0
        """Steps done; None after a checkpoint that did not count them, until the next step."""
        self.image_losses: Tensor | None = None
        """Loss of each image of the latest batch, float32 ``[B]``, where asked for; valid until
        the next call."""
        self._keep_image_losses = image_losses
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.average = Average(model) if config.ema or config.lookahead else None
        self._whitening_bias = dict(model.named_parameters()).get(WHITENING_BIAS)
        if self._whitening_bias is not None and not self._whitening_bias.requires_grad:
            self._whitening_bias = None
        self._loss = self._forward
        self._is_captured = captured
        if compile:
            limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
            torch._dynamo.config.recompile_limit = limit
            self._loss = torch.compile(self._forward, dynamic=False)
        self._table = self._rate_table() if captured else None
        self._graphs: dict[Any, CudaGraph] = {}
        self._source_tensors: list[Tensor] = []
        self._graph_memory = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @property
    def ema(self) -> Average | None:
        """The averaged network of an exponential moving average."""
        return self.average if self.config.ema else None

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images)
        logits = logits.float()
        reduction = "none" if self._keep_image_losses else "mean"
        smoothing = self.config.label_smoothing
        loss = LOSSES["cross_entropy"](logits, labels, smoothing, reduction)
        main = labels if labels.ndim == 1 else labels.argmax(1)
        correct = (logits.detach().argmax(1) == main).sum()
        if self._keep_image_losses:
            return loss.mean(), correct, loss.detach()
        return loss, correct

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            images: ``[B, C, H, W]`` in ``channels_last``, in the compute dtype.
            labels: int64 ``[B]``, or parts of the classes, float32 ``[B, classes]``, of which the
                largest then counts as the correct one.

        Returns:
            Mean loss (float32) and number of correct predictions (int64), both 0-d on the device,
            valid until the next call.
        """
        kind, weight = self._next()
        if self._table is None:
            out = self._step(images, labels, kind.moves_average, weight)
        else:
            out = self._graph(images, labels, kind).replay(images, labels)
        self.steps += 1
        loss, correct, *rest = out
        if rest:
            self.image_losses = rest[0]
        return loss, correct

    def train_next(
        self, batches: BatchSource, metrics: StepMetrics, images: int, pixels: int
    ) -> Tensor:
        """One step on the next batch of a source.

        Args:
            batches: makes the batch; always the same source where steps are captured.
            metrics: gets the mean loss, correct predictions and, where kept, the losses of images;
                always the same where steps are captured.
            images: size of the batch.
            pixels: its height and width.

        Returns:
            The batch's images, ``[B, C, H, W]``, valid until the next call.
        """
        if self._table is not None and batches.capturable:
            kind, _ = self._next()
            (trained,) = self._source_graph(batches, metrics, images, pixels, kind).replay()
            self.steps += 1
            return trained
        batch = batches.next(images, pixels)
        loss, correct = self(batch.images, batch.labels)
        metrics.add(loss, correct, self.image_losses, batch.indices)
        return batch.images

    def _next(self) -> tuple[_Kind, float]:
        """Prepares the next step: its kind, and the weight of its average."""
        if self.steps is None:
            self.steps = self.schedule.position if self.schedule else 0
        if self.average is not None and self.steps == 0:
            self.average.restart()  # the weights may have changed since it was created
        kind = self._kind(self.steps)
        self._train_whitening_bias(kind.whitening_bias)
        if self._table is not None:
            self._table.seek(self.steps)
        return kind, self._average_weight(self.steps)

    def _step(
        self, images: Tensor, labels: Tensor, moves_average: bool, weight: float | Tensor
    ) -> tuple[Tensor, ...]:
        loss, *rest = self._backward(images, labels)
        parameters = self.model.parameters()
        if self.config.clip_value or self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
        if self.config.clip_value:
            nn.utils.clip_grad_value_(parameters, self.config.clip_value)
        elif self.config.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if moves_average:
            self.average.move(weight, write_back=bool(self.config.lookahead))
        return loss, *rest

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Accumulates the gradients of a batch; returns what :meth:`_forward` returns for it."""
        size = math.ceil(len(images) / self.config.accumulate)
        if size == len(images):
            loss, *rest = self._loss_of(images, labels)
            self.scaler.scale(loss).backward()
            return loss.detach(), *rest
        loss, correct, image_losses = 0.0, 0, []
        for part, part_labels in zip(images.split(size), labels.split(size), strict=True):
            mean, right, *rest = self._loss_of(part, part_labels)
            mean = mean * (len(part) / len(images))
            self.scaler.scale(mean).backward()
            loss, correct = loss + mean.detach(), correct + right
            image_losses += rest
        return loss, correct, *([torch.cat(image_losses)] if image_losses else [])

    def _loss_of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        with captured_step(self._is_captured):
            return self._loss(images, labels)

    # -- what changes from step to step -----------------------------------------------------------

    def _kind(self, step: int) -> _Kind:
        bias = self._whitening_bias is not None and step < self.schedule.whitening_bias_steps
        moves = bool(self.config.ema)
        if self.config.lookahead:
            moves = moves_lookahead(self.config, step + 1, self.schedule.total)
        return _Kind(whitening_bias=bias, moves_average=moves)

    def _average_weight(self, step: int) -> float:
        if self.config.ema:
            return ema_weight(self.config.ema, step)
        if self.config.lookahead:
            return lookahead_weight(self.config, step + 1, self.schedule.total)
        return 0.0

    def _rate_table(self) -> RateTable:
        assert self.schedule is not None
        weights = [self._average_weight(step) for step in range(self.schedule.total)]
        return RateTable(self.schedule, self.optimizer, weights, self.device)

    def _train_whitening_bias(self, trained: bool) -> None:
        if self._whitening_bias is not None and self._whitening_bias.requires_grad != trained:
            self._whitening_bias.requires_grad_(trained)

    # -- compilation and capture ------------------------------------------------------------------

    def warm_up(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        fall_back: bool,
        source: tuple[BatchSource, StepMetrics] | None = None,
        steps: Iterable[int] | None = None,
    ) -> float:
        """Compiles (and captures) every kind of step on a dummy batch.

        Weights, statistics, generators, the optimizer and the source are left as they were. Call
        it once for each shape to come.

        Args:
            images: a batch of the shape, dtype and layout to come.
            labels: its labels.
            fall_back: if compilation or capture fails, continue without it and log a warning.
            source: the source and metrics that :meth:`train_next` will be called with; None where
                the step will be called with batches.
            steps: of the run that have batches of this shape; by default all.

        Returns:
            Seconds it took.

        Raises:
            RuntimeError: compiling or capturing failed and ``fall_back`` is False.
        """
        start = time.perf_counter()
        kinds = self._kinds_to_come(steps)
        for trained in sorted({kind.whitening_bias for kind in kinds}, reverse=True):
            self._train_whitening_bias(trained)
            self._compile(images, labels, fall_back)
        if self._table is not None:
            try:
                for kind in kinds:
                    self._train_whitening_bias(kind.whitening_bias)
                    if source is None or not source[0].capturable:
                        self._graph(images, labels, kind)
                    else:
                        self._source_graph(*source, len(images), images.shape[3], kind)
            except RuntimeError as error:
                if not fall_back:
                    raise
                logger.warning(
                    "training continues without a CUDA graph, which failed: %s", _first_line(error)
                )
                self._table.detach()
                self._table = None
                self._graphs.clear()
        self._train_whitening_bias(self._kind(self.steps or 0).whitening_bias)
        runtime.synchronize(self.device)
        return time.perf_counter() - start

    def _kinds_to_come(self, steps: Iterable[int] | None) -> list[_Kind]:
        if self.schedule is None:
            return [self._kind(0)]
        steps = range(self.schedule.total) if steps is None else steps
        return list(dict.fromkeys(self._kind(step) for step in steps))

    def _compile(self, images: Tensor, labels: Tensor, fall_back: bool) -> None:
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with _keep_generators(self.device):
            try:
                self._backward(images, labels)
            except RuntimeError as error:
                if not fall_back:
                    raise
                logger.warning(
                    "training continues without torch.compile, which failed: %s", _first_line(error)
                )
                self._loss = self._forward
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _graph(self, images: Tensor, labels: Tensor, kind: _Kind) -> CudaGraph:
        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            self._table.advance()
            return self._step(images, labels, kind.moves_average, self._table.average_weight)

        key = kind, images.shape, images.dtype, labels.shape
        return self._captured(key, step, [images, labels])

    def _source_graph(
        self, batches: BatchSource, metrics: StepMetrics, images: int, pixels: int, kind: _Kind
    ) -> CudaGraph:
        def step() -> tuple[Tensor, ...]:
            self._table.advance()
            batch = batches.next(images, pixels)
            loss, correct, *rest = self._step(
                batch.images, batch.labels, kind.moves_average, self._table.average_weight
            )
            metrics.add(loss, correct, rest[0] if rest else None, batch.indices)
            return (batch.images,)

        self._source_tensors = [*batches.tensors, *metrics.tensors]
        return self._captured((kind, images, pixels, id(batches), id(metrics)), step, [])

    def _captured(
        self, key: Any, step: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
    ) -> CudaGraph:
        if key not in self._graphs:
            with self._everything_kept(), _keep_generators(self.device):
                self._graphs[key] = CudaGraph(
                    step,
                    inputs,
                    device=self.device,
                    pool=self._graph_memory,
                    capturing=_capturable(self.optimizer),
                )
        return self._graphs[key]

    @contextlib.contextmanager
    def _everything_kept(self):
        """Within it steps may be run; after it all is as before, at the same addresses."""
        before = [(tensor, tensor.detach().clone()) for tensor in self._state_tensors()]
        saved = {id(tensor) for tensor, _ in before}
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
                for tensor in self._optimizer_tensors():
                    if id(tensor) not in saved:
                        tensor.zero_()  # momentum that the steps created

    def _optimizer_tensors(self) -> list[Tensor]:
        state = self.optimizer.state.values()
        return [value for values in state for value in values.values() if torch.is_tensor(value)]

    def _state_tensors(self) -> list[Tensor]:
        modules = [self.model] if self.average is None else [self.model, self.average.module]
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        tensors += [*self._optimizer_tensors(), *self._source_tensors]
        return tensors if self._table is None else [*tensors, *self._table.tensors]

    # -- state ------------------------------------------------------------------------------------

    def reset(self, model_state: dict[str, Tensor]) -> None:
        """Begins a new training with what is compiled and captured.

        Weights, averages, optimizer, schedule and scaler become those of a new step over a model
        with ``model_state``; the schedule's length and the configuration stay.

        Args:
            model_state: state dict of the model, as its initialisation left it.
        """
        self.model.load_state_dict(model_state)
        if self._graphs:  # they know the addresses of the optimizer's state
            for tensor in self._optimizer_tensors():
                tensor.zero_()
        else:
            self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        if self.schedule is not None:
            self.schedule.reset()
        self.steps, self.image_losses = 0, None
        if self.average is not None:
            self.average.restart()

    @property
    def evaluated_model(self) -> nn.Module:
        """The network whose weights count: the averaged one where there is one."""
        return self.model if self.average is None else self.average.module

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, as tensors and plain values."""
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(self.steps),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps = state.get("steps")
        if self.steps is None and self.average is not None:  # of version 0.1
            self.steps = int(state["ema"]["n_averaged"])
        self._graphs.clear()  # the optimizer's state has moved
        if self._table is not None:
            self._table.attach()


def why_not_captured(config: OptimConfig, dtype: torch.dtype) -> str | None:
    """What keeps a step from being captured as a CUDA graph, or None where nothing does."""
    if dtype == torch.float16:
        return "the loss scale of float16 is decided by the host"
    if config.schedule == "plateau":
        return "the plateau schedule is decided by the host"
    if config.schedule == "onecycle" and config.cycle_momentum:
        return "--cycle-momentum changes the optimizer's momentum on the host"
    return None


@dataclass(frozen=True)
class _Kind:
    """What of a step is not data: another value means another graph."""

    whitening_bias: bool
    moves_average: bool


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer):
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _keep_generators(device: torch.device):
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
