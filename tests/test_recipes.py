"""Recipes are TOML files that hold every number of a run."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import resfast.config.recipes as recipes
from resfast.config import files
from resfast.config.compare import differences
from resfast.config.recipes import RECIPES, SUMMARIES, decide, read, recipe
from resfast.config.schema import Config
from resfast.errors import ResfastError

FOLDER = Path(recipes.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
GROUPS = ["model", "data", "optim", "transfer", "evaluation", "runtime"]

_FAST = {
    "param_budget": 5_000_000,
    "sizes": ((16, 0.3), (24, 0.7)),
    "filter_start": 0.25,
    "filter_keep": 0.5,
    "augment": "crop=4,flip=alternating,cutout=8",
    "batch_size": 500,
    "optimizer": "muon",
    "lr": 0.12,
    "momentum": 0.85,
    "sgd_momentum": 0.85,
    "weight_decay": 0.0,
    "head_weight_decay": 2.4e-3,
    "bias_weight_decay": 3.8e-5,
    "newton_schulz_steps": 3,
    "normalize_filters": True,
    "schedule": "linear",
    "warmup": 0.0,
    "end_factor": 0.0,
    "label_smoothing": 0.1,
    "tta": "multi-crop",
    "tta_select": 0.1,
    "tta_mirror": 0.4,
    "fuse": True,
    "eval_every": 0,
    "eval_batch_size": 500,
    "winograd_tile": 4,
}
_FAST_SPEEDNET = _FAST | {
    "whitening_padding": "same",
    "head_std": 0.035,
    "norm_momentum": 0.15,
    "head_lr": 0.41,
    "bias_lr": 26.5,
}
_FAST_RESNET = _FAST | {
    "activation": "gelu",
    "freeze_norm_scale": True,
    "head_lr": 0.03,
    "bias_lr": 0.4,
}
EXPECTED = {
    "default": _FAST_RESNET  # 70 epochs, except that a small data set has fewer
    | {
        "augment": "crop=4,flip=alternating,cutout=12",
        "filter_keep": 0.75,
        "accumulate": 2,
    },
    "report-onecycle": {
        "param_budget": 5_000_000,
        "augment": "crop=4,flip=random",
        "epochs": 70,
        "batch_size": 512,
        "optimizer": "adam",
        "lr": 0.01,
        "weight_decay": 1e-6,
        "decay_norm_bias": True,
        "cycle_momentum": True,
        "end_factor": 4e-6,
        "clip_value": 0.1,
    },
    "fast94": _FAST_SPEEDNET
    | {
        "model": "speednet-94",
        "augment": "crop=2,flip=alternating",
        "epochs": 12,
        "whitening_bias_epochs": 2.0,
    },
    "fast95": _FAST_SPEEDNET
    | {
        "model": "speednet-96",
        "filter_keep": 0.75,
        "epochs": 24,
        "whitening_bias_epochs": 4.5,
    },
    "fast-resnet-453": _FAST_RESNET | {"model": "resnet-453", "epochs": 10, "accumulate": 4},
}
"""Of each recipe the values that are not the defaults."""
MEASURED = {
    28: _FAST_RESNET | {"epochs": 28, "accumulate": 2},
    70: EXPECTED["default"] | {"epochs": 70},
}
"""The same of default at the lengths that it was measured at, for CIFAR-10."""


def differing(config: Config) -> dict[str, object]:
    found = {}
    for group in [*GROUPS, "run"]:
        values = getattr(config, group)
        for field in fields(values):
            value = getattr(values, field.name)
            if (value, type(value)) != (field.default, type(field.default)):
                found[field.name] = str(value) if field.name == "augment" else value
    return {name: value for name, value in found.items() if name not in ("data_dir", "out")}


def test_there_is_a_file_for_each_recipe():
    assert RECIPES.keys() == EXPECTED.keys() == SUMMARIES.keys()
    assert {path.stem for path in FOLDER.glob("*.toml")} == RECIPES.keys()


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe_has_its_values(name: str):
    expected = dict(EXPECTED[name])
    if expected["augment"] == str(Config().data.augment):
        del expected["augment"]  # of fast94: the default policy
    found = differing(RECIPES[name])
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in expected.items()
    }


@pytest.mark.parametrize("epochs", sorted(MEASURED))
def test_default_has_the_values_that_were_measured(epochs: int):
    found = decide(recipe("default", epochs=epochs), train_images=50_000, streamed=False)
    assert found.undecided == ()
    assert differing(found) == MEASURED[epochs]
    # And those of the run itself, which was trained before default had them.
    run = ROOT / f"benchmarks/results/2026-11-28-cpu/fast-resnet-2111-{epochs}-epochs-seed0"
    trained = differences(files.load(run / "config.json"), found)
    assert trained.keys() <= {"recipe", "data", "device", "precision", "compile", "cuda_graph"} | {
        "loader",
        "eval_every",
    }


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe_names_every_field_in_the_order_of_the_dataclasses(name: str):
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").partition("\n[by_epochs]")[0]
    named = re.findall(r"^(?:\[(\w+)\]|(?:# )?(\w+)(?: = |: ))", text, re.MULTILINE)
    expected = ["summary"]
    for group in GROUPS:
        expected += [group, *(f.name for f in fields(getattr(RECIPES[name], group)))]
    assert [section or key for section, key in named] == expected
    for group, values in tomllib.loads(text).items():
        if group != "summary":
            unset = {f.name for f in fields(getattr(RECIPES[name], group))} - values.keys()
            assert all(getattr(getattr(RECIPES[name], group), field) is None for field in unset)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("summary = ", "# ", "has no summary"),
        ("lr = 0.12\n", "", "optim.lr is missing; a recipe names every value"),
        ("lr = 0.12\n", "lr = 0.0\n", "optim.lr: Input should be greater than 0"),
        ("lr = 0.12\n", "rate = 0.125\n", "optim.rate"),
        ("lr = 0.12\n", "lr = \n", "expected a recipe as TOML"),
        ("crop=4", "crop=-4", "--augment crop=-4 is out of range"),
    ],
)
def test_a_damaged_recipe_is_refused(old: str, new: str, message: str, tmp_path: Path):
    text = (FOLDER / "default.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "default.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ResfastError, match=re.escape(message)):
        read(path)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe_survives_json(name: str):
    text = files.to_json(RECIPES[name])
    assert files.to_json(files.from_json(text, "x")) == text
