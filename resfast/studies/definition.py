"""A study as data: a TOML file of variants, seeds, claims and figures, read and checked here.

``catalog/`` has the studies of this package. Options are named as the fields of the configuration
(:mod:`resfast.config.schema`), and are checked against it when a file is read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pydantic

from resfast.config.files import describe
from resfast.config.recipes import RECIPES, check_name
from resfast.config.recipes.conditions import GROUP_OF
from resfast.config.schema import ADAPTER, Config
from resfast.config.validate import check
from resfast.data.augment import parse_augment
from resfast.errors import ResfastError, nearest

CATALOG = Path(__file__).parent / "catalog"
BASES = CATALOG / "bases.toml"
"""Options that several studies start from."""
RUN_OF = "run of "
"""A path in an option that is the run of another variant with the same seed."""
REST = "rest"
"""Value of ``unlabelled``: training images after the first ``max_images``."""
REST_FACTOR = 2
"""Number of those, in ``max_images``; fewer if the data set has no more."""
_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
_PATHS = ("teacher", "pseudo_from", "init_from")
_GROUP_OF = GROUP_OF | {"record": "run"}
Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the trainings that a study compares.

    Attributes:
        name: of its folder and in tables.
        about: what the report says about it.
        options: its options, which replace those of the study.
        quick: options that replace these in the quick study.
        parameters: number of parameters for 10 classes; a test checks it.
        stated: the number of parameters in the report's words.
        reported: accuracy that the report states, 0 to 1.
        group: variants that a figure shows together.
    """

    __pydantic_config__ = _STRICT

    name: str
    about: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    stated: str = ""
    reported: float | None = None
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement that the accuracies can support or contradict: the report's, in words or by its
    figures, or ours.

    One of these is set: ``better`` and ``worse``, ``alike``, or ``variant`` and ``at_least``.

    Attributes:
        text: the statement.
        better, worse: variants of which the first has the higher accuracy.
        alike: variants whose accuracies do not differ.
        variant: a variant with a mean accuracy of ``at_least``, 0 to 1.
        is_ours: whether the report leaves it open.
    """

    __pydantic_config__ = _STRICT

    text: str
    better: str | None = None
    worse: str | None = None
    alike: tuple[str, ...] = ()
    variant: str | None = None
    at_least: float | None = None
    is_ours: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Variants that it is about."""
        named = (self.better, self.worse, self.variant)
        return (*(name for name in named if name is not None), *self.alike)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure of a study.

    Attributes:
        kind: ``accuracy`` of each variant; ``curves`` over the epochs; accuracy over
            ``parameters``; ``seconds`` of an epoch; ``band`` between the lowest and highest value
            of a column of ``steps.csv`` over the variants of each group; ``ensemble``: accuracy of
            the runs of each variant together.
        column: of ``steps.csv``, for ``band``.
        label: of its axis, for ``band``.
        logarithmic: whether that axis is.
    """

    __pydantic_config__ = _STRICT

    kind: Literal["accuracy", "curves", "parameters", "seconds", "band", "ensemble"]
    column: str = ""
    label: str = ""
    logarithmic: bool = False

    @property
    def file(self) -> str:
        """Name of its PNG file."""
        return f"{self.column.replace('_', '-') or self.kind}.png"


@dataclass(frozen=True, kw_only=True)
class Quick:
    """What the quick study changes.

    Attributes:
        seeds: number of seeds.
        options: replace those of the study.
    """

    __pydantic_config__ = _STRICT

    seeds: int = 3
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study.

    Attributes:
        name: of its file.
        title: in a few words.
        report: number of the report that it repeats.
        about: what is compared, and which of the settings are ours.
        base: table of ``bases.toml`` that the options start from.
        seeds: number of seeds, from 0.
        options: of all variants.
        quick: what the quick study changes.
        variants: in the order in which they are trained.
        claims: of the report.
        plots: the figures.
    """

    __pydantic_config__ = _STRICT

    name: str
    title: str
    report: str
    about: str = ""
    base: str
    seeds: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    quick: Quick = field(default_factory=Quick)
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...] = ()
    plots: tuple[Plot, ...] = (Plot(kind="accuracy"),)

    def seed_count(self, quick: bool) -> int:
        """Number of seeds."""
        return self.quick.seeds if quick else self.seeds

    def variant(self, name: str) -> Variant:
        """A variant by name.

        Raises:
            ResfastError: an unknown name.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        names = [variant.name for variant in self.variants]
        raise ResfastError(
            f"study {self.name} has no variant {name!r}{nearest(name, names)} "
            f"(it has {', '.join(names)})"
        )

    def values(self, variant: Variant, quick: bool) -> dict[str, Any]:
        """All options of a variant, from the most general table to the most special one."""
        bases = read_bases()
        values = dict(bases[self.base]) | self.options
        if quick:
            values |= bases["quick"] | self.quick.options
        values |= variant.options
        return values | variant.quick if quick else values

    def config(self, variant: Variant, quick: bool) -> Config:
        """The checked configuration of a variant, with the paths of :meth:`needs` left out.

        Raises:
            ResfastError: an option that is unknown, of the wrong type or out of range.
        """
        values = self.values(variant, quick)
        without = {name: value for name, value in values.items() if name not in self.needs(variant)}
        if values.get("unlabelled") == REST:
            del without["unlabelled"]
        for name in ("distill_temperature", "distill_weight", "pseudo_threshold"):
            if self.needs(variant):
                without.pop(name, None)
        config = configured(without, f"{self.name}, variant {variant.name}")
        check(config)
        return config

    def needs(self, variant: Variant) -> dict[str, str]:
        """Options whose value is the run of another variant, and the name of that variant."""
        values = dict(self.options) | variant.options
        return {
            name: str(values[name]).removeprefix(RUN_OF)
            for name in _PATHS
            if str(values.get(name, "")).startswith(RUN_OF)
        }


_ADAPTER = pydantic.TypeAdapter(Study)


def configured(values: Options, source: str) -> Config:
    """A configuration from options by name, on top of the recipe that ``recipe`` names.

    Args:
        values: options as in a TOML file; ``augment`` is in the notation of the command line.
        source: where they come from, for the error message.

    Raises:
        ResfastError: an unknown recipe or option, or a value that does not fit.
    """
    values = dict(values)
    name = values.pop("recipe", "report-onecycle")
    check_name(name)
    groups: dict[str, Any] = asdict(RECIPES[name])
    for option, value in values.items():
        if option not in _GROUP_OF:
            raise ResfastError(
                f"{source}: there is no option {option!r}{nearest(option, _GROUP_OF)}; the names "
                "are those of the configuration"
            )
        if option == "augment" and isinstance(value, str):
            value = asdict(parse_augment(value))
        groups[_GROUP_OF[option]][option] = value
    groups["undecided"] = tuple(name for name in groups["undecided"] if name not in values)
    try:
        return ADAPTER.validate_python(groups)
    except pydantic.ValidationError as error:
        raise ResfastError(f"{source}: {describe(error)}") from None


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ResfastError(f"{path}: {error}; expected a study as TOML") from None


@cache
def read_bases() -> dict[str, dict[str, Any]]:
    """The tables of ``bases.toml``."""
    return _toml(BASES)


def read(path: Path) -> Study:
    """Reads a study and checks it.

    Raises:
        ResfastError: invalid TOML, a field that is missing, unknown or of the wrong type, names
            that occur twice or not at all, or options that no training takes.
    """
    try:
        study = _ADAPTER.validate_python({"name": path.stem, **_toml(path)})
    except pydantic.ValidationError as error:
        raise ResfastError(f"{path}: {describe(error)}; expected a study") from None
    _check_names(study, path)
    for variant in study.variants:
        for quick in (False, True):
            study.config(variant, quick)
    return study


def _check_names(study: Study, path: Path) -> None:
    if study.base not in read_bases():
        raise ResfastError(f"{path}: {BASES.name} has no table {study.base!r}")
    names: list[str] = []
    for variant in study.variants:
        if variant.name in names or Path(variant.name).name != variant.name:
            raise ResfastError(
                f"{path}: variant {variant.name!r} is there twice or no plain folder name"
            )
        for needed in study.needs(variant).values():
            if needed not in names:
                raise ResfastError(
                    f"{path}: variant {variant.name} needs {needed!r}, which has to come before it"
                )
        names.append(variant.name)
    for claim in study.claims:
        kinds = (bool(claim.better and claim.worse), bool(claim.alike), claim.at_least is not None)
        if sum(kinds) != 1:
            raise ResfastError(
                f"{path}: the claim {claim.text!r} needs better and worse, alike, or variant and "
                "at_least"
            )
        for name in claim.names:
            study.variant(name)
    for plot in study.plots:
        if (plot.kind == "band") != bool(plot.column):
            raise ResfastError(f"{path}: a plot has a column exactly if its kind is band")


def names() -> list[str]:
    """Names of the studies of this package."""
    return sorted(path.stem for path in CATALOG.glob("*.toml") if path != BASES)


def study(name: str) -> Study:
    """A study of this package, or one in a file of the user's.

    Args:
        name: its name, or a path that ends in ``.toml``.

    Raises:
        ResfastError: an unknown name, a file that cannot be read, or as :func:`read`.
    """
    if name.endswith(".toml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ResfastError(f"there is no file {name}; expected a study as TOML")
        return read(path)
    if name not in names():
        raise ResfastError(
            f"unknown study {name!r}{nearest(name, names())}; resfast study --list shows them, and "
            "a path to a .toml file is taken too"
        )
    return read(CATALOG / f"{name}.toml")


def with_runtime(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with fields of any group replaced by name; None keeps a value."""
    for name, value in values.items():
        if value is not None:
            group = _GROUP_OF[name]
            config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return config
