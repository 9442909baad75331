"""Damaged and foreign files of a run are refused and named; an older one is used if possible."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from resfast.config.schema import Config
from resfast.errors import ResfastError
from resfast.inference.load import load
from resfast.runs import checkpoint
from resfast.runs import folder as records
from resfast.training import saved_state
from resfast.training.loop import Interrupted, train
from tests.conftest import change, interrupt_at
from tests.test_training import assert_same_weights

FLIPS = 60


@pytest.fixture
def run(tiny: Config) -> Path:
    return train(change(tiny, plots=False)).path


@pytest.fixture
def stopped(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted in its third epoch, after two checkpoints."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9)
        with pytest.raises(Interrupted) as caught:
            train(change(tiny, plots=False))
    return caught.value.path


def damaged(data: bytes, seed: int) -> bytes:
    """One bit flipped, or for odd seeds a run of bytes zeroed."""
    generator = random.Random(seed)
    changed = bytearray(data)
    place = generator.randrange(len(data))
    if seed % 2:
        length = generator.randrange(1, 64)
        changed[place : place + length] = bytes(len(changed[place : place + length]))
    else:
        changed[place] ^= 1 << generator.randrange(8)
    return bytes(changed)


def edit_state(file: Path, **values: Any) -> None:
    state = checkpoint.load_state(file)
    for name, value in values.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    checkpoint.save_state(file, state)


def test_damaged_weights_are_refused_or_the_same(run: Path):
    file = run / records.WEIGHTS
    data, right = file.read_bytes(), checkpoint.load_weights(file)
    refused = 0
    for seed in range(FLIPS):
        file.write_bytes(damaged(data, seed))
        try:
            found = checkpoint.load_weights(file)
        except ResfastError as error:
            refused += str(file) in str(error)
        else:
            assert found.config == right.config
            assert found.classes == right.classes
            assert all(
                torch.equal(found.tensors[name], right.tensors[name]) for name in right.tensors
            )
    assert refused > FLIPS // 2


def test_the_same_weights_are_the_same_bytes(run: Path, tmp_path: Path):
    found = load(run)
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for file in files:
        checkpoint.save_weights(
            file, found.model, found.config, found.classes, found.mean, found.std
        )
    assert len({file.read_bytes() for file in files}) == 1


def test_damaged_weights_name_what_can_be_used_instead(run: Path):
    file = run / records.WEIGHTS
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResfastError, match=r"checksum is wrong.*best.safetensors.*--weights best"):
        load(run)
    assert load(run, weights="best").file.name == records.BEST


def test_weights_of_older_versions_have_no_checksum(run: Path, monkeypatch: pytest.MonkeyPatch):
    found = load(run)
    monkeypatch.setattr(checkpoint, "_DIGEST", "none")
    checkpoint.save_weights(
        run / records.WEIGHTS, found.model, found.config, found.classes, found.mean, found.std
    )
    monkeypatch.undo()
    assert b"sha256" not in (run / records.WEIGHTS).read_bytes()
    again = load(run).model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in found.model.state_dict().items())


def test_a_damaged_checkpoint_is_refused_or_the_same(run: Path):
    file = run / records.CHECKPOINT
    data, right = file.read_bytes(), checkpoint.load_state(file)["training"]["model"]
    refused = 0
    for seed in range(FLIPS):
        file.write_bytes(damaged(data, seed))
        try:
            found = checkpoint.load_state(file)["training"]["model"]
        except ResfastError as error:
            refused += str(file) in str(error)
        else:
            assert all(torch.equal(found[name], right[name]) for name in right)
    assert refused > FLIPS // 2


def test_the_checkpoint_before_a_damaged_one_is_used(
    tiny: Config, stopped: Path, capsys: pytest.CaptureFixture[str]
):
    whole = train(change(tiny, name="whole", plots=False)).path
    file = stopped / records.CHECKPOINT
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    capsys.readouterr()
    assert_same_weights(train(resume=stopped).path, whole)
    shown = capsys.readouterr()
    assert "continuing from checkpoint-previous.pt (after 2 epochs)" in shown.out + shown.err
    assert (stopped / saved_state.DAMAGED).read_bytes() == data[: len(data) // 2]


def test_a_process_killed_between_the_renames_loses_nothing(tiny: Config, stopped: Path):
    whole = train(change(tiny, name="whole", plots=False)).path
    (stopped / records.CHECKPOINT).unlink()
    assert_same_weights(train(resume=stopped).path, whole)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [("runtime", "seed", 7), ("optim", "lr", 0.02), ("optim", "label_smoothing", 0.2)],
)
def test_a_changed_configuration_is_refused(stopped: Path, group: str, name: str, value: float):
    file = stopped / records.CONFIG
    config = json.loads(file.read_text())
    config[group][name] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ResfastError, match=rf"another configuration: {name} is {value} in config"):
        train(resume=stopped)


def test_a_checkpoint_of_another_network_is_refused(tiny: Config, stopped: Path):
    other = train(change(tiny, name="other", plots=False, channels=(8, 24))).path
    (stopped / records.PREVIOUS).unlink()
    (other / records.CHECKPOINT).replace(stopped / records.CHECKPOINT)
    with pytest.raises(ResfastError, match=r"channels is \(8, 16\) in config.json and was"):
        train(resume=stopped)
    edit_state(stopped / records.CHECKPOINT, config=None)  # as of an older version
    with pytest.raises(ResfastError, match=r"weights: .* is \[\d+.*\], in the network \["):
        train(resume=stopped)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 99}, "epoch 100 of 3"),
        ({"epoch": -1}, "epoch: -1 is below 0"),
        ({"step": 40}, "step 40 of 4"),
        ({"epoch": "2"}, "epoch: Input should be a valid integer"),
        ({"training": {}}, "training.model: Field required"),
        ({"schedule": None}, "schedule: Field required"),
        ({"rates": torch.zeros(3)}, r"\[3\] learning rates of \d+ steps"),
        ({"best": [1, 2]}, "best"),
        ({"history": "["}, "Expecting value"),
        ({"history": 5}, "history: Input should be a valid string"),
    ],
)
def test_a_checkpoint_with_other_content_is_refused(stopped: Path, values: dict, message: str):
    (stopped / records.PREVIOUS).unlink()
    edit_state(stopped / records.CHECKPOINT, **values)
    with pytest.raises(ResfastError, match=message):
        train(resume=stopped)


def test_a_state_of_another_optimizer_is_refused(stopped: Path):
    file = stopped / records.CHECKPOINT
    (stopped / records.PREVIOUS).unlink()
    training = checkpoint.load_state(file)["training"]
    for state in training["optimizer"]["state"].values():
        state["momentum_buffer"] = torch.zeros(3)
    edit_state(file, training=training)
    with pytest.raises(ResfastError, match=r"optimizer: momentum_buffer is \[3\] for a parameter"):
        train(resume=stopped)
