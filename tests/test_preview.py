from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resfast.cli import data as command
from resfast.data import preview
from resfast.data.augment import POLICIES, Augment, order, sample, sample_mix, statistics
from resfast.data.batches import split_sources
from resfast.data.dataset import Dataset
from resfast.data.preview import augmented, class_plot, contact_sheet, sample_grid
from resfast.data.statistics import channel_mean_std
from resfast.errors import ResfastError
from resfast.ops.augment.op import augment

MIXING = Augment(
    crop=3, flip="random", rotate=10, cutout=5, contrast=0.3, grey=0.3, mixup=1, cutmix=1
)


def dataset(size: int = 12, classes: tuple[str, ...] = ("cat", "dog", "ship")) -> Dataset:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, size, size, 3), generator=random, dtype=torch.uint8)
    labels = torch.arange(40) % len(classes)
    return Dataset("made", images, labels, images[:4], labels[:4], classes, digest="")


def places(sheet: Image.Image, column: int, image: torch.Tensor, factor: int) -> list[int]:
    """Rows of pixels at which the sheet shows ``image`` in ``column``, enlarged exactly."""
    large = np.kron(image.numpy(), np.ones((factor, factor, 1), dtype=np.uint8))
    height, width = large.shape[:2]
    left = preview._MARGIN + preview._SIDE_LABEL + column * (width + preview._GAP)
    strip = np.asarray(sheet)[:, left : left + width]
    return [
        top
        for top in range(len(strip) - height + 1)
        if np.array_equal(strip[top : top + height], large)
    ]


def test_the_sheet_shows_plain_and_augmented_images_enlarged_exactly_in_order():
    data = dataset()
    policies = {"strong": MIXING, "mirrored": Augment(flip="alternating")}
    sheet = contact_sheet(data, policies, images=4, seed=3, epochs=(0, 5))
    chosen = preview._one_of_each_class(data, 4, 3)
    mean, std = channel_mean_std(data.train_images)
    rows = [data.train_images[chosen]]
    for policy in policies.values():
        for epoch in (0, 5):
            rows.append(augmented(data, policy, chosen, mean, std, seed=3, epoch=epoch)[0])
    for column in range(4):
        found = [places(sheet, column, row[column], 8) for row in rows]
        assert all(found)
        # The plain image is also that of the one epoch in which it is not mirrored.
        tops = [found[0][0], *(row[-1] for row in found[1:])]
        assert tops == sorted(set(tops))
        assert sorted({top for row in found for top in row}) == tops
    right_margin = np.asarray(sheet)[:, -preview._MARGIN + 1 :]
    assert (right_margin == 255).all()


def test_an_image_is_what_training_makes_of_it_in_a_batch_of_one():
    data = dataset()
    images, chosen = data.train_images, torch.tensor([7, 0, 31, 12])
    mean, std = channel_mean_std(images)
    got, parts = augmented(data, MIXING, chosen, mean, std, seed=1, epoch=2)
    values = {"size": (12, 12), "seed": 1, "epoch": 2}
    table = statistics(images)
    params = sample(MIXING, torch.arange(40), channels=3, statistics=table, **values)
    kinds = set()
    for pixels, row, index in zip(got, parts, chosen, strict=True):
        mix = sample_mix(MIXING, index[None], count=40, **values)
        result = augment(images, index[None], params, mean, std, mix=mix)[0].permute(1, 2, 0)
        expected = ((result * std + mean) * 255).clamp(0, 255)
        assert (pixels - expected).abs().max() <= 0.51
        own, partner = data.train_labels[index], data.train_labels[mix.partner[0]]
        share = mix.label_weights(12, 12)[0]
        expected_row = torch.zeros(3)
        expected_row[own] += share
        expected_row[partner] += 1 - share
        torch.testing.assert_close(row, expected_row)
        kinds.add(bool(mix.box.any()))
    assert kinds == {False, True}  # both MixUp and CutMix were seen


def test_alternating_flip_is_visible_from_one_epoch_to_the_next():
    data, chosen = dataset(), torch.arange(10)
    mean, std = channel_mean_std(data.train_images)
    policy = Augment(flip="alternating")
    first, second = (
        augmented(data, policy, chosen, mean, std, seed=0, epoch=epoch)[0] for epoch in (0, 1)
    )
    assert torch.equal(first, second.flip(2))
    mirrored = (first != data.train_images[chosen]).flatten(1).any(1)
    assert 0 < mirrored.sum() < 10


def test_every_class_is_shown_before_one_is_shown_again():
    data = dataset()
    for images in (2, 3, 7, 40):
        chosen = preview._one_of_each_class(data, images, seed=0)
        assert len(chosen.unique()) == images
        counts = torch.bincount(data.train_labels[chosen], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(chosen, preview._one_of_each_class(data, 40, seed=1))


def test_label_lines_name_the_larger_class_first_and_add_up():
    classes = ("cat", "dog", "ship")
    assert preview._label_lines(torch.tensor([0.0, 1.0, 0.0]), classes) == ["100 % dog"]
    assert preview._label_lines(torch.tensor([0.7, 0.0, 0.3]), classes) == ["70 % cat", "30 % ship"]
    assert preview._label_lines(torch.tensor([0.396, 0.604, 0]), classes) == [
        "60 % dog",
        "40 % cat",
    ]
    assert preview._label_lines(torch.tensor([0.5, 0.5, 0]), classes) == ["50 % cat", "50 % dog"]
    assert preview._label_lines(torch.tensor([1.0]), ("cat",)) == ["100 % cat"]


def test_long_names_stay_in_their_column_and_long_policies_are_broken_into_lines():
    names = tuple(f"{'very_' * 12}long_{number}" for number in range(3))
    sheet = contact_sheet(
        dataset(classes=names), {f"my own {'policy ' * 30}": MIXING}, images=3, epochs=(0,)
    )
    pixels = np.asarray(sheet)
    cell, first = 96, preview._MARGIN + preview._SIDE_LABEL
    captions = preview._Sheet(3, 12, 12)
    captions.captions([[name, name] for name in names])
    strip = np.asarray(captions.strips[0])
    assert (strip < 128).any()
    for column in range(2):
        gap = slice(
            first + column * (cell + preview._GAP) + cell,
            first + (column + 1) * (cell + preview._GAP),
        )
        assert (strip[:, gap] == 255).all()
    assert (pixels[:, -preview._MARGIN + 1 :] == 255).all()
    lines = preview._wrapped(str(MIXING), captions.text_font, 200)
    assert len(lines) > 1
    assert "".join(lines) == str(MIXING)
    assert all(captions.text_font.getlength(line) <= 200 for line in lines)


@pytest.mark.parametrize(("size", "factor"), [(8, 12), (28, 3), (32, 3), (96, 1), (224, 1)])
def test_images_are_enlarged_by_a_whole_factor(size: int, factor: int):
    sheet = preview._Sheet(2, size, size)
    assert (sheet.cell_height, sheet.cell_width) == (factor * size, factor * size)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": 0}, "--images 0 is out of range: expected 1 to 40"),
        ({"images": 41}, "--images 41 is out of range: expected 1 to 40"),
        ({"epochs": ()}, r"--epochs \(none\): expected one or more"),
        ({"epochs": (0, -1)}, "--epochs 0 -1: expected one or more, counted from 0"),
        ({"policies": {"x": Augment(crop=12)}}, "crop=12 does not fit images of 12x12 pixels"),
    ],
)
def test_numbers_out_of_range_are_refused(values: dict[str, object], message: str):
    with pytest.raises(ResfastError, match=message):
        contact_sheet(dataset(), **{"policies": POLICIES, **values})


# The command.


def test_the_command_writes_a_sheet_of_every_named_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "out.png"
    assert command.main(["--preview", str(out), "--data", "digits", "--images", "5"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as sheet:
        every = sheet.size
        assert sheet.format == "PNG"
    options = ["--preview", str(out), "--data", "digits", "--images", "5"]
    assert command.main([*options, "--augment", "light"]) == 0
    with Image.open(out) as sheet:
        one = sheet.size
    assert command.main([*options, "--augment", "light", "--augment", "crop=1,cutout=3"]) == 0
    with Image.open(out) as sheet:
        two = sheet.size
    assert command.main([*options, "--augment", "light", "--epochs", "0", "3", "9"]) == 0
    with Image.open(out) as sheet:
        three_epochs = sheet.size
    assert every[0] == one[0] == two[0] == three_epochs[0]
    assert one[1] < three_epochs[1] < every[1]
    assert one[1] < two[1] < every[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to do: expected --preview PNG"),
        (["--preview", "out.jpg"], "--preview out.jpg: expected a name that ends in .png"),
        (["--preview", "out.png", "--augment", "lihgt"], "did you mean 'light'"),
        (["--preview", "out.png", "--data", "digit"], "did you mean 'digits'"),
        (["--preview", "out.png", "--data", "digits", "--images", "500"], "expected 1 to 100"),
        (["--preview", "file/out.png", "--data", "digits"], "cannot create the folder file"),
        (["--preview", "folder.png", "--data", "digits"], "cannot write folder.png"),
        (["--shards", "out", "--data", "digits"], "packs an image folder, not --data digits"),
        (["--shards", "out", "--data", "folder:"], "use --data folder:PATH"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    assert command.main(options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("resfast: error: ")
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_samples_have_a_row_of_each_class():
    data = dataset()
    grid = sample_grid(data, images=3, seed=7)
    shuffled = order(40, seed=7, epoch=0, device="cpu")
    tops = []
    for label in range(3):
        chosen = shuffled[data.train_labels[shuffled] == label][:3]
        rows = [places(grid, column, data.train_images[chosen[column]], 8) for column in range(3)]
        assert len(rows[0]) == 1
        assert rows[0] == rows[1] == rows[2]
        tops += rows[0]
    assert tops == sorted(tops)
    for number in (0, 101):
        with pytest.raises(ResfastError, match=f"--images {number} is out of range"):
            sample_grid(data, images=number)


def test_a_class_with_fewer_images_has_a_shorter_row():
    assert sample_grid(dataset(), images=50).width > sample_grid(dataset(), images=10).width


def test_bars_are_the_number_of_images_of_each_class():
    data = dataset()
    figure = class_plot(data, val_fraction=0.25)
    (axes,) = figure.axes
    bars = {one.get_label(): [bar.get_width() for bar in one] for one in axes.containers}
    kept, held_out, test = split_sources(data, 0.25, 0)
    assert held_out is not None
    for name, (_, labels) in {"training": kept, "held out": held_out, "test": test}.items():
        assert bars[name] == torch.bincount(labels, minlength=3).tolist()
    assert len(class_plot(data).axes[0].containers) == 2
    assert [label.get_text() for label in axes.get_yticklabels()] == list(data.classes)


@pytest.mark.parametrize("option", ["--samples", "--distribution"])
def test_the_command_writes_samples_and_bars(
    option: str, image_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "new" / "plot.png"
    options = ["--data", f"folder:{image_tree}", "--data-dir", str(tmp_path), "--image-size", "16"]
    assert command.main([option, str(path), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    with Image.open(path) as image:
        assert min(image.size) > 100
    assert command.main([option, str(tmp_path / "plot.jpg"), *options]) == 2
    assert f"{option} {tmp_path / 'plot.jpg'}: expected a name that ends in .png" in (
        capsys.readouterr().err
    )


def test_the_command_packs_an_image_folder(
    image_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "shards"
    options = ["--shards", str(out), "--data", f"folder:{image_tree}", "--images-per-shard", "20"]
    assert command.main(options) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert len(list(out.rglob("*.tar"))) >= 4  # 48 training images and 16 test images


def test_the_module_is_a_command_and_importing_it_does_not_draw():
    code = (
        "import sys, resfast.cli.data as m; "
        "print('PIL' in sys.modules, 'matplotlib' in sys.modules)"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert imported.stdout == "False False\n", imported.stderr
    options = [sys.executable, "-m", "resfast.data", "--help"]
    shown = subprocess.run(options, capture_output=True, text=True)
    assert shown.returncode == 0
    for option in ("--preview", "--shards", "--augment", "--epochs", "--images-per-shard"):
        assert option in shown.stdout
