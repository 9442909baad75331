from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from resfast.cli.train import command_line, main
from resfast.config import compare, files
from resfast.config.network import network
from resfast.config.recipes import RECIPES, SUMMARIES, decide, recipe
from resfast.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
)
from resfast.config.validate import check, check_network, expectation
from resfast.errors import ResfastError
from resfast.models.presets import PRESETS, build_model, create_model
from resfast.models.resnet import count_parameters
from resfast.models.summary import summarize
from tests.conftest import change


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_survives_json_and_passes_its_own_checks(name: str):
    recipe = RECIPES[name]
    assert files.from_json(files.to_json(recipe), "x") == recipe
    assert recipe.recipe == name
    assert name in SUMMARIES
    check(recipe)


def test_report_onecycle_has_the_settings_of_the_report():
    recipe = RECIPES["report-onecycle"]
    optim = recipe.optim
    assert (optim.optimizer, optim.schedule, optim.lr) == ("adam", "onecycle", 0.01)
    assert (optim.weight_decay, optim.clip_value, optim.epochs) == (1e-6, 0.1, 70)
    assert recipe.model.model == "resnet-2111"
    assert recipe.model.param_budget == 5_000_000


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("default", "resnet-2111"),
        ("fast-resnet-453", "resnet-453"),
    ],
)
def test_fast_resnets_have_the_presets_exact_shape(recipe: str, name: str):
    spec = network(RECIPES[recipe].model)
    rest = {"freeze_norm_scale": True, "activation": "gelu"}  # neither is of the shape
    assert spec == dataclasses.replace(PRESETS[name], **rest)
    assert count_parameters(build_model(spec, 10)) == count_parameters(create_model(name))


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("fast")])
def test_fast_recipes_stay_below_five_million_parameters_and_score_the_test_set_once(name: str):
    recipe = RECIPES[name]
    assert count_parameters(build_model(network(recipe.model), 10)) <= 5_000_000
    assert recipe.model.param_budget == 5_000_000
    assert recipe.evaluation.eval_every == 0
    bias, sizes = recipe.optim.whitening_bias_epochs, recipe.data.sizes
    assert bias <= sizes[0][1] * recipe.optim.epochs  # or there would be more to compile


def test_options_override_the_recipe():
    start, config = command_line(
        "--recipe report-onecycle --epochs 5 --blocks 1,2 --channels 8,16 --no-tf32".split()
    )
    assert start.recipe == "report-onecycle"
    assert config.optim.epochs == 5
    assert config.optim.lr == 0.01
    assert config.model.blocks == (1, 2)
    assert not config.runtime.tf32
    assert config.recipe == "report-onecycle"


def test_no_option_is_the_default_recipe():
    assert command_line([])[1] == decide(RECIPES["default"])


def test_a_saved_configuration_starts_the_same_run(tmp_path: Path):
    saved = change(recipe("default", epochs=3), lr=0.7, name="old")
    file = tmp_path / "config.json"
    file.write_text(files.to_json(saved))
    _, config = command_line(["--config", str(file)])
    assert config == change(saved, name=None)
    _, config = command_line(["--config", str(file), "--lr", "0.1"])
    assert config.optim.lr == 0.1
    assert config.optim.epochs == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"optim": {"epoch": 3}}', "optim.epoch"),
        ('{"optim": {"epochs": "many"}}', "optim.epochs"),
        ('{"optim": {"schedule": "wave"}}', "optim.schedule"),
    ],
)
def test_a_damaged_configuration_names_the_place(text: str, message: str, tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ResfastError, match=message) as error:
        files.load(file)
    assert str(file) in str(error.value)


def test_a_missing_configuration_is_an_error(tmp_path: Path):
    with pytest.raises(ResfastError, match="No such file"):
        files.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 0", "--epochs 0 is out of range"),
        ("--batch-size 0", "--batch-size 0"),
        ("--accumulate 0", "--accumulate 0"),
        ("--lr 0", "--lr 0.0"),
        ("--lr nan", "--lr nan"),
        ("--warmup 1.5", "--warmup 1.5"),
        ("--val-fraction 1", "--val-fraction 1.0"),
        ("--target 94", "--target 94.0 is out of range: expected an accuracy, 0.94"),
        ("--clip-value 1 --clip-norm 1", "choose one"),
        ("--schedule multistep", "needs --milestones"),
        (
            "--milestone-steps 5,3",
            "--milestone-steps 5,3 is out of range: expected increasing",
        ),
        ("--schedule multistep --milestones 3 --milestone-steps 5", "both set; choose one"),
        (
            "--schedule onecycle --schedule-epochs 5",
            "is an option of cosine and linear, but the schedule is onecycle",
        ),
        ("--schedule plateau --rate-per-epoch", "does nothing with --schedule plateau"),
        ("--optimizer adam --no-nesterov", "--no-nesterov is an option of sgd"),
        ("--optimizer rmsprop --cycle-momentum", "needs an optimizer with momentum"),
        ("--mean 125,123,114", "--mean 125.0,123.0,114.0 is out of range: expected three numbers"),
        ("--std 0.2,0,0.2", "--std 0.2,0.0,0.2 is out of range: expected three numbers above 0"),
        ("--mean 0.5", "--mean 0.5 is out of range: expected three numbers from 0 to 1"),
        ("--std 0.5,0.5,0.5 --no-normalize", "exclude each other"),
        ("--label-noise 1", "--label-noise 1.0 is out of range"),
        ("--milestones 5,3", "--milestones 5,3 is out of range: expected increasing epochs"),
        ("--schedule multistep --milestones 9 --epochs 9", "epochs below --epochs 9"),
        ("--model resnet-2112", "did you mean 'resnet-2111'"),
        ("--model resnet", "needs --blocks and --channels"),
        ("--recipe defualt", "unknown recipe 'defualt'; did you mean 'default'"),
        ("--recipe fast-resnet-2111", "'fast-resnet-2111' is now default with --epochs 28"),
        ("--recipe fast-resnet-2111-70", "is now default with --epochs 70"),
        ("--recipe default --config x.json", "both set the starting values"),
        ("--config missing.json", "cannot read missing.json"),
        ("--resume nowhere", "cannot read nowhere/config.json"),
        ("--data cifar11", "cifar11"),
        ("--data folder:nowhere", "nowhere"),
        ("--device tpu", "device 'tpu' is unknown"),
        ("--device cuda:99", "does not exist"),
        ("--name a/b", "must be a plain folder name"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    options: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    data = [] if "--data" in options else ["--data", "digits"]
    assert main([*options.split(), *data]) == 2
    error = capsys.readouterr().err
    assert error.startswith("resfast: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    "options", ["--epoch 3", "--epochs many", "--blocks 2,x", "--augment flip=never"]
)
def test_a_malformed_option_exits_with_2(options: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        main(options.split())
    assert error.value.code == 2
    assert options.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("block", ("None", "basic", "bottleneck")),
        ("shortcut", ("None", "conv1", "conv3", "pool")),
        ("activation", ("None", "relu", "leaky_relu", "silu", "gelu")),
        ("final-pool", ("None", "max", "avg", "both")),
        ("whitening-padding", ("None", "valid", "same")),
        ("residual", ("None", "True", "False")),
        ("optimizer", ("sgd", "adam", "adamw", "muon")),
    ],
)
def test_choices_are_listed_in_the_order_of_the_help(
    option: str,
    choices: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        command_line([f"--{option}", "nonsense"])
    error = re.sub(r"[│\s]+", " ", capsys.readouterr().err)
    assert ", ".join(map(repr, choices)) in error


def test_optional_choices_are_read():
    line = "--block bottleneck --shortcut None --residual False --whitening True --dirac-init None"
    model = command_line(line.split())[1].model
    assert (model.block, model.shortcut) == ("bottleneck", None)
    assert (model.residual, model.whitening, model.dirac_init) == (False, True, None)


def test_help_shows_every_option_with_explanation_and_default():
    run = subprocess.run(
        [sys.executable, "-m", "resfast.train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "100", "PATH": "/usr/bin:/bin"},
    )
    text = re.sub(r"[│\s]+", " ", run.stdout)
    explained = dict(re.findall(r" (--[a-z0-9-]+)[^(]*? ([A-Z0-9a-z].*?\(default: .*?\))", text))
    for name in compare.flatten(RECIPES["default"]).keys() - {
        "recipe",
        "undecided",
        "recipe_epochs",
    }:
        option = "--" + name.replace("_", "-")
        assert option in explained, option
        words = explained[option].split("(default:")[0].split()
        assert len(words) >= 3, (option, words)
    for group in ("model", "data", "optim", "transfer", "evaluation", "runtime", "run"):
        assert f"─ {group} options ─" in run.stdout


def test_list_prints_recipes_and_models_with_parameters(capsys: pytest.CaptureFixture[str]):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in PRESETS:
        assert any(line.split()[:1] == [name] for line in lines), name
    for name in RECIPES:
        assert any(line.split()[:1] == [name] for line in lines), name
    assert any("resnet-2111 " in line and "4,977,226" in line for line in lines)


def test_summary_prints_the_layers_and_stops(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["--summary", "--model", "resnet-222"]) == 0
    out = capsys.readouterr().out
    assert "2,777,674" in out
    assert "Conv2d" in out
    assert not list(tmp_path.iterdir())


def test_summary_of_several_networks_has_a_line_each(capsys: pytest.CaptureFixture[str]):
    assert main(["--summary", "--model", "resnet-222,resnet-1111"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["model", "resnet-222", "resnet-1111"]
    alone = summarize(build_model(PRESETS["resnet-222"]))
    assert f"{alone.total_params:,}" in lines[1]
    assert f"{alone.total_mult_adds:,}" in lines[1]
    assert main(["--summary", "--model", "resnet-222,resnet-111"]) == 2
    assert "unknown model 'resnet-111'; did you mean" in capsys.readouterr().err


def test_a_model_above_the_budget_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    options = ["--data", "digits", "--model", "resnet18", "--out", str(tmp_path)]
    assert main(options) == 2
    error = capsys.readouterr().err
    assert "11,173,962" in error
    assert "5,000,000" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model resnet18", "above the budget of 5,000,000"),
        ("--image-size 24 --sizes 28:0.5", "has 28 pixels, more than the images' 24"),
        (
            "--image-size 24 --sizes 28:0.5 --data cifar10",
            "has 28 pixels, more than the images' 24",
        ),
        ("--image-size 24 --sizes 28:0.5 --data auto", "has 28 pixels, more than the images' 24"),
        ("--sizes 1:0.5 --model speednet-94", "--sizes 1:0.5: the network cannot take that size"),
        ("--image-size 4 --model speednet-94", "images of 4x4 pixels are too small"),
    ],
)
def test_the_network_is_checked_before_data_is_read(
    options: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    data = ["--data", f"folder:{tmp_path / 'missing'}", "--out", str(tmp_path / "runs")]
    assert main([*data, *options.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("data", ["auto", "cifar10", "cifar100", "digits"])
def test_images_may_be_larger_than_those_of_the_data_set(data: str):
    config = RECIPES["fast94"]
    sizes = dataclasses.replace(config.data, data=data, image_size=48, sizes=((40, 0.5),))
    check_network(dataclasses.replace(config, data=sizes))


def test_checking_the_network_draws_no_random_numbers():
    before = torch.get_rng_state()
    check_network(RECIPES["fast94"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 1.5}, "--warmup 1.5 is out of range: expected at least 0, at most 1"),
        ({"gamma": 1.0}, "--gamma 1.0 is out of range: expected between 0 and 1"),
        ({"ema": 1.0}, "--ema 1.0 is out of range: expected at least 0 and below 1"),
        ({"start_factor": 0.0}, "--start-factor 0.0 is out of range: expected above 0, at most 1"),
        ({"epochs": 0.5}, "--epochs 0.5 is out of range: expected a number of at least 1"),
        ({"epochs": math.inf}, "--epochs inf is out of range: expected a number of at least 1"),
        ({"max_seconds": math.nan}, "--max-seconds nan is out of range: expected a positive"),
        ({"logit_scale": math.inf}, "--logit-scale inf is out of range: expected a finite number"),
        ({"epochs": "many"}, "--epochs 'many' is invalid"),
    ],
)
def test_the_error_states_option_value_and_range(values: dict, message: str):
    with pytest.raises(ResfastError, match=re.escape(message)):
        check(change(Config(), **values))


@pytest.mark.parametrize("group", [OptimConfig, DataConfig, EvalConfig, RuntimeConfig, RunConfig])
def test_every_declared_range_is_worded(group: type):
    for name, hint in get_type_hints(group, include_extras=True).items():
        declared = "Ge(" in repr(hint) or "Gt(" in repr(hint)
        assert (expectation(hint) != "a finite number") == declared, name


def test_overrides_apply_to_a_preset():
    spec = network(ModelConfig(model="resnet-2111", dropout=0.2, head=(32,), shortcut="pool"))
    assert spec == dataclasses.replace(
        PRESETS["resnet-2111"], dropout=0.2, head=(32,), shortcut="pool"
    )
    deeper = network(ModelConfig(model="resnet-222", blocks=(1,) * 4, channels=(8,) * 4))
    assert deeper.strides == (1, 2, 2, 2)


def test_differences_leave_out_what_does_not_change_the_result():
    config = Config()
    assert compare.differences(config, change(config, name="x", data_dir=Path("y"))) == {}
    assert compare.differences(config, change(config, lr=0.2)) == {"lr": (0.1, 0.2)}


def test_json_is_readable():
    assert json.loads(files.to_json(Config()))["optim"]["lr"] == 0.1
