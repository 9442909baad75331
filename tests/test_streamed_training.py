"""Training from a stream: the same trainer, checkpoints and evaluation as with a resident set."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import resfast
from resfast.config.schema import Config
from resfast.data.augment import parse_augment
from resfast.data.shards import write_shards
from resfast.errors import ResfastError
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.training.loop import Interrupted, train
from tests.conftest import change
from tests.test_training import assert_same_weights

pytest.importorskip("nvidia.dali")


@pytest.fixture(scope="module")
def shard_folder(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(image_tree, folder, images_per_shard=20, report=lambda line: None)
    return folder


@pytest.fixture(params=["folder", "shards", "arrays"])
def streamed(request: pytest.FixtureRequest, tiny: Config, shard_folder: Path) -> Config:
    """The tiny run with its images streamed from files, from shards, or from arrays."""
    config = change(tiny, loader="dali")
    if request.param == "shards":
        return change(config, data=f"shards:{shard_folder}", augment=tiny.data.augment)
    if request.param == "arrays":
        return change(config, data="digits", batch_size=200, epochs=2)
    return config


def test_a_streamed_run_learns_and_says_how_it_was_fed(streamed: Config):
    summary = train(streamed).summary
    assert summary["loader"] == "dali"
    assert summary["augment"] == "crop=1"
    history = (streamed.run.out / "tiny" / records.METRICS).read_text().splitlines()
    assert len(history) == streamed.optim.epochs
    first, last = (
        float(line.split('"train_loss": ')[1].split(",")[0])
        for line in history[:: len(history) - 1]
    )
    assert last < first


def test_a_streamed_folder_trains_to_the_same_weights_as_a_resident_one(tiny: Config):
    resident = train(change(tiny, name="resident", loader="resident"))
    streamed = train(change(tiny, name="streamed", loader="dali"))
    # PNG files decode to the same bytes, order and augmentation are the same functions.
    assert_same_weights(resident.path, streamed.path)
    assert resident.summary.test_accuracy == streamed.summary.test_accuracy


@pytest.mark.parametrize("step", [1, 3])
def test_a_streamed_run_that_was_stopped_ends_with_the_same_weights(
    streamed: Config, monkeypatch: pytest.MonkeyPatch, step: int
):
    from resfast.training.step import TrainStep

    streamed = change(streamed, augment=parse_augment("crop=1,flip=alternating,cutout=4,mixup=1"))
    whole = train(change(streamed, name="whole"))
    original, calls = TrainStep.__call__, []

    def stopping(self, images, labels):
        calls.append(0)
        if len(calls) == 2 + step:
            signal.raise_signal(signal.SIGTERM)
        return original(self, images, labels)

    monkeypatch.setattr(TrainStep, "__call__", stopping)
    with pytest.raises(Interrupted) as stopped:
        train(change(streamed, name="stopped"))
    monkeypatch.undo()
    assert torch.is_tensor(checkpoint.load_state(stopped.value.path / records.CHECKPOINT)["losses"])
    assert_same_weights(train(resume=stopped.value.path).path, whole.path)


def test_a_streamed_run_can_be_scored_on_its_own_and_on_held_data(
    tiny: Config, shard_folder: Path, image_tree: Path
):
    run = train(change(tiny, data=f"shards:{shard_folder}"))
    messages: list[str] = []
    own = resfast.evaluate(run.path, report=messages.append)
    assert own.accuracy == run.summary.test_accuracy
    assert not messages
    other = resfast.evaluate(
        run.path, f"folder:{image_tree}", data_dir=tiny.data.data_dir, report=messages.append
    )
    assert other.accuracy == own.accuracy


def test_the_held_out_part_of_a_streamed_folder_is_evaluated(tiny: Config):
    summary = train(change(tiny, loader="dali", val_fraction=0.25)).summary
    assert (summary["train_images"], summary["best_on"]) == (36, "val")


def test_shards_cannot_be_split(tiny: Config, shard_folder: Path):
    with pytest.raises(ResfastError, match="--val-fraction cannot split shards"):
        train(change(tiny, data=f"shards:{shard_folder}", val_fraction=0.25))


def test_named_classes_hold_for_other_shards_and_without_their_file(
    tiny: Config, shard_folder: Path, tmp_path: Path
):
    for name, split in (("own", "train"), ("own", "test"), ("other", "train"), ("other", "test")):
        (tmp_path / name).mkdir(exist_ok=True)
        for shard in shard_folder.glob(f"{split}-*.tar"):
            (tmp_path / name / shard.name).write_bytes(shard.read_bytes())
    names = tmp_path / "names.txt"
    names.write_text("west\neast\n")  # whose order is not the alphabet's
    run = train(change(tiny, data=f"shards:{tmp_path / 'own'}", classes=names))
    names.unlink()
    messages: list[str] = []
    own = resfast.evaluate(run.path, report=messages.append)
    assert own.accuracy == run.summary.test_accuracy
    assert not any("changed" in line for line in messages)
    other = resfast.evaluate(run.path, f"shards:{tmp_path / 'other'}", report=messages.append)
    assert other.accuracy == own.accuracy
    assert other.classes == ("west", "east")
    assert torch.equal(other.confusion, own.confusion)
