"""What a sweep found: ``results.csv``, ``best.toml``, and two plots of the options."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from resfast import atomic
from resfast.config.files import load, to_toml
from resfast.config.schema import Config, RunConfig
from resfast.runs import folder as records
from resfast.runs import plots
from resfast.training.sweep.space import Space
from resfast.training.sweep.trial import REASON, REFUSED, RUN, SECONDS

RESULTS, BEST, IMPORTANCE, CONTOUR = "results.csv", "best.toml", "importance.png", "contour.png"
MIN_COMPLETE = 3
"""Completed trials that importances and contours need."""
MAX_CONTOUR_PARAMETERS = 4
"""The contour plot has the most important options with several values, at most this many."""


def best(study: optuna.Study) -> FrozenTrial | None:
    """The best completed trial, or None."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return study.best_trial if done else None


def state_of(trial: FrozenTrial) -> str:
    """``complete``, ``pruned``, ``refused``, ``failed``, ``running`` or ``waiting``.

    A refused trial could not be trained: its network is above the parameter budget, its values do
    not fit each other, or its loss was not finite.
    """
    if trial.state == TrialState.PRUNED and trial.user_attrs.get(REFUSED):
        return "refused"
    return {"fail": "failed"}.get(trial.state.name.lower(), trial.state.name.lower())


def write(path: Path, study: optuna.Study, space: Space, base: Config, *, with_plots: bool) -> None:
    """Writes the files of a sweep's results, each atomically.

    Args:
        path: folder of the sweep.
        study: the study.
        space: what was searched.
        base: the base configuration, which says whether the best run scores the test images.
        with_plots: draw importances and contours too, which takes seconds.

    Raises:
        ResfastError: a file cannot be written. A plot that cannot be drawn is logged and left out.
    """
    trials = study.get_trials(deepcopy=False)
    atomic.save(path / RESULTS, _csv(trials, space).encode())
    if (found := best(study)) is not None:
        atomic.save(path / BEST, _best(path, found, space, base).encode())
    if (
        with_plots
        and len([trial for trial in trials if trial.state == TrialState.COMPLETE]) >= MIN_COMPLETE
    ):
        _plots(path, study)


def _csv(trials: list[FrozenTrial], space: Space) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [parameter.name for parameter in space.parameters]
    head = ["trial", "state", space.objective, "evaluations", "seconds", "run", "retry_of"]
    writer.writerow([*head, *names, "reason"])
    for trial in trials:
        writer.writerow(
            [
                trial.number,
                state_of(trial),
                "" if trial.value is None else f"{trial.value:.6g}",
                len(trial.intermediate_values),
                "" if (s := trial.user_attrs.get(SECONDS)) is None else f"{s:.3f}",
                trial.user_attrs.get(RUN, ""),
                trial.system_attrs.get("failed_trial", ""),
                *(trial.params.get(name, "") for name in names),
                trial.user_attrs.get(REASON, ""),
            ]
        )
    return text.getvalue()


def _best(path: Path, trial: FrozenTrial, space: Space, base: Config) -> str:
    """The configuration of the best trial, which scores the test images if the options do."""
    run = path / "trials" / trial.user_attrs[RUN]
    config = load(run / records.CONFIG)
    config = replace(
        config,
        run=RunConfig(),
        evaluation=replace(config.evaluation, score_test=base.evaluation.score_test),
    )
    values = ", ".join(f"{name} {value}" for name, value in trial.params.items())
    lines = (
        f"# Trial {trial.number} of a sweep: {space.objective} {trial.value:.6g}, held-out images.",
        f"# {values}".replace("\n", " "),
        "# Train it with: resfast train --config best.toml",
    )
    return "\n".join(lines) + "\n\n" + to_toml(config)


def importances(study: optuna.Study) -> dict[str, float]:
    """Importance of each option, largest first; empty with too few completed trials."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < MIN_COMPLETE or len({trial.value for trial in done}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _plots(path: Path, study: optuna.Study) -> None:
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as drawing

    found: dict[str, float] = {}
    try:
        with plots.optional(path / IMPORTANCE):
            found = importances(study)
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            if found:
                axes = drawing.plot_param_importances(study, evaluator=evaluator)
                _save(axes.figure, path / IMPORTANCE)
        with plots.optional(path / CONTOUR):
            done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            vary = [name for name in found if len({trial.params[name] for trial in done}) > 1]
            names = vary[:MAX_CONTOUR_PARAMETERS]
            if len(names) > 1:
                drawn = drawing.plot_contour(study, params=names)
                figure = drawn.figure if hasattr(drawn, "figure") else drawn.flat[0].figure
                figure.set_size_inches(3.2 * max(2, len(names)), 2.8 * max(2, len(names)))
                _save(figure, path / CONTOUR)
    finally:
        pyplot.close("all")


def _save(figure: Figure, path: Path) -> None:
    """Writes a figure of Optuna's, whose labels may lie outside of it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    atomic.save(path, buffer.getvalue())
