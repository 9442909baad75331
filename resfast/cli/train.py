"""``resfast train``: trains a network, prints recipes and layer tables, or profiles a step."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from resfast.cli import common as entry
from resfast.config.files import load
from resfast.config.network import network
from resfast.config.recipes import FAMILIES, RECIPES, SUMMARIES, decide, recipe
from resfast.config.recipes.family import given as given_fields
from resfast.config.schema import Config, ModelConfig
from resfast.errors import ResfastError
from resfast.models.imported import is_imported, trust_model

if TYPE_CHECKING:
    from resfast.runs.targets import Row

COMMAND = "train"


@dataclass(frozen=True)
class Start:
    """Options that decide where the other values come from, or what to do instead of training."""

    recipe: str | None = None
    """Named set of values that the other options override (None: default, whose values suit
    the number of epochs, the network and the data; --list shows them)."""
    config: Path | None = None
    """Start from a saved configuration: runs/NAME/config.json, or the best.toml of a sweep."""
    resume: Path | None = None
    """Resume an interrupted run, runs/NAME."""
    trust: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose code may run, since it makes the network of --config, --resume,
    --teacher or another run; may be repeated. The file of --model needs none."""
    list: bool = False
    """Print the recipes and models with their parameter counts, and exit."""
    summary: bool = False
    """Print the network layer by layer, or of --model A,B,C a line for each network, and exit."""
    profile: Path | None = None
    """Train for a few steps only, write a Chrome trace of them to this file, print the slowest
    operators and how the step compares with a matrix product, and exit."""


@dataclass(frozen=True)
class Command:
    """Trains a CIFAR-scale ResNet and writes weights, metrics and plots to runs/NAME.

    Exit codes: 0 trained, 2 bad input, 3 the loss is not finite, 130 interrupted and saved.
    """

    start: Annotated[Start, tyro.conf.arg(name="")] = field(default_factory=Start)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def command_line(args: Sequence[str]) -> tuple[Start, Config]:
    """Parses a command line in two passes: first where the defaults come from, then all options.

    Values that depend on the number of epochs and on the network are decided; options win.

    Raises:
        ResfastError: an unknown recipe, an unreadable configuration, or two sources of defaults.
        SystemExit: help was requested (code 0), or an option is unknown or malformed (code 2).
    """
    start, config = undecided(args)
    if "model" in given_fields(args):
        for name in config.model.model.split(","):
            trust_model(name.strip())
    entry.trust_files(start.trust)
    return start, config if start.resume is not None else decide(config)


def undecided(args: Sequence[str]) -> tuple[Start, Config]:
    """:func:`command_line` with the values undecided that depend on the epochs and the network."""
    start, _ = tyro.cli(
        Start,
        args=list(args),
        prog=entry.program(COMMAND),
        add_help=False,
        return_unknown_args=True,
        console_outputs="--help" not in args and "-h" not in args,
    )
    given = [name for name in ("recipe", "config", "resume") if getattr(start, name) is not None]
    if len(given) > 1:
        raise ResfastError(
            f"--{given[0]} and --{given[1]} both set the starting values; choose one"
        )
    if start.resume is not None:
        # Its values stay as they are, whatever the epochs are now.
        return start, _parsed(args, start, load(start.resume / "config.json"))
    elif start.config is not None:
        default = load(start.config)
        default = replace(default, run=replace(default.run, name=None))
    else:
        default = recipe(start.recipe or "default")
    config = _parsed(args, start, default)
    target, seconds = config.evaluation.target, config.run.max_seconds
    if not given and target is not None and seconds is not None:
        row = _pick_recipe(config, target, seconds)
        args = [*shlex.split(row.options), *args]
        config = _parsed(args, start, recipe(row.recipe))
    if any((config.transfer.init_from, config.transfer.teacher, config.transfer.pseudo_from)):
        from resfast.runs.find import with_single_runs

        config = with_single_runs(config, lambda line: print(line, flush=True))
    left = [name for name in config.undecided if name not in given_fields(args)]
    return start, replace(config, undecided=tuple(left))


def _parsed(args: Sequence[str], start: Start, default: Config) -> Config:
    return entry.parse(Command, args, COMMAND, Command(start, default)).config


def _pick_recipe(config: Config, target: float, max_seconds: float) -> Row:
    """The measured recipe for a target and a time limit; prints the reason for the choice."""
    from resfast import runtime
    from resfast.runs.targets import pick

    row, reason = pick(
        target,
        max_seconds,
        device=runtime.resolve_device(config.runtime.device),
        data=config.data.data,
        threads=config.runtime.threads,
    )
    print(reason)
    return row


def print_list() -> None:
    """Prints recipes and models."""
    import torch

    from resfast.models.presets import PRESETS, build_model, create_model
    from resfast.models.resnet import count_parameters
    from resfast.runs.targets import TABLE, read

    with torch.device("meta"):  # shapes only: no weights are initialized
        counts = {name: count_parameters(create_model(name)) for name in PRESETS}
        trained = {
            name: count_parameters(build_model(network(config.model)))
            for name, config in RECIPES.items()
        }
    print("recipes (--recipe NAME)")
    for name, config in RECIPES.items():
        print(f"  {name:<20} {config.model.model:<20} {trained[name]:>11,}  {SUMMARIES[name]}")
        for line in FAMILIES[name].table():
            print(f"    {line}")
    measured = read(TABLE)
    if measured:
        print("\nmeasured (--target 0.94 --max-seconds 300 picks among these)")
    for row in measured:
        print(f"  {row}")
    print("\nmodels (--model NAME), parameters for 10 classes")
    for name, spec in PRESETS.items():
        print(f"  {name:<20} {counts[name]:>11,}  {spec}")
    print("  resnet               custom: --blocks 2,1,1,1 --channels 64,128,256,512 …")
    print("  speednet             custom: --convolutions 2,2,2 --channels 64,256,256 …")


def print_summary(config: Config) -> None:
    """Prints the layer table of the network that ``config`` describes, for 10 classes.

    Of several, ``--model A,B,C``, it prints a line each.
    """
    from resfast.models.presets import build_model
    from resfast.models.summary import layer_table, network_table

    size = config.data.image_size
    if "," in config.model.model:
        names = [name.strip() for name in config.model.model.split(",") if name.strip()]
        shapes = {name: network(_named(config.model, name)) for name in names}
        models = {name: build_model(shape, image_size=size) for name, shape in shapes.items()}
        print(network_table(models, size))
        return
    print(layer_table(build_model(network(config.model), image_size=size), size))


def _named(config: ModelConfig, name: str) -> ModelConfig:
    """The options for another network, of which one from elsewhere takes none."""
    return ModelConfig(model=name) if is_imported(name) else replace(config, model=name)


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    started = time.perf_counter() - (_process_seconds() if args is None else 0.0)
    arguments = list(sys.argv[1:] if args is None else args)

    def command() -> None:
        start, config = command_line(arguments)
        if start.list:
            print_list()
            return
        if start.summary:
            print_summary(config)
            return
        if start.profile is not None:
            from resfast.training.profiling import profile

            print(profile(config, start.profile))
            return
        from resfast.training.seeds import headline, train

        result = train(config, resume=start.resume, started=started)
        print(f"{headline(result.summary)}\n{result.path}")

    return entry.run(command)


def _process_seconds() -> float:
    """Seconds since this process started; 0 where that cannot be determined."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # proc(5): field 22
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # not Linux
        return 0.0
