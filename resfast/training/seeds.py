"""One training, or the same one with several seeds and the statistics of their results."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import nn

from resfast import atomic
from resfast.config.compare import check_same
from resfast.config.files import load
from resfast.config.paths import absolute_paths
from resfast.config.recipes import decide
from resfast.config.recipes.family import decided_like
from resfast.config.schema import Config
from resfast.config.validate import check
from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs.find import with_single_runs
from resfast.runs.lock import locked_folder, remove_left_lock
from resfast.runs.statistics import CONFIDENCE, p_value, statistics
from resfast.runs.summary import (
    MeanSd,
    RunSummary,
    SecondsStatistics,
    SeedRow,
    SeedsSummary,
    read_run,
    read_seeds,
)
from resfast.training import loop as trainer
from resfast.training.display import Display
from resfast.training.loop import Interrupted, Result, Shared

logger = logging.getLogger("resfast")


@dataclass(frozen=True)
class SeedsResult:
    """Several finished runs that differ in their seed.

    Attributes:
        path: their common folder.
        summary: statistics over the runs; it is saved as ``summary.json`` in that folder.
        model: the network of the last run in eval mode, on its device.
    """

    path: Path
    summary: SeedsSummary
    model: nn.Module


def train(
    config: Config | None = None,
    *,
    resume: str | Path | None = None,
    started: float | None = None,
) -> Result | SeedsResult:
    """Trains one network, or with ``config.run.runs`` above 1 one for each seed.

    With several, the seeds are ``config.runtime.seed`` and those after it. Each run has its own
    folder below a common one and ends with the same bits as if it had been trained alone; the
    compiled step is shared. ``config.evaluation.target`` then does not stop a run: the mean
    accuracy is tested against it. The common ``summary.json`` is rewritten after every run.

    Args:
        config: what to train; with ``resume`` it may be left out.
        resume: the folder of a run to continue, or the common folder of several.
        started: ``time.perf_counter()`` when the command began (None: now).

    Returns:
        The finished run, or with ``config.run.runs`` above 1 all of them.

    Raises:
        ResfastError: bad input, or files that cannot be read or written.
        NonFiniteLossError: the loss became infinite or NaN; earlier runs are in the summary.
        Interrupted: SIGINT or SIGTERM came; everything was saved and can be resumed.
    """
    saved = None if resume is None else records.config_of(Path(resume))
    count = (config or saved or Config()).run.runs
    if saved is not None and (count > 1) != (saved.run.runs > 1):
        raise ResfastError(
            f"--runs {count} does not fit {resume}, which is "
            f"{'one run' if saved.run.runs == 1 else f'a folder of {saved.run.runs} runs'}; "
            "leave it out, or start a new run without --resume"
        )
    if count == 1:
        return trainer.train(config, resume=resume, started=started)
    path = None if resume is None else Path(resume)
    return _SeedsTraining(config or saved, saved, path, started).train()


class _SeedsTraining:
    """Trains several seeds one after another.

    Args:
        config: what to train, with the first seed and the number of runs.
        saved: the configuration in ``path``; None for new runs.
        path: the common folder of runs to continue; None for new runs.
        started: ``time.perf_counter()`` when the command began (None: now).

    Attributes:
        before_seconds: wall-clock seconds of earlier sessions.
        seeds: seeds of all runs.
        finished: summaries of the finished runs, in the order of ``seeds``.

    Raises:
        ResfastError: bad input, or the folder cannot be made or written.
    """

    def __init__(
        self, config: Config, saved: Config | None, path: Path | None, started: float | None
    ) -> None:
        self.started = time.perf_counter() if started is None else started
        self.display = Display()
        if saved is None:
            config = decide(with_single_runs(config, self.display.say))
        check(config)
        self.before_seconds = 0.0
        if path is None:
            path = records.run_folder(config, config.model.model)
        else:
            check_same(saved, config, path)
            self.before_seconds = _seconds_before(path / records.SUMMARY)
        self.config, self.path = config, path
        records.write_config(path, absolute_paths(config))
        first = config.runtime.seed
        self.seeds = range(first, first + config.run.runs)
        self.finished: list[RunSummary] = []

    def train(self) -> SeedsResult:
        """Trains the seeds that are not finished yet."""
        with locked_folder(self.path):
            atomic.remove_stale(self.path, older_than_s=0)
            return self._train()

    def _train(self) -> SeedsResult:
        shared, model = Shared(), None
        for seed in self.seeds:
            try:
                summary, trained = self._one(seed, shared)
            except KeyboardInterrupt as error:
                if self.finished:
                    records.write_summary(self.path, self._summary())
                    self.display.say(headline(self._summary()))
                raise Interrupted(self.path, getattr(error, "signum", 2)) from None
            model = trained or model
            self.finished.append(summary)
            records.write_summary(self.path, self._summary())
            self._say(summary)
        if model is None:  # all were finished before
            model = trainer.train(resume=self.path / _folder(self.seeds[-1])).model
        return SeedsResult(self.path, self._summary(), model)

    def _one(self, seed: int, shared: Shared) -> tuple[RunSummary, nn.Module | None]:
        """The result of a seed, and its network unless the run was finished before."""
        path, epochs = self.path / _folder(seed), self.config.optim.epochs
        saved = load(path / records.CONFIG) if (path / records.CONFIG).exists() else None
        is_longer = saved is not None and epochs is not None and epochs != saved.optim.epochs
        if (path / records.SUMMARY).exists() and not is_longer and _has_plots(path, self.config):
            remove_left_lock(path)
            return _read_summary(path), None
        config = replace(
            self.config,
            evaluation=replace(self.config.evaluation, target=None),
            runtime=replace(self.config.runtime, seed=seed),
            run=replace(self.config.run, runs=1, name=path.name, out=self.path),
        )
        if saved is not None:
            resumed = replace(saved, run=config.run)
            if is_longer:
                resumed = replace(resumed, optim=replace(resumed.optim, epochs=epochs))
            result = trainer.train(resumed, resume=path, shared=shared)
        else:
            if self.finished:  # all seeds have the same values, also with more epochs than before
                first = load(self.path / _folder(self.seeds[0]) / records.CONFIG)
                config = decided_like(config, first)
            result = trainer.train(config, shared=shared)
        return result.summary, result.model

    def _summary(self) -> SeedsSummary:
        total = self.before_seconds + time.perf_counter() - self.started
        target = self.config.evaluation.target
        return summarize(self.finished, self.config, target, total, self.path.name)

    def _say(self, summary: RunSummary) -> None:
        name, accuracy = summary.headline_accuracy()
        found = statistics([other.headline_accuracy()[1] for other in self.finished])
        spread = "" if found.sd is None else f" ± {found.sd:.2%}"
        self.display.say(
            f"seed {summary.seed} ({found.count} of {len(self.seeds)}): {accuracy:.2%} "
            f"({name}) in {summary.timed_seconds:.1f} s; mean {found.mean:.2%}{spread}"
        )


def _has_plots(path: Path, config: Config) -> bool:
    """Whether a finished run has the plots that it was asked for; it may be killed before them."""
    files = (records.CURVES, records.CONFUSION)
    return not config.run.plots or all((path / name).is_file() for name in files)


def _folder(seed: int) -> str:
    return f"seed{seed}"


def _seconds_before(path: Path) -> float:
    """Wall-clock seconds of the earlier sessions of several runs, from their common summary."""
    if not path.exists():  # no run was finished yet
        return 0.0
    try:
        return read_seeds(path).total_seconds
    except ResfastError as error:
        logger.warning("counting the seconds of this session only: %s", error)
        return 0.0


def _read_summary(path: Path) -> RunSummary:
    try:
        summary = read_run(path / records.SUMMARY)
        summary.headline_accuracy()
        summary.seconds_by_kind()
    except ResfastError as error:
        raise ResfastError(
            f"{path / records.SUMMARY} cannot be read as the result of a run ({error}); delete it "
            "to evaluate that run again"
        ) from None
    return summary


def summarize(
    finished: Sequence[RunSummary],
    config: Config,
    target: float | None,
    total_seconds: float,
    name: str,
) -> SeedsSummary:
    """The common summary of runs that differ only in their seed.

    Args:
        finished: summaries of the runs, at least one.
        config: configuration of the runs.
        target: accuracy, 0 to 1, that the mean is tested against; None for no test.
        total_seconds: wall-clock seconds of the whole command over all its sessions.
        name: name of the common folder.

    Returns:
        The summary, with values that all runs share taken from the first.

    Raises:
        ResfastError: a run has no accuracy, or an older version of resfast measured fewer seconds.
    """
    first, last = finished[0], finished[-1]
    accuracies = [run.headline_accuracy()[1] for run in finished]
    found = statistics(accuracies)
    seconds = [run.seconds_by_kind() for run in finished]
    now = records.circumstances()
    return SeedsSummary(
        recipe=config.recipe,
        model=first.model,
        params=first.params,
        macs=first.macs,
        train_macs=first.train_macs,
        data=first.data,
        data_digest=first.data_digest,
        tta=first.tta,
        tta_select=first.tta_select,
        tta_mirror=first.tta_mirror,
        scored_on=first.scored_on,
        test_images=first.test_images,
        val_images=first.val_images,
        device=first.device,
        device_type=first.device_type,
        precision=first.precision,
        runs=config.run.runs,
        finished=len(finished),
        seeds=tuple(run.seed for run in finished),
        accuracy=first.headline_accuracy()[0],
        accuracies=tuple(accuracies),
        mean=found.mean,
        sd=found.sd,
        confidence=CONFIDENCE,
        confidence_interval=None if found.low is None else (found.low, found.high),
        target=target,
        p_value=None if target is None else p_value(accuracies, target),
        seconds=SecondsStatistics(
            timed=_mean_sd([run.timed for run in seconds]),
            whitening=_mean_sd([run.whitening for run in seconds]),
            train=_mean_sd([run.train for run in seconds]),
            final_eval=_mean_sd([run.final_eval for run in seconds]),
            eval=_mean_sd([run.eval for run in seconds]),
            compile=_mean_sd([run.compile for run in seconds]),
            total=_mean_sd([run.total for run in seconds]),
        ),
        timed_seconds=statistics([run.timed for run in seconds]).mean,
        total_seconds=total_seconds,
        timing_rule=records.TIMING_RULE,
        peak_memory_bytes=max(
            (run.peak_memory_bytes for run in finished if run.peak_memory_bytes is not None),
            default=None,
        ),
        stopped=tuple(sorted({run.stopped for run in finished if run.stopped})),
        compile_seconds=max(run.compile for run in seconds),
        threads=now.threads if last.threads is None else last.threads,
        versions=now.versions if last.versions is None else last.versions,
        date=now.date if last.date is None else last.date,
        each=tuple(map(_row, finished)),
        run=name,
    )


def _row(summary: RunSummary) -> SeedRow:
    seconds = summary.seconds_by_kind()
    return SeedRow(
        run=summary.run,
        seed=summary.seed,
        test_accuracy=summary.test_accuracy,
        tta_accuracy=summary.tta_accuracy,
        val_accuracy=summary.val_accuracy,
        val_tta_accuracy=summary.val_tta_accuracy,
        best_accuracy=summary.best_accuracy,
        per_class_accuracy=summary.per_class_accuracy,
        timed_seconds=seconds.timed,
        whitening_seconds=seconds.whitening,
        train_seconds=seconds.train,
        final_eval_seconds=seconds.final_eval,
        eval_seconds=seconds.eval,
        compile_seconds=seconds.compile,
        total_seconds=seconds.total,
        stopped=summary.stopped,
    )


def _mean_sd(values: Sequence[float]) -> MeanSd:
    found = statistics(values)
    return MeanSd(mean=found.mean, sd=found.sd)


def headline(summary: RunSummary | SeedsSummary) -> str:
    """The result of a run, or of several with different seeds, in a few lines."""
    if isinstance(summary, SeedsSummary):
        return _headline_of_several(summary)
    return _headline_of_one(summary)


def _headline_of_several(summary: SeedsSummary) -> str:
    accuracy = f"{summary.finished} of {summary.runs} runs: {summary.accuracy} {summary.mean:.2%}"
    if summary.confidence_interval is not None:
        low, high = summary.confidence_interval
        accuracy += (
            f" ± {summary.sd:.2%} (standard deviation), {summary.confidence:.0%} confidence "
            f"interval of the mean {low:.2%} to {high:.2%}"
        )
    lines = [accuracy]
    if summary.target is not None:
        tested = "one run cannot be tested"
        if summary.p_value is not None:
            tested = f"p = {summary.p_value:.3g} (t test, H0: the mean is below it)"
        reached = "at least" if summary.mean >= summary.target else "below"
        lines.append(f"mean {reached} the target {summary.target:.2%}: {tested}")
    parts = []
    for kind in fields(summary.seconds):
        found: MeanSd = getattr(summary.seconds, kind.name)
        spread = "" if found.sd is None else f" ± {found.sd:.2f}"
        parts.append(f"{kind.name.replace('_', ' ')} {found.mean:.2f}{spread}")
    lines.append(f"seconds a run: {', '.join(parts)}")
    lines.append(f"whole command {summary.total_seconds:.1f} s")
    return "\n".join(lines)


def _headline_of_one(summary: RunSummary) -> str:
    accuracies = []
    for images, plain, augmented in (
        ("test", summary.test_accuracy, summary.tta_accuracy),
        ("held-out", summary.val_accuracy, summary.val_tta_accuracy),
    ):
        if plain is not None:
            text = f"{images} accuracy {plain:.2%}"
            if summary.tta != "none":
                text += f", with test-time augmentation ({summary.tta}) {augmented:.2%}"
            accuracies.append(text)
    seconds = summary.seconds_by_kind()
    timed = (
        f"{seconds.timed:.1f} s timed: {seconds.train:.1f} training "
        f"({summary.images_per_second:,.0f} images/s) + {seconds.final_eval:.1f} "
        "final evaluation"
    )
    if seconds.whitening:
        timed += f" + {seconds.whitening:.2f} whitening"
    other = (
        f"not in it: {seconds.compile:.1f} s compiling, "
        f"{seconds.eval - seconds.final_eval:.1f} s other evaluations; "
        f"{seconds.total:.1f} s in all"
    )
    return f"{'; '.join(accuracies)}\n{timed}\n{other}"
