"""Plots of a run. They are optional: one that cannot be drawn is logged and skipped."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from resfast import atomic
from resfast.runs.epoch_row import EpochRow
from resfast.text import printable

logger = logging.getLogger("resfast")

matplotlib.use("Agg")

TRAIN, EVAL, RATE = "#1f5fa8", "#d1495b", "#5b7f3a"


def plain(text: str) -> str:
    """``text`` for matplotlib to draw literally: printable characters only, and no mathtext."""
    return printable(text).replace("$", r"\$")


@contextlib.contextmanager
def optional(path: Path) -> Iterator[None]:
    """Guards the drawing of the plot ``path``: a failure is logged with its reason, not raised.

    On failure an older plot of that name is removed, since it does not show the new result.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001  # a plot must not cost the result that it shows
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        logger.warning("continuing without the plot %s: %s", path, reason)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    atomic.save(path, buffer.getvalue())


def save_curves(
    path: Path,
    history: Sequence[EpochRow],
    title: str,
    rates: Sequence[tuple[float, float]] = (),
) -> None:
    """Loss, accuracy and learning rate over the epochs of ``history``.

    Args:
        path: PNG to write.
        history: a row for each epoch.
        title: of the figure.
        rates: epochs trained and learning rate, for each step; by default those of ``history``.

    Raises no error: see :func:`optional`.
    """
    with optional(path):
        save(_curves(history, title, rates), path)


def _curves(
    history: Sequence[EpochRow], title: str, rates: Sequence[tuple[float, float]] = ()
) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(plain(title), fontsize=10)
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row.epoch for row in history]
    evaluated = [(row, row.eval_accuracy) for row in history if row.eval_accuracy is not None]
    eval_epochs = [row.epoch for row, _ in evaluated]
    eval_set = history[-1].eval_set if history else "test"
    marker = "o" if len(epochs) < 15 else None

    loss.plot(epochs, [r.train_loss for r in history], color=TRAIN, marker=marker, label="train")
    eval_loss = [row.eval_loss for row, _ in evaluated]
    loss.plot(eval_epochs, eval_loss, color=EVAL, marker=marker, label=eval_set)
    loss.set_ylabel("loss (nats)")
    loss.legend(frameon=False)

    train_accuracy = [100 * row.train_accuracy for row in history]
    eval_accuracy = [100 * value for _, value in evaluated]
    accuracy.plot(epochs, train_accuracy, color=TRAIN, marker=marker, label="train (augmented)")
    accuracy.plot(eval_epochs, eval_accuracy, color=EVAL, marker=marker, label=eval_set)
    accuracy.set_ylabel("accuracy (%)")
    accuracy.legend(frameon=False, loc="lower right")

    if rates:
        rate.plot(*zip(*rates, strict=True), color=RATE)
    else:
        rate.plot(epochs, [row.lr for row in history], color=RATE, marker=marker)
    rate.set_ylabel("learning rate")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_confusion(path: Path, confusion: Tensor, classes: tuple[str, ...]) -> None:
    """Confusion matrix, in percent of each true class. Raises no error: see :func:`optional`.

    Args:
        path: PNG to write.
        confusion: int64 ``[classes, classes]``, true class by predicted class.
        classes: names of the classes.
    """
    with optional(path):
        save(_confusion(confusion, classes), path)


def _confusion(confusion: Tensor, classes: tuple[str, ...]) -> Figure:
    count = len(classes)
    side = min(4 + 0.35 * count, 24)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    percent = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    if count <= 30:
        for row in range(count):
            for column in range(count):
                value = float(percent[row, column])
                if value >= 0.05:
                    color = "white" if value > 55 else "black"
                    text = f"{value:.1f}"
                    axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
        names = [plain(name) for name in classes]
        axes.set_xticks(range(count), names, rotation=45, ha="right")
        axes.set_yticks(range(count), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")
    return figure


def save_corruptions(
    path: Path, errors: Mapping[str, Sequence[float]], mean: float, title: str
) -> None:
    """Error under each corruption and severity, and their means. Raises no error, see
    :func:`optional`.

    Args:
        path: PNG to write.
        errors: for each corruption, the error at the severities from 1, 0 to 1.
        mean: mean error.
        title: of the figure.
    """
    with optional(path):
        save(_corruptions(errors, mean, title), path)


def _corruptions(errors: Mapping[str, Sequence[float]], mean: float, title: str) -> Figure:
    severities = len(next(iter(errors.values())))
    figure = Figure(figsize=(7.2, 1.7 + 0.32 * len(errors)), layout="constrained")
    figure.suptitle(plain(title), fontsize=10)
    axes = figure.subplots()
    rows = [[*values, sum(values) / len(values)] for values in errors.values()]
    percent = [[100 * value for value in row] for row in rows]
    image = axes.imshow(percent, cmap="YlOrRd", vmin=0, vmax=100, aspect="auto")
    for row, values in enumerate(percent):
        for column, value in enumerate(values):
            color = "white" if value > 65 else "black"
            weight = "bold" if column == severities else "normal"
            axes.text(
                column, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize=8,
                fontweight=weight,
            )  # fmt: skip
    axes.axvline(severities - 0.5, color="white", linewidth=4)
    axes.set_xticks(range(severities + 1), [*map(str, range(1, severities + 1)), "mean"])
    axes.set_yticks(range(len(errors)), [plain(kind.replace("_", " ")) for kind in errors])
    axes.set_xlabel(f"severity (mean error {mean:.1%})")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="error (%)")
    return figure
