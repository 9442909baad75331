"""One training step: forward, loss, backward and optimizer, compiled where asked."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resfast.training.config import OptimConfig

logger = logging.getLogger("resfast")


class TrainStep:
    """Trains a model by one batch a call, without waiting for the device.

    Args:
        model: the network, in ``channels_last``, on the device.
        optimizer: over its parameters.
        config: clipping, label smoothing and averaging.
        device: where it runs.
        dtype: compute dtype under autocast; fp16 scales the loss.
        compile: whether forward and backward go through torch.compile.
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
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.device, self.dtype = device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.ema: AveragedModel | None = None
        if config.ema:
            self.ema = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)
        self._loss = torch.compile(self._forward) if compile else self._forward

    def _average(self, averaged: Any, current: Any, updates: Tensor) -> None:
        # A short memory at first, so that the average does not hold on to the random start.
        # `updates` lives on the CPU: reading it waits for nothing.
        done = int(updates)
        decay = min(self.config.ema, (1 + done) / (10 + done))
        get_ema_multi_avg_fn(decay)(averaged, current, updates)

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        main = labels if labels.ndim == 1 else labels.argmax(1)
        return loss, (logits.detach().argmax(1) == main).sum()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            images: ``[B, C, H, W]`` in ``channels_last``, in the compute dtype.
            labels: int64 ``[B]``, or parts of the classes, float32 ``[B, classes]``, of which the
                largest then counts as the correct one.

        Returns:
            Mean loss (float32) and number of correct predictions (int64), both 0-d on the device.
        """
        loss, correct = self._loss(images, labels)
        self.scaler.scale(loss).backward()
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
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return loss.detach(), correct

    def warm_up(self, images: Tensor, labels: Tensor, *, fall_back: bool) -> float:
        """Compiles on a dummy batch, leaving weights, statistics and generators as they were.

        Args:
            images: a batch of the shape, dtype and layout to come.
            labels: its labels.
            fall_back: go on without compilation, and say so, where compiling fails.

        Returns:
            Seconds it took.

        Raises:
            RuntimeError: compiling failed and ``fall_back`` is False.
        """
        start = time.perf_counter()
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with _keep_generators(self.device):
            try:
                loss, _ = self._loss(images, labels)
                loss.backward()
            except RuntimeError as error:
                if not fall_back:
                    raise
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                logger.warning("training goes on without torch.compile, which failed: %s", reason)
                self._loss = self._forward
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    @property
    def evaluated_model(self) -> nn.Module:
        """The network whose weights count: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a state of :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@contextlib.contextmanager
def _keep_generators(device: torch.device):
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
