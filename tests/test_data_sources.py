"""Data sets by name, and arrays: what is read, and what is refused."""

from __future__ import annotations

import collections
import hashlib
import pickle
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from resfast.data import cifar_files
from resfast.data.dataset import Dataset
from resfast.data.sources import load_dataset
from resfast.data.unlabelled import open_images
from resfast.errors import ResfastError

COUNTS = {"train": 6, "test": 4}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request, *args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def random_images(split: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(COUNTS[split]).integers(0, 256, (COUNTS[split], *shape), np.uint8)


def labels_of(split: str) -> np.ndarray:
    return np.arange(COUNTS[split]) % 3


def write_svhn(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    images, lists = {}, {}
    for split in COUNTS:
        images[split] = random_images(split, 32, 32, 3)
        file = data_dir / f"{split}_32x32.mat"
        digits = np.where(labels_of(split) == 0, 10, labels_of(split))  # 10 stands for 0
        content = {"X": images[split].transpose(1, 2, 3, 0), "y": digits[:, None].astype(np.uint8)}
        savemat(file, content)
        lists[split] = [
            "http://x/" + file.name,
            file.name,
            hashlib.md5(file.read_bytes()).hexdigest(),
        ]
    monkeypatch.setattr(SVHN, "split_list", lists)
    return images


def write_fashion(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    images = {}
    raw = data_dir / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, name in (("train", "train"), ("test", "t10k")):
        grey = random_images(split, 28, 28)
        images[split] = np.repeat(grey[..., None], 3, 3)
        header = struct.pack(">IIII", 0x803, len(grey), 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + grey.tobytes())
        header = struct.pack(">II", 0x801, len(grey))
        labels = labels_of(split).astype(np.uint8).tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels)
    return images


def write_stl10(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    from torchvision.datasets import STL10

    folder, images, lists = data_dir / "stl10_binary", {}, {}
    folder.mkdir()
    for split in COUNTS:
        images[split] = random_images(split, 96, 96, 3)
        lists[split] = []
        for name, data in (
            (f"{split}_X.bin", images[split].transpose(0, 3, 2, 1).tobytes()),  # column by column
            (f"{split}_y.bin", (labels_of(split) + 1).astype(np.uint8).tobytes()),
        ):
            (folder / name).write_bytes(data)
            lists[split].append([name, hashlib.md5(data).hexdigest()])
    names = b"airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n"
    (folder / "class_names.txt").write_bytes(names)
    monkeypatch.setattr(STL10, "train_list", lists["train"])
    monkeypatch.setattr(STL10, "test_list", lists["test"])
    return images


WRITERS = {
    "svhn": (write_svhn, 32, tuple("0123456789")),
    "fashion-mnist": (write_fashion, 28, None),
    "stl10": (write_stl10, 96, None),
}


@pytest.mark.parametrize("name", WRITERS)
def test_data_sets_of_torchvision_are_read(name: str, tmp_path: Path, monkeypatch):
    write, size, classes = WRITERS[name]
    images = write(tmp_path, monkeypatch)
    data = load_dataset(name, data_dir=tmp_path, image_size=size)
    assert data.name == name
    assert len(data.classes) == 10
    assert classes in (None, data.classes)
    for split in COUNTS:
        assert np.array_equal(getattr(data, f"{split}_images").numpy(), images[split])
        assert getattr(data, f"{split}_labels").tolist() == labels_of(split).tolist()
    assert load_dataset(name, data_dir=tmp_path, image_size=16).image_size == 16


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_that_is_missing_and_cannot_be_fetched_is_an_error(name: str, tmp_path: Path):
    with pytest.raises(ResfastError, match=f"{name} was looked for as .*cannot be reached.*: put"):
        load_dataset(name, data_dir=tmp_path)


# -- other versions of CIFAR -----------------------------------------------------------------------


def write_cifar(data_dir: Path, name: str, kind: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Four images a file; returns images and labels of each split."""
    from scipy.io import savemat

    [version] = [v for v in cifar_files.VERSIONS[name] if v.names.endswith(kind)]
    folder = data_dir / version.folder
    folder.mkdir()
    random, written = np.random.default_rng(1), {}
    for split, files in (("train", version.train), ("test", version.test)):
        images = random.integers(0, 256, (len(files), 4, 3072), np.uint8)
        labels = random.integers(0, 3, (len(files), 4)).astype(np.uint8)
        for file, data, targets in zip(files, images, labels, strict=True):
            if kind == "txt":
                heads = [targets[:, None] + 7] * (version.labels - 1) + [targets[:, None]]
                np.concatenate([*heads, data], 1).astype(np.uint8).tofile(folder / file)
            else:
                savemat(folder / file, {"data": data, version.labels: targets[:, None]})
        pixels = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        written[split] = pixels, labels.ravel()
    if kind == "txt":
        (folder / version.names).write_text("a\nb b\nc\n\n")
    else:
        names = np.array([["a"], ["b b"], ["c"]], dtype=object)
        savemat(folder / version.names, {version.classes: names})
    return written


@pytest.mark.parametrize("kind", ["txt", "mat"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_other_versions_of_cifar_are_read(name: str, kind: str, tmp_path: Path):
    written = write_cifar(tmp_path, name, kind)
    data = load_dataset(name, data_dir=tmp_path)
    assert data.name == name
    assert data.classes == ("a", "b b", "c")
    for split, (pixels, labels) in written.items():
        assert np.array_equal(getattr(data, f"{split}_images").numpy(), pixels)
        assert getattr(data, f"{split}_labels").tolist() == labels.tolist()
    assert load_dataset(name, data_dir=tmp_path, image_size=16).image_size == 16
    files = sorted(next(tmp_path.iterdir()).iterdir())
    for file in files:
        whole = file.read_bytes()
        for damaged in (whole[:-7], b""):
            file.write_bytes(damaged)
            if file.suffix == ".txt" and damaged:
                continue  # names cut short: a shorter name
            with pytest.raises(ResfastError, match=f"{file.name} cannot be read|a label 2 of"):
                load_dataset(name, data_dir=tmp_path)
        file.unlink()
        with pytest.raises(ResfastError, match=rf"{file.name} cannot be read \(it does not exist"):
            load_dataset(name, data_dir=tmp_path)
        file.write_bytes(whole)


# -- arrays ----------------------------------------------------------------------------------------


def content(*shape: int, **changes: object) -> dict[str, np.ndarray]:
    arrays = {}
    for split in COUNTS:
        arrays[f"{split}_images"] = random_images(split, *(shape or (8, 8, 3)))
        arrays[f"{split}_labels"] = labels_of(split)
    return {**arrays, **changes}


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    return path


def load(path: Path, size: int = 8) -> Dataset:
    return load_dataset(f"arrays:{path}", data_dir=path.parent, image_size=size)


@pytest.mark.parametrize("file", ["a.npz", "folder"])
@pytest.mark.parametrize(
    ("shape", "order"),
    [((8, 8, 3), (0, 1, 2, 3)), ((3, 8, 8), (0, 2, 3, 1)), ((8, 8), None), ((8, 8, 1), None)],
)
def test_arrays_are_read(file: str, shape: tuple, order: tuple | None, tmp_path: Path):
    arrays = content(*shape)
    data = load(save(tmp_path / file, arrays))
    assert data.classes == ("0", "1", "2")
    for split in COUNTS:
        images = arrays[f"{split}_images"]
        rgb = images.reshape(-1, 8, 8, 1).repeat(3, 3) if order is None else images.transpose(order)
        assert np.array_equal(getattr(data, f"{split}_images").numpy(), rgb)
        assert torch.equal(getattr(data, f"{split}_labels"), torch.from_numpy(labels_of(split)))
    assert load(tmp_path / file, 16).image_size == 16


def test_names_of_keras_and_of_classes_are_known(tmp_path: Path):
    arrays = content(classes=np.array(["a", "b", "c", "d"]))
    for split in COUNTS:
        arrays[f"x_{split}"] = arrays.pop(f"{split}_images")
        arrays[f"y_{split}"] = arrays.pop(f"{split}_labels")[:, None].astype(np.uint8)
    data = load(save(tmp_path / "a.npz", arrays))
    assert data.classes == ("a", "b", "c", "d")
    assert data.test_labels.tolist() == labels_of("test").tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((6, 8, 8, 3))}, r"train_images in .* is float64 \[6, 8, 8, 3\]"),
        ({"test_images": np.zeros((4, 8, 9, 3), np.uint8)}, "images of 8x9; expected squares"),
        (
            {"test_images": np.zeros((4, 8, 8, 4), np.uint8)},
            r"uint8 \[4, 8, 8, 4\]; expected uint8",
        ),
        ({"test_labels": np.zeros((4, 10), np.int64)}, r"\[4, 10\]; expected whole numbers"),
        ({"test_labels": np.zeros(4)}, "float64"),
        (
            {"test_labels": np.array([0, 1, 2, -1])},
            "labels from -1 to 2; expected them to count from 0",
        ),
        ({"test_labels": np.zeros(3, np.int64)}, "4 test images and 3 test labels"),
        ({"classes": np.array(["a"])}, "labels up to 2 and 1 names"),
        ({"train_labels": np.array([object()] * 6)}, "train_labels in .* cannot be read"),
        ({"classes": np.array(["a", "b", "a"])}, "classes in .* has the name 'a' 2 times"),
        ({"classes": np.array(["a", " ", "c"])}, "classes in .* has a class without a name"),
        (
            {"classes": np.arange(3.0)},
            r"classes in .* is float64 \[3\]; expected an array of names",
        ),
        ({"classes": np.array([b"a", b"\xff", b"c"])}, "cannot be read .*expected names in UTF-8"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict, message: str, tmp_path: Path):
    with pytest.raises(ResfastError, match=message):
        load(save(tmp_path / "a.npz", content(**changes)))


def test_files_that_are_no_arrays_are_refused(tmp_path: Path):
    with pytest.raises(ResfastError, match=r"cannot be read \(No such file"):
        load(tmp_path / "gone.npz")
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(ResfastError, match=r"a\.npz cannot be read \(it is no \.npz file\)"):
        load(tmp_path / "a.npz")
    whole = save(tmp_path / "b.npz", content()).read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ResfastError, match=r"b\.npz cannot be read"):
        load(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", other=np.zeros(1))
    with pytest.raises(ResfastError, match="has no train_images: it holds other; expected"):
        load(tmp_path / "c.npz")
    with pytest.raises(ResfastError, match="has no path"):
        load_dataset("arrays:", data_dir=tmp_path)


# -- pickles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ids", "id", "IDs", "filenames"])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize(
    "ids", [[7, 8, 9], range(7, 10), np.array([7, 8, 9]), [b"7", b"8", b"9"]], ids=str
)
def test_pickles_keep_their_ids(name: str, kind: type, ids: object, tmp_path: Path):
    path = tmp_path / "a.pkl"
    images = np.zeros((3, 3072), np.uint8)
    path.write_bytes(pickle.dumps(kind([("data", images), (name, ids)])))
    assert list(open_images([path]).ids) == ["7", "8", "9"]


def test_a_range_of_another_length_is_refused_without_being_listed(tmp_path: Path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "ids": range(10**15)}))
    with pytest.raises(ResfastError, match="expected one id per image"):
        open_images([path])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (np.array(["é".encode(), b"dog", b"owl"]), ("é", "dog", "owl")),
        (np.array(["é", "dog", "owl"]), ("é", "dog", "owl")),
        (np.array([7, 8, 9], np.uint8), ("7", "8", "9")),
    ],
    ids=["bytes", "text", "numbers"],
)
def test_names_of_classes_are_text_however_they_are_stored(
    names: np.ndarray, expected: tuple[str, ...], tmp_path: Path
):
    assert load(save(tmp_path / "a.npz", content(classes=names))).classes == expected


def test_images_and_labels_of_different_splits_are_not_taken_together(tmp_path: Path):
    arrays = content()
    arrays["val_labels"] = arrays["test_labels"][::-1]
    arrays["val_images"] = arrays["test_images"][::-1]
    data = load(save(tmp_path / "both.npz", arrays))
    assert data.test_labels.tolist() == labels_of("test").tolist()
    without = {name: array for name, array in arrays.items() if name != "test_labels"}
    with pytest.raises(ResfastError, match="has no test_labels: it holds"):
        load(save(tmp_path / "mixed.npz", without))
    del without["test_images"]
    data = load(save(tmp_path / "val.npz", without))
    assert data.test_labels.tolist() == labels_of("test").tolist()[::-1]
    assert np.array_equal(data.test_images.numpy(), arrays["val_images"])


@pytest.mark.parametrize("damage", ["cut", "empty", "folder"])
@pytest.mark.parametrize("name", ["train_images", "test_labels"])
def test_a_damaged_file_in_a_folder_of_arrays_is_one_sentence(
    name: str, damage: str, tmp_path: Path
):
    folder = save(tmp_path / "arrays", content())
    file = folder / f"{name}.npy"
    whole = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(whole[:-8] if damage == "cut" else b"")
    with pytest.raises(ResfastError, match=f"{name} in .* cannot be read"):
        load(folder)
