"""Which recipe ``--target`` with ``--max-seconds`` picks, from measured rows."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resfast.cli.train import command_line, main
from resfast.config.recipes import RECIPES
from resfast.config.validate import check
from resfast.errors import ResfastError
from resfast.runs import targets
from resfast.runs.targets import Row, data_name, pick, read, to_json

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parents[1]
SLOW = Row(
    recipe="default",
    device="cpu",
    hardware="AMD EPYC",
    threads=2,
    data="folder:cifar10-jpeg.tar.xz",
    data_digest="b90",
    accuracy=0.92,
    sd=0.001,
    runs=5,
    timed_seconds=1000.0,
    compile_seconds=30.0,
    date="2026-11-20",
    versions="resfast 0.1.0, torch 2.15.0",
    source="benchmarks/results/x.json",
)
FAST = replace(SLOW, recipe="report-onecycle", accuracy=0.907, timed_seconds=180.0)
GPU = replace(
    FAST, device="cuda", hardware="NVIDIA H200", threads=None, accuracy=0.91, timed_seconds=1.5
)


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch):
    machines = {"cpu": ("AMD EPYC", 2), "cuda": ("NVIDIA H100 80GB HBM3", None)}
    monkeypatch.setattr(targets, "here", lambda device: machines[device.type])


def chosen(target: float, seconds: float, *rows: Row, data: str = SLOW.data, **values: object):
    return pick(target, seconds, device=values.pop("device", CPU), data=data, rows=rows, **values)


def test_the_fastest_that_reaches_the_target_is_picked():
    assert chosen(0.90, 2000, SLOW, FAST)[0] == FAST
    assert chosen(0.91, 2000, SLOW, FAST)[0] == SLOW
    row, reason = chosen(0.90, 300, SLOW, FAST)
    assert row == FAST
    assert "report-onecycle" in reason
    assert "90.70%" in reason
    assert "180 s" in reason
    assert "differ" not in reason


def test_rows_of_another_kind_of_device_never_count():
    assert chosen(0.90, 300, FAST, GPU)[0] == FAST
    assert chosen(0.90, 300, FAST, GPU, device=CUDA)[0] == GPU
    with pytest.raises(ResfastError, match="no recipe has been measured on cuda"):
        chosen(0.90, 300, FAST, device=CUDA)


def test_of_a_recipe_the_row_of_the_nearest_machine_counts():
    other = replace(FAST, hardware="Intel Xeon", timed_seconds=10.0)
    assert chosen(0.90, 300, other, FAST)[0] == FAST
    with pytest.raises(ResfastError, match=r"takes longer.*180 s"):
        chosen(0.90, 100, other, FAST)
    more_threads = replace(FAST, threads=64, timed_seconds=10.0)
    assert chosen(0.90, 300, more_threads, FAST)[0] == FAST
    assert chosen(0.90, 300, more_threads, FAST, threads=48)[0] == more_threads
    later = replace(FAST, date="2026-12-01", timed_seconds=170.0)
    assert chosen(0.90, 300, later, FAST)[0] == later


def test_differences_from_this_machine_and_data_are_reported():
    row, reason = chosen(0.90, 300, GPU, device=CUDA)
    assert row.hardware == "NVIDIA H200"
    assert "this is NVIDIA H100 80GB HBM3, so the seconds will differ" in reason
    assert "not measured on cifar10" in chosen(0.90, 300, FAST, data="cifar10")[1]
    original = replace(FAST, data="cifar10", accuracy=0.94)
    assert chosen(0.90, 300, FAST, original, data="auto")[0] == original


def test_nothing_that_fits_is_an_error_with_what_is_known():
    with pytest.raises(ResfastError, match=r"no known recipe reaches 95\.00%.*default: 92\.00%"):
        chosen(0.95, 2000, SLOW, FAST)
    with pytest.raises(ResfastError, match=r"fastest known recipe that reaches 92\.00%.*1000 s"):
        chosen(0.92, 300, SLOW, FAST)
    with pytest.raises(ResfastError, match=r"expected an accuracy, 0\.94 for 94 %"):
        chosen(94, 300, SLOW)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("folder:/some/where/cifar10-jpeg.tar.xz", "folder:cifar10-jpeg.tar.xz"),
        ("shards:x/y/", "shards:y"),
        ("auto", "cifar10"),
        ("digits", "digits"),
    ],
)
def test_data_is_known_by_the_end_of_its_path(data: str, name: str):
    assert data_name(data) == name


def test_a_table_survives_its_file_and_a_damaged_one_is_named(tmp_path: Path):
    file = tmp_path / "targets.json"
    file.write_text(to_json([GPU, SLOW, FAST]))
    assert set(read(file)) == {GPU, SLOW, FAST}
    assert read(file)[:2] == (FAST, SLOW)
    file.write_text('[{"recipe": 3}]')
    with pytest.raises(ResfastError, match=r"0\.recipe"):
        read(file)
    with pytest.raises(ResfastError, match="cannot read"):
        read(tmp_path / "missing.json")


def test_lengths_of_one_recipe_are_told_apart():
    long = replace(SLOW, options="--epochs 70")
    short = replace(SLOW, options="--epochs 8", accuracy=0.905, timed_seconds=500.0)
    row, reason = chosen(0.90, 2000, long, short)
    assert row == short
    assert "recipe default --epochs 8: the fastest" in reason
    assert chosen(0.91, 2000, long, short)[0] == long


def test_the_options_of_a_row_count_unless_the_user_gives_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    row = replace(SLOW, options="--epochs 28 --model resnet-453")
    monkeypatch.setattr(targets, "read", lambda path: (row,))
    options = ["--target", "0.9", "--max-seconds", "2000", "--device", "cpu"]
    config = command_line(options)[1]
    assert (config.recipe, config.optim.epochs) == ("default", 28)
    assert (config.model.model, config.data.filter_keep) == ("resnet-453", 0.5)
    assert "filter_keep" in config.undecided  # until the data is known
    config = command_line([*options, "--epochs", "4", "--filter-keep", "0.75"])[1]
    assert (config.optim.epochs, config.data.filter_keep) == (4, 0.75)
    assert str(config.data.augment) == "crop=2,flip=alternating"
    assert "filter_keep" not in config.undecided


def test_rows_that_come_with_resfast_name_known_recipes_and_files_that_are_there():
    for row in read(targets.TABLE):
        assert row.recipe in RECIPES, row
        check(command_line(["--recipe", row.recipe, *shlex.split(row.options)])[1])
        assert bool(row.options) == bool(RECIPES[row.recipe].undecided), row
        assert (ROOT / row.source).exists(), row
        assert 0 < row.accuracy <= 1
        assert row.timed_seconds > 0


def test_target_and_limit_pick_the_recipe_of_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(targets, "read", lambda path: (SLOW, FAST))
    options = ["--target", "0.9", "--max-seconds", "300", "--device", "cpu", "--epochs", "3"]
    _, config = command_line(options)
    assert config.recipe == "report-onecycle"
    assert config.optim.optimizer == "adam"
    assert config.optim.epochs == 3  # other options still count
    assert config.evaluation.target == 0.9
    assert config.run.max_seconds == 300
    assert "recipe report-onecycle: the fastest known" in capsys.readouterr().out
    assert command_line([*options, "--recipe", "default"])[1].recipe == "default"
    assert command_line(options[:2])[1].recipe == "default"
    assert command_line(options[2:4])[1].recipe == "default"
    monkeypatch.chdir(tmp_path)
    assert main(["--target", "0.99", "--max-seconds", "300", "--device", "cpu"]) == 2
    assert "no known recipe reaches 99.00%" in capsys.readouterr().err


def test_the_list_of_recipes_shows_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(targets, "read", lambda path: (SLOW,))
    assert main(["--list"]) == 0
    assert f"  {SLOW}\n" in capsys.readouterr().out
