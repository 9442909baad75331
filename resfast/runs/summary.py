"""The result of a run as a type, read from and written to ``summary.json``.

:class:`RunSummary` is the result of one run, :class:`SeedsSummary` that of several runs that differ
in their seed; ``resfast.runs.epoch_row`` has the rows of ``metrics.jsonl``. A field that older
versions of resfast did not write is None where it is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pydantic

from resfast.errors import ResfastError
from resfast.runs.stored import STORED, EvaluatedOn, Finite, read

AccuracyName = Literal["test_accuracy", "tta_accuracy", "val_accuracy", "val_tta_accuracy"]
"""Fields that can be the headline accuracy, see :meth:`RunSummary.headline_accuracy`."""

_NONE_IS_A_VALUE = {"val_accuracy", "val_tta_accuracy", "stopped"}
"""Fields with the default None in which None does not mean that it was not recorded."""
_FOUND_ELSEWHERE = {"torch", "resfast", "run"}
"""Fields with the default None that are also in ``versions`` or the name of the folder."""


class _Summary(Mapping[str, Any]):
    """Methods of both kinds of summary.

    For code older than these classes, a summary can also be read by key: ``summary["versions"]`` is
    the value in ``summary.json``, with lists for tuples and dictionaries for other classes. New
    code should read attributes, which type checkers know.
    """

    def to_json(self) -> str:
        """The text of ``summary.json``."""
        return json.dumps(_ADAPTERS[type(self)].dump_python(self), indent=2) + "\n"

    def not_recorded(self) -> list[str]:
        """Names of the fields that the resfast version that wrote the summary did not record."""
        may_be_none = _NONE_IS_A_VALUE | _FOUND_ELSEWHERE
        added_later = [f.name for f in fields(self) if f.default is None]  # type: ignore[arg-type]
        missing = [name for name in added_later if getattr(self, name) is None]
        return [name for name in missing if name not in may_be_none]

    def __getitem__(self, key: str) -> Any:
        return json.loads(self.to_json())[key]

    def __iter__(self) -> Iterator[str]:
        return (f.name for f in fields(self))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of the software that a run used.

    Attributes:
        resfast: version of this package.
        torch: version of PyTorch, with its build, such as ``2.15.0+cu132``.
        python: version of Python.
        cuda: CUDA version that PyTorch was built with; None without CUDA.
        cudnn: version of cuDNN, such as 92600 for 9.26.0; None without cuDNN.
    """

    __pydantic_config__ = STORED

    resfast: str
    torch: str
    python: str
    cuda: str | None
    cudnn: int | None


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """Circumstances of a measurement.

    Attributes:
        threads: CPU threads of PyTorch.
        versions: versions of the software.
        date: YYYY-MM-DD, local time, at the end of the measurement.
    """

    threads: int
    versions: Versions
    date: str


@dataclass(frozen=True, kw_only=True)
class RunSeconds:
    """Seconds of one run by kind; documented in :class:`RunSummary` as ``<kind>_seconds``."""

    timed: float
    whitening: float
    train: float
    final_eval: float
    eval: float
    compile: float
    total: float


@dataclass(frozen=True, kw_only=True, eq=False)
class RunSummary(_Summary):
    """Result of one run. All accuracies are fractions from 0 to 1, all losses are in nats.

    Attributes:
        run: name of the run's folder.
        recipe: name of the recipe that the run started from.
        model: name of the preset, or ``resnet`` or ``speednet``.
        params: trainable parameters of the network.
        macs: multiply-accumulates of a forward pass of one image at full size.
        macs_by_pixels: the same for each image size used in training, by height in pixels.
        train_macs: multiply-accumulates of the forward passes of all images trained on.
        epochs: number of whole epochs trained.
        data: name of the data set.
        data_digest: hexadecimal digest of its content.
        train_images: number of training images, without the held-out ones.
        test_images: number of test images scored; 0 if they were not scored.
        test_accuracy: accuracy on the test images; None if they were not scored.
        test_loss: mean cross-entropy on the test images; None if they were not scored or it is not
            finite.
        tta: test-time augmentation: ``none``, ``flip``, ``shift`` or ``multi-crop``.
        tta_select: fraction of the images that get all views.
        tta_mirror: fraction of the images that get a mirrored view.
        tta_accuracy: accuracy on the test images with test-time augmentation; None if they were not
            scored.
        val_images: number of held-out training images.
        val_accuracy: accuracy on the held-out images; None without held-out images.
        val_tta_accuracy: the same with test-time augmentation.
        best_accuracy: highest accuracy of the evaluations during training, below 0 without any.
        best_epoch: number of epochs trained when it was reached.
        best_on: images on which it was measured.
        scored_on: images of the final evaluation, ``per_class_accuracy`` and ``confusion``.
        per_class_accuracy: accuracy by class name; None for a class without images.
        confusion: number of images by true class (rows) and predicted class (columns).
        whitening_seconds: computation of the filters of a whitening first layer; 0 without one.
        train_seconds: training, without evaluations.
        final_eval_seconds: the final evaluation with test-time augmentation.
        timed_seconds: the time to report; see ``timing_rule``.
        compile_seconds: compilation and warm-up.
        eval_seconds: all evaluations, including the final one.
        total_seconds: wall-clock time of the command, summed over all sessions.
        timing_rule: what ``timed_seconds`` includes, in words.
        peak_memory_bytes: highest memory use of any session, of the device for CUDA.
        stopped: why training ended before its last epoch (``target``, ``early_stop`` or
            ``max_seconds``); None if it did not.
        images_per_second: training images per second of ``train_seconds``.
        loader: ``resident`` or ``dali``.
        augment: the augmentation, in the notation of ``--augment``.
        device: name of the processor; for a CPU, also the number of threads.
        device_type: ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        compile: whether the training step was compiled: ``on`` or ``off``.
        batch_size: images per step.
        mean: mean of each channel of the training images, in units of pixel / 255.
        std: standard deviation of each channel, in the same units.
        torch: version of PyTorch.
        resfast: version of this package.
        threads: CPU threads of PyTorch.
        versions: versions of the software.
        date: YYYY-MM-DD, when the run ended.
        seed: random seed.
    """

    __pydantic_config__ = STORED

    run: str
    recipe: str
    model: str
    params: int
    macs: int
    macs_by_pixels: dict[int, int] | None = None
    train_macs: int | None = None
    epochs: int
    data: str
    data_digest: str
    train_images: int
    test_images: int
    test_accuracy: float | None
    test_loss: Finite
    tta: str
    tta_select: float | None = None
    tta_mirror: float | None = None
    tta_accuracy: float | None
    val_images: int | None = None
    val_accuracy: float | None = None
    val_tta_accuracy: float | None = None
    best_accuracy: float
    best_epoch: int
    best_on: EvaluatedOn
    scored_on: EvaluatedOn | None = None
    per_class_accuracy: dict[str, Finite]
    confusion: tuple[tuple[int, ...], ...]
    whitening_seconds: float | None = None
    train_seconds: float
    final_eval_seconds: float | None = None
    timed_seconds: float | None = None
    compile_seconds: float
    eval_seconds: float
    total_seconds: float | None = None
    timing_rule: str | None = None
    peak_memory_bytes: int | None = None
    stopped: str | None = None
    images_per_second: float
    loader: str | None = None
    augment: str | None = None
    device: str
    device_type: str | None = None
    precision: str
    compile: str
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    torch: str | None = None  # missing in files of versions that wrote it only to `versions`
    resfast: str | None = None
    threads: int | None = None
    versions: Versions | None = None
    date: str | None = None
    seed: int

    def headline_accuracy(self) -> tuple[AccuracyName, float]:
        """Name and value of the accuracy that a run is judged by.

        It is the accuracy with test-time augmentation if the run uses any, and on the held-out
        images if the test images were not scored.

        Raises:
            ResfastError: the summary has no accuracy.
        """
        augmented = self.tta != "none"
        if (test := self.tta_accuracy if augmented else self.test_accuracy) is not None:
            return ("tta_accuracy" if augmented else "test_accuracy"), test
        if (held_out := self.val_tta_accuracy if augmented else self.val_accuracy) is not None:
            return ("val_tta_accuracy" if augmented else "val_accuracy"), held_out
        raise ResfastError(f"the summary of {self.run} has no accuracy; evaluate that run again")

    def seconds_by_kind(self) -> RunSeconds:
        """Seconds by kind.

        Raises:
            ResfastError: an older version of resfast wrote the summary, without some of them.
        """
        whitening, final_eval = self.whitening_seconds, self.final_eval_seconds
        timed, total = self.timed_seconds, self.total_seconds
        if whitening is None or final_eval is None or timed is None or total is None:
            missing = [name for name in self.not_recorded() if name.endswith("_seconds")]
            raise ResfastError(
                f"the summary of {self.run} has no {', '.join(missing)}: an older version of "
                "resfast wrote it; train it again"
            )
        return RunSeconds(
            timed=timed,
            whitening=whitening,
            train=self.train_seconds,
            final_eval=final_eval,
            eval=self.eval_seconds,
            compile=self.compile_seconds,
            total=total,
        )


@dataclass(frozen=True, kw_only=True)
class MeanSd:
    """Mean and sample standard deviation (n - 1, None for a single run) over several runs."""

    __pydantic_config__ = STORED

    mean: float
    sd: float | None


@dataclass(frozen=True, kw_only=True)
class SecondsStatistics:
    """Statistics of the seconds of several runs, by kind as in :class:`RunSeconds`."""

    __pydantic_config__ = STORED

    timed: MeanSd
    whitening: MeanSd
    train: MeanSd
    final_eval: MeanSd
    eval: MeanSd
    compile: MeanSd
    total: MeanSd


@dataclass(frozen=True, kw_only=True)
class SeedRow:
    """One run in the common summary of several; the fields are those of :class:`RunSummary`."""

    __pydantic_config__ = STORED

    run: str
    seed: int
    test_accuracy: float | None
    tta_accuracy: float | None
    val_accuracy: float | None = None
    val_tta_accuracy: float | None = None
    best_accuracy: float
    per_class_accuracy: dict[str, Finite]
    timed_seconds: float
    whitening_seconds: float
    train_seconds: float
    final_eval_seconds: float
    eval_seconds: float
    compile_seconds: float
    total_seconds: float
    stopped: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class SeedsSummary(_Summary):
    """Result of runs that differ only in their seed.

    Fields that are not described here are as in :class:`RunSummary` and the same for all runs.

    Attributes:
        runs: number of runs requested.
        finished: number of runs finished so far.
        seeds: seeds of the finished runs, in order.
        accuracy: name of the headline accuracy, see :meth:`RunSummary.headline_accuracy`.
        accuracies: headline accuracy of each finished run, 0 to 1.
        mean: mean of ``accuracies``.
        sd: sample standard deviation (n - 1) of ``accuracies``; None for a single run.
        confidence: level of the confidence interval, 0 to 1.
        confidence_interval: confidence interval of the mean (Student's t); None for a single run.
        target: accuracy that the mean is tested against, or None.
        p_value: p-value of the one-sided t test of the mean against the target; None without a
            target and for a single run.
        seconds: statistics of the seconds of a run, by kind.
        timed_seconds: mean over the runs.
        total_seconds: wall-clock time of the whole command, summed over all sessions.
        peak_memory_bytes: maximum over the runs.
        stopped: reasons why runs ended early, sorted.
        compile_seconds: maximum over the runs: only the first one compiles.
        threads, versions, date: those of the last finished run.
        each: one row per finished run.
        run: name of the common folder.
    """

    __pydantic_config__ = STORED

    recipe: str
    model: str
    params: int
    macs: int
    train_macs: int | None = None
    data: str
    data_digest: str
    tta: str
    tta_select: float | None = None
    tta_mirror: float | None = None
    scored_on: EvaluatedOn | None = None
    test_images: int | None = None
    val_images: int | None = None
    device: str
    device_type: str | None = None
    precision: str
    runs: int
    finished: int
    seeds: tuple[int, ...]
    accuracy: AccuracyName
    accuracies: tuple[float, ...]
    mean: float
    sd: float | None
    confidence: float
    confidence_interval: tuple[float, float] | None
    target: float | None
    p_value: float | None
    seconds: SecondsStatistics
    timed_seconds: float
    total_seconds: float
    timing_rule: str
    peak_memory_bytes: int | None = None
    stopped: tuple[str, ...]
    compile_seconds: float
    threads: int | None = None
    versions: Versions | None = None
    date: str | None = None
    each: tuple[SeedRow, ...]
    run: str | None = None

    @property
    def test_accuracy(self) -> float | None:
        """Mean over the runs, 0 to 1; None if the test images were not scored."""
        found = [row.test_accuracy for row in self.each if row.test_accuracy is not None]
        return math.fsum(found) / len(found) if found else None


_RUN = pydantic.TypeAdapter(RunSummary)
_SEEDS = pydantic.TypeAdapter(SeedsSummary)
_ADAPTERS: dict[type, Any] = {RunSummary: _RUN, SeedsSummary: _SEEDS}


def read_run(path: Path) -> RunSummary:
    """Reads the ``summary.json`` of one run.

    Raises:
        ResfastError: it cannot be read, or a field is missing or of the wrong type.
    """
    return read(_RUN, path, "the summary.json of a run")


def read_seeds(path: Path) -> SeedsSummary:
    """Reads the common ``summary.json`` of several runs.

    Raises:
        ResfastError: it cannot be read, or a field is missing or of the wrong type.
    """
    return read(_SEEDS, path, "the common summary.json of several runs")
