"""``python -m resfast.train``: trains a network. In Python, ``resfast.train(config)``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from resfast import entry
from resfast.errors import ResfastError
from resfast.training.config import Config, load, network
from resfast.training.recipes import RECIPES, SUMMARIES, recipe

PROG = "python -m resfast.train"


@dataclass(frozen=True)
class Start:
    """Options that decide where the values of the others come from, or what to do instead."""

    recipe: str | None = None
    """Named set of values that the other options override (None: default; --list shows them)."""
    config: Path | None = None
    """Start from a saved configuration, runs/NAME/config.json."""
    resume: Path | None = None
    """Go on with an interrupted run, runs/NAME."""
    list: bool = False
    """Print the recipes and models with their parameter counts, and stop."""
    summary: bool = False
    """Print the network layer by layer, and stop."""


@dataclass(frozen=True)
class Command:
    """Trains a CIFAR-scale ResNet and leaves weights, metrics and plots in runs/NAME.

    Exit codes: 0 trained, 2 bad input, 3 the loss is not finite, 130 interrupted and saved.
    """

    start: Annotated[Start, tyro.conf.arg(name="")] = field(default_factory=Start)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def command_line(args: Sequence[str]) -> tuple[Start, Config]:
    """The options of a command line, in two passes: first where the defaults come from, then all.

    Raises:
        ResfastError: an unknown recipe, an unreadable configuration, or two sources of defaults.
        SystemExit: help was asked for, or an option is unknown or malformed (code 2).
    """
    start, _ = tyro.cli(
        Start,
        args=list(args),
        prog=PROG,
        add_help=False,
        return_unknown_args=True,
        console_outputs="--help" not in args and "-h" not in args,
    )
    given = [name for name in ("recipe", "config", "resume") if getattr(start, name) is not None]
    if len(given) > 1:
        raise ResfastError(
            f"--{given[0]} and --{given[1]} both say where to start from; choose one"
        )
    if start.resume is not None:
        default = load(start.resume / "config.json")
    elif start.config is not None:
        default = load(start.config)
        default = replace(default, run=replace(default.run, name=None))
    else:
        default = recipe(start.recipe or "default")
    command = entry.parse(Command, args, PROG, Command(start, default))
    return start, command.config


def print_list() -> None:
    """Prints recipes and models."""
    import torch

    from resfast.models.presets import PRESETS, create_model
    from resfast.models.resnet import count_parameters

    with torch.device("meta"):  # shapes alone: nothing is initialised
        counts = {name: count_parameters(create_model(name)) for name in PRESETS}
    print("recipes (--recipe NAME)")
    for name, config in RECIPES.items():
        model = config.model.model
        print(f"  {name:<20} {model:<20} {counts[model]:>11,}  {SUMMARIES[name]}")
    print("\nmodels (--model NAME), parameters for 10 classes")
    for name, spec in PRESETS.items():
        shape = (
            f"blocks {_commas(spec.blocks)}  channels {_commas(spec.channels)}  stem {spec.stem}"
        )
        extra = [spec.block] if spec.block != "basic" else []
        extra += [f"shortcut {spec.shortcut}"] if spec.shortcut != "conv1" else []
        extra += [f"head {_commas(spec.head)}"] if spec.head else []
        print(f"  {name:<20} {counts[name]:>11,}  {'  '.join([shape, *extra])}")
    print("  resnet               of your own: --blocks 2,1,1,1 --channels 64,128,256,512 …")


def _commas(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def print_summary(config: Config) -> None:
    """Prints the layer table of the network that ``config`` describes, for 10 classes."""
    from resfast.models.resnet import ResNet
    from resfast.models.summary import summarize

    print(summarize(ResNet(network(config.model)), config.data.image_size))


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = list(sys.argv[1:] if args is None else args)

    def command() -> None:
        start, config = command_line(arguments)
        if start.list:
            print_list()
            return
        if start.summary:
            print_summary(config)
            return
        from resfast.training.trainer import train

        result = train(config, resume=start.resume)
        summary = result.summary
        print(
            f"test accuracy {summary['test_accuracy']:.2%}, with test-time augmentation "
            f"({summary['tta']}) {summary['tta_accuracy']:.2%}; trained in "
            f"{summary['train_seconds']:.1f} s ({summary['images_per_second']:,.0f} images/s) + "
            f"{summary['compile_seconds']:.1f} s compiling + {summary['eval_seconds']:.1f} s "
            f"evaluating\n{result.path}"
        )

    return entry.run(command)


def _train(*args: object, **kwargs: object) -> object:
    from resfast.training.trainer import train

    return train(*args, **kwargs)


if __name__ == "__main__":
    sys.exit(main())
else:
    entry.make_callable(__name__, _train)
