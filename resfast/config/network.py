"""The shape of the network that a model configuration describes."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from resfast.config.schema import ModelConfig
from resfast.errors import ResfastError
from resfast.models.presets import Spec, preset
from resfast.models.resnet import ResNetSpec
from resfast.models.speednet import SpeedNetSpec

_OWN = {"resnet": ("blocks", ResNetSpec), "speednet": ("convolutions", SpeedNetSpec)}
"""Networks without a preset: the option required besides --channels, and the type of the shape."""


def network(config: ModelConfig) -> Spec:
    """The shape of the preset that a model configuration names, with its overrides applied.

    Raises:
        ResfastError: an unknown preset, 'resnet' without blocks and channels, 'speednet' without
            convolutions and channels, an option of the other family, or two that exclude each
            other.
    """
    values: dict[str, Any] = {}
    if config.model in _OWN:
        depth, kind = _OWN[config.model]
        if not getattr(config, depth) or not config.channels:
            raise ResfastError(
                f"model {config.model!r} needs --{depth} and --channels, for example "
                f"--{depth} 2,1,1,1 --channels 64,128,256,512"
            )
    else:
        spec = preset(config.model)
        values, kind = asdict(spec), type(spec)
        depth = "blocks" if kind is ResNetSpec else "convolutions"
        given = getattr(config, depth)
        if given and not config.strides and len(given) != len(values["strides"]):
            values["strides"] = ()
    shape = {f.name for f in fields(kind)}
    others = {"model", "param_budget"} | ({"zero_init_residual"} if kind is ResNetSpec else set())
    for option in fields(ModelConfig):
        value = getattr(config, option.name)
        if value == option.default:
            continue
        if option.name in shape:
            values[option.name] = value
        elif option.name not in others:
            families = ("speednets", "resnets") if kind is ResNetSpec else ("resnets", "speednets")
            raise ResfastError(
                f"--{option.name.replace('_', '-')} is an option of {families[0]}, and "
                f"{config.model!r} is one of the {families[1]}; leave it out or choose another "
                "--model"
            )
    made = kind(**values)
    if config.zero_init_residual and made.freeze_norm_scale:
        raise ResfastError(
            "--zero-init-residual starts norm scales at zero and --freeze-norm-scale would leave "
            "them there; choose one"
        )
    return made
