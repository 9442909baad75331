"""The parts of a training that exist before its first step: data, network, plan and step.

:func:`open_session` builds them once; the progress of a run is in ``resfast.training.state``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resfast import runtime
from resfast.config.network import network
from resfast.config.schema import Config
from resfast.config.validate import check_budget, size_refused
from resfast.data import batches as feed
from resfast.data.augment import generator
from resfast.data.batch import BatchSource
from resfast.data.dataset import Dataset, Stream
from resfast.data.device_batches import DeviceBatches
from resfast.data.two_views import TwoViews
from resfast.layers import whitening
from resfast.layers.conv import set_winograd_tile
from resfast.models.imported import is_imported
from resfast.models.presets import build_model
from resfast.models.resnet import count_parameters
from resfast.models.summary import count_macs
from resfast.optim.optimizers import build_optimizer
from resfast.optim.schedules import Schedule
from resfast.runs.transfer import freeze, initialize, read_source
from resfast.training.display import Display
from resfast.training.gradient_probe import COLUMNS, GradientProbe
from resfast.training.optimize import optimization_report, optimize
from resfast.training.plan import Plan, PlannedBatch, make_plan
from resfast.training.pretraining import add_projector, barlow_twins, two_headed
from resfast.training.pseudo_labels import PseudoLabels, pseudo_labels
from resfast.training.resolve import resolve
from resfast.training.step import TrainStep
from resfast.training.step_metrics import StepMetrics
from resfast.training.teacher import Distillation, Teacher

_DROPOUT_STREAM = 4


@dataclass
class Shared:
    """Objects shared by trainings that differ only in their seed.

    Attributes:
        data: the data set, once it has been opened.
        step: the training step, once it has been built.
        train_batches: the source of its batches, if it can be part of a captured step.
        step_metrics: the metrics that the step records.
    """

    data: Dataset | Stream | None = None
    step: TrainStep | None = None
    train_batches: BatchSource | None = None
    step_metrics: StepMetrics | None = None


@dataclass
class Session:
    """The parts of one training.

    Attributes:
        config: the resolved configuration.
        data: the data set.
        device: the device to train on.
        dtype: compute dtype.
        train_source: training images, without the held-out ones.
        val_source: held-out images, or None.
        test_source: test images.
        mean: channel means of the training images, float32 ``[C]`` in units of pixel / 255.
        std: their standard deviations, float32 ``[C]`` in the same units.
        train_batches: source of the training batches.
        plan: all steps of the run.
        parameters: number of trainable parameters.
        macs: multiply-accumulates per image at the data set's image size.
        macs_by_pixels: the same for every image size used in training.
        step: the training step.
        step_metrics: losses and correct predictions of the steps of an epoch.
        compiled: whether the step was compiled by an earlier training.
        whitening_seconds: seconds to compute the frozen first layer.
        pseudo: images without labels and their predicted ones; None if there are none.
        batch_shape: number of images and their height in pixels of the latest batch; None makes the
            next batch release cached memory.
    """

    config: Config
    data: Dataset | Stream
    device: torch.device
    dtype: torch.dtype
    train_source: feed.Source
    val_source: feed.Source | None
    test_source: feed.Source
    mean: Tensor
    std: Tensor
    train_batches: BatchSource
    plan: Plan
    parameters: int
    macs: int
    macs_by_pixels: dict[int, int]
    step: TrainStep
    step_metrics: StepMetrics
    compiled: bool
    whitening_seconds: float
    pseudo: PseudoLabels | None = None
    batch_shape: tuple[int, int] | None = None

    @property
    def schedule(self) -> Schedule:
        """Learning rates of the step."""
        assert self.step.schedule is not None
        return self.step.schedule

    def batches(
        self, source: feed.Source, dtype: torch.dtype | None = None
    ) -> feed.EvaluationBatches:
        """One pass over all images of a source, normalized for the network."""
        return _evaluation_batches(
            self.config, self.data, source, self.mean, self.std, self.device, dtype or self.dtype
        )

    def make_room(self, batch: PlannedBatch) -> None:
        """Releases cached memory, which batches of another shape cannot reuse.

        An incomplete last batch fits into the memory of the others.
        """
        shape = batch.images, batch.pixels
        if self.batch_shape != shape and (self.batch_shape is None or not self.plan.uniform):
            self.batch_shape = shape
            runtime.release_memory(self.device)

    def seed_epoch(self, epoch: int) -> None:
        """Seeds dropout for an epoch that starts at its first step."""
        stream = generator(self.config.runtime.seed, _DROPOUT_STREAM, epoch)
        torch.manual_seed(stream.initial_seed())


def open_session(
    config: Config, shared: Shared, display: Display, *, saved: dict[str, Any] | None = None
) -> Session:
    """Builds the parts of a training.

    Args:
        config: configuration of the training; values of ``auto`` are resolved here.
        shared: holds the opened data set; its step is reused, or set by the first training.
        display: shows which values were adjusted.
        saved: a state that will be restored, which includes the whitening filters; None for a new
            run.

    Raises:
        ResfastError: values that do not fit the data, the machine or each other.
    """
    data, resumed = shared.data, saved is not None
    assert data is not None
    say = display.say if shared.step is None else lambda line: None
    train_source, val_source, test_source = feed.split_sources(
        data,
        config.data.val_fraction,
        config.runtime.seed,
        config.data.hold_out,
        config.data.max_images,
    )
    train_source = feed.with_label_noise(
        train_source, config.data.label_noise, len(data.classes), config.runtime.seed
    )
    pseudo = pseudo_labels(
        config, data.classes, data.image_size, saved=(saved or {}).get("pseudo"), say=say
    )
    if pseudo is not None:
        train_source = pseudo.added_to(train_source)
    config, notes = resolve(config, data, feed.count(train_source))
    for note in notes:
        say(note)
    device = torch.device(config.runtime.device)
    dtype = runtime.DTYPES[config.runtime.precision]
    runtime.prepare(
        device,
        threads=config.runtime.threads,
        tf32=config.runtime.tf32,
        tuned_allocator=config.runtime.tune_allocator,
    )
    pipeline = _pipeline(config)
    mean, std = _mean_std(config, train_source, data.image_size, device)
    train_batches = feed.training_batches(
        train_source,
        mean,
        std,
        loader=config.data.loader,
        image_size=data.image_size,
        batch_size=config.optim.batch_size,
        augment=config.data.augment,
        classes=len(data.classes),
        seed=config.runtime.seed,
        device=device,
        dtype=dtype,
        resize_by=config.data.resize_by,
        drop_last=config.data.drop_last,
        reuse=shared.train_batches,
        **pipeline,
    )
    plan = make_plan(config, train_batches.count, data.image_size)

    torch.manual_seed(config.runtime.seed)
    model = build_model(network(config.model), len(data.classes), data.image_size)
    parameters = count_parameters(model)
    check_budget(config.model, parameters)
    if config.model.zero_init_residual:
        model.zero_init_residual()
    whitened = _transfer(model, config, data.classes, say, resumed=resumed)
    macs = count_macs(model, data.image_size)
    if config.transfer.pretrain != "none":
        assert isinstance(train_batches, DeviceBatches)  # resolve has refused the others
        train_batches = TwoViews(train_batches)
        add_projector(model, config.transfer.projector)
    macs_by_pixels = {data.image_size: macs} | _macs_of_sizes(model, config)
    model = model.to(device, memory_format=torch.channels_last)
    set_winograd_tile(model, config.runtime.winograd_tile)
    whitening_seconds = 0.0
    if not (resumed or whitened) and whitening.needed(model):
        whitening_seconds = _whiten(model, config, data, train_source, mean, std, device)
    compiled = shared.step is not None
    if shared.step is None:
        images = train_batches.count
        filters = any(epoch.kept < images for epoch in plan.epochs)
        shared.step = _build_step(model, config, plan, len(train_batches), device, dtype, filters)
        if is_imported(config.model.model):
            say(_kernels(shared.step.model))
        shared.step_metrics = StepMetrics(plan.max_steps, images if filters else 0, device)
        if train_batches.capturable:  # captured steps hold the addresses of its tensors
            shared.train_batches = train_batches
    else:
        assert shared.step_metrics is not None
        shared.step.reset(model.state_dict())
        shared.step_metrics.reset()
    _teach(shared.step, config, data.classes, mean, std)
    assert shared.step_metrics is not None
    return Session(
        config, data, device, dtype, train_source, val_source, test_source, mean, std,
        train_batches, plan, parameters, macs, macs_by_pixels, shared.step, shared.step_metrics,
        compiled, whitening_seconds, pseudo,
    )  # fmt: skip


def _transfer(
    model: nn.Module,
    config: Config,
    classes: Sequence[str],
    say: Callable[[str], None],
    *,
    resumed: bool,
) -> bool:
    """Takes the weights of ``--init-from`` and freezes the layers of ``--freeze``.

    Returns:
        Whether the filters of a whitening layer were taken.
    """
    transfer, has_filters = config.transfer, False
    if transfer.init_from is not None and not resumed:
        taken = initialize(model, read_source(transfer.init_from), classes)
        say(taken.table())
        has_filters = taken.took("whitening.weight")
    if transfer.freeze:
        say(f"{freeze(model, transfer.freeze):,} of {count_parameters(model):,} parameters frozen")
    return has_filters


def _mean_std(
    config: Config, source: feed.Source, image_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel that images are normalized with.

    Both float32 ``[3]`` in units of pixel / 255.
    """
    data = config.data
    if not data.normalize:
        return torch.zeros(3), torch.ones(3)
    if data.mean and data.std:
        return torch.tensor(data.mean), torch.tensor(data.std)
    mean, std = feed.mean_std(source, image_size, device=device, **_pipeline(config))
    return (
        torch.tensor(data.mean) if data.mean else mean,
        torch.tensor(data.std) if data.std else std,
    )


def _pipeline(config: Config) -> dict[str, int]:
    return {"prefetch": config.data.prefetch, "threads": config.runtime.threads}


def _build_step(
    model: nn.Module,
    config: Config,
    plan: Plan,
    batches: int,
    device: torch.device,
    dtype: torch.dtype,
    image_losses: bool,
) -> TrainStep:
    optimizer = build_optimizer(model, config.optim)
    if is_imported(config.model.model):
        optimize(
            model,
            optimizer,
            torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
            winograd_tile=config.runtime.winograd_tile,
        )
    schedule = Schedule(optimizer, config.optim, config.optim.epochs, batches, plan.progress())
    step = TrainStep(
        model,
        optimizer,
        config.optim,
        device=device,
        dtype=dtype,
        compile=config.runtime.compile != "off",
        schedule=schedule,
        captured=config.runtime.cuda_graph != "off",
        image_losses=image_losses,
    )
    if config.transfer.pretrain != "none":
        step.outputs = two_headed(model)
        step.criterion = barlow_twins(step.criterion, config.transfer.redundancy_weight)
    if measured := [name for name in config.run.record if COLUMNS[name]]:
        step.probe = GradientProbe(
            model,
            measured,
            loss=lambda images, labels: step.loss_of(images, labels)[0],
            learning_rate=lambda: schedule.lr,
            device=device,
        )
    return step


def _kernels(model: nn.Module) -> str:
    """Which of this project's kernels train a network from elsewhere, in a line."""
    report = optimization_report(model)
    ours = report.convolutions + report.batch_norms + report.blocks
    if not ours:
        reason = report.left[0][1] if report.left else "it has no part that they compute"
        return f"training with PyTorch's kernels: {reason}"
    return (
        f"training with resfast's kernels: {report.convolutions} convolutions, "
        f"{report.batch_norms} batch norms, {report.activations} activations and "
        f"{report.residuals} additions; {len(report.left)} parts are left to PyTorch"
    )


def _teach(
    step: TrainStep, config: Config, classes: Sequence[str], mean: Tensor, std: Tensor
) -> None:
    """Gives the step the teacher of ``--teacher``; a compiled step keeps the one it has."""
    transfer = config.transfer
    if transfer.teacher is None:
        return
    if isinstance(step.criterion, Distillation):
        step.criterion.teacher.normalized_by(mean, std)
        return
    teacher = Teacher(transfer.teacher, config, classes, mean, std, step.device, step.dtype)
    step.criterion = Distillation(
        step.criterion,
        teacher,
        temperature=transfer.distill_temperature,
        weight=transfer.distill_weight,
    )


def _macs_of_sizes(model: nn.Module, config: Config) -> dict[int, int]:
    """Multiply-accumulates per image at each size of ``--sizes``."""
    sizes = config.data.sizes
    try:
        return {pixels: count_macs(model, pixels) for pixels, _ in sizes}
    except RuntimeError as error:
        raise size_refused(sizes, error) from None


def _whiten(
    model: nn.Module,
    config: Config,
    data: Dataset | Stream,
    source: feed.Source,
    mean: Tensor,
    std: Tensor,
    device: torch.device,
) -> float:
    """Computes the frozen first layer; returns the seconds it took."""

    def batches(source: feed.Source) -> feed.EvaluationBatches:
        return _evaluation_batches(config, data, source, mean, std, device, torch.float32)

    blank = blank_source(min(config.evaluation.eval_batch_size, whitening.IMAGES), data.image_size)
    # Warm-up: loading libraries and compiling kernels is not timed.
    whitening.prepare_model(copy.deepcopy(model), batches(blank))
    start = time.perf_counter()
    whitening.prepare_model(model, batches(feed.spread(source, whitening.IMAGES)))
    runtime.synchronize(device)
    return time.perf_counter() - start


def blank_source(count: int, pixels: int) -> feed.Resident:
    """Dummy images and labels in the format of a data set."""
    images = torch.zeros(count, pixels, pixels, 3, dtype=torch.uint8)
    return images, torch.zeros(count).long()


def _evaluation_batches(
    config: Config,
    data: Dataset | Stream,
    source: feed.Source,
    mean: Tensor,
    std: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> feed.EvaluationBatches:
    return feed.EvaluationBatches(
        source,
        mean,
        std,
        image_size=data.image_size,
        batch_size=config.evaluation.eval_batch_size,
        device=device,
        dtype=dtype,
        classes=len(data.classes),
        **_pipeline(config),
    )
