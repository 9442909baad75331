"""The trials of a sweep, in one process or several that share a file of SQLite."""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from resfast import atomic
from resfast.config.recipes import decide
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.training.sweep import results
from resfast.training.sweep.space import Space, without_test_images
from resfast.training.sweep.trial import REASON, RUN, Trainer

STORAGE, LOCK, SPACE = "study.db", ".sweep.lock", "space.toml"
MAX_RETRIES = 3
"""Times that a trial is tried again after its process was killed."""
BUSY_SECONDS = 120
"""How long a process waits for the lock of SQLite."""
_COUNTED = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class SweepResult:
    """A sweep whose trials are done.

    Attributes:
        path: its folder.
        study: Optuna's study.
        best: the best trial; None if none was completed.
    """

    path: Path
    study: optuna.Study
    best: FrozenTrial | None


def sweep(
    space: Space,
    base: Config,
    path: Path,
    *,
    trials: int,
    heartbeat_s: int = 60,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Runs trials until the study has ``trials`` of them, together with other processes.

    Every process that is started with the same folder takes trials from the same study, and
    returns when all are done. A process that is killed stops its heartbeat; after two intervals
    another one marks its trial as failed and resumes it from its checkpoint. Trials that were
    pruned or refused count, failed ones do not.

    Args:
        space: what is searched.
        base: configuration of the base options, see :func:`resfast.cli.train.undecided`.
        path: folder of the sweep, made if it is missing.
        trials: number of trials of the whole study.
        heartbeat_s: seconds between signs of life of a trial's process.
        say: called with a line of text for each notable step.

    Raises:
        ResfastError: a folder of another space, data that cannot be opened, a bad base
            configuration, or files that cannot be written.
        KeyboardInterrupt: SIGINT or SIGTERM came; the running trial is saved, and the next process
            goes on with it.
    """
    without_test_images(decide(base))
    atomic.make_folder(path, "--out")
    lock = filelock.FileLock(path / LOCK)
    with _quiet():
        study = _open(space, path, lock, heartbeat_s)
        trainer = Trainer(space, base, path / "trials", say)
        trainer.data(decide(base))  # so that missing data is one error, not one per trial

        def after_trial(number: int) -> None:
            with lock:
                results.write(path, study, space, base, with_plots=False)
            say(_line(study, study.trials[number], trials))

        _run(study, trainer, lock, trials, heartbeat_s, after_trial, say)
        with lock:
            results.write(path, study, space, base, with_plots=True)
    return SweepResult(path, study, results.best(study))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own log, and its warnings that heartbeats are experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _open(space: Space, path: Path, lock: filelock.BaseFileLock, heartbeat_s: int) -> optuna.Study:
    """The study of a folder, made if it is missing.

    Raises:
        ResfastError: the folder has a study of another space, or a damaged one.
    """
    with lock:  # two processes must not both make the tables
        saved = path / SPACE
        if saved.exists() and saved.read_text(encoding="utf-8") != space.text:
            raise ResfastError(
                f"{path} has a sweep of another space, see {saved}; choose another --out, or "
                "restore the file"
            )
        _check_database(path / STORAGE)
        storage = RDBStorage(
            f"sqlite:///{path.absolute() / STORAGE}",
            engine_kwargs={"connect_args": {"timeout": BUSY_SECONDS}},
            heartbeat_interval=heartbeat_s,
            grace_period=2 * heartbeat_s,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
        )
        study = optuna.create_study(
            storage=storage,
            study_name="sweep",
            direction=space.direction,
            load_if_exists=True,
            pruner=_pruner(space),
        )
        atomic.save(saved, space.text.encode())
    return study


def _check_database(path: Path) -> None:
    """Raises ``ResfastError`` for a file that SQLite finds damaged."""
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise ResfastError(
            f"{path} cannot be read as the study of a sweep ({found.splitlines()[0]}); choose "
            "another --out, or restore the file"
        )


def _pruner(space: Space) -> optuna.pruners.BasePruner:
    if space.pruner == "none":
        return optuna.pruners.NopPruner()
    if space.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, space.warmup_epochs))
    if space.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, space.warmup_epochs))
    # Optuna counts steps from 0: with n_warmup_steps=1, its first pruning is at our epoch 1.
    return optuna.pruners.MedianPruner(
        n_startup_trials=space.startup_trials, n_warmup_steps=space.warmup_epochs + 1
    )


def _run(
    study: optuna.Study,
    trainer: Trainer,
    lock: filelock.BaseFileLock,
    trials: int,
    heartbeat_s: int,
    after_trial: Callable[[int], None],
    say: Callable[[str], None],
) -> None:
    """Runs trials until the study has enough of them and none is running.

    The lock is held from counting the trials until this process's next one is among them, so that
    several processes together run exactly the number asked for.
    """
    running: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        lock.release()
        running.append(trial.number)
        return trainer.objective(trial)

    waited = False
    while True:
        lock.acquire()
        try:
            fail_stale_trials(study)
            found = study.get_trials(deepcopy=False)
            if sum(trial.state in _COUNTED for trial in found) < trials:
                # A new seed for each trial: with the same one, each process would suggest the same.
                study.sampler = optuna.samplers.TPESampler(
                    seed=(trainer.space.seed * _SEED_STRIDE + len(found)) % 2**32,
                    constant_liar=True,
                )
                running.clear()
                study.optimize(objective, n_trials=1)
                after_trial(running[0])
                continue
            busy = [trial.number for trial in found if trial.state == TrialState.RUNNING]
        except KeyboardInterrupt:
            if running and study.trials[running[0]].state == TrialState.FAIL:
                _try_again(study, study.trials[running[0]])
            raise
        finally:
            if lock.is_locked:
                lock.release()
        if not busy:
            return
        if not waited:
            say(f"waiting for trial {', '.join(map(str, busy))} of another process")
            waited = True
        time.sleep(min(heartbeat_s, 5))


def _try_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Lets the next process go on with a trial that was interrupted."""
    RetryHeartbeatStaleTrialCallback()(study, trial)


def _line(study: optuna.Study, trial: FrozenTrial, trials: int) -> str:
    """A finished trial in one line."""
    found = study.get_trials(deepcopy=False)
    done = sum(one.state in (TrialState.COMPLETE, TrialState.PRUNED) for one in found)
    if trial.state == TrialState.COMPLETE:
        text = f"{trial.value:.4f}"
    else:
        epochs = len(trial.intermediate_values)
        reason = trial.user_attrs.get(REASON, "")
        text = f"{results.state_of(trial)} after {epochs} evaluations: {reason}"
    best = results.best(study)
    record = "" if best is None else f"; best {best.value:.4f} (trial {best.number})"
    name = trial.user_attrs.get(RUN, "")
    return f"trial {trial.number} ({done} of {trials} done, {name}): {text}{record}"


def counts(study: optuna.Study) -> dict[str, Any]:
    """Number of trials by state, in words."""
    found: dict[str, int] = {}
    for trial in study.get_trials(deepcopy=False):
        name = results.state_of(trial)
        found[name] = found.get(name, 0) + 1
    return found
