"""Training on images without labels, with the labels that a run predicts."""

from __future__ import annotations

import csv
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import resfast
from resfast.cli.predict import main as predict
from resfast.config.schema import Config
from resfast.config.validate import check
from resfast.data import batches as feed
from resfast.errors import ResfastError
from resfast.training.loop import Interrupted, train
from tests.conftest import change, interrupt_at, write_tree
from tests.test_training import assert_same_weights

COUNT = 40


@pytest.fixture(scope="module")
def nolabel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The competition's pickle: images of 16 pixels and their IDs, in a random order."""
    folder = tmp_path_factory.mktemp("more")
    write_tree(folder / "tree", train=COUNT // 2, test=1)
    from PIL import Image

    paths = sorted((folder / "tree" / "train").rglob("*.png"))
    order = np.random.default_rng(1).permutation(len(paths))
    images = np.stack([np.array(Image.open(paths[row])) for row in order])
    path = folder / "nolabel.pkl"
    path.write_bytes(pickle.dumps({b"data": images, b"ids": np.arange(100, 100 + COUNT)}))
    return path


@pytest.fixture
def teacher(tiny: Config) -> Path:
    return train(change(tiny, name="teacher", epochs=8, ema=0.0, label_smoothing=0.0)).path


def sources(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The images and labels of each training from now on."""
    seen: list = []
    batches = feed.training_batches

    def noted(source: feed.Source, *args: object, **options: object):
        seen.append(source)
        return batches(source, *args, **options)

    monkeypatch.setattr(feed, "training_batches", noted)
    return seen


def test_images_above_the_threshold_are_added_with_their_class(
    tiny: Config, teacher: Path, nolabel: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    run = resfast.load(teacher, device="cpu")
    images = torch.from_numpy(pickle.loads(nolabel.read_bytes())[b"data"])
    probability, labels = run.probabilities(images).max(1)
    threshold = float(probability.sort().values[COUNT // 2])
    kept = probability >= threshold
    assert 0 < kept.sum() < COUNT
    seen = sources(monkeypatch)
    config = change(
        tiny, unlabelled=nolabel, pseudo_from=teacher, pseudo_threshold=threshold, name="student"
    )
    result = train(config)
    found, targets = seen[-1]
    assert result.summary.train_images == 48 + int(kept.sum())
    assert torch.equal(found[48:], images[kept])
    assert torch.equal(targets[48:], labels[kept])
    output = capsys.readouterr().out
    counts = torch.bincount(labels[kept], minlength=2).tolist()
    assert f"pseudo-labels for {int(kept.sum())} of {COUNT} images without labels" in output
    assert f"left {counts[0]}, right {counts[1]}" in output


def test_held_out_images_and_noise_are_of_the_labelled_alone(
    tiny: Config, teacher: Path, nolabel: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = sources(monkeypatch)
    config = change(tiny, hold_out=8, label_noise=0.25, name="plain", epochs=1)
    train(config)
    more = {"unlabelled": nolabel, "pseudo_from": teacher, "pseudo_threshold": 0.0}
    result = train(change(config, **more, name="more"))
    assert torch.equal(seen[1][1][:40], seen[0][1])
    assert len(seen[1][1]) == 40 + COUNT
    assert result.summary.val_images == 8


def test_a_run_resumes_with_the_labels_that_it_began_with(
    tiny: Config, teacher: Path, nolabel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    copied = Path(shutil.copy(nolabel, tmp_path / "nolabel.pkl"))
    config = change(tiny, unlabelled=copied, pseudo_from=teacher, pseudo_threshold=0.6)
    whole = train(change(config, name="whole"))
    interrupt_at(monkeypatch, 5)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    monkeypatch.undo()
    shutil.rmtree(teacher)
    other = shutil.copytree(stopped.value.path, tmp_path / "other")
    assert_same_weights(train(resume=stopped.value.path).path, whole.path)
    copied.write_bytes(pickle.dumps(np.zeros((COUNT, 16, 16, 3), np.uint8)))
    with pytest.raises(ResfastError, match=r"the images of --unlabelled .* have changed"):
        train(resume=other)


def test_every_seed_has_them(tiny: Config, teacher: Path, nolabel: Path):
    config = change(tiny, unlabelled=nolabel, pseudo_from=teacher, pseudo_threshold=0.6, epochs=1)
    both = resfast.train(change(config, runs=2)).path
    for seed in (0, 1):
        alone = train(change(config, seed=seed, name=f"alone{seed}"))
        assert_same_weights(both / f"seed{seed}", alone.path)


def test_what_does_not_fit_is_refused(tiny: Config, teacher: Path, nolabel: Path, image_tree: Path):
    given = {"unlabelled": nolabel, "pseudo_from": teacher}
    with pytest.raises(ResfastError, match="probability 1 or more, the most is 0"):
        train(change(tiny, **given, pseudo_threshold=1.0))
    with pytest.raises(ResfastError, match=r"--pseudo-from .* on images of 16 pixels, not 20"):
        train(change(tiny, **given, image_size=20, name="size"))
    with pytest.raises(ResfastError, match=r"--pseudo-from .* classes left, right, not on 0"):
        train(change(tiny, **given, data="digits", name="classes"))
    with pytest.raises(ResfastError, match="does not exist"):
        train(change(tiny, **given | {"unlabelled": nolabel / "no"}, name="missing"))
    for values, message in (
        ({"unlabelled": nolabel}, "--unlabelled needs --pseudo-from"),
        ({"pseudo_from": teacher}, "--pseudo-from needs --unlabelled"),
        ({"pseudo_threshold": 0.5}, "--pseudo-threshold needs --unlabelled"),
    ):
        with pytest.raises(ResfastError, match=message):
            check(change(tiny, **values))


def test_streamed_images_cannot_be_added_to(tiny: Config, teacher: Path, nolabel: Path):
    pytest.importorskip("nvidia.dali")
    streamed = change(tiny, unlabelled=nolabel, pseudo_from=teacher, pseudo_threshold=0.0)
    with pytest.raises(ResfastError, match="use it with --loader resident"):
        train(change(streamed, loader="dali", name="streamed"))


def test_the_competitions_file_is_written(teacher: Path, nolabel: Path, tmp_path: Path):
    """``ID,Labels`` in the order of the pickle, with the pickle's IDs."""
    target = tmp_path / "submission.csv"
    assert predict([str(teacher), str(nolabel), "--csv", str(target), "--device", "cpu"]) == 0
    rows = list(csv.reader(target.read_text().splitlines()))
    assert rows[0] == ["ID", "Labels"]
    images = torch.from_numpy(pickle.loads(nolabel.read_bytes())[b"data"])
    labels = resfast.load(teacher, device="cpu").probabilities(images).argmax(1)
    assert rows[1:] == [[str(100 + row), str(int(label))] for row, label in enumerate(labels)]
