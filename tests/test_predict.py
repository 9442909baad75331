"""Use of a trained run: loading, ``evaluate`` and ``predict``."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import resfast
from resfast.cli import evaluate, predict
from resfast.cli import main as console
from resfast.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
)
from resfast.data.augment import Augment
from resfast.data.sources import load_dataset
from resfast.data.unlabelled import open_images
from resfast.errors import ResfastError
from resfast.inference import load as inference
from resfast.inference.evaluate import label_numbers
from resfast.runs.checkpoint import load_weights, save_weights

SIZE = 16


def tiny(out: Path, name: str, **data) -> Config:
    return Config(
        model=ModelConfig(model="resnet", blocks=(1, 1), channels=(8, 16), stem=8),
        data=DataConfig(data_dir=out / "data", image_size=SIZE, augment=Augment(crop=1), **data),
        optim=OptimConfig(epochs=3, batch_size=16),
        evaluation=EvalConfig(tta="shift", eval_batch_size=50),
        runtime=RuntimeConfig(device="cpu", precision="fp32", compile="off"),
        run=RunConfig(name=name, out=out / "runs"),
    )


def draw(kind: str, seed: int, size: int = SIZE) -> Image.Image:
    """Red, green or blue noise: classes that a network learns at once."""
    pixels = np.random.default_rng(seed).integers(0, 60, (size, size, 3), dtype=np.uint8)
    pixels[..., ("blue", "green", "red").index(kind)] += 180
    return Image.fromarray(pixels)


def make_tree(root: Path, classes=("blue", "green", "red"), train=32, test=5) -> Path:
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = draw(
                    name if name in ("blue", "green") else "red", i + 1000 * (count == test)
                )
                image.save(root / split / name / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def tree(work) -> Path:
    return make_tree(work / "colours")


@pytest.fixture(scope="module")
def run(work, tree) -> Path:
    """A finished run on the colours."""
    return resfast.train(tiny(work, "colours", data=f"folder:{tree}")).path


@pytest.fixture(scope="module")
def trained(run) -> inference.TrainedRun:
    return resfast.load(run, device="cpu")


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, main, *args: object) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    assert main([*map(str, args), "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("resfast: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        header, *body = csv.reader(file)
    assert header == ["ID", "Labels"]
    return body


def pixels(count: int = 6, size: int = 32) -> np.ndarray:
    return np.stack(
        [np.asarray(draw(("blue", "green", "red")[i % 3], i, size)) for i in range(count)]
    )


EXPECTED = ["0", "1", "2", "0", "1", "2"]


# -- loading -----------------------------------------------------------------------------------


def test_a_loaded_run_has_all_that_is_needed(run, trained):
    assert trained.path == run
    assert trained.file == run / "model.safetensors"
    assert trained.classes == ("blue", "green", "red")
    assert trained.summary == json.loads((run / "summary.json").read_text())
    assert trained.config.model.channels == (8, 16)
    assert (trained.device, trained.dtype) == (torch.device("cpu"), torch.float32)
    assert not trained.model.training
    weight = trained.model.stages[1][0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert trained.mean.shape == trained.std.shape == (3,)
    assert len(repr(trained)) < 1000


def test_logits_and_probabilities_are_those_of_the_network(trained, tree):
    data = load_dataset(f"folder:{tree}", data_dir=tree.parent / "data", image_size=SIZE)
    logits = trained.logits(data.test_images, batch_size=4)
    assert logits.shape == (15, 3)
    assert logits.dtype == torch.float32
    normalized = (data.test_images / 255 - trained.mean) / trained.std
    expected = trained.model(normalized.permute(0, 3, 1, 2))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    probabilities = trained.probabilities(data.test_images)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=1e-4, atol=1e-5)
    mirrored = trained.logits(data.test_images.flip(2))
    flipped = trained.logits(data.test_images, "flip")
    torch.testing.assert_close(flipped, (logits + mirrored) / 2, rtol=1e-4, atol=1e-4)
    assert trained.logits(data.test_images[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, SIZE, SIZE, 3),
        torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
    ],
)
def test_images_of_another_dtype_or_shape_are_refused(trained, images):
    with pytest.raises(ResfastError, match=r"expected uint8 \[N, 16, 16, 3\]"):
        trained.logits(images)


def test_bad_values_are_refused_with_the_choices(run, trained):
    images = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)
    with pytest.raises(ResfastError, match="tta 'both' is unknown; choose none, flip, shift"):
        trained.logits(images, "both")
    with pytest.raises(ResfastError, match="batch-size 0"):
        trained.logits(images, batch_size=0)
    with pytest.raises(ResfastError, match="choose final, best"):
        resfast.load(run, weights="last")
    with pytest.raises(ResfastError, match="choose auto, bf16, fp16, fp32"):
        resfast.load(run, precision="fp8")
    with pytest.raises(ResfastError, match="'gpu' is unknown"):
        resfast.load(run, device="gpu")


def test_loading_leaves_the_random_state_alone(run):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    resfast.load(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_is_the_run_s_own_unless_asked(run):
    assert resfast.load(run, device="cpu").dtype == torch.float32
    low = resfast.load(run, device="cpu", precision="bf16")
    assert low.dtype == torch.bfloat16
    images = torch.from_numpy(pixels(6, SIZE))
    assert low.logits(images).dtype == torch.float32
    assert low.logits(images).argmax(1).tolist() == [0, 1, 2, 0, 1, 2]


def test_best_weights_and_a_file_by_itself_can_be_loaded(run, tmp_path):
    assert resfast.load(run, weights="best").file == run / "best.safetensors"
    alone = tmp_path / "net.safetensors"
    shutil.copy(run / "model.safetensors", alone)
    loaded = resfast.load(str(alone))
    assert (loaded.file, loaded.summary) == (alone, None)
    images = torch.from_numpy(pixels(2, SIZE))
    assert torch.equal(loaded.logits(images), resfast.load(run).logits(images))


def test_a_missing_run_is_named_with_the_nearest(run):
    with pytest.raises(ResfastError, match=r"there is no run .*colour; .*did you mean 'colours'"):
        resfast.load(run.parent / "colour")


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(ResfastError, match=r"is not a run; .*it holds runs, for example .*colours"):
        resfast.load(run.parent)
    with pytest.raises(ResfastError, match="is not a run"):
        resfast.load(tmp_path)
    with pytest.raises(ResfastError, match="is not a weights file"):
        resfast.load(run / "checkpoint.pt")


def test_a_folder_of_several_runs_names_one_to_use(run, copied, tmp_path):
    several = tmp_path / "several"
    for seed in (3, 4):
        shutil.copytree(run, several / f"seed{seed}")
    (several / "seed3" / "model.safetensors").unlink()
    shutil.copy(run / "config.json", several)
    message = rf"several is a folder of 2 runs .*for example {several / 'seed4'}$"
    with pytest.raises(ResfastError, match=message):
        resfast.load(several)


def test_an_unfinished_run_says_what_there_is(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ResfastError, match=r"unfinished.*best, or continue it with .*--resume"):
        resfast.load(copied)
    assert resfast.load(copied, weights="best").file.name == "best.safetensors"
    (copied / "best.safetensors").unlink()
    for weights in ("final", "best"):
        with pytest.raises(ResfastError, match=r"unfinished and has no weights yet; .*--resume"):
            resfast.load(copied, weights=weights)
    (copied / "checkpoint.pt").unlink()
    with pytest.raises(ResfastError, match=r"no weights yet; train it again"):
        resfast.load(copied)


def test_missing_best_weights_point_at_the_final_ones(copied):
    (copied / "best.safetensors").unlink()
    with pytest.raises(ResfastError, match=r"no best weights .*--weights final"):
        resfast.load(copied, weights="best")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64])
def test_damaged_weights_are_one_error(copied, content):
    (copied / "model.safetensors").write_bytes(content)
    with pytest.raises(ResfastError, match=r"model\.safetensors cannot be read"):
        resfast.load(copied)


def test_truncated_and_foreign_weights_are_one_error(copied):
    from safetensors.torch import save_file

    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ResfastError, match="cannot be read"):
        resfast.load(copied)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ResfastError, match="cannot be read"):
        resfast.load(copied)
    config = load_weights(copied / "best.safetensors").config
    save_weights(path, torch.nn.Linear(1, 1), config, ("a", "b"), torch.zeros(1), torch.ones(1))
    with pytest.raises(ResfastError, match="cannot be read"):
        resfast.load(copied)


def test_weights_that_do_not_match_their_configuration_are_refused(copied):
    path = copied / "model.safetensors"
    weights = load_weights(path)
    for model, match in (
        (
            dataclasses.replace(weights.config.model, channels=(8, 24)),
            r"\[16, .*\[24, .* and .*more",
        ),
        (dataclasses.replace(weights.config.model, blocks=(1, 2)), "is missing"),
        (dataclasses.replace(weights.config.model, blocks=(1,), channels=(8,)), "is not part of"),
    ):
        config = dataclasses.replace(weights.config, model=model)
        network = torch.nn.Module()
        network.state_dict = lambda: weights.tensors
        save_weights(path, network, config, weights.classes, weights.mean, weights.std)
        with pytest.raises(ResfastError, match=f"do not match their configuration.*{match}"):
            resfast.load(copied)


def test_a_damaged_summary_is_left_out_and_said(copied, caplog):
    (copied / "summary.json").write_text("{")
    assert resfast.load(copied).summary is None
    assert "damaged" in caplog.text


# -- evaluate ----------------------------------------------------------------------------------


def test_evaluate_finds_what_the_run_found_and_keeps_its_files(copied, capsys):
    kept = {p.name: p.read_bytes() for p in copied.iterdir()}
    assert evaluate.main([str(copied), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for name, content in kept.items():
        assert (copied / name).read_bytes() == content
    summary = json.loads((copied / "summary.json").read_text())
    found = json.loads((copied / "evaluation.json").read_text())
    for key in ("test_accuracy", "tta_accuracy", "tta", "data_digest", "confusion"):
        assert found[key] == summary[key]
    assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-4)
    assert found["per_class_accuracy"] == summary["per_class_accuracy"]
    assert Image.open(copied / "evaluation-confusion.png").format == "PNG"
    assert f"test accuracy {summary['test_accuracy']:.2%}" in out
    assert "augmentation (shift)" in out
    table = [line.split()[:3] for line in out.splitlines() if line[:4] in ("blue", "gree", "red ")]
    assert [line[:2] for line in table] == [["blue", "5"], ["green", "5"], ["red", "5"]]


def test_evaluate_scores_other_data_resized_and_in_the_run_s_order(run, tmp_path, capsys):
    root = make_tree(tmp_path / "other", train=1, test=2)
    draw("red", 5, 40).save(root / "test" / "red" / "large.png")
    args = [str(run), "--data", f"folder:{root}", "--data-dir", str(tmp_path), "--tta", "none"]
    assert evaluate.main([*args, "--out", str(tmp_path / "new" / "place"), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "new" / "place" / "evaluation.json").read_text())
    assert np.array(found["confusion"]).sum(1).tolist() == [2, 2, 3]
    assert (found["test_images"], found["tta"]) == (7, "none")
    assert found["tta_accuracy"] == found["test_accuracy"]
    assert "augmentation" not in capsys.readouterr().out
    assert not (run / "evaluation.json").exists()


def test_labels_follow_the_names_of_the_run_s_classes(trained, tree):
    data = load_dataset(f"folder:{tree}", data_dir=tree.parent / "data", image_size=SIZE)
    turned = dataclasses.replace(data, classes=("red", "blue", "green"))
    assert label_numbers(trained, turned).tolist() == [2, 0, 1]
    assert label_numbers(trained, data) is None


def test_evaluate_from_python_writes_only_where_it_is_told(trained, run, tmp_path):
    lines: list[str] = []
    result = resfast.evaluate(trained, tta="flip", batch_size=7, report=lines.append)
    assert result.accuracy == trained.summary.test_accuracy
    assert (result.tta, result.classes) == ("flip", trained.classes)
    assert int(result.confusion.sum()) == 15
    assert len(result.per_class) == 3
    assert not (run / "evaluation.json").exists()
    resfast.evaluate(run, weights="best", out=tmp_path)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["weights"] == "best.safetensors"
    with pytest.raises(ResfastError, match="tta 'both'"):
        resfast.evaluate(run, tta="both")


def test_data_that_changed_since_the_training_is_said(trained, tree):
    changed = dataclasses.replace(
        trained, summary=dataclasses.replace(trained.summary, data_digest="0")
    )
    lines: list[str] = []
    resfast.evaluate(changed, report=lines.append)
    assert any("has changed since" in line for line in lines)


def test_evaluate_names_missing_and_extra_classes(run, tmp_path, capsys):
    root = make_tree(tmp_path / "other", classes=("blue", "pink"), train=1, test=1)
    error = fails(
        capsys, evaluate.main, run, "--data", f"folder:{root}", "--data-dir", tmp_path / "d"
    )
    assert "missing: green, red; extra: pink" in error
    error = fails(capsys, evaluate.main, run, "--data", "digits")
    assert "extra: 0, 1, 2, 3, 4 and 5 more" in error


def test_evaluate_leaves_out_corrupt_images_only_when_told(run, tmp_path, capsys):
    root = make_tree(tmp_path / "other", train=1, test=2)
    (root / "test" / "red" / "bad.png").write_bytes(b"no image")
    args = [run, "--data", f"folder:{root}", "--data-dir", tmp_path / "d", "--out", tmp_path]
    assert "bad.png is not a readable" in fails(capsys, evaluate.main, *args)
    assert evaluate.main([*map(str, args), "--skip-corrupt", "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["skipped_images"] == 1


def test_evaluate_refuses_bad_values(run, tmp_path, capsys):
    assert "there is no run" in fails(capsys, evaluate.main, tmp_path / "none")
    assert "unknown data 'cifar11'" in fails(capsys, evaluate.main, run, "--data", "cifar11")
    assert "batch-size 0" in fails(capsys, evaluate.main, run, "--batch-size", "0")
    (tmp_path / "file").touch()
    assert "choose another --out" in fails(capsys, evaluate.main, run, "--out", tmp_path / "file")
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run), "--tta", "both"])
    assert exit.value.code == 2


# -- predict: image files ----------------------------------------------------------------------


def test_image_files_are_answered_with_their_most_probable_classes(run, here, capsys):
    draw("red", 1, 40).save(here / "a.png")
    draw("blue", 2).save(here / "b.JPG", format="JPEG")
    assert predict.main([str(run), "a.png", "b.JPG", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[4]] == ["a.png", "b.JPG"]
    assert [lines[1].split()[0], lines[5].split()[0]] == ["red", "blue"]
    assert len(lines) == 8  # three classes, though five were asked for
    assert len({len(line) for line in lines if line.startswith(" ")}) == 1
    values = [float(line.split()[1].rstrip("%")) for line in lines[1:4]]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(100, abs=0.05)
    assert sorted(p.name for p in here.iterdir()) == ["a.png", "b.JPG"]


def test_top_and_tta_are_followed_and_a_csv_is_written_on_request(run, here, capsys):
    draw("red", 1).save(here / "a.png")
    args = ["a.png", "--top", "1", "--tta", "shift", "--csv", "x.csv", "--names"]
    assert predict.main([str(run), *args, "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a.png"
    assert out[1].split()[0] == "red"
    assert out[2].startswith("wrote 1 predictions to x.csv")
    assert rows(here / "x.csv") == [["a.png", "red"]]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_mode_of_image_is_read_as_in_training(run, here, mode, capsys):
    name = "x.jpg" if mode == "CMYK" else "x.png"
    draw("red", 1).convert(mode).save(here / name)
    assert predict.main([str(run), name, "--device", "cpu"]) == 0


def test_wrong_images_are_one_sentence(run, here, capsys):
    (here / "empty").mkdir()
    (here / "bad.png").write_bytes(b"no image")
    (here / "x.heic").touch()
    draw("red", 1).save(here / "a.png")
    error = fails(capsys, predict.main, run, "a.png", "gone.png")
    assert "gone.png does not exist" in error
    assert "holds no images" in fails(capsys, predict.main, run, "empty")
    assert "unknown type '.heic'" in fails(capsys, predict.main, run, "x.heic")
    error = fails(capsys, predict.main, run, "a.png", "bad.png")
    assert "bad.png is not a readable" in error
    assert "--skip-corrupt" in error
    assert "with 1 other" in fails(capsys, predict.main, run, "a.png", "empty")
    assert "no images were given" in fails(capsys, predict.main, run)
    assert "--top 0" in fails(capsys, predict.main, run, "a.png", "--top", "0")
    assert "all 1 images are corrupt" in fails(
        capsys, predict.main, run, "bad.png", "--skip-corrupt"
    )
    assert "there is no run" in fails(capsys, predict.main, "gone", "a.png")


def test_corrupt_image_files_are_left_out_when_told(run, here, capsys):
    (here / "bad.png").write_bytes(b"no image")
    draw("red", 1).save(here / "a.png")
    args = [str(run), "bad.png", "a.png", "a.png", "--skip-corrupt", "--device", "cpu"]
    assert predict.main(args) == 0
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if line[0] != " "] == ["a.png", "a.png"]
    assert "skipped 1 corrupt images (bad.png)" in captured.err


# -- predict: folders --------------------------------------------------------------------------


@pytest.fixture
def pile(here) -> Path:
    """An unlabelled folder: blue, green and red images, one of them deep down."""
    folder = here / "pile"
    (folder / "deep" / "er").mkdir(parents=True)
    draw("green", 1).save(folder / "b.png")
    draw("blue", 2, 40).save(folder / "a,1.png")
    draw("red", 3).save(folder / "deep" / "er" / "é.webp", lossless=True)
    (folder / "notes.txt").write_text("no image")
    draw("red", 3).save(folder / ".hidden.png")
    return folder


def test_a_folder_becomes_a_csv_of_relative_paths(run, pile, here, capsys):
    args = [str(run), "pile", "--batch-size", "2", "--device", "cpu"]
    assert predict.main(args) == 0
    captured = capsys.readouterr()
    assert "wrote 3 predictions to predictions.csv" in captured.out
    assert "ignored 1 files" in captured.err
    expected = [["a,1.png", "0"], ["b.png", "1"], ["deep/er/é.webp", "2"]]
    assert rows(here / "predictions.csv") == expected
    assert (here / "predictions.csv").read_bytes().startswith(b"ID,Labels\n")
    assert predict.main([*args, "--names", "--csv", "names.csv"]) == 0
    assert [row[1] for row in rows(here / "names.csv")] == ["blue", "green", "red"]


def test_a_csv_that_exists_is_kept_unless_told(run, pile, here, capsys):
    (here / "predictions.csv").write_text("mine")
    error = fails(capsys, predict.main, run, "pile")
    assert "predictions.csv already exists" in error
    assert "--overwrite" in error
    assert (here / "predictions.csv").read_text() == "mine"
    assert predict.main([str(run), "pile", "--overwrite", "--device", "cpu"]) == 0
    assert len(rows(here / "predictions.csv")) == 3
    error = fails(capsys, predict.main, run, "pile", "--csv", "no/x.csv")
    assert "create no first" in error
    assert "is a folder" in fails(capsys, predict.main, run, "pile", "--csv", "pile")


def test_an_old_csv_stays_when_writing_fails(run, pile, here, capsys, monkeypatch):
    (here / "predictions.csv").write_text("mine")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error = fails(capsys, predict.main, run, "pile", "--overwrite")
    assert "No space left" in error
    assert (here / "predictions.csv").read_text() == "mine"
    assert sorted(p.name for p in here.iterdir()) == ["pile", "predictions.csv"]


def test_a_corrupt_image_of_a_folder_is_named_or_left_out(run, pile, here, capsys):
    (pile / "deep" / "bad.jpg").write_bytes(b"\xff\xd8")
    assert "pile/deep/bad.jpg is not a readable" in fails(capsys, predict.main, run, "pile")
    assert not (here / "predictions.csv").exists()
    assert predict.main([str(run), "pile", "--skip-corrupt", "--device", "cpu"]) == 0
    assert "skipped 1 corrupt images (deep/bad.jpg)" in capsys.readouterr().err
    assert [row[1] for row in rows(here / "predictions.csv")] == ["0", "1", "2"]


# -- predict: arrays ---------------------------------------------------------------------------


def layouts() -> dict[str, np.ndarray]:
    images = pixels()
    planes = images.transpose(0, 3, 1, 2)
    return {
        "NHWC": images,
        "NCHW": np.ascontiguousarray(planes),
        "flat": planes.reshape(6, 3072),
        "fortran": np.asfortranarray(images),
        "other size": pixels(6, 24),
    }


@pytest.mark.parametrize("layout", layouts())
def test_a_npy_becomes_a_csv_of_row_numbers(run, here, layout, capsys):
    np.save(here / "test.npy", layouts()[layout])
    assert predict.main([str(run), "test.npy", "--batch-size", "4", "--device", "cpu"]) == 0
    assert rows(here / "predictions.csv") == [[str(i), n] for i, n in enumerate(EXPECTED)]
    assert "to the run's 16x16" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("layout", ["NHWC", "flat", "fortran"])
def test_pickles_of_every_protocol_are_read(here, layout, protocol):
    content = {b"data": layouts()[layout], "ids": np.arange(10, 16), b"names": [b"a", np.int64(3)]}
    (here / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    source = open_images([here / "x.pkl"])
    assert list(source.ids) == [str(i) for i in range(10, 16)]
    np.testing.assert_array_equal(source.array, pixels())


def test_pickles_of_numpy_1_and_python_2_are_read(here):
    data = pickle.dumps({"data": pixels()}, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in data
    (here / "numpy1.pkl").write_bytes(data)
    # What Python 2 wrote for {'data': uint8 [1, 3072]}: text is SHORT_BINSTRING or BINSTRING.
    raw = bytes(range(256)) * 12
    python2 = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        b"U\x01b\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + raw + b"tbu."
    )
    (here / "test_batch").write_bytes(python2)
    np.testing.assert_array_equal(open_images([here / "numpy1.pkl"]).array, pixels())
    planes = open_images([here / "test_batch"]).array.transpose(0, 3, 1, 2)
    assert planes.reshape(-1).tobytes() == raw


@pytest.mark.parametrize("ids", [None, np.arange(6) + 7, [b"a", b"b", "c", "d", "e", "f"]])
def test_a_pickle_becomes_a_csv_with_its_ids(run, here, ids):
    content = {b"data": layouts()["flat"]} | ({} if ids is None else {b"ids": ids})
    (here / "test.pkl").write_bytes(pickle.dumps(content))
    assert predict.main([str(run), "test.pkl", "--device", "cpu"]) == 0
    names = {type(None): "012345", list: "abcdef"}.get(type(ids), [str(i) for i in range(7, 13)])
    assert rows(here / "predictions.csv") == [
        list(row) for row in zip(names, EXPECTED, strict=True)
    ]


def test_a_bare_array_in_a_pickle_is_read(here):
    (here / "x.pickle").write_bytes(pickle.dumps(pixels()))
    np.testing.assert_array_equal(open_images([here / "x.pickle"]).array, pixels())


class Malicious:
    def __init__(self, function, *args: object) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_is_refused_and_runs_nothing(run, here, protocol, capsys):
    for call in (
        Malicious(os.system, "touch executed"),
        Malicious(eval, "open('executed', 'w')"),
        Malicious(Path.touch, Path("executed")),
        Malicious(np.load, "executed"),
    ):
        content = {"data": pixels(), "ids": call}
        (here / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        error = fails(capsys, predict.main, run, "x.pkl")
        assert "x.pkl was rejected" in error
        assert sorted(p.name for p in here.iterdir()) == ["x.pkl"]


def test_pickles_cannot_forge_objects_in_arrays(here):
    objects = np.array([{}, []], dtype=object)
    structured = np.zeros(2, dtype=[("a", "i4"), ("b", "O")])
    for array in (objects, structured):
        for protocol in (2, 5):
            (here / "x.pkl").write_bytes(pickle.dumps(array, protocol=protocol))
            with pytest.raises(ResfastError, match="was rejected"):
                open_images([here / "x.pkl"])
    # Attributes set on what a pickle can name must not stick.
    (here / "x.pkl").write_bytes(
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x08__code__K\x01s\x86b."
    )
    with pytest.raises(ResfastError, match="not a readable pickle"):
        open_images([here / "x.pkl"])
    (here / "x.pkl").write_bytes(pickle.dumps(Counter("abc")))
    with pytest.raises(ResfastError, match=r"it asks for collections\.Counter"):
        open_images([here / "x.pkl"])


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (pixels().astype(np.float32), "float32"),
        (pixels()[..., :1], "expected uint8"),
        (pixels()[0], "expected uint8"),
        (pixels()[:, :20], "H equal to W"),
        (np.zeros((2, 3000), np.uint8), "3000"),
        (pixels()[:0], "no images"),
        (np.zeros((0, 3072), np.uint8), "no images"),
        (np.zeros((), np.uint8), "expected uint8"),
        (np.array([None]), "not a readable .npy|was rejected"),
    ],
)
def test_wrong_arrays_are_one_sentence(run, here, array, match, capsys):
    np.save(here / "x.npy", array, allow_pickle=True)
    (here / "x.pkl").write_bytes(pickle.dumps(array))
    for name in ("x.npy", "x.pkl"):
        with pytest.raises(ResfastError, match=match):
            open_images([Path(name)])
        assert name in fails(capsys, predict.main, run, name)


def test_damaged_array_files_are_one_sentence(here):
    np.save(here / "whole.npy", pixels())
    whole = (here / "whole.npy").read_bytes()
    for content in (b"", b"abc", whole[:100], whole[:-10]):
        (here / "x.npy").write_bytes(content)
        with pytest.raises(ResfastError, match=r"x\.npy is not a readable \.npy"):
            open_images([Path("x.npy")])
    whole = pickle.dumps({"data": pixels()})
    for content in (b"", b"abc", whole[:40], whole[:-10], b"\x80\xff", b"c", b"("):
        (here / "x.pkl").write_bytes(content)
        with pytest.raises(ResfastError, match=r"x\.pkl is not a readable pickle"):
            open_images([Path("x.pkl")])
    for content, match in (
        ({"images": pixels()}, "a dict of 'images'"),
        ({}, "a dict of nothing"),
        ([1, 2], "holds a list"),
        ({"data": "text"}, "holds a str"),
        ({"data": pixels(), "ids": [1, 2]}, "2 ids for 6 images"),
        ({"data": pixels(), "ids": [0.5] * 6}, "the id 0.5"),
        ({"data": pixels(), "ids": 3}, "for 6 images"),
    ):
        (here / "x.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ResfastError, match=match):
            open_images([Path("x.pkl")])


def test_a_folder_and_an_array_of_the_same_images_agree(run, here):
    (here / "pile").mkdir()
    for i, image in enumerate(pixels(6, SIZE)):
        Image.fromarray(image).save(here / "pile" / f"{i}.png")
    by_file = resfast.predict(run, here / "pile", device="cpu", batch_size=6)
    assert by_file == resfast.predict(run, pixels(6, SIZE), device="cpu", batch_size=6)


# -- predict: Python ---------------------------------------------------------------------------


def test_predict_from_python_takes_files_and_arrays(trained, run, here):
    draw("red", 1).save(here / "a.png")
    (answer,) = resfast.predict(run, "a.png", top=2, device="cpu")
    assert [type(part) for part in answer[0]] == [str, float]
    assert (len(answer), answer[0][0]) == (2, "red")
    for again in resfast.predict(trained, [here / "a.png", "a.png"], top=2, tta="none"):
        assert [name for name, _ in again] == [name for name, _ in answer]
        assert [value for _, value in again] == pytest.approx([v for _, v in answer], abs=1e-5)
    for images in (pixels(), torch.from_numpy(pixels()), layouts()["flat"]):
        names = [row[0][0] for row in resfast.predict(trained, images, tta="flip")]
        assert names == ["blue", "green", "red"] * 2
    with pytest.raises(ResfastError, match="the array holds float32"):
        resfast.predict(trained, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ResfastError, match="no images were given"):
        resfast.predict(trained, [])
    with pytest.raises(ResfastError, match="--top 0"):
        resfast.predict(trained, pixels(), top=0)


# -- the commands themselves -------------------------------------------------------------------


def command(*args: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(resfast.__file__).parents[1])} | variables,
        check=False,
    )


def test_the_evaluate_command_runs(run, here):
    done = command("resfast.evaluate", run, "--out", here, "--device", "cpu")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "test accuracy" in done.stdout
    assert (here / "evaluation-confusion.png").exists()


def test_the_predict_command_runs(run, here):
    np.save(here / "x.npy", pixels())
    done = command("resfast.predict", run, "x.npy", "--device", "cpu")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert [row[1] for row in rows(here / "predictions.csv")] == EXPECTED


def on_ascii_terminal(monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str]:
    """Exit code and output of a command in this process, on streams as PYTHONIOENCODING makes."""
    output, error = (
        io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
        for errors in ("strict", "backslashreplace")
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", error)
        try:
            code = console.main([*map(str, args)])
        except SystemExit as exit:  # as --help ends
            code = int(exit.code or 0)
    for stream in (output, error):
        stream.flush()
    return code, (output.buffer.getvalue() + error.buffer.getvalue()).decode("ascii")


def test_every_command_prints_any_name_on_an_ascii_terminal(here, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # for the processes that doctor starts
    tree = make_tree(here / "caf\xe9", ("caf\xe9", "\u732b", "red"), train=8, test=1)
    run = "runs/caf\xe9"
    train = "--model resnet --blocks 1,1 --channels 8,8 --epochs 1 --compile off --threads 1"
    image = next((tree / "test" / "caf\xe9").iterdir())
    escaped = ascii("caf\xe9").strip("'")
    for module, *args in (
        ("train", "--data", f"folder:{tree}", *train.split(), "--name", "caf\xe9"),
        ("train", "--help"),
        ("train", "--summary"),
        ("evaluate", run),
        ("predict", run, image),
        ("predict", run, here / "missing-\udce9.png"),
        ("export", run, "--format", "torch-export", "--output", "caf\xe9.pt2"),
        ("data", "--data", f"folder:{tree}", "--preview", "caf\xe9.png", "--images", "3"),
        ("doctor", "--data", f"folder:{tree}"),
    ):
        missing = "missing" in str(args[-1])
        if "--name" in args or missing:
            done = command(f"resfast.{module}", *args, PYTHONIOENCODING="ascii")
            code, output = done.returncode, done.stdout + done.stderr
        else:  # torch need not be imported again
            code, output = on_ascii_terminal(monkeypatch, module, *args)
        assert "Traceback" not in output, output
        assert code in ((2,) if missing else (0, 1)), output
        assert output.isascii()
        if args[0] == run or module == "data":
            assert escaped in output or "\\udce9" in output
