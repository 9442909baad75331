"""One training step: forward, loss, backward, clipping, optimizer, averaged weights.

What differs between steps is in ``step_kinds.py``, their capture as CUDA graphs in
``step_graphs.py``, and their compilation before the first one in ``warm_up.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resfast.config.schema import OptimConfig
from resfast.data.batch import BatchSource
from resfast.layers.norm import captured_step
from resfast.optim.averaging import Average
from resfast.optim.rate_table import RateTable
from resfast.optim.schedules import Schedule
from resfast.training.gradient_probe import GradientProbe
from resfast.training.losses import criterion
from resfast.training.step_graphs import StepGraphs, optimizer_tensors, why_not_captured
from resfast.training.step_kinds import StepKind, StepKinds
from resfast.training.step_metrics import StepMetrics

_RECOMPILE_LIMIT = 64
"""Most compiled variants: image sizes x batch sizes x 2 (whitening bias trained or frozen)."""


class TrainStep:
    """Trains a model on one batch per call, without synchronizing with the device.

    Args:
        model: the network, in ``channels_last``, on the device.
        optimizer: optimizer of its parameters.
        config: accumulation, clipping, label smoothing, averaging, and the epochs in which a
            whitening bias is trained.
        device: device of the model.
        dtype: compute dtype under autocast; float16 scales the loss.
        compile: whether forward and backward use torch.compile.
        schedule: schedule of ``optimizer``; required by Lookahead, a trained whitening bias and
            ``captured``.
        captured: whether to run each kind of step as one CUDA graph. On the CPU the graph is
            replaced by a call.
        image_losses: whether to keep :attr:`image_losses`.

    Attributes:
        kinds: how the steps of the run differ.
        graphs: the CUDA graphs, or None if steps are not captured.
        average: the averaged network, or None.
        scaler: scales the loss in float16.
        steps: number of steps done. None after loading a checkpoint without it; the next step takes
            it from the schedule.
        image_losses: loss of each image of the latest batch, float32 ``[B]``, valid until the next
            call; None if not kept.
        outputs: logits of images and, in pre-training, more; ``criterion``: the loss of them.
        probe: measures the gradients of each step, unless captured; None if they are not.

    Raises:
        ValueError: the schedule is missing, or :func:`why_not_captured` gives a reason.
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
        self.image_losses: Tensor | None = None
        self._keep_image_losses = image_losses
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.average = Average(model) if config.ema or config.lookahead else None
        self.kinds = StepKinds(config, schedule, model)
        self.probe: GradientProbe | None = None
        self.outputs: Callable[[Tensor], Sequence[Tensor]] = lambda images: [model(images)]
        self.criterion = criterion(config.loss, config.label_smoothing)
        self._loss = _compiled(self._forward) if compile else self._forward
        self._is_captured = captured
        self.graphs: StepGraphs | None = None
        if captured:
            table = RateTable(schedule, optimizer, self.kinds.average_weights(), device)
            networks = [model] if self.average is None else [model, self.average.module]
            self.graphs = StepGraphs(self._step, networks, optimizer, table, device)

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Mean loss, number of correct predictions and, where kept, the loss of each image."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            outputs = self.outputs(images)
        logits, *others = [value.float() for value in outputs]
        reduction = "none" if self._keep_image_losses else "mean"
        loss = self.criterion(images, logits, labels, reduction, *others)
        main = labels if labels.ndim == 1 else labels.argmax(1)
        correct = (logits.detach().argmax(1) == main).sum()
        if self._keep_image_losses:
            return loss.mean(), correct, loss.detach()
        return loss, correct

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            images: ``[B, C, H, W]`` in ``channels_last``, in the compute dtype.
            labels: int64 ``[B]``, or class probabilities, float32 ``[B, classes]``, of which the
                largest is the correct class.

        Returns:
            Mean loss (float32) and number of correct predictions (int64), both 0-d on the device,
            valid until the next call.
        """
        kind = self._begin()
        if self.graphs is None:
            weight = self.kinds.average_weight(self.steps) if kind.moves_average else None
            out = self._step(images, labels, weight)
        else:
            out = self.graphs.for_batch(kind, images, labels).replay(images, labels)
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
            batches: makes the batch. Captured steps need the same source in every call.
            metrics: records the mean loss, correct predictions and, where kept, the losses of the
                images. Captured steps need the same object in every call.
            images: size of the batch.
            pixels: its height and width.

        Returns:
            The batch's images, ``[B, C, H, W]``, valid until the next call.
        """
        if self.graphs is not None and batches.capturable:
            kind = self._begin()
            (trained,) = self.graphs.for_source(kind, batches, metrics, images, pixels).replay()
            self.steps += 1
            return trained
        batch = batches.next(images, pixels)
        loss, correct = self(batch.images, batch.labels)
        metrics.add(loss, correct, self.image_losses, batch.indices)
        return batch.images

    def _begin(self) -> StepKind:
        """Prepares the next step; returns its kind."""
        if self.steps is None:
            self.steps = self.schedule.position if self.schedule else 0
        if self.average is not None and self.steps == 0:
            self.average.restart()  # the weights may have changed since it was created
        kind = self.kinds.of(self.steps)
        self.kinds.train_whitening_bias(kind.trains_whitening_bias)
        if self.graphs is not None:
            self.graphs.table.seek(self.steps)
        return kind

    def _step(
        self, images: Tensor, labels: Tensor, average_weight: float | Tensor | None
    ) -> tuple[Tensor, ...]:
        """Trains on a batch and moves the average by a weight; None leaves the average alone."""
        loss, *rest = self.backward(images, labels)
        if self.probe is not None:
            self.probe.measure(images, labels, self.scaler.get_scale())
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
        if average_weight is not None:
            self.average.move(average_weight, write_back=bool(self.config.lookahead))
        return loss, *rest

    def backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Accumulates the gradients of a batch, a part at a time if ``accumulate`` > 1.

        Takes what :meth:`__call__` takes. Returns the mean loss, the number of correct predictions
        and, where kept, the loss of each image.
        """
        size = math.ceil(len(images) / self.config.accumulate)
        if size == len(images):
            loss, *rest = self.loss_of(images, labels)
            self.scaler.scale(loss).backward()
            return loss.detach(), *rest
        loss, correct, image_losses = 0.0, 0, []
        for part, part_labels in zip(images.split(size), labels.split(size), strict=True):
            mean, right, *rest = self.loss_of(part, part_labels)
            mean = mean * (len(part) / len(images))
            self.scaler.scale(mean).backward()
            loss, correct = loss + mean.detach(), correct + right
            image_losses += rest
        return loss, correct, *([torch.cat(image_losses)] if image_losses else [])

    def loss_of(self, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Results as of :meth:`backward`, of the whole batch at once and with a graph."""
        with captured_step(self._is_captured):
            return self._loss(images, labels)

    def run_uncompiled(self) -> None:
        """Runs forward and backward without torch.compile from now on."""
        self._loss = self._forward

    def reset(self, model_state: dict[str, Tensor]) -> None:
        """Starts a new training and keeps what is compiled and captured.

        Afterwards weights, averages, optimizer, schedule and scaler are those of a new step for a
        model with ``model_state``. The configuration and the number of steps are kept.

        Args:
            model_state: state dict of an initialized model.
        """
        self.model.load_state_dict(model_state)
        if self.graphs is not None and self.graphs.captured:  # they know the state's addresses
            for tensor in optimizer_tensors(self.optimizer):
                tensor.zero_()
        else:
            self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        if self.schedule is not None:
            self.schedule.reset()
        self.steps, self.image_losses = 0, None
        if self.probe is not None:
            self.probe.reset()
        if self.average is not None:
            self.average.restart()

    @property
    def evaluated_model(self) -> nn.Module:
        """The network to evaluate and save: the averaged one if there is one."""
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
        if self.steps is None and self.average is not None:  # a checkpoint of version 0.1
            self.steps = int(state["ema"]["n_averaged"])
        if self.graphs is not None:
            self.graphs.forget()


def _compiled(forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    torch._dynamo.config.recompile_limit = limit
    return torch.compile(forward, dynamic=False)
