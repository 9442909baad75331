"""Duplicates: the same pixels, altered copies and mirror images are found, and others are not."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy import ndimage

from resfast.cli.data import main as data_command
from resfast.data.dataset import Dataset
from resfast.data.duplicates import (
    Pair,
    _best_correlation,
    _detail,
    find_duplicates,
)
from resfast.data.preview import duplicate_sheet
from resfast.errors import ResfastError
from tests.conftest import write_tree

SIDE = 32


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Random pictures with structure at several sizes, uint8 ``[count, 32, 32, 3]``."""
    random = np.random.default_rng(seed)
    made = np.zeros((count, SIDE, SIDE, 3))
    for size, weight in ((4, 1.0), (8, 0.7), (16, 0.4)):
        coarse = random.normal(size=(count, size, size, 3))
        made += weight * ndimage.zoom(coarse, (1, SIDE / size, SIDE / size, 1), order=1)
    return np.clip(128 + 45 * made, 0, 255).astype(np.uint8)


def altered(image: np.ndarray) -> dict[str, np.ndarray]:
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=60)
    return {
        "jpeg": np.asarray(Image.open(buffer)),
        "darker": np.asarray(ImageEnhance.Brightness(picture).enhance(0.7)),
        "grey": np.asarray(picture.convert("L").convert("RGB")),
        "shifted": np.roll(image, 1, 1),
        "mirrored": image[:, ::-1],
    }


def dataset(train: np.ndarray, test: np.ndarray) -> Dataset:
    return Dataset(
        "made",
        torch.from_numpy(np.ascontiguousarray(train)),
        torch.arange(len(train)) % 2,
        torch.from_numpy(np.ascontiguousarray(test)),
        torch.arange(len(test)) % 2,
        ("cat", "dog"),
        "",
    )


def test_copies_are_found_within_and_across_the_splits_and_nothing_else():
    train, test = pictures(300), pictures(60, seed=1)
    train[7] = train[200]
    test[4] = train[50]
    test[9] = test[30]
    test[11] = train[80][:, ::-1]
    copies = altered(train[100])
    for row, name in enumerate(copies):
        test[20 + row] = copies[name]
    found = find_duplicates(dataset(train, test))
    exact = {(pair.first, pair.second, pair.mirrored) for pair in found if pair.exact}
    assert exact == {
        (("train", 7), ("train", 200), False),
        (("train", 50), ("test", 4), False),
        (("test", 9), ("test", 30), False),
        (("train", 80), ("test", 11), True),
        (("train", 100), ("test", 24), True),
    }
    near = {pair.second[1]: pair for pair in found if pair.first == ("train", 100)}
    assert set(near) == {20, 21, 22, 23, 24}
    assert all(0.86 <= pair.similarity <= 1 and pair.across for pair in near.values())
    # The copies of one image are also alike among themselves.
    assert {row for pair in found for row in (pair.first, pair.second) if not pair.exact} <= {
        ("train", 100), *(("test", row) for row in range(20, 25))
    }  # fmt: skip
    assert [pair.across for pair in found] == sorted((p.across for p in found), reverse=True)
    assert next(pair for pair in found if pair.second == ("test", 4)).labels == (0, 0)


def test_at_a_similarity_of_one_only_the_same_pixels_count():
    train, test = pictures(40), pictures(10, seed=1)
    test[1], test[2] = train[3], altered(train[3])["jpeg"]
    [pair] = find_duplicates(dataset(train, test), 1.0)
    assert pair == Pair(("train", 3), ("test", 1), 1.0, True, False, (1, 1))
    with pytest.raises(ResfastError, match=r"--similarity 0.5 is out of range: expected 0.6 to 1"):
        find_duplicates(dataset(train, test), 0.5)


def test_each_of_many_equal_images_is_paired_with_the_first():
    train = np.concatenate([pictures(20), np.repeat(pictures(1, seed=5), 50, 0)])
    found = find_duplicates(dataset(train, pictures(5, seed=2)), 1.0)
    rows = [(pair.first[1], pair.second[1]) for pair in found]
    assert rows == [(20, row) for row in range(21, 70)]


def test_images_without_any_detail_are_no_near_duplicates():
    flat = np.zeros((30, SIDE, SIDE, 3), np.uint8)
    flat += np.arange(30, dtype=np.uint8)[:, None, None, None] * 8
    assert find_duplicates(dataset(flat[:20], flat[20:])) == []


def test_the_correlation_is_the_best_over_the_shifts():
    images = torch.from_numpy(pictures(12))
    a, b = _detail(images[:6]), _detail(images[6:])
    best = torch.full((6,), -1.0, dtype=torch.float64)
    core = b[:, 0, 2:30, 2:30].flatten(1).double()
    core = core - core.mean(1, keepdim=True)
    for down in range(5):
        for right in range(5):
            part = a[:, 0, down : down + 28, right : right + 28].flatten(1).double()
            part = part - part.mean(1, keepdim=True)
            value = (part * core).sum(1) / part.norm(dim=1) / core.norm(dim=1)
            best = torch.maximum(best, value)
    assert torch.allclose(_best_correlation(a, b).double(), best, atol=1e-4)


@pytest.mark.parametrize("side", [8, 48])
def test_duplicates_of_other_sizes_are_found(side: int):
    zoom = (1, side / SIDE, side / SIDE, 1)
    train = np.clip(ndimage.zoom(pictures(40).astype(float), zoom, order=1), 0, 255)
    train = train.astype(np.uint8)
    copy = np.clip(train[5].astype(int) + 9, 0, 255).astype(np.uint8)
    found = find_duplicates(dataset(train, copy[None]))
    assert (("train", 5), ("test", 0)) in [(pair.first, pair.second) for pair in found]


def test_the_command_writes_a_sheet_and_a_list(tmp_path: Path, capsys):
    tree = write_tree(tmp_path / "tree", train=6, test=3)
    (tree / "test" / "left" / "001.png").write_bytes(
        (tree / "train" / "right" / "004.png").read_bytes()
    )
    sheet = tmp_path / "sheet.png"
    options = ["--data", f"folder:{tree}", "--data-dir", str(tmp_path), "--image-size", "16"]
    arguments = ["--duplicates", str(sheet), *options, "--similarity", "1"]
    assert data_command(arguments) == 0
    printed = capsys.readouterr().out
    assert "training and test images: 1 pairs alike, 1 of them with the same pixels" in printed
    assert "training images: 0 pairs" in printed
    with open(tmp_path / "sheet.csv") as file:
        [row] = csv.DictReader(file)
    assert row == {
        "first_split": "train", "first_index": "10", "first_class": "right",
        "second_split": "test", "second_index": "1", "second_class": "left",
        "similarity": "1.0000", "exact": "1", "mirrored": "0",
        "first_file": "train/right/004.png", "second_file": "test/left/001.png",
    }  # fmt: skip
    with Image.open(sheet) as image:
        assert image.width > 500
    assert data_command(["--duplicates", str(tmp_path / "a.jpg"), *options]) == 2
    assert "expected a name that ends in .png" in capsys.readouterr().err


def test_the_sheet_has_both_images_of_a_pair_one_above_the_other():
    data = dataset(pictures(4), pictures(4, seed=1))
    pair = Pair(("train", 2), ("test", 3), 0.9, False, False, (0, 1))
    sheet = np.asarray(duplicate_sheet(data, [pair], images=2))
    large = [np.kron(image.numpy(), np.ones((3, 3, 1), np.uint8))
             for image in (data.train_images[2], data.test_images[3])]  # fmt: skip
    tops = []
    for image in large:
        left = 90
        strip = sheet[:, left : left + 96]
        tops.append([t for t in range(len(strip) - 95) if np.array_equal(strip[t : t + 96], image)])
    assert len(tops[0]) == len(tops[1]) == 1
    assert 96 <= tops[1][0] - tops[0][0] < 110
