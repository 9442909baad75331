"""Trained networks, ready to use: :func:`load` a run, then ask it for logits or probabilities."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from resfast import runtime
from resfast.config.network import network
from resfast.config.schema import Config
from resfast.errors import ResfastError, nearest
from resfast.inference.scoring import TTA, predict
from resfast.models.imported import source_digest
from resfast.models.presets import build_model
from resfast.runs import folder as records
from resfast.runs.checkpoint import Weights, load_weights
from resfast.runs.find import summary_of
from resfast.runs.summary import RunSummary

logger = logging.getLogger("resfast")
Which = Literal["final", "best"]
FILES = {"final": records.WEIGHTS, "best": records.BEST}
_RUN = "the folder of a run (runs/NAME) or a .safetensors file of one"


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A trained network and what is needed to use it.

    Attributes:
        path: folder of the run.
        file: the weights' file.
        model: the network in eval mode and ``channels_last`` memory, on ``device``.
        config: the run's configuration.
        classes: class names, in the order of the logits.
        mean: float32 ``[C]`` in units of pixel / 255, on the CPU.
        std: float32 ``[C]`` in units of pixel / 255, on the CPU.
        device: device of the network.
        dtype: compute dtype, under autocast unless float32.
        summary: result of the run, or None without a readable ``summary.json``.
    """

    path: Path
    file: Path
    model: nn.Module = field(repr=False)
    config: Config = field(repr=False)
    classes: tuple[str, ...]
    mean: Tensor = field(repr=False)
    std: Tensor = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    summary: RunSummary | None = field(repr=False)

    @property
    def image_size(self) -> int:
        """Height and width of the images it was trained on, in pixels."""
        return self.config.data.image_size

    def logits(self, images: Tensor, tta: TTA = "none", *, batch_size: int | None = None) -> Tensor:
        """Logits of every image.

        Args:
            images: uint8 ``[N, H, W, C]`` on any device, RGB, H and W equal to ``image_size``.
            tta: test-time augmentation, see :func:`resfast.inference.scoring.predict`.
            batch_size: images per step (None: the run's ``eval_batch_size``). Only one batch at
                a time is moved to the network's device.

        Returns:
            float32 ``[N, classes]`` on the device of ``images``.

        Raises:
            ResfastError: another dtype or shape, an unknown ``tta``, a batch size below 1, or a
                batch that does not fit into the GPU's memory.
        """
        size = self.image_size
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (size, size, 3):
            raise ResfastError(
                f"images are {str(images.dtype).removeprefix('torch.')} {list(images.shape)}; "
                f"expected uint8 [N, {size}, {size}, 3] (N, H, W, C), raw pixels of 0 to 255"
            )
        check_choice("tta", tta, get_args(TTA))
        batch_size = self.checked_batch_size(batch_size)
        logits = torch.empty(len(images), len(self.classes), device=images.device)
        with out_of_memory(batch_size):
            for batch, out in zip(images.split(batch_size), logits.split(batch_size), strict=True):
                if len(batch):
                    out.copy_(
                        predict(
                            self.model,
                            batch.to(self.device),
                            self.mean,
                            self.std,
                            batch_size=batch_size,
                            dtype=self.dtype,
                            tta=tta,
                        )
                    )
        return logits

    def probabilities(
        self, images: Tensor, tta: TTA = "none", *, batch_size: int | None = None
    ) -> Tensor:
        """Softmax of :meth:`logits`: float32 ``[N, classes]``, each row summing to 1."""
        return self.logits(images, tta, batch_size=batch_size).softmax(1)

    def checked_batch_size(self, asked: int | None) -> int:
        """``asked``, or the run's own evaluation batch size for None.

        Raises:
            ResfastError: below 1.
        """
        batch_size = self.config.evaluation.eval_batch_size if asked is None else asked
        if batch_size < 1:
            raise ResfastError(f"--batch-size {batch_size} is out of range: expected at least 1")
        return batch_size


def load(
    run: str | Path,
    *,
    weights: Which = "final",
    device: str = "auto",
    precision: runtime.Precision = "auto",
) -> TrainedRun:
    """Loads a trained network.

    Args:
        run: folder of a run, or a ``.safetensors`` file of one, which is enough by itself.
        weights: ``final``, or ``best`` for those of the best evaluation. Ignored if ``run`` is a
            file.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for CUDA if there is one.
        precision: compute dtype; ``auto`` is the run's own on the kind of device that it was
            trained on, so that its numbers are reproduced, and the hardware's choice on another.

    Returns:
        The network, on the device and ready to use.

    Raises:
        ResfastError: there is no such run, it has no such weights, their file is damaged or does
            not fit its own configuration, or there is no such device.
    """
    check_choice("weights", weights, FILES)
    check_choice("precision", precision, get_args(runtime.Precision))
    where = runtime.resolve_device(device)
    file = _weights_file(Path(run).expanduser(), weights)
    loaded = load_weights(file)
    config = loaded.config
    if precision == "auto" and config.runtime.device.partition(":")[0] == where.type:
        precision = config.runtime.precision
    dtype = runtime.DTYPES[runtime.resolve_precision(precision, where)]
    model = _network(file, loaded).to(where, memory_format=torch.channels_last).eval()
    return TrainedRun(
        path=file.parent,
        file=file,
        model=model.requires_grad_(False),
        config=config,
        classes=loaded.classes,
        mean=loaded.mean,
        std=loaded.std,
        device=where,
        dtype=dtype,
        summary=_summary(file),
    )


def prepare(run: TrainedRun) -> None:
    """Applies the process-wide settings of a command: allocator, TF32 and cuDNN's tuning."""
    runtime.prepare(
        run.device,
        threads=0,
        tf32=run.config.runtime.tf32,
        tuned_allocator=run.config.runtime.tune_allocator,
    )


@contextlib.contextmanager
def out_of_memory(batch_size: int) -> Iterator[None]:
    """Turns a GPU out-of-memory error into a message with the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResfastError(
            f"a batch of {batch_size:,} images does not fit into the GPU's memory "
            f"({str(error).splitlines()[0]}); choose a smaller --batch-size or --device cpu"
        ) from error


def check_choice(option: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ResfastError(f"--{option} {value!r} is unknown; choose {', '.join(choices)}")


def _weights_file(run: Path, weights: Which) -> Path:
    """The file with the requested weights, or an error that says what exists instead."""
    try:
        if run.is_file():
            if run.suffix != ".safetensors":
                raise ResfastError(f"{run} is not a weights file; expected {_RUN}")
            return run
        if not run.is_dir():
            siblings = [p.name for p in run.parent.iterdir()] if run.parent.is_dir() else []
            hint = nearest(run.name, siblings)
            raise ResfastError(f"there is no run {run}; expected {_RUN}{hint}")
        held = {name for name, file in FILES.items() if (run / file).is_file()}
        if weights in held:
            return run / FILES[weights]
        inside = sorted(p.parent.name for p in run.glob(f"*/{records.CONFIG}"))
        if not held and not (run / records.CONFIG).is_file():
            hint = f"; it holds runs, for example {run / inside[-1]}" if inside else ""
            raise ResfastError(f"{run} is not a run; expected {_RUN}{hint}")
        if not held and inside:
            usable = [name for name in inside if (run / name / FILES[weights]).is_file()]
            example = run / (usable or inside)[0]
            raise ResfastError(
                f"{run} is a folder of {len(inside)} runs that differ in their seed, and has no "
                f"weights of its own; use one of its runs, for example {example}"
            )
        resumable = records.has_checkpoint(run)
    except OSError as error:
        raise ResfastError(f"cannot read {run}: {error.strerror}; expected {_RUN}") from None
    remedy = (
        f"continue it with python -m resfast.train --resume {run}"
        if resumable
        else f"train it again with python -m resfast.train --config {run / records.CONFIG}"
    )
    if held == {"best"}:
        raise ResfastError(
            f"run {run} is unfinished and has no final weights ({records.WEIGHTS}); use its best "
            f"so far with --weights best, or {remedy}"
        )
    if held == {"final"}:
        raise ResfastError(
            f"run {run} has no best weights ({records.BEST}); use its final ones with "
            "--weights final"
        )
    raise ResfastError(f"run {run} is unfinished and has no weights yet; {remedy}")


def _network(file: Path, weights: Weights) -> nn.Module:
    """The network of the configuration, with the weights in it."""
    with torch.random.fork_rng(devices=[]):  # initialization must not advance the generator
        size = weights.config.data.image_size
        model = build_model(network(weights.config.model), len(weights.classes), size)
    if weights.code not in (None, source_digest(weights.config.model.model)):
        logger.warning(
            "%s was trained with another version of %s or of a file that it imports: its results "
            "may differ",
            file,
            weights.config.model.model.rpartition(":")[0],
        )
    wanted, given = model.state_dict(), weights.tensors
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is not part of the network" for name in given if name not in wanted]
    problems += [
        f"{name} is {list(given[name].shape)} and the network's {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ResfastError(
            f"weights {file} do not match their configuration (model "
            f"{weights.config.model.model!r}, {len(weights.classes)} classes): {problems[0]}"
            f"{more}; expected an unchanged file written by resfast.train"
        )
    model.load_state_dict(given)
    return model


def _summary(file: Path) -> RunSummary | None:
    return summary_of(file.parent) if file.name in FILES.values() else None
