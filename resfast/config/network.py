"""The shape of the network that a model configuration describes."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from resfast.config.schema import ModelConfig
from resfast.errors import ResfastError
from resfast.models.imported import ImportedSpec
from resfast.models.presets import Spec, preset
from resfast.models.resnet import ResNetSpec
from resfast.models.speednet import SpeedNetSpec
from resfast.models.vgg import VGGSpec

_FAMILIES: dict[str, tuple[str, type]] = {
    "resnet": ("blocks", ResNetSpec),
    "speednet": ("convolutions", SpeedNetSpec),
    "vgg": ("convolutions", VGGSpec),
}
"""Families of networks: the option for their depth, and the class of the spec. The name is also a
value of ``--model``, which requires that option and --channels."""


def network(config: ModelConfig) -> Spec:
    """The shape of the configured preset with the configuration's overrides applied.

    Raises:
        ResfastError: an unknown preset, a family without depth and channels, an option of another
            family, or two options that exclude each other.
    """
    values: dict[str, Any] = {}
    if config.model in _FAMILIES:
        family = config.model
        depth, spec_class = _FAMILIES[family]
        if not getattr(config, depth) or not config.channels:
            raise ResfastError(
                f"model {config.model!r} needs --{depth} and --channels, for example "
                f"--{depth} 2,1,1,1 --channels 64,128,256,512"
            )
    else:
        spec = preset(config.model)
        if isinstance(spec, ImportedSpec):
            _check_no_shape(config)
            return spec
        values, spec_class = asdict(spec), type(spec)
        family, depth = next(
            (name, depth) for name, (depth, kind) in _FAMILIES.items() if kind is spec_class
        )
        stages = getattr(config, depth)
        resized = stages and not config.strides and len(stages) != len(values.get("strides", ()))
        if resized and "strides" in values:
            values["strides"] = ()
    shape = _options(spec_class)
    for option in fields(ModelConfig):
        value = getattr(config, option.name)
        if value == option.default or option.name in ("model", "param_budget"):
            continue
        if option.name in shape:
            values[option.name] = value
            continue
        if family == "resnet" and option.name == "zero_init_residual":
            continue
        others = [name for name, (_, kind) in _FAMILIES.items() if option.name in _options(kind)]
        owners = " and ".join(f"{name}s" for name in others or ["resnet"])
        raise ResfastError(
            f"--{option.name.replace('_', '-')} is an option of {owners}, but "
            f"{config.model!r} is a {family}; leave it out or choose another --model"
        )
    result = spec_class(**values)
    if config.zero_init_residual and result.freeze_norm_scale:
        raise ResfastError(
            "--zero-init-residual starts norm scales at zero and --freeze-norm-scale would leave "
            "them there; choose one"
        )
    return result


def _check_no_shape(config: ModelConfig) -> None:
    for option in fields(ModelConfig):
        is_set = getattr(config, option.name) != option.default
        if is_set and option.name not in ("model", "param_budget"):
            raise ResfastError(
                f"--{option.name.replace('_', '-')} is an option of this project's networks, but "
                f"{config.model!r} is made elsewhere; leave it out, or choose another --recipe if "
                "yours sets it"
            )


def _options(spec_class: type) -> set[str]:
    """The options of a family, which are the fields of its spec."""
    return {field.name for field in fields(spec_class)}
