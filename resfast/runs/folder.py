"""The folder of a run: ``config.json``, ``metrics.jsonl``, ``summary.json``, weights and plots."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from resfast import __version__, atomic
from resfast.config.files import load, to_json
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.runs.epoch_row import EpochRow, row_values, rows_to_lines
from resfast.runs.lock import FOLDER_LOCK
from resfast.runs.summary import Circumstances, RunSummary, SeedsSummary, Versions

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
CHECKPOINT, WEIGHTS, BEST = "checkpoint.pt", "model.safetensors", "best.safetensors"
PREVIOUS = "checkpoint-previous.pt"
CURVES, CONFUSION, STEPS = "curves.png", "confusion.png", "steps.csv"
logger = logging.getLogger("resfast")
TIMING_RULE = (
    "timed_seconds = whitening + training + final evaluation with test-time augmentation: all that "
    "depends on the training images or produces the final predictions. Not in it: compiling and "
    "warm-up on dummy data, loading data (with its channel mean and deviation), other evaluations."
)
"""What ``timed_seconds`` of a summary includes: the rule of airbench (Jordan, arXiv:2404.00498)."""


def circumstances() -> Circumstances:
    """Threads, versions and today's date, for the summary of a measurement."""
    return Circumstances(
        threads=torch.get_num_threads(),
        versions=Versions(
            resfast=__version__,
            torch=str(torch.__version__),
            python=platform.python_version(),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        ),
        date=time.strftime("%Y-%m-%d"),
    )


def config_of(path: Path) -> Config:
    """The configuration of a run's folder.

    Raises:
        ResfastError: it cannot be read; or the run was killed before it was written.
    """
    if is_unstarted(path):
        raise ResfastError(
            f"{path} has nothing to resume: the run was killed before it wrote {CONFIG}; train it "
            f"again with --name {path.name}"
        )
    return load(path / CONFIG)


def has_checkpoint(path: Path) -> bool:
    """Whether a run's folder has a state to resume from, the latest or the one before."""
    return any((path / name).exists() for name in (CHECKPOINT, PREVIOUS))


def is_unstarted(path: Path) -> bool:
    """Whether a folder has nothing but what a run leaves that is killed before it begins."""
    return path.is_dir() and all(
        child.name == FOLDER_LOCK or atomic.is_temporary(child) for child in path.iterdir()
    )


def run_folder(config: Config, network_name: str) -> Path:
    """Creates the folder of a new run, or of several runs that differ in their seed.

    A folder of the run's name that was left by one that was killed before it began is taken.

    Raises:
        ResfastError: the name is invalid or taken, or the folder cannot be created.
    """
    name = config.run.name
    seeds = f"seed{config.runtime.seed}"
    if config.run.runs > 1:
        seeds = f"seeds{config.runtime.seed}-{config.runtime.seed + config.run.runs - 1}"
    if name is None:
        data = config.data.data.removeprefix("folder:").rstrip("/")
        data = Path(data).name.split(".")[0] or "folder"
        name = f"{config.recipe}-{network_name}-{data}-{seeds}-{time.strftime('%Y%m%d-%H%M%S')}"
    elif Path(name).name != name or name in (".", ".."):
        raise ResfastError(f"run name {name!r} must be a plain folder name; --out sets where it is")
    path = config.run.out / name
    try:
        config.run.out.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            try:
                path.mkdir()
                return path
            except FileExistsError:
                if config.run.name is not None and is_unstarted(path):
                    logger.warning("%s was left by a run that was killed: starting over", path)
                    return path
                if config.run.name is not None:
                    raise ResfastError(
                        f"run {path} exists; continue it with --resume {path}, or choose another "
                        "--name"
                    ) from None
                number += 1
                path = config.run.out / f"{name}-{number}"
    except OSError as error:
        raise ResfastError(
            f"cannot create the run's folder {path}: {error.strerror}; choose another --out"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replaces a text file of a run atomically.

    Raises:
        ResfastError: the file cannot be written; the old one is intact.
    """
    atomic.save(path, text.encode())


def write_config(path: Path, config: Config) -> None:
    """Writes the configuration of a run."""
    write_text(path / CONFIG, to_json(config))


def write_metrics(path: Path, history: Iterable[EpochRow]) -> None:
    """Writes all rows, one per epoch, so that the file always matches the checkpoint."""
    write_text(path / METRICS, rows_to_lines(history))


def write_summary(path: Path, summary: RunSummary | SeedsSummary) -> None:
    """Writes the summary of one run, or of several with different seeds."""
    write_text(path / SUMMARY, summary.to_json())


class Loggers:
    """Logs to TensorBoard and Weights & Biases, if enabled."""

    def __init__(self, path: Path, config: Config) -> None:
        self.tensorboard = self.wandb = None
        if config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(path / "tensorboard"))
        if config.run.wandb:
            import wandb

            self.wandb = wandb.init(
                project="resfast",
                name=path.name,
                id=path.name,
                dir=str(path),
                config=json.loads(to_json(config)),
                resume="allow",
            )

    def log(self, row: EpochRow) -> None:
        """Logs the values of a finished epoch."""
        values = {
            name: value for name, value in row_values(row).items() if isinstance(value, float)
        }
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, row.epoch)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=row.epoch)

    def close(self, summary: RunSummary) -> None:
        """Closes both loggers; Weights & Biases gets the result of the run."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.summary.update(json.loads(summary.to_json()))
            self.wandb.finish()
