"""Trains the variants of a study with each seed, in one process or in several that share them.

Data is decoded once, and seeds of a variant share a compiled step. Each run has a usual folder, so
that one that was interrupted continues where it stopped. A run that is being trained is locked;
the lock ends with its process.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resfast import atomic
from resfast.config.files import load
from resfast.config.schema import Config
from resfast.data.dataset import Dataset, Stream, print_to_stderr
from resfast.data.split import first_of_each_class
from resfast.errors import NonFiniteLossError, ResfastError
from resfast.runs import folder as records
from resfast.runs.lock import lock
from resfast.studies.definition import REST, REST_FACTOR, Study, Variant, with_runtime
from resfast.training import loop as trainer
from resfast.training.loop import Shared, open_configured_data

STUDY, DIVERGED, UNLABELLED = "study.json", "diverged.json", "unlabelled.npy"


@dataclass(frozen=True)
class Settings:
    """How a study is run.

    Attributes:
        quick: whether to use the options of the quick study.
        data: the data set, as ``--data`` of train names it.
        data_dir: where data sets are looked for, downloaded to and cached.
        out: folder that holds the folder of the study.
        seeds: number of seeds; None for that of the study.
        variants: names of the variants to train; empty for all.
        device, precision, threads: as in train; None keeps the study's.
    """

    quick: bool = False
    data: str = "auto"
    data_dir: Path = Path("data")
    out: Path = Path("studies")
    seeds: int | None = None
    variants: tuple[str, ...] = ()
    device: str | None = None
    precision: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Unit:
    """A variant with a seed.

    Attributes:
        variant: the variant.
        seed: the seed.
        path: folder of the run.
    """

    variant: Variant
    seed: int
    path: Path

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end, or its loss has become infinite or NaN."""
        return (self.path / records.SUMMARY).exists() or self.is_diverged

    @property
    def is_diverged(self) -> bool:
        """Whether its loss has become infinite or NaN."""
        return (self.path / DIVERGED).exists()


@dataclass
class Progress:
    """What a process has done.

    Attributes:
        trained: number of runs that it finished.
        training_seconds: of their training and evaluations, compilation included.
        seconds: of these runs in all; opening the data, once, and waiting for others not included.
    """

    trained: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class Runner:
    """Trains the runs of a study that are not finished.

    Args:
        study: the study.
        settings: how it is run.
        say: called with a line of text before each run.

    Raises:
        ResfastError: an unknown variant, fewer than one seed, or a folder that cannot be written or
            holds the study with other options.
    """

    study: Study
    settings: Settings
    say: Callable[[str], None] = print_to_stderr
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        settings, study = self.settings, self.study
        seeds = study.seed_count(settings.quick) if settings.seeds is None else settings.seeds
        if seeds < 1:
            raise ResfastError(f"--seeds {seeds} is out of range: expected at least 1")
        self.path = settings.out.expanduser() / study.name
        names = settings.variants or [variant.name for variant in study.variants]
        self.variants = self._with_needed([study.variant(name) for name in names])
        self.units = [
            Unit(variant, seed, self._folder(variant) / f"seed{seed}")
            for variant in self.variants
            for seed in range(seeds)
        ]
        self._data: dict[tuple[int, bool], Dataset | Stream] = {}
        atomic.make_folder(self.path, "--out")
        atomic.make_folder(self.path / "locks", "--out")
        self._record()

    def _with_needed(self, chosen: Sequence[Variant]) -> list[Variant]:
        """The chosen variants and those whose runs they start from, in the study's order."""
        names = {variant.name for variant in chosen}
        for variant in reversed(self.study.variants):
            if variant.name in names:
                names |= set(self.study.needs(variant).values())
        return [variant for variant in self.study.variants if variant.name in names]

    def finished(self) -> list[Unit]:
        """All finished runs of the study, also of variants that are not trained now."""
        found = []
        for variant in self.study.variants:
            paths = self._folder(variant).glob("seed*")
            numbers = (path.name.removeprefix("seed") for path in paths)
            seeds = sorted(int(number) for number in numbers if number.isdecimal())
            units = (Unit(variant, n, self._folder(variant) / f"seed{n}") for n in seeds)
            found += [unit for unit in units if unit.is_finished]
        return found

    def _folder(self, variant: Variant) -> Path:
        return self.path / "runs" / variant.name

    def _record(self) -> None:
        """Writes what the study is, or checks that the folder has the same one."""
        quick, settings = self.settings.quick, self.settings
        now: dict[str, Any] = {
            "study": self.study.name,
            "quick": quick,
            "data": settings.data,
            "precision": settings.precision,
            "variants": {v.name: self.study.values(v, quick) for v in self.study.variants},
        }
        now = json.loads(json.dumps(now))
        path = self.path / STUDY
        with lock(self.path / "locks" / "study", wait=True):
            before = _read_record(path)
            for name, value in before.items():
                if name != "variants" and now.get(name) != value:
                    raise ResfastError(
                        f"{self.path} has this study with {name} {json.dumps(value)}, not "
                        f"{json.dumps(now.get(name))}; choose another --out, or delete it"
                    )
            for variant, values in before.get("variants", {}).items():
                if now["variants"].get(variant, values) != values:
                    raise ResfastError(
                        f"{self.path} has the variant {variant} with other options than "
                        f"{self.study.name} has now; choose another --out, or delete it"
                    )
            atomic.save(path, (json.dumps(now, indent=2) + "\n").encode())

    def train(self, after_run: Callable[[], object] = lambda: None) -> None:
        """Trains until all runs are finished, by this process or by others.

        Args:
            after_run: called after each run of this process.

        Raises:
            ResfastError: bad input, or files that cannot be read or written.
            KeyboardInterrupt: SIGINT or SIGTERM came; the run was saved.
        """
        while pending := [unit for unit in self.units if not unit.is_finished]:
            ready = [unit for unit in pending if self._is_ready(unit)]
            before = self.progress.trained
            for unit, shared in self._with_shared(ready):
                with lock(self._lock(unit), wait=False) as is_held:
                    if is_held and not unit.is_finished:
                        self._train(unit, shared)
                        after_run()
            if self.progress.trained == before:  # others train all that is ready
                with lock(self._lock(ready[0]), wait=True):
                    pass

    def _with_shared(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Shared]]:
        """Units with what those of one variant share; a teacher differs from seed to seed."""
        shared, name = Shared(), None
        for unit in units:
            if unit.variant.name != name or self.study.needs(unit.variant):
                shared, name = Shared(), unit.variant.name
                if torch.cuda.is_initialized():
                    gc.collect()  # the last variant's network, which is in reference cycles
            yield unit, shared

    def _lock(self, unit: Unit) -> Path:
        return self.path / "locks" / f"{unit.variant.name}-seed{unit.seed}"

    def _needed(self, unit: Unit) -> dict[str, Unit]:
        return {
            option: next(u for u in self.units if u.variant.name == name and u.seed == unit.seed)
            for option, name in self.study.needs(unit.variant).items()
        }

    def _is_ready(self, unit: Unit) -> bool:
        needed = self._needed(unit).values()
        for other in needed:
            if other.is_diverged:
                raise ResfastError(
                    f"variant {unit.variant.name} starts from {other.path}, whose loss became "
                    "infinite or NaN; leave the variant out with --variants"
                )
        return all(other.is_finished for other in needed)

    def _train(self, unit: Unit, shared: Shared) -> None:
        number = self.units.index(unit) + 1
        self.say(f"run {number} of {len(self.units)}: {unit.variant.name}, seed {unit.seed}")
        saved = load(unit.path / records.CONFIG) if self._has_config(unit) else None
        config = self.config(unit) if saved is None else replace(saved, run=self._run(unit))
        shared.data = self._open(config)
        start = time.perf_counter()
        if saved is None:
            config = self._with_unlabelled(unit, config, shared.data)
        try:
            summary = trainer.train(
                config, resume=None if saved is None else unit.path, shared=shared
            ).summary
        except NonFiniteLossError as error:
            reason = {"message": str(error), "seconds": time.perf_counter() - start}
            records.write_text(unit.path / DIVERGED, json.dumps(reason) + "\n")
            self.say(f"{unit.variant.name}, seed {unit.seed}: {error}")
            shared.step = None
            seconds = math.inf
        else:
            kinds = summary.seconds_by_kind()
            seconds = kinds.train + kinds.eval + kinds.compile + kinds.whitening
        elapsed = time.perf_counter() - start
        self.progress.trained += 1
        self.progress.training_seconds += min(seconds, elapsed)  # it has those before a resume too
        self.progress.seconds += elapsed

    def _has_config(self, unit: Unit) -> bool:
        """Whether a run has begun."""
        return (unit.path / records.CONFIG).exists()

    def _run(self, unit: Unit) -> Any:
        config = self.study.config(unit.variant, self.settings.quick)
        return replace(config.run, name=unit.path.name, out=unit.path.parent, plots=False)

    def config(self, unit: Unit) -> Config:
        """The configuration of a new run, but for images without labels."""
        settings = self.settings
        config = self.study.config(unit.variant, settings.quick)
        given = self.study.values(unit.variant, settings.quick)
        names = ("distill_temperature", "distill_weight", "pseudo_threshold")
        late = {name: given.get(name) for name in names}
        late |= {option: other.path for option, other in self._needed(unit).items()}
        config = with_runtime(
            config,
            {
                "data": settings.data,
                "data_dir": settings.data_dir,
                "device": settings.device,
                "precision": settings.precision,
                "threads": settings.threads,
                "seed": unit.seed,
                **late,
            },
        )
        return replace(config, run=self._run(unit))

    def _open(self, config: Config) -> Dataset | Stream:
        """The data set of a run, which is opened once."""
        key = config.data.image_size, config.data.skip_corrupt
        if key not in self._data:
            self._data[key] = open_configured_data(config, self.say)
        return self._data[key]

    def _with_unlabelled(self, unit: Unit, config: Config, data: Dataset | Stream) -> Config:
        """The configuration with the images that ``unlabelled = "rest"`` stands for."""
        if self.study.values(unit.variant, self.settings.quick).get("unlabelled") != REST:
            return config
        path = self.path / UNLABELLED
        if not path.exists():
            if isinstance(data, Stream):
                raise ResfastError(f"study {self.study.name} needs its images in memory")
            count, labels = config.data.max_images, data.train_labels
            rest = torch.zeros(len(labels), dtype=torch.bool)
            rest[first_of_each_class(labels, (1 + REST_FACTOR) * count)] = True
            rest[first_of_each_class(labels, count)] = False
            if not bool(rest.any()):
                raise ResfastError(
                    f"{data.name} has no images beyond the first {count:,}, which "
                    f"study {self.study.name} takes as images without labels; choose another --data"
                )
            with atomic.replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, data.train_images[rest].numpy())
        return with_runtime(config, {"unlabelled": path})


def _read_record(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResfastError(f"cannot read {path} ({error}); restore it or delete it") from None
