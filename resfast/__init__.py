"""resfast: trains CIFAR-scale ResNets to a target accuracy as fast as the hardware allows.

The names here are loaded on first use, so that importing the package is quick::

    import resfast

    result = resfast.train(resfast.recipe("default"))
    model = resfast.create_model("resnet-2111")
    run = resfast.load(result.path)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from resfast.config.recipes import RECIPES as RECIPES
    from resfast.config.recipes import recipe as recipe
    from resfast.config.schema import Config as Config
    from resfast.data.augmenter import Augment as Augment
    from resfast.data.augmenter import DeviceLoader as DeviceLoader
    from resfast.data.dataset import Dataset as Dataset
    from resfast.data.sources import load_dataset as load_dataset
    from resfast.errors import ResfastError as ResfastError
    from resfast.inference.ensemble import ensemble as ensemble
    from resfast.inference.evaluate import evaluate as evaluate
    from resfast.inference.export import export as export
    from resfast.inference.fuse import fuse as fuse
    from resfast.inference.load import load as load
    from resfast.inference.predict import predict as predict
    from resfast.models.imported import trust as trust
    from resfast.models.presets import create_model as create_model
    from resfast.models.resnet import ResNet as ResNet
    from resfast.models.resnet import ResNetSpec as ResNetSpec
    from resfast.models.speednet import SpeedNet as SpeedNet
    from resfast.models.speednet import SpeedNetSpec as SpeedNetSpec
    from resfast.models.vgg import VGG as VGG
    from resfast.models.vgg import VGGSpec as VGGSpec
    from resfast.training.optimize import OptimizationReport as OptimizationReport
    from resfast.training.optimize import optimization_report as optimization_report
    from resfast.training.optimize import optimize as optimize
    from resfast.training.optimize import restore as restore
    from resfast.training.seeds import train as train

__version__ = "0.1.0"

_HOME = {
    "Augment": "resfast.data.augmenter",
    "Config": "resfast.config.schema",
    "Dataset": "resfast.data.dataset",
    "DeviceLoader": "resfast.data.augmenter",
    "OptimizationReport": "resfast.training.optimize",
    "RECIPES": "resfast.config.recipes",
    "ResNet": "resfast.models.resnet",
    "ResNetSpec": "resfast.models.resnet",
    "SpeedNet": "resfast.models.speednet",
    "SpeedNetSpec": "resfast.models.speednet",
    "VGG": "resfast.models.vgg",
    "VGGSpec": "resfast.models.vgg",
    "ResfastError": "resfast.errors",
    "create_model": "resfast.models.presets",
    "fuse": "resfast.inference.fuse",
    "load": "resfast.inference.load",
    "load_dataset": "resfast.data.sources",
    "optimization_report": "resfast.training.optimize",
    "optimize": "resfast.training.optimize",
    "recipe": "resfast.config.recipes",
    "restore": "resfast.training.optimize",
    "trust": "resfast.models.imported",
}

_COMMANDS = ("ensemble", "evaluate", "export", "predict", "train")

__all__ = [
    "__version__",
    "ensemble",
    "evaluate",
    "export",
    "predict",
    "train",
    *sorted(_HOME),
]


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name in _COMMANDS:
            # Entry points are callable modules (see resfast.cli.common.make_callable).
            return importlib.import_module(f"resfast.{name}")
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        raise AttributeError(f"module 'resfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
