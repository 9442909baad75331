"""Progress output of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from resfast.runs.epoch_row import EpochRow

HEADER = (
    "  epoch  lr        train loss  train acc  {set:>4} loss  {set:>4} acc  images/s  seconds"
    "     left"
)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Display:
    """Reports a run to a console.

    Args:
        console: where to print; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.evaluated_on = "test"

    def say(self, line: str) -> None:
        """Prints one plain line, above the bar if there is one."""
        self.console.print(line, markup=False)

    def start(self, epochs: int, steps: int, evaluated_on: str) -> None:
        """Starts the display of training: ``steps`` batches in total, in ``epochs`` epochs."""
        self.epochs, self.evaluated_on = epochs, evaluated_on
        self.say(HEADER.format(set=evaluated_on))
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=4,
                transient=True,
            )
            self.task = self.progress.add_task("", total=steps, epoch=0, status="")
            self.progress.start()

    def step(
        self,
        done: int,
        epoch: int,
        loss: float,
        accuracy: float,
        lr: float,
        images_per_second: float,
    ) -> None:
        """Moves the bar to ``done`` batches; NaN means not known yet and is not shown."""
        if self.progress is None:
            return
        parts = [f"lr {lr:.2g}"]
        if math.isfinite(loss):
            parts.insert(0, f"loss {loss:.3f}  accuracy {accuracy:.1%}")
        if images_per_second:
            parts.append(f"{images_per_second:,.0f} images/s")
        self.progress.update(self.task, completed=done, epoch=epoch + 1, status="  ".join(parts))

    def epoch(self, row: EpochRow, left: float) -> None:
        """Prints the line of a finished epoch; ``left`` is the estimated time left, in seconds."""
        loss, accuracy = row.eval_loss, row.eval_accuracy
        width = max(4, len(self.evaluated_on)) + 5
        cells = [
            f"{row.epoch:>3}/{self.epochs:<3}",
            f"{row.lr:<8.3g}",
            f"{row.train_loss:>10.4f}",
            f"{row.train_accuracy:>9.2%}",
            f"{'-' if loss is None else f'{loss:.4f}':>{width}}",
            f"{'-' if accuracy is None else f'{accuracy:.2%}':>{width - 1}}",
            f"{row.images_per_second:>8,.0f}",
            f"{row.train_seconds:>7.1f}",
            f"{_duration(left):>7}",
        ]
        self.say("  ".join(cells))

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
