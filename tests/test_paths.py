"""A run on data of a relative path can be used from any folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import resfast
from resfast import evaluate
from resfast.cli.train import main
from resfast.config.compare import differences
from resfast.config.files import load
from resfast.config.paths import absolute_data, absolute_paths
from resfast.config.schema import Config
from resfast.runs import folder as records
from tests.conftest import change


@pytest.fixture
def work(image_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(image_tree, folder / "photos")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def relative(tiny: Config, work: Path) -> Config:
    return change(tiny, data="folder:photos", data_dir=Path("sets"), epochs=1)


def test_paths_of_folders_and_shards_become_absolute(work: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for data, expected in {
        "folder:photos": f"folder:{work}/photos",
        "shards:a/b": f"shards:{work}/a/b",
        "folder:~/photos": "folder:/home/someone/photos",
        "folder:/photos": "folder:/photos",
        "cifar10": "cifar10",
        "auto": "auto",
    }.items():
        assert absolute_data(data) == expected
    assert absolute_paths(Config()).data.data_dir == work / "data"


@pytest.mark.parametrize("runs", [1, 2])
def test_a_run_on_a_relative_path_is_used_from_another_folder(
    relative: Config, work: Path, monkeypatch: pytest.MonkeyPatch, runs: int, capsys
):
    first = resfast.train(change(relative, runs=runs))
    assert first.summary.data == "folder:photos"
    saved = [load(path) for path in sorted(first.path.rglob(records.CONFIG))]
    assert len(saved) == (1 if runs == 1 else 3)
    for config in saved:
        assert (config.data.data, config.data.data_dir) == (
            f"folder:{work}/photos",
            work / "sets",
        )

    monkeypatch.chdir(work.parent / "elsewhere")
    one = first.path if runs == 1 else first.path / "seed0"
    summary = json.loads((one / records.SUMMARY).read_text())
    for weights in (one, one / records.WEIGHTS):
        assert evaluate(weights).accuracy == summary["test_accuracy"]
    again = resfast.train(replace(saved[0], run=replace(saved[0].run, name="again")))
    resumed = resfast.train(resume=first.path)
    for result in (again, resumed):
        assert result.summary.data_digest == first.summary.data_digest
    assert not list(work.parent.glob("elsewhere/*"))

    other = next((work / "photos" / "test").glob("*/*.png"))
    other.write_bytes(next((work / "photos" / "train").glob("*/*.png")).read_bytes())
    capsys.readouterr()
    evaluate(one)
    assert "has changed since" in capsys.readouterr().err


def test_the_relative_path_given_again_agrees_with_the_saved_one(
    relative: Config, work: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    path = resfast.train(relative).path
    assert main(["--resume", str(path), "--data", "folder:photos", "--data-dir", "sets"]) == 0
    assert load(path / records.CONFIG).data.data == f"folder:{work}/photos"
    monkeypatch.chdir(work.parent / "elsewhere")
    assert main(["--resume", str(path), "--data", "folder:photos"]) == 2
    assert f"data was 'folder:{work}/photos' and is now 'folder:photos'" in capsys.readouterr().err


def test_a_run_saved_with_a_relative_path_is_still_read(relative: Config, work: Path):
    path = resfast.train(relative).path
    old = load(path / records.CONFIG)
    old = change(old, data="folder:photos", data_dir=Path("sets"))
    records.write_config(path, old)
    assert differences(old, relative)["loader"]
    assert "data" not in differences(old, change(relative, data=f"folder:{work}/photos"))
    assert resfast.train(resume=path).summary.data == "folder:photos"
    assert load(path / records.CONFIG).data.data == f"folder:{work}/photos"


def test_a_run_whose_names_are_not_utf_8_is_read_again(
    tiny: Config, image_tree: Path, tmp_path: Path
):
    name = "$1 caf\udce9 $2"
    try:
        tree = Path(shutil.copytree(image_tree, tmp_path / name))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for split in ("train", "test"):
        first = min((tree / split).iterdir())
        first.rename(first.with_name(name))
    config = change(tiny, data=f"folder:{tree}", name=name, epochs=1, out=tmp_path / name)
    first = resfast.train(config)
    assert (first.path / records.CONFUSION).exists()
    saved = load(first.path / records.CONFIG)
    assert (saved.data.data, saved.run) == (config.data.data, config.run)
    assert evaluate(first.path).accuracy == first.summary.test_accuracy
    assert name in resfast.load(first.path).classes
    assert resfast.train(resume=first.path).summary.data_digest == first.summary.data_digest
