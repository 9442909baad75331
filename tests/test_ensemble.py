"""Several runs as one classifier: what each method computes, budgets, classes and files."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import resfast
from resfast.cli.ensemble import main
from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.inference.ensemble import Combination, wilson_interval
from resfast.training.loop import train
from tests.conftest import change


@pytest.fixture(scope="module")
def runs(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs that differ in seed, one of them in image size."""
    folder = tmp_path_factory.mktemp("members")
    options = Config()
    options = change(options, model="resnet", blocks=(1, 1), channels=(8, 16), stem=8)
    options = change(options, data=f"folder:{image_tree}", data_dir=folder / "data")
    options = change(options, epochs=1, batch_size=12, lr=0.05, tta="flip", device="cpu")
    options = change(options, precision="fp32", compile="off", threads=1, out=folder)
    found = []
    for seed, size in ((0, 16), (1, 16), (2, 12)):
        one = change(options, image_size=size, seed=seed, name=f"seed{seed}")
        found.append(train(replace(one)).path)
    return found


def test_methods_are_means_and_votes() -> None:
    """Three members, one image: two weak votes for 1 against a strong one for 0."""
    logits = torch.tensor([[[5.0, 0.0, -1.0]], [[0.0, 0.4, 0.0]], [[0.1, 0.5, 0.0]]])
    combination = Combination(1, 3)
    for member in logits:
        combination.add(member)
    assert torch.allclose(combination.scores("logits"), logits.mean(0))
    assert torch.allclose(combination.scores("probabilities"), logits.softmax(2).mean(0))
    assert combination.scores("logits").argmax(1).item() == 0
    assert combination.scores("vote").argmax(1).item() == 1


def test_ties_of_votes_are_broken_by_the_mean_softmax() -> None:
    for strong, expected in ((3.0, 0), (0.1, 2)):
        combination = Combination(1, 3)
        combination.add(torch.tensor([[strong, 0.0, 0.0]]))
        combination.add(torch.tensor([[0.0, 0.0, 1.0]]))
        assert combination.scores("vote").argmax(1).item() == expected


def test_the_result_is_that_of_the_members_logits(runs: list[Path]) -> None:
    result = resfast.ensemble(runs, tta="none", device="cpu")
    logits, labels = [], None
    for path in runs:
        run = resfast.load(path, device="cpu")
        data = resfast.load_dataset(
            run.config.data.data, data_dir=run.config.data.data_dir, image_size=run.image_size
        )
        logits.append(run.logits(data.test_images))
        labels = data.test_labels
    stacked = torch.stack(logits)
    expected = {
        "probabilities": stacked.softmax(2).mean(0),
        "logits": stacked.mean(0),
    }
    for method, scores in expected.items():
        torch.testing.assert_close(result.scores[method], scores)
        right = (scores.argmax(1) == labels).float().mean().item()
        assert result.accuracy[method] == pytest.approx(right)
    for member, own in zip(result.members, logits, strict=True):
        assert member.accuracy == pytest.approx((own.argmax(1) == labels).float().mean().item())
    assert result.parameters == 3 * result.members[0].parameters
    assert result.images == 16


def test_one_member_is_scored_as_it_is_alone(runs: list[Path]) -> None:
    result = resfast.ensemble(runs[:1], device="cpu")
    alone = resfast.evaluate(runs[0], device="cpu")
    assert result.accuracy["logits"] == pytest.approx(alone.with_tta.accuracy)


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [(0, 10, (0.0, 0.277533)), (9, 10, (0.595850, 0.982124)), (500, 1000, (0.469070, 0.530930))],
)
def test_intervals_are_wilson_s(right: int, count: int, interval: tuple[float, float]) -> None:
    """Values from (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.95996."""
    assert wilson_interval(right, count) == pytest.approx(interval, abs=1e-6)


def test_a_folder_of_runs_stands_for_its_runs(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    (folder / "config.json").write_bytes((runs[0] / "config.json").read_bytes())
    for run in runs[:2]:
        (folder / run.name).symlink_to(run)
    whole = resfast.ensemble([folder], device="cpu")
    assert [member.run.name for member in whole.members] == ["seed0", "seed1"]
    assert whole.accuracy == resfast.ensemble(runs[:2], device="cpu").accuracy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "run"),
        (["{0}", "{0}/../seed0"], "is given twice"),
        (["{0}", "nowhere"], "there is no run nowhere"),
        (["{0}", "{1}", "--param-budget", "6000"], "2 members have 10,260 parameters, above"),
        (["{0}", "--data", "digits"], "differ from those of digits (10)"),
        (["{0}", "--images", "missing.npy"], "missing.npy"),
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str],
    message: str,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [option.format(*runs) for option in options]
    if not options:
        with pytest.raises(ResfastError, match="at least one run"):
            resfast.ensemble([])
        return
    assert main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_command_prints_a_table_and_writes_json(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ensemble.json"
    assert main([*map(str, runs), "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "majority vote" in printed
    record = json.loads(out.read_text())
    assert len(record["members"]) == 3
    accuracy = record["test_accuracy"]["vote"]
    assert f"{accuracy:.2%}" in printed
    low, high = record["confidence_interval"]["vote"]
    assert low <= accuracy <= high


@pytest.mark.parametrize("method", ["probabilities", "logits", "vote"])
def test_unlabelled_images_are_classified(method: str, runs: list[Path], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    target = tmp_path / "out.csv"
    arguments = [
        *map(str, runs[:2]),
        "--images",
        str(tmp_path / "images.npy"),
        "--csv",
        str(target),
    ]
    assert main([*arguments, "--method", method, "--device", "cpu", "--batch-size", "3"]) == 0
    rows = list(csv.reader(target.open()))
    assert rows[0] == ["ID", "Labels"]
    combination = Combination(7, 2)
    for path in runs[:2]:
        combination.add(resfast.load(path, device="cpu").logits(torch.from_numpy(images)))
    expected = combination.scores(method).argmax(1).tolist()
    assert [int(label) for _, label in rows[1:]] == expected
    assert main([*arguments, "--device", "cpu"]) == 2  # the file exists
