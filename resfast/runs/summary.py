"""The result of a run as a type, and ``summary.json`` from and to it.

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
    """What both kinds of summary can do.

    A summary can be read by key too, for code older than these classes: ``summary["versions"]`` is
    what ``summary.json`` has there, with lists for tuples and dictionaries for other classes. New
    code reads attributes, whose types a type checker knows.
    """

    def to_json(self) -> str:
        """The text of ``summary.json``."""
        return json.dumps(_ADAPTERS[type(self)].dump_python(self), indent=2) + "\n"

    def not_recorded(self) -> list[str]:
        """Names of the fields that the version of resfast that wrote the summary did not have."""
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
        resfast: of this package.
        torch: of PyTorch, with its build, as in ``2.15.0+cu132``.
        python: of Python.
        cuda: of the CUDA that PyTorch was built with; None without.
        cudnn: of cuDNN, as in 92600 for 9.26.0; None without.
    """

    __pydantic_config__ = STORED

    resfast: str
    torch: str
    python: str
    cuda: str | None
    cudnn: int | None


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """Under what circumstances something was measured.

    Attributes:
        threads: CPU threads of PyTorch.
        versions: of the software.
        date: YYYY-MM-DD, local time, at the end of the measurement.
    """

    threads: int
    versions: Versions
    date: str


@dataclass(frozen=True, kw_only=True)
class RunSeconds:
    """Seconds of one run by kind; :class:`RunSummary` documents them as ``<kind>_seconds``."""

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
        macs_by_pixels: the same by height and width of the image in pixels, for each size that the
            run trained at.
        train_macs: multiply-accumulates of one forward pass of every image trained on.
        epochs: whole epochs trained.
        data: name of the data set.
        data_digest: hexadecimal digest of its content.
        train_images: images of the training set, without those held out.
        test_images: test images that were scored; 0 where they were not.
        test_accuracy: on the test images; None where they were not scored.
        test_loss: mean cross-entropy of the test images; None where they were not scored or it is
            not finite.
        tta: test-time augmentation: ``none``, ``flip``, ``shift`` or ``multi-crop``.
        tta_select: fraction of the images that get all views.
        tta_mirror: fraction of the images that get a mirrored view.
        tta_accuracy: on the test images with test-time augmentation; None where not scored.
        val_images: images held out of the training set.
        val_accuracy: on the images held out; None without such.
        val_tta_accuracy: on the images held out, with test-time augmentation; None without such.
        best_accuracy: highest accuracy of the evaluations during training, below 0 for none.
        best_epoch: epochs trained when it was reached.
        best_on: images that it was measured on.
        scored_on: images that the final figures, ``per_class_accuracy`` and ``confusion`` are of.
        per_class_accuracy: by name of the class; None for a class without images.
        confusion: images by true class (rows) and predicted class (columns).
        whitening_seconds: computing the filters of a whitening first layer; 0 without one.
        train_seconds: training, without evaluations.
        final_eval_seconds: the final evaluation with test-time augmentation.
        timed_seconds: what counts, see ``timing_rule``.
        compile_seconds: compiling and warm-up.
        eval_seconds: all evaluations, the final one included.
        total_seconds: wall clock of the command, all its sessions together.
        timing_rule: what ``timed_seconds`` includes, in words.
        peak_memory_bytes: highest memory use of any session, on CUDA of the device.
        stopped: why training ended before its last epoch (``target``, ``early_stop`` or
            ``max_seconds``); None where it did not.
        images_per_second: training images per second of ``train_seconds``.
        loader: ``resident`` or ``dali``.
        augment: the augmentation, in the notation of ``--augment``.
        device: name of the processor, for a CPU with its threads.
        device_type: ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        compile: whether the training step was compiled: ``on`` or ``off``.
        batch_size: images per step.
        mean: of each channel of the training images, in units of pixel / 255.
        std: standard deviation of each channel, in units of pixel / 255.
        torch: version of PyTorch.
        resfast: version of this package.
        threads: CPU threads of PyTorch.
        versions: of the software.
        date: YYYY-MM-DD, when the run ended.
        seed: of the random numbers.
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
    torch: str | None = None  # for some time only within versions
    resfast: str | None = None
    threads: int | None = None
    versions: Versions | None = None
    date: str | None = None
    seed: int

    def headline_accuracy(self) -> tuple[AccuracyName, float]:
        """The name and the value of the accuracy that a run is judged by.

        It is with test-time augmentation if the run has it, and of the images held out if the test
        images were not scored.

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
    """Mean and sample standard deviation (n - 1) over runs; None for a single run."""

    __pydantic_config__ = STORED

    mean: float
    sd: float | None


@dataclass(frozen=True, kw_only=True)
class SecondsStatistics:
    """Seconds of a run over several runs, by kind as in :class:`RunSeconds`."""

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
    """One of several runs in their common summary; its fields are those of :class:`RunSummary`."""

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
    """Result of the same run with several seeds.

    Fields that are not described here are those of :class:`RunSummary`, the same for all runs.

    Attributes:
        runs: runs asked for.
        finished: runs finished so far.
        seeds: of the finished runs, in order.
        accuracy: name of the headline accuracy, see :meth:`RunSummary.headline_accuracy`.
        accuracies: headline accuracy of each finished run, 0 to 1.
        mean: of ``accuracies``.
        sd: sample standard deviation (n - 1) of ``accuracies``; None for a single run.
        confidence: level of the confidence interval, 0 to 1.
        confidence_interval: of the mean (Student's t); None for a single run.
        target: accuracy that the mean is tested against; None for none.
        p_value: of the one-sided t test of the mean against the target; None without a target and
            for a single run.
        seconds: of a run, by kind.
        timed_seconds: mean of the runs.
        total_seconds: wall clock of the whole command, all its sessions together.
        peak_memory_bytes: highest of all runs.
        stopped: reasons for which runs were cut short, sorted.
        compile_seconds: highest of all runs, which is that of the run that compiled.
        threads, versions, date: of the last finished run.
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
        """Mean over the runs, 0 to 1; None where the test images were not scored."""
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
