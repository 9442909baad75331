"""Sweeps: what a space may hold, which trials are trained, and that processes share them."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")  # the extra sweep
pytest.importorskip("tomli_w")

from resfast.cli.sweep import main
from resfast.cli.train import command_line
from resfast.config.files import load as load_config
from resfast.config.files import to_toml
from resfast.config.schema import Config
from resfast.data.augment import parse_augment
from resfast.errors import ResfastError
from resfast.runs.summary import read_run
from resfast.training.sweep.space import Parameter, checked_value, read_options, read_space
from tests.conftest import TINY_OPTIONS, change

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def options(image_tree: Path, tmp_path: Path) -> str:
    """Base options of a tiny trial: 3 epochs of 3 steps, 12 held-out images."""
    return (
        f"{' '.join(TINY_OPTIONS)} --data folder:{image_tree} --data-dir {tmp_path / 'data'} "
        "--epochs 3 --val-fraction 0.25 --device cpu --optimizer sgd"
    )


def space_file(path: Path, options: str, space: str, **settings: object) -> Path:
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    path.write_text("\n".join([f'options = "{options}"', *lines, "[space]", space]))
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def parameters(text: str, tmp_path: Path) -> dict[str, Parameter]:
    path = space_file(tmp_path / "space.toml", "--val-fraction 0.1", text)
    arguments, rest = read_options(path)
    space = read_space(path, arguments, rest, Config())
    return {parameter.name: parameter for parameter in space.parameters}


# -- the space ---------------------------------------------------------------------------------


def test_kinds_follow_from_bounds_and_field(tmp_path: Path) -> None:
    found = parameters(
        """
        lr = {low = 1, high = 2}
        weight-decay = {low = 1e-5, high = 1e-2, log = true}
        batch_size = {low = 16, high = 64, step = 16}
        epochs = {low = 2, high = 4}
        optimizer = {choices = ["sgd", "adam"]}
        blocks = {choices = ["1,1", [2, 1]]}
        augment = {choices = ["none", "crop=4,flip=random"]}
        nesterov = {choices = [true, false]}
        ema = {type = "float", low = 0, high = 0.9}
        """,
        tmp_path,
    )
    kinds = {name: one.kind for name, one in found.items()}
    assert kinds == {
        **{"lr": "float", "weight_decay": "float", "batch_size": "int", "epochs": "int"},
        **dict.fromkeys(("optimizer", "blocks", "augment", "nesterov"), "categorical"),
        "ema": "float",
    }
    assert found["blocks"].choices == {"1,1": (1, 1), "2,1": (2, 1)}
    assert found["nesterov"].choices == {"true": True, "false": False}
    augment = found["augment"].choices
    assert augment is not None
    assert augment["crop=4,flip=random"] == parse_augment("crop=4,flip=random")
    assert found["batch_size"].step == 16


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate = {low = 1, high = 2}", "no option 'learning_rate'"),
        ("lrr = {low = 1, high = 2}", "no option 'lrr'; did you mean 'lr'"),
        ("lr = 0.1", "space.lr is 0.1; expected {low = …, high = …} or {choices = […]}"),
        ("lr = {low = 1, hihg = 2}", "unknown key 'hihg'; did you mean 'high'"),
        ("lr = {low = 2, high = 1}", "low 2 is not below high 1"),
        ("lr = {low = 'a', high = 1}", "low is 'a'; expected a number"),
        ("lr = {low = -1, high = 1}", "--lr -1 is out of range: expected a positive number"),
        ("lr = {low = 0.1, high = 1, log = true, step = 0.1}", "expected no step with log = true"),
        ("label_smoothing = {low = 0.0, high = 0.5, log = true}", "low 0.0 has no logarithm"),
        ("label_smoothing = {low = 0.0, high = 1.5}", "--label-smoothing 1.5 is out of range"),
        ("batch_size = {low = 0, high = 8}", "--batch-size 0 is out of range"),
        ("batch_size = {low = 1.5, high = 8.0}", "must be whole numbers for type int"),
        ("batch_size = {type = 'float', low = 1, high = 8}", "expected type int"),
        ("lr = {type = 'real', low = 1, high = 8}", "type is 'real'; choose float, int, categor"),
        ("lr = {choices = [0.1]}", "expected a list of two or more"),
        ("batch_size = {choices = [64, 64.0]}", "the choice 64.0 is given twice; leave one out"),
        (
            "batch_size = {low = 1, high = 8}\nbatch-size = {low = 8, high = 16}",
            "space has batch_size twice, with - and with _; leave one of them out",
        ),
        ("lr = {choices = [0.1, 0.1]}", "the choice 0.1 is given twice"),
        ("lr = {choices = ['0.1', 'b']}", "expected a number"),
        ("nesterov = {choices = [1, true]}", "expected true or false"),
        ("optimizer = {low = 1, high = 2}", "optimizer is not a number"),
        ("optimizer = {choices = ['sgd', 'adm']}", "optimizer"),
        ("blocks = {choices = ['1,1', 'a']}", "is not a comma-separated list of whole numbers"),
        ("augment = {choices = ['none', 'crp=4']}", "crp"),
        ("seed = {low = 0, high = 9}", "cannot be searched: the best seed is luck"),
        ("val_fraction = {low = 0.1, high = 0.2}", "cannot be searched: trials are compared on"),
        ("data = {choices = ['digits', 'cifar10']}", "cannot be searched: trials need the same"),
    ],
)
def test_a_bad_space_is_one_sentence(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ResfastError) as error:
        parameters(line, tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "space.toml") in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[space", "expected a sweep as TOML"),
        ("options = ''", "has no table [space]"),
        ("option = ''\n[space]\nlr = {low = 1, high = 2}", "unknown key 'option'; did you mean"),
        ("options = 3\n[space]\nlr = {low = 1, high = 2}", "options is 3; expected text"),
        ("options = '\"'\n[space]\nlr = {low = 1, high = 2}", "expected train's options"),
        (
            "objective = 'test'\n[space]\nlr = {low = 1, high = 2}",
            "objective is 'test'; choose acc",
        ),
        ("direction = 'minimize'\n[space]\nlr = {low = 1, high = 2}", "is to maximize; leave it"),
        ("pruner = 'medain'\n[space]\nlr = {low = 1, high = 2}", "did you mean 'median'"),
        ("seed = -1\n[space]\nlr = {low = 1, high = 2}", "seed is -1; expected a whole number"),
        ("[space]\nlr = {low = 1, high = 2}", "hold out none; add --val-fraction 0.1"),
        ("options = '--list'\n[space]\nlr = {low = 1, high = 2}", "--list is not for a sweep"),
        ("options = '--runs 2 --val-fraction 0.1'\n[space]\nlr = {low = 1, high = 2}", "--runs 2"),
    ],
)
def test_a_bad_file_is_one_sentence_and_exit_code_2(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_optuna_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resfast.cli.sweep.find_spec", lambda name: None)
    assert main([str(tmp_path / "space.toml")]) == 2
    assert "needs the package optuna; pip install 'resfast[sweep]'" in capsys.readouterr().err


def test_values_of_a_choice_are_those_of_the_field() -> None:
    assert checked_value(Config(), "lr", 1, "x") == 1.0
    assert checked_value(Config(), "sizes", "24:0.5", "x") == ((24, 0.5),)
    with pytest.raises(ResfastError, match="not a value of batch_size; expected a number"):
        checked_value(Config(), "batch_size", "64", "x")


# -- one process -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of eight trials, some of them above the budget of parameters."""
    folder = tmp_path_factory.mktemp("sweep")
    options = (
        f"{' '.join(TINY_OPTIONS)} --data folder:{image_tree} --data-dir {folder / 'data'} "
        "--epochs 3 --val-fraction 0.25 --device cpu --optimizer sgd --param-budget 8000"
    )
    space = "lr = {low = 0.001, high = 0.3, log = true}\nchannels = {choices = ['8,16', '16,32']}"
    path = space_file(folder / "space.toml", options, space, startup_trials=2)
    assert main([str(path), "--trials", "8", "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_each_trial_is_a_run_on_held_out_images(done: Path) -> None:
    found = rows(done)
    assert len(found) == 8
    assert {row["state"] for row in found} >= {"complete", "refused"}
    for row in found:
        if row["state"] != "complete":
            continue
        run = done / "trials" / row["run"]
        summary, config = read_run(run / "summary.json"), load_config(run / "config.json")
        assert float(row["accuracy"]) == pytest.approx(summary.val_accuracy)
        assert (summary.test_images, summary.test_accuracy) == (0, None)
        assert config.optim.lr == float(row["lr"])
        assert config.model.channels == tuple(map(int, row["channels"].split(",")))


def test_a_network_above_the_budget_is_not_trained(done: Path) -> None:
    refused = [row for row in rows(done) if row["channels"] == "16,32"]
    assert refused
    for row in refused:
        assert row["state"] == "refused"
        assert "parameters, above the budget of 8,000" in row["reason"]
        assert (row["accuracy"], row["evaluations"]) == ("", "0")
        assert not (done / "trials" / row["run"]).exists()


def test_the_best_trial_can_be_trained_again(done: Path) -> None:
    complete = [row for row in rows(done) if row["state"] == "complete"]
    best = max(complete, key=lambda row: (float(row["accuracy"]), -int(row["trial"])))
    start, config = command_line(["--config", str(done / "best.toml")])
    assert start.config == done / "best.toml"
    assert config.optim.lr == float(best["lr"])
    assert config.evaluation.score_test  # as the base options say, not as the trials did
    saved = load_config(done / "trials" / best["run"] / "config.json")
    assert change(config, score_test=False).optim == saved.optim
    assert config.model == saved.model
    assert config.data == saved.data


def test_a_finished_sweep_only_writes_its_results(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows(done)
    (done / "results.csv").unlink()
    assert main([str(done / "space.toml"), "--trials", "8", "--out", str(done)]) == 0
    assert rows(done) == before
    printed = capsys.readouterr().out
    assert "best accuracy on held-out images: " in printed
    assert "train it with: resfast train --config" in printed


def test_more_trials_continue_a_sweep(done: Path) -> None:
    before = rows(done)
    assert main([str(done / "space.toml"), "--trials", "9", "--out", str(done)]) == 0
    after = rows(done)
    assert after[:8] == before
    assert len(after) == 9
    assert after[8]["lr"] not in {row["lr"] for row in before}  # not the first draws again


def test_importances_and_contours_are_plotted(options: str, tmp_path: Path) -> None:
    space = "lr = {low = 0.001, high = 0.3, log = true}\nweight_decay = {low = 0.0, high = 0.01}"
    path = space_file(tmp_path / "s.toml", f"{options} --epochs 1", space, pruner="none")
    assert main([str(path), "--trials", "6", "--out", str(tmp_path / "out")]) == 0
    for name in ("importance.png", "contour.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_another_space_is_refused_in_the_same_folder(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.toml"
    path.write_text((done / "space.toml").read_text().replace("0.3", "0.4"))
    assert main([str(path), "--out", str(done)]) == 2
    assert "has a sweep of another space" in capsys.readouterr().err


def test_a_damaged_study_is_one_sentence(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = space_file(tmp_path / "s.toml", options, "lr = {low = 0.1, high = 0.2}")
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.db").write_text("no database")
    assert main([str(path), "--trials", "1", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "study.db cannot be read as the study of a sweep (" in error
    assert len(error.strip().splitlines()) == 1
    assert (out / "study.db").read_text() == "no database"


def test_a_trial_that_is_worse_is_pruned(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracies that are reported are replaced: trial by trial lower, so all but two end.

    Not at the first evaluation, which is within the warm-up; and every evaluation is reported.
    """
    from resfast.training.sweep import trial as trials

    reported: list[tuple[int, int]] = []
    report = trials.optuna.Trial.report

    def lower(self: Any, value: float, step: int) -> None:
        reported.append((self.number, step))
        report(self, 1 - 0.1 * self.number, step)

    monkeypatch.setattr(trials.optuna.Trial, "report", lower)
    path = space_file(
        tmp_path / "s.toml",
        options,
        "lr = {low = 0.001, high = 0.3}",
        startup_trials=2,
        warmup_epochs=1,
    )
    assert main([str(path), "--trials", "4", "--out", str(tmp_path / "out")]) == 0
    assert [row["state"] for row in rows(tmp_path / "out")] == [
        *("complete", "complete"),
        *("pruned", "pruned"),
    ]
    expected = [(n, step) for n in range(4) for step in ((1, 2, 3) if n < 2 else (1, 2))]
    assert reported == expected


def test_a_trial_is_not_pruned_after_its_last_epoch(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resfast.training.sweep import trial as trials

    asked: list[int] = []
    monkeypatch.setattr(trials.optuna.Trial, "should_prune", lambda self: asked.append(0))
    path = space_file(tmp_path / "s.toml", options, "lr = {low = 0.001, high = 0.3}")
    assert main([str(path), "--trials", "1", "--out", str(tmp_path / "out")]) == 0
    assert len(asked) == 2  # of three evaluations


def test_values_that_do_not_fit_each_other_are_refused_with_the_reason(
    options: str, tmp_path: Path
) -> None:
    space = "optimizer = {choices = ['sgd', 'adamw']}\nnesterov = {choices = [false, true]}"
    path = space_file(tmp_path / "s.toml", f"{options} --epochs 1", space, seed=1)
    assert main([str(path), "--trials", "8", "--out", str(tmp_path / "out")]) == 0
    found = rows(tmp_path / "out")
    for row in found:
        bad = row["optimizer"] == "adamw" and row["nesterov"] == "false"
        assert (row["state"] == "refused") == bad
        assert ("--no-nesterov is an option of sgd" in row["reason"]) == bad
    assert {row["state"] for row in found} == {"refused", "complete"}


def test_a_space_of_which_no_value_can_be_trained_is_an_error(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = "channels = {choices = ['8,16', '16,32']}"
    path = space_file(tmp_path / "s.toml", f"{options} --param-budget 10", space)
    assert main([str(path), "--trials", "8", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "the first 5 trials were all refused, the last because: model resnet has" in error


def test_missing_data_is_one_error(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = space_file(
        tmp_path / "s.toml", f"{options} --data folder:{tmp_path / 'gone'}", "lr = {low=1, high=2}"
    )
    assert main([str(path), "--trials", "2", "--out", str(tmp_path / "out")]) == 2
    assert "gone" in capsys.readouterr().err
    assert not (tmp_path / "out" / "trials").exists()


def test_an_interrupted_trial_is_resumed_by_the_same_command(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.conftest import interrupt_at

    path = space_file(tmp_path / "s.toml", options, "lr = {low = 0.001, high = 0.3}", pruner="none")
    arguments = [str(path), "--trials", "2", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 13)  # in the second epoch of the second trial
        assert main(arguments) == 130
    assert main(arguments) == 0
    found = rows(tmp_path / "out")
    assert [row["state"] for row in found] == ["complete", "failed", "complete"]
    assert found[2]["retry_of"] == "1"
    for name in ("lr", "run"):
        assert found[2][name] == found[1][name]
    assert found[2]["evaluations"] == "3"  # with those before the interruption
    # Exactly what an uninterrupted run of these values gives.
    run = tmp_path / "out" / "trials" / found[2]["run"]
    from resfast.training.loop import train

    again = train(change(load_config(run / "config.json"), name="again", out=tmp_path))
    assert again.summary.confusion == read_run(run / "summary.json").confusion


# -- several processes -------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts sweeps in processes of their own, which do not outlive the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(path: Path, out: Path, trials: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "resfast.sweep", str(path), "--out", str(out)]
        with (tmp_path / f"log{len(started)}").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--trials", str(trials), "--heartbeat", "1"],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_a_killed_worker_s_trial_is_taken_over(options: str, tmp_path: Path, start: Any) -> None:
    out = tmp_path / "out"
    long = f"{options} --epochs 120"
    path = space_file(tmp_path / "s.toml", long, "lr = {low = 0.001, high = 0.1}", pruner="none")
    process = start(path, out, 1)
    wait_for(lambda: (out / "trials" / "trial0000" / "checkpoint.pt").exists())
    process.send_signal(signal.SIGKILL)
    process.wait()
    trained = len((out / "trials" / "trial0000" / "metrics.jsonl").read_text().splitlines())
    assert trained < 120
    assert main([str(path), "--trials", "1", "--out", str(out), "--heartbeat", "1"]) == 0
    found = rows(out)
    assert [row["state"] for row in found] == ["failed", "complete"]
    assert found[1]["retry_of"] == "0"
    assert found[1]["lr"] == found[0]["lr"]
    assert found[1]["run"] == "trial0000"
    assert found[1]["evaluations"] == "120"


def test_two_processes_do_the_trials_together(options: str, tmp_path: Path, start: Any) -> None:
    out = tmp_path / "out"
    path = space_file(
        tmp_path / "s.toml", f"{options} --epochs 30", "lr = {low = 0.001, high = 0.1}"
    )
    processes = [start(path, out, 5) for _ in range(2)]
    for process in processes:
        assert process.wait(timeout=200) == 0
    found = rows(out)
    assert len(found) == 5
    assert {row["state"] for row in found} <= {"complete", "pruned"}
    assert len({row["lr"] for row in found}) == 5
    logs = [(tmp_path / f"log{number}").read_text() for number in range(2)]
    done = [[n for n in range(5) if f"trial {n} (" in log] for log in logs]
    assert sorted(done[0] + done[1]) == list(range(5))
    assert all(done), "each process has trained at least one"


def test_toml_gives_the_configuration_back(tmp_path: Path) -> None:
    config = change(
        Config(), blocks=(2, 1), sizes=((24, 0.5),), augment=parse_augment("strong"), head_lr=0.5
    )
    (tmp_path / "c.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(tmp_path / "c.toml") == config
    (tmp_path / "c.toml").write_text("[optim\n")
    with pytest.raises(ResfastError, match="expected a configuration as TOML"):
        load_config(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text("[optim]\nlrr = 1\n")
    with pytest.raises(ResfastError, match=r"optim\.lrr"):
        load_config(tmp_path / "c.toml")
