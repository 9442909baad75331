"""The shape of the network that a model configuration describes."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from resfast.config.schema import ModelConfig
from resfast.errors import ResfastError
from resfast.models.presets import Spec, preset
from resfast.models.resnet import ResNetSpec
from resfast.models.speednet import SpeedNetSpec

_CUSTOM = {"resnet": ("blocks", ResNetSpec), "speednet": ("convolutions", SpeedNetSpec)}
"""Networks without a preset: the option required besides --channels, and the class of the spec."""


def network(config: ModelConfig) -> Spec:
    """The shape of the configured preset with the configuration's overrides applied.

    Raises:
        ResfastError: an unknown preset, 'resnet' without blocks and channels, 'speednet' without
            convolutions and channels, an option of the other family, or two options that exclude
            each other.
    """
    values: dict[str, Any] = {}
    if config.model in _CUSTOM:
        depth, spec_class = _CUSTOM[config.model]
        if not getattr(config, depth) or not config.channels:
            raise ResfastError(
                f"model {config.model!r} needs --{depth} and --channels, for example "
                f"--{depth} 2,1,1,1 --channels 64,128,256,512"
            )
    else:
        spec = preset(config.model)
        values, spec_class = asdict(spec), type(spec)
        depth = "blocks" if spec_class is ResNetSpec else "convolutions"
        stages = getattr(config, depth)
        if stages and not config.strides and len(stages) != len(values["strides"]):
            values["strides"] = ()
    is_resnet = spec_class is ResNetSpec
    shape = {f.name for f in fields(spec_class)}
    others = {"model", "param_budget"} | ({"zero_init_residual"} if is_resnet else set())
    for option in fields(ModelConfig):
        value = getattr(config, option.name)
        if value == option.default:
            continue
        if option.name in shape:
            values[option.name] = value
        elif option.name not in others:
            family, other = ("resnet", "speednet") if is_resnet else ("speednet", "resnet")
            raise ResfastError(
                f"--{option.name.replace('_', '-')} is an option of {other}s, but "
                f"{config.model!r} is a {family}; leave it out or choose another --model"
            )
    result = spec_class(**values)
    if config.zero_init_residual and result.freeze_norm_scale:
        raise ResfastError(
            "--zero-init-residual starts norm scales at zero and --freeze-norm-scale would leave "
            "them there; choose one"
        )
    return result
