#!/usr/bin/env bash
# Optuna 5.0.0's matplotlib plot_contour draws a row and a column of axes for a parameter that has had
# one value in all trials (a categorical with one choice, or one that a search has settled on), but
# leaves all of them without data, labels or ticks' names, and says nothing: a third of the figure is
# blank for three parameters. (It also needs SciPy, which Optuna does not install: NameError without.)
#
# Seen on 2026-11-30 (Matplotlib 3.11.2): 3x3 axes; the 5 in the last row and column are without data
# and without labels, those of the other two parameters have both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet optuna==5.0.0 matplotlib==3.11.2 scipy==1.17.1
venv/bin/python - <<'END'
import warnings

import matplotlib

matplotlib.use("Agg")
import optuna

warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)


def objective(trial):
    trial.suggest_categorical("kind", ["only"])
    return trial.suggest_float("a", 0, 1) + trial.suggest_float("b", 0, 1)


study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
study.optimize(objective, n_trials=10)
axes = optuna.visualization.matplotlib.plot_contour(study, params=["a", "b", "kind"])
blank = [
    (row, column)
    for row in range(3)
    for column in range(3)
    if not axes[row, column].get_xlabel() and not axes[row, column].get_ylabel()
]
print(axes.shape, "without labels:", blank)
assert axes.shape == (3, 3)
assert blank == [(0, 2), (1, 2), (2, 0), (2, 1), (2, 2)], blank
assert not any(axes[place].has_data() for place in blank)
assert axes[0, 1].has_data() and axes[1, 0].has_data()
END
