"""Conditions of the tables ``[when.CONDITION]`` of a recipe, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from resfast.config.files import load
from resfast.config.network import network
from resfast.config.schema import Config, ModelConfig
from resfast.errors import ResfastError
from resfast.models.imported import ImportedSpec
from resfast.models.presets import Spec
from resfast.models.speednet import SpeedNetSpec
from resfast.models.vgg import VGGSpec

SMALL_DATA_IMAGES = 10_000
"""Training sets with fewer images than this are small."""
SMALL_BATCH = 256
"""Batches of fewer images than this fit in memory undivided."""
GROUP_OF: dict[str, str] = {
    part.name: group
    for group in ("model", "data", "optim", "transfer", "evaluation", "runtime")
    for part in fields(getattr(Config(), group))
}
"""The group of each field that a recipe has."""
_MODEL_DEFAULTS: dict[str, Any] = {part.name: part.default for part in fields(ModelConfig)}


def values_of(config: Config) -> dict[str, Any]:
    """All values of a recipe by name."""
    return {name: getattr(getattr(config, group), name) for name, group in GROUP_OF.items()}


class _UnknownError(Exception):
    """A condition depends on something that is not known yet."""


class View:
    """What conditions see: the values so far, the network, and what is known of the data.

    Args:
        config: the configuration.
        undecided: names of the fields that are being decided.
        images: number of training images, or None if it is not known yet.
        streamed: whether DALI decodes images during training, or None if it is not known yet.
    """

    def __init__(
        self, config: Config, undecided: Sequence[str], images: int | None, streamed: bool | None
    ) -> None:
        self.config = config
        self.values = values_of(config)
        self.unknown: set[str] = set()
        self._images, self._streamed = images, streamed
        # The user's own options alone: the others may not fit the network yet.
        model = {name: _MODEL_DEFAULTS[name] for name in undecided if name in _MODEL_DEFAULTS}
        try:
            self._spec: Spec | None = network(replace(config.model, **model))
        except ResfastError:  # which check reports
            self._spec = None

    def __getitem__(self, name: str) -> Any:
        if name in self.unknown:
            raise _UnknownError
        return self.values[name]

    @property
    def images(self) -> int:
        """Number of training images."""
        if self._images is None:
            raise _UnknownError
        return self._images

    @property
    def streamed(self) -> bool:
        """Whether DALI decodes images during training."""
        if self._streamed is None:
            raise _UnknownError
        return self._streamed

    @property
    def spec(self) -> Spec:
        """The architecture."""
        if self._spec is None:
            raise _UnknownError
        return self._spec

    @property
    def least_pixels(self) -> int:
        """Height and width of the smallest images that the network takes, as far as is known."""
        return getattr(self._spec, "least_image_size", 0)

    def apply(self, condition: str, values: Mapping[str, Any]) -> None:
        """Sets values if a condition holds; if that is not known, they may still change."""
        try:
            holds = bool(values) and CONDITIONS[condition][1](self)
        except _UnknownError:
            self.unknown |= values.keys()
            return
        if holds:
            self.values |= values
            self.unknown -= values.keys()


def _starts_from_other_activation(view: View) -> bool:
    source = view["init_from"]
    if source is None:
        return False
    file = Path(source) / "config.json"
    if not file.is_file():
        return True
    return getattr(network(load(file).model), "activation", None) != view["activation"]


def _is_watched(view: View) -> bool:
    stops = view["target"] is not None and view.config.run.runs == 1
    return bool(stops or view["early_stop"] or view["val_fraction"]) or (
        view["schedule"] == "plateau"
    )


CONDITIONS: dict[str, tuple[str, Callable[[View], bool]]] = {
    "small_data": (
        f"fewer than {SMALL_DATA_IMAGES:,} training images",
        lambda view: view.images < SMALL_DATA_IMAGES,
    ),
    "streamed": ("images decoded by DALI during training", lambda view: view.streamed),
    "small_batch": (
        f"a batch size below {SMALL_BATCH}",
        lambda view: (view["batch_size"] or 0) < SMALL_BATCH,
    ),
    "speednet": ("a speednet", lambda view: isinstance(view.spec, SpeedNetSpec)),
    "vgg": ("a VGG or plain CNN", lambda view: isinstance(view.spec, VGGSpec)),
    "imported": (
        "a network of torchvision, timm or a file",
        lambda view: isinstance(view.spec, ImportedSpec),
    ),
    "no_norm": (
        "a network without batch norm",
        lambda view: getattr(view.spec, "norm", "batch") == "none",
    ),
    "zero_init_residual": (
        "--zero-init-residual",
        lambda view: view["zero_init_residual"],
    ),
    "init_from": (
        "--init-from",
        lambda view: view["init_from"] is not None,
    ),
    "other_activation": (
        "--init-from with weights trained with another activation, or not by resfast",
        _starts_from_other_activation,
    ),
    "pretrain": ("--pretrain", lambda view: view["pretrain"] != "none"),
    "other_optimizer": ("another optimizer than muon", lambda view: view["optimizer"] != "muon"),
    "other_schedule": (
        "another schedule than linear and cosine",
        lambda view: view["schedule"] not in ("linear", "cosine"),
    ),
    "watched": (
        "accuracies that are needed during training: --target, --early-stop, --val-fraction or "
        "--schedule plateau",
        _is_watched,
    ),
}
"""Name of a condition to its description and its test."""
