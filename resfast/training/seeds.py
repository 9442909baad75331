"""One training, or the same one with several seeds and what their results say together."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from resfast import atomic
from resfast.config.compare import differences
from resfast.config.files import load
from resfast.config.paths import absolute_paths
from resfast.config.schema import Config
from resfast.config.validate import check
from resfast.errors import ResfastError
from resfast.runs import folder as records
from resfast.runs.statistics import CONFIDENCE, Statistics, p_value, statistics
from resfast.training import loop as trainer
from resfast.training.display import Display
from resfast.training.loop import Interrupted, Result, Shared

SECONDS = ("timed", "whitening", "train", "final_eval", "eval", "compile", "total")
"""Kinds of seconds of a run; its summary has them as ``<kind>_seconds``."""
_SAME = (
    *("model", "params", "macs", "train_macs", "data", "data_digest"),
    *("tta", "tta_select", "tta_mirror", "scored_on", "test_images", "val_images"),
    *("device", "device_type", "precision"),
)


def train(
    config: Config | None = None,
    *,
    resume: str | Path | None = None,
    started: float | None = None,
) -> Result:
    """Trains one network, or with ``config.run.runs`` above 1 one for each seed.

    With several, the seeds are ``config.runtime.seed`` and those after it. Each run has a folder of
    its own below a common one and ends with the same bits as if it had been trained alone; what was
    compiled serves all. ``config.evaluation.target`` then stops nothing: it is what the mean
    accuracy is tested against. The common ``summary.json`` is written anew after every run.

    Args:
        config: what to train; with ``resume`` it may be left out.
        resume: the folder of a run to go on with, or the common folder of several.
        started: ``time.perf_counter()`` when the command began (None: now).

    Returns:
        The finished run; of several the common folder, its summary and the last network.

    Raises:
        ResfastError: bad input, or files that cannot be read or written.
        NonFiniteLossError: the loss became infinite or NaN; runs before it are in the summary.
        Interrupted: SIGINT or SIGTERM came; all was saved and can be resumed.
    """
    saved = None if resume is None else load(Path(resume) / records.CONFIG)
    count = (config or saved or Config()).run.runs
    if saved is not None and (count > 1) != (saved.run.runs > 1):
        raise ResfastError(
            f"--runs {count} does not fit {resume}, which is "
            f"{'one run' if saved.run.runs == 1 else f'a folder of {saved.run.runs} runs'}; "
            "leave it out, or start anew without --resume"
        )
    if count == 1:
        return trainer.train(config, resume=resume, started=started)
    return _Runs(config or saved, saved, None if resume is None else Path(resume), started).train()


class _Runs:
    """State of several trainings."""

    def __init__(
        self, config: Config, saved: Config | None, path: Path | None, started: float | None
    ) -> None:
        self.started = time.perf_counter() if started is None else started
        self.display = Display()
        check(config)
        self.before_seconds = 0.0
        if path is None:
            path = records.run_folder(config, config.model.model)
        else:
            if differing := differences(saved, config):
                name, (before, now) = next(iter(differing.items()))
                raise ResfastError(
                    f"cannot resume {path} with another configuration: {name} was {before!r} and "
                    f"is now {now!r}; leave that option out, or start anew without --resume"
                )
            with contextlib.suppress(OSError, ValueError, KeyError):  # none was finished yet
                summary = json.loads((path / records.SUMMARY).read_bytes())
                self.before_seconds = summary["total_seconds"]
        self.config, self.path = config, path
        records.write_config(path, absolute_paths(config))
        first = config.runtime.seed
        self.seeds = range(first, first + config.run.runs)
        self.finished: list[dict[str, Any]] = []

    def train(self) -> Result:
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
        if model is None:  # all were there already
            model = trainer.train(resume=self.path / _folder(self.seeds[-1])).model
        return Result(self.path, self._summary(), model)

    def _one(self, seed: int, shared: Shared) -> tuple[dict[str, Any], torch.nn.Module | None]:
        path = self.path / _folder(seed)
        if (path / records.SUMMARY).exists():
            return _read_summary(path), None
        config = replace(
            self.config,
            evaluation=replace(self.config.evaluation, target=None),
            runtime=replace(self.config.runtime, seed=seed),
            run=replace(self.config.run, runs=1, name=path.name, out=self.path),
        )
        if (path / records.CONFIG).exists():
            resumed = replace(load(path / records.CONFIG), run=config.run)
            result = trainer.train(resumed, resume=path, shared=shared)
        else:
            if path.exists():  # killed before it had written anything
                atomic.remove_stale(path, older_than_s=0)
                path.rmdir()
            result = trainer.train(config, shared=shared)
        return result.summary, result.model

    def _summary(self) -> dict[str, Any]:
        total = self.before_seconds + time.perf_counter() - self.started
        target = self.config.evaluation.target
        return summarize(self.finished, self.config, target, total) | {"run": self.path.name}

    def _say(self, summary: dict[str, Any]) -> None:
        name, accuracy = counted(summary)
        accuracies = [counted(other)[1] for other in self.finished]
        found = statistics(accuracies)
        spread = "" if found.sd is None else f" ± {found.sd:.2%}"
        self.display.say(
            f"seed {summary['seed']} ({len(accuracies)} of {len(self.seeds)}): {accuracy:.2%} "
            f"({name}) in {summary['timed_seconds']:.1f} s; mean {found.mean:.2%}{spread}"
        )


def _folder(seed: int) -> str:
    return f"seed{seed}"


def _read_summary(path: Path) -> dict[str, Any]:
    file = path / records.SUMMARY
    try:
        summary = json.loads(file.read_bytes())
        counted(summary)
        return {**summary, **{f"{kind}_seconds": summary[f"{kind}_seconds"] for kind in SECONDS}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResfastError(
            f"{file} cannot be read as the result of a run ({error}); delete it to evaluate that "
            "run again"
        ) from None


def counted(summary: dict[str, Any]) -> tuple[str, float]:
    """The accuracy of a run that counts, by its name in the summary: with test-time augmentation
    where there is some, of the held-out part where the test set was not scored."""
    for part in ("", "val_"):
        plain, augmented = f"{part or 'test_'}accuracy", f"{part}tta_accuracy"
        name = plain if summary["tta"] == "none" else augmented
        if summary.get(name) is not None:
            return name, summary[name]
    raise KeyError("tta_accuracy")


def summarize(
    finished: list[dict[str, Any]], config: Config, target: float | None, total_seconds: float
) -> dict[str, Any]:
    """The common summary of runs that differ in their seed alone.

    Args:
        finished: summaries of the runs, at least one.
        config: what they were trained from.
        target: accuracy that the mean is tested against, if any.
        total_seconds: wall clock of the whole command, all its sessions together.

    Returns:
        What ``summary.json`` says.
    """
    name = counted(finished[0])[0]
    accuracies = [counted(summary)[1] for summary in finished]
    found = statistics(accuracies)
    return {
        "recipe": config.recipe,
        **{key: finished[0].get(key) for key in _SAME},
        "runs": config.run.runs,
        "finished": len(finished),
        "seeds": [summary["seed"] for summary in finished],
        "accuracy": name,
        "accuracies": accuracies,
        "mean": found.mean,
        "sd": found.sd,
        "confidence": CONFIDENCE,
        "confidence_interval": None if found.low is None else [found.low, found.high],
        "target": target,
        "p_value": None if target is None else p_value(accuracies, target),
        "seconds": {kind: _mean_sd([s[f"{kind}_seconds"] for s in finished]) for kind in SECONDS},
        "timed_seconds": statistics([s["timed_seconds"] for s in finished]).mean,
        "total_seconds": total_seconds,
        "timing_rule": records.TIMING_RULE,
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in finished),
        "stopped": sorted({s["stopped"] for s in finished if s["stopped"]}),
        "compile_seconds": max(summary["compile_seconds"] for summary in finished),
        **{key: finished[-1].get(key, value) for key, value in records.circumstances().items()},
        "each": [
            {
                "run": summary["run"],
                "seed": summary["seed"],
                **{key: value for key, value in summary.items() if key.endswith("accuracy")},
                **{f"{kind}_seconds": summary[f"{kind}_seconds"] for kind in SECONDS},
                "stopped": summary["stopped"],
            }
            for summary in finished
        ],
    }


def _mean_sd(values: list[float]) -> dict[str, float | None]:
    found: Statistics = statistics(values)
    return {key: asdict(found)[key] for key in ("mean", "sd")}


def headline(summary: dict[str, Any]) -> str:
    """The summary of a run, or what :func:`summarize` found, in a few lines."""
    if "finished" not in summary:
        return _headline_of_one(summary)
    count, mean, name = summary["finished"], summary["mean"], summary["accuracy"]
    lines = [f"{count} of {summary['runs']} runs: {name} {mean:.2%}"]
    if summary["sd"] is not None:
        low, high = summary["confidence_interval"]
        lines[0] += (
            f" ± {summary['sd']:.2%} (standard deviation), {summary['confidence']:.0%} confidence "
            f"interval of the mean {low:.2%} to {high:.2%}"
        )
    if summary["target"] is not None:
        tested = "one run cannot be tested"
        if summary["p_value"] is not None:
            tested = f"p = {summary['p_value']:.3g} (t test, H0: the mean is below it)"
        reached = "at least" if mean >= summary["target"] else "below"
        lines.append(f"mean {reached} the target {summary['target']:.2%}: {tested}")
    parts = []
    for kind in SECONDS:
        of = summary["seconds"][kind]
        spread = "" if of["sd"] is None else f" ± {of['sd']:.2f}"
        parts.append(f"{kind.replace('_', ' ')} {of['mean']:.2f}{spread}")
    lines.append(f"seconds a run: {', '.join(parts)}")
    lines.append(f"whole command {summary['total_seconds']:.1f} s")
    return "\n".join(lines)


def _headline_of_one(summary: dict[str, Any]) -> str:
    parts = [("test ", ""), ("held-out ", "val_")]
    accuracies = []
    for what, prefix in parts:
        plain = summary.get(f"{prefix or 'test_'}accuracy")
        if plain is not None:
            text = f"{what}accuracy {plain:.2%}"
            if summary["tta"] != "none":
                text += (
                    f", with test-time augmentation ({summary['tta']}) "
                    f"{summary[f'{prefix}tta_accuracy']:.2%}"
                )
            accuracies.append(text)
    timed = (
        f"{summary['timed_seconds']:.1f} s timed: {summary['train_seconds']:.1f} training "
        f"({summary['images_per_second']:,.0f} images/s) + {summary['final_eval_seconds']:.1f} "
        "final evaluation"
    )
    if summary["whitening_seconds"]:
        timed += f" + {summary['whitening_seconds']:.2f} whitening"
    other = (
        f"not in it: {summary['compile_seconds']:.1f} s compiling, "
        f"{summary['eval_seconds'] - summary['final_eval_seconds']:.1f} s other evaluations; "
        f"{summary['total_seconds']:.1f} s in all"
    )
    return f"{'; '.join(accuracies)}\n{timed}\n{other}"
