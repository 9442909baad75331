"""One trial of a sweep: a run with the suggested values, which may be pruned or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna

from resfast.config.files import load
from resfast.config.recipes import decide
from resfast.config.recipes.family import with_values
from resfast.config.schema import Config
from resfast.config.validate import check, check_network
from resfast.data.dataset import Dataset, Stream
from resfast.errors import NonFiniteLossError, ResfastError
from resfast.inference.scoring import Evaluation
from resfast.runs import folder as records
from resfast.runs.epoch_row import read_rows
from resfast.training import loop
from resfast.training.loop import Result, Shared
from resfast.training.sweep.space import Space, without_test_images

RUN, REASON, REFUSED, SECONDS = "run", "reason", "refused", "seconds"
"""User attributes of a trial: name of its run, why it has no value, whether its values are why
(and not the pruner), and the seconds that it took."""
MAX_REFUSED = 5
"""A sweep ends if this many trials were refused and none could be trained."""


@dataclass
class Trainer:
    """Trains the trials of one process.

    Attributes:
        space: what is searched.
        base: configuration of the base options, with values left undecided that depend on others.
        folder: where the runs are.
        say: called with a line of text for each notable step.
        trained: number of trials that could be trained.
        refused: number of trials that could not.
    """

    space: Space
    base: Config
    folder: Path
    say: Callable[[str], None]
    trained: int = 0
    refused: int = 0
    _data: dict[tuple[int, str], Dataset | Stream] = field(default_factory=dict)

    def objective(self, trial: optuna.Trial) -> float:
        """Trains one trial and returns its objective.

        A trial that another process left unfinished is resumed from its last checkpoint. The
        parameter budget is a constraint that is known before training, so a network above it is
        pruned without any value: the sampler then ranks it below all others, and it does not
        distort the importances, as a made-up accuracy of 0 would.

        Raises:
            optuna.TrialPruned: it is worse than others, its network is above the parameter budget,
                its values do not fit each other, or its loss is not finite.
            ResfastError: the first trials are all refused, so that the space is at fault; or a run
                that has begun cannot go on.
        """
        values = {one.name: one.suggest(trial) for one in self.space.parameters}
        name = trial.user_attrs.get(RUN, f"trial{trial.number:04d}")
        trial.set_user_attr(RUN, name)
        try:
            result = self._train(trial, values, self.folder / name)
        except optuna.TrialPruned as pruned:
            trial.set_user_attr(REASON, str(pruned))
            self.trained += 1
            raise
        except NonFiniteLossError as error:
            self.trained += 1
            raise self._refuse(trial, error) from None
        except ResfastError as error:
            if (self.folder / name / records.CONFIG).is_file():
                raise  # it has begun: the disk or the data are at fault, and not the values
            self.refused += 1
            if not self.trained and self.refused >= MAX_REFUSED:
                raise ResfastError(
                    f"the first {self.refused} trials were all refused, the last because: {error}"
                ) from None
            raise self._refuse(trial, error) from None
        self.trained += 1
        trial.set_user_attr(SECONDS, result.summary.timed_seconds)
        return self._value(result)

    @staticmethod
    def _refuse(trial: optuna.Trial, error: ResfastError) -> optuna.TrialPruned:
        trial.set_user_attr(REASON, str(error))
        trial.set_user_attr(REFUSED, True)
        return optuna.TrialPruned(str(error))

    def config_of(self, values: dict[str, Any], name: str) -> Config:
        """The configuration of a trial, as its options on the command line would give it."""
        config = without_test_images(decide(with_values(self.base, values)))
        return replace(config, run=replace(config.run, name=name, out=self.folder, runs=1))

    def _train(self, trial: optuna.Trial, values: dict[str, Any], path: Path) -> Result:
        shared = Shared()

        def report(epochs: int, found: Evaluation) -> None:
            value = found.loss if self.space.objective == "loss" else found.accuracy
            trial.report(value, epochs)
            # After the last epoch there is nothing to save, and the value would be lost.
            is_last = epochs >= load(path / records.CONFIG).optim.epochs
            if not is_last and trial.should_prune():
                raise optuna.TrialPruned(f"worse than others after {epochs} epochs")

        if (path / records.CONFIG).is_file():
            self.say(f"trial {trial.number}: resuming {path}")
            self._report_earlier(trial, path)
            return loop.train(resume=path, shared=shared, after_evaluation=report)
        config = self.config_of(values, path.name)
        check(config)
        check_network(config)
        shared.data = self.data(config)
        shown = ", ".join(f"{name} {value}" for name, value in trial.params.items())
        self.say(f"trial {trial.number}: {shown}")
        return loop.train(config, shared=shared, after_evaluation=report)

    def _report_earlier(self, trial: optuna.Trial, path: Path) -> None:
        """Reports the evaluations before an interruption, which are not made again."""
        if not (path / records.METRICS).is_file():
            return
        for row in read_rows(path / records.METRICS):
            value = row.eval_loss if self.space.objective == "loss" else row.eval_accuracy
            if value is not None:
                trial.report(value, row.epoch)

    def data(self, config: Config) -> Dataset | Stream:
        """The data of a trial, opened once for each image size."""
        key = config.data.image_size, config.data.loader
        if key not in self._data:
            self._data[key] = loop.open_configured_data(config, self.say)
        return self._data[key]

    def _value(self, result: Result) -> float:
        """The objective of a finished run."""
        summary = result.summary
        if self.space.objective == "loss":
            losses = [row.eval_loss for row in read_rows(result.path / records.METRICS)]
            found = next((loss for loss in reversed(losses) if loss is not None), None)
        elif self.space.objective == "tta_accuracy":
            found = summary.val_tta_accuracy
        else:
            found = summary.val_accuracy
        if found is None:
            raise ResfastError(f"{result.path} has no {self.space.objective} on held-out images")
        return found
