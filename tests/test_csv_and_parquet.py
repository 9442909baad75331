"""Images with labels in CSV and Parquet files; Kaggle's submissions; names of classes."""

from __future__ import annotations

import csv
import io
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resfast.cli.predict import main as predict_command
from resfast.data.dataset import Dataset
from resfast.data.sources import load_dataset
from resfast.errors import ResfastError
from tests.conftest import write_tree
from tests.test_export import make_run

CLASSES = ("cat", "frog")


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def load(data: str, tmp_path: Path, **options: object) -> Dataset:
    return load_dataset(data, data_dir=tmp_path / "data", image_size=8, **options)


def write_csv(path: Path, rows: list, header: tuple = ("id", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_kaggle(folder: Path, count: int = 22) -> Path:
    """Images 1.png and so on of two classes in turn, and two test images without labels."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    for number in range(1, count + 1):
        (folder / "train" / f"{number}.png").write_bytes(png(number))
    for number in (1, 2, 10):
        (folder / "test" / f"{number}.png").write_bytes(png(100 + number))
    rows = [(number, CLASSES[number % 2]) for number in range(1, count + 1)]
    write_csv(folder / "trainLabels.csv", rows)
    return folder


# -- CSV -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "/trainLabels.csv"])
def test_the_layout_of_kaggle_is_read(name: str, tmp_path: Path, capsys):
    folder = write_kaggle(tmp_path / "kaggle")
    data = load(f"csv:{folder}{name}", tmp_path)
    assert data.classes == CLASSES
    numbers = [n for n in range(1, 23) if n not in (19, 20)]  # the tenth of each class
    assert data.train_labels.tolist() == [n % 2 for n in numbers]
    for image, number in zip(data.train_images.numpy(), numbers, strict=True):
        assert np.array_equal(image, pixels(number))
    assert data.test_labels.tolist() == [1, 0]
    assert np.array_equal(data.test_images[0].numpy(), pixels(19))
    assert "every 10th of each class, 2 in all, is a test image" in capsys.readouterr().err
    again = load(f"csv:{folder}{name}", tmp_path)
    assert again.digest == data.digest
    assert "reading" not in capsys.readouterr().err  # it was cached
    (folder / "train" / "3.png").write_bytes(png(500))
    assert load(f"csv:{folder}{name}", tmp_path).digest != data.digest


def test_labels_of_test_images_and_a_column_of_splits_are_used(tmp_path: Path):
    folder = write_kaggle(tmp_path / "kaggle")
    write_csv(folder / "testLabels.csv", [(10, "frog"), (2, "cat")])
    data = load(f"csv:{folder}", tmp_path)
    assert len(data.train_labels) == 22
    assert data.test_labels.tolist() == [1, 0]
    assert np.array_equal(data.test_images[0].numpy(), pixels(110))
    rows = [("test", f"train/{n}.png", "x", n % 2 + 9) for n in (1, 2)]
    rows += [("train", f"train/{n}.png", "y", n % 2 + 9) for n in (3, 4, 5)]
    path = write_csv(folder / "all.csv", rows, ("Split", "file_name", "note", "Label"))
    data = load(f"csv:{path}", tmp_path)
    assert data.classes == ("9", "10")  # by value
    assert data.train_labels.tolist() == [1, 0, 1]
    assert data.test_labels.tolist() == [1, 0]


def test_any_name_of_the_only_other_column_is_that_of_the_images(tmp_path: Path):
    folder = write_kaggle(tmp_path / "kaggle")
    rows = [(f"{n}.png", CLASSES[n % 2]) for n in range(1, 23)]
    path = write_csv(folder / "b.csv", rows, ("picture", "class"))
    assert len(load(f"csv:{path}", tmp_path).train_labels) == 20


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (("id", "label"), [(1, "a"), (77, "b"), ("9.png", "b"), ("z.png", "b")],
         r"2 of 4 images in .* are missing, for example '77' in line 3; expected 77.png in "),
        (("id", "label"), [(1, "a"), (1, "b")], "names images twice, 1 in all, for"),
        (("id", "label"), [(1, "a"), ("1.png", "b")], "names images twice"),
        (("id", "label"), [(1, "a"), (2, "")], "line 3 of .* has no label; expected a class"),
        (("id", "label"), [(1, "a"), (2,)], "line 3 of .* has 1 values; expected 2: id, label"),
        (("id", "label"), [], "has no rows"),
        (("id", "name", "label"), [(1, 1, "a")],
         "has 2 columns that may be the images: id, name; rename all but one"),
        (("id", "label", "class"), [(1, "a", "b")],
         "has 2 columns that may be the labels: label, class"),
        (("id", "animal"), [(1, "a")],
         "has no column with the labels: it has id, animal; expected one named label, "),
        (("id", "id", "label"), [(1, 1, "a")], "has the column 'id' twice"),
        (("id", "label", "split"), [(1, "a", "odd")], "line 2 of .* has the split 'odd'"),
        (("id", "label"), [(1, "a"), (2, "a")], "fewer than 10 of each class"),
    ],
)  # fmt: skip
def test_wrong_csv_files_are_one_sentence(header: tuple, rows: list, message: str, tmp_path: Path):
    folder = write_kaggle(tmp_path / "kaggle")
    path = write_csv(folder / "c.csv", rows, header)
    with pytest.raises(ResfastError, match=message):
        load(f"csv:{path}", tmp_path)


def test_missing_csv_files_are_one_sentence(tmp_path: Path):
    folder = write_kaggle(tmp_path / "kaggle")
    with pytest.raises(ResfastError, match="has no path, expected csv:PATH"):
        load("csv:", tmp_path)
    with pytest.raises(ResfastError, match="gone does not exist; expected a CSV file"):
        load(f"csv:{tmp_path / 'gone'}", tmp_path)
    path = folder / "latin.csv"
    path.write_bytes(b"id,label\n1,caf\xe9\n")
    with pytest.raises(ResfastError, match=r"latin.csv cannot be read .*expected CSV in UTF-8"):
        load(f"csv:{path}", tmp_path)
    (folder / "trainLabels.csv").rename(folder / "a.csv")
    with pytest.raises(ResfastError, match=r"has none of trainLabels.csv.*a.csv, latin.csv: name"):
        load(f"csv:{folder}", tmp_path)
    (folder / "train" / "4.jpg").write_bytes(png(4))
    with pytest.raises(ResfastError, match=r"4.jpg and 4.png differ only in their suffix"):
        load(f"csv:{folder}/a.csv", tmp_path)


def test_a_corrupt_image_of_a_csv_file_is_named_or_skipped(tmp_path: Path):
    folder = write_kaggle(tmp_path / "kaggle")
    (folder / "train" / "5.png").write_bytes(b"nothing")
    with pytest.raises(ResfastError, match=r"train/5.png is not a readable JPEG, PNG or WebP"):
        load(f"csv:{folder}", tmp_path)
    data = load(f"csv:{folder}", tmp_path, skip_corrupt=True)
    assert len(data.train_labels) == 19
    assert data.skipped == (str(folder / "train" / "5.png"),)


def test_a_submission_is_as_kaggle_expects_it(tmp_path: Path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", size=8)
    monkeypatch.chdir(tmp_path)
    folder = write_kaggle(tmp_path / "kaggle") / "test"
    assert predict_command([str(run), str(folder), "--submission"]) == 0
    assert predict_command([str(run), str(folder), "--names"]) == 0
    with open("predictions.csv") as file:
        names = {row["ID"]: row["Labels"] for row in csv.DictReader(file)}
    lines = Path("submission.csv").read_text().splitlines()
    assert lines == ["id,label", *(f"{n},{names[f'{n}.png']}" for n in (1, 2, 10))]
    capsys.readouterr()
    assert predict_command([str(run), str(folder), "--submission"]) == 2
    assert "submission.csv already exists" in capsys.readouterr().err
    (folder / "more").mkdir()
    (folder / "more" / "2.png").write_bytes(png(1))
    assert predict_command([str(run), str(folder), "--submission", "--overwrite"]) == 2
    assert "several images have the same id, for example '2'" in capsys.readouterr().err


# -- Parquet ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["3.png", "images/3.png"])
def test_an_image_that_is_in_two_places_is_refused(other: str, tmp_path: Path):
    folder = write_kaggle(tmp_path / "kaggle")
    (folder / other).parent.mkdir(exist_ok=True)
    (folder / other).write_bytes(png(500))
    with pytest.raises(ResfastError, match="may both be the image '3'"):
        load(f"csv:{folder}", tmp_path)


def test_too_few_images_to_take_test_images_from_are_refused(tmp_path: Path):
    folder = write_kaggle(tmp_path / "kaggle", count=18)
    with pytest.raises(ResfastError, match=r"fewer than 10 of each class.*add a column split"):
        load(f"csv:{folder}", tmp_path)


def test_an_image_by_two_paths_is_refused(tmp_path: Path):
    folder = write_kaggle(tmp_path / "kaggle")
    rows = [("train/1.png", "cat"), ("./train/1.png", "dog"), ("train/2.png", "dog")]
    write_csv(folder / "trainLabels.csv", rows)
    with pytest.raises(ResfastError, match="twice"):
        load(f"csv:{folder}", tmp_path)


def write_parquet(path: Path, seeds: list[int], *, image: str = "img", **columns: list) -> None:
    """A file as the Hugging Face Hub has them."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": png(seed), "path": None} for seed in seeds]
    names = {key: {"names": list(CLASSES), "_type": "ClassLabel"} for key in columns}
    features = {image: {"_type": "Image"}, **names}
    table = pa.table({image: pa.array(values, struct), **columns})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)


def test_files_of_the_hugging_face_hub_are_read(tmp_path: Path, capsys):
    folder = tmp_path / "cifar" / "plain_text"
    write_parquet(folder / "train-00000-of-00002.parquet", [1, 2, 3], label=[0, 1, 1])
    write_parquet(folder / "train-00001-of-00002.parquet", [4], label=[0])
    write_parquet(folder / "test-00000-of-00001.parquet", [5, 6], label=[1, 0])
    data = load(f"parquet:{tmp_path / 'cifar'}", tmp_path)
    assert data.classes == CLASSES
    assert data.train_labels.tolist() == [0, 1, 1, 0]
    assert data.test_labels.tolist() == [1, 0]
    for image, seed in zip(data.train_images.numpy(), (1, 2, 3, 4), strict=True):
        assert np.array_equal(image, pixels(seed))
    capsys.readouterr()
    assert load(f"parquet:{folder}", tmp_path).digest == data.digest
    assert "reading" not in capsys.readouterr().err


def test_different_data_sets_in_one_folder_are_refused(tmp_path: Path):
    folder = tmp_path / "hub"
    for name in ("a", "b"):
        write_parquet(folder / name / "train-0.parquet", [1, 2], label=[0, 1])
        write_parquet(folder / name / "test-0.parquet", [3, 4], label=[0, 1])
    with pytest.raises(ResfastError, match=r"both have files for t.*give the path of one"):
        load(f"parquet:{folder}", tmp_path)


def test_class_names_that_disagree_are_refused(tmp_path: Path, monkeypatch):
    folder = tmp_path / "hub"
    write_parquet(folder / "train-0.parquet", [1, 2], label=[0, 1])
    monkeypatch.setitem(globals(), "CLASSES", CLASSES[::-1])
    write_parquet(folder / "test-0.parquet", [3, 4], label=[0, 1])
    with pytest.raises(ResfastError, match="name the classes differently"):
        load(f"parquet:{folder}", tmp_path)


def test_fine_labels_names_and_plain_bytes_are_read(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for split, seeds in (("train", [1, 2]), ("val", [3])):
        folder = tmp_path / "a" / split
        write_parquet(folder / "0.parquet", seeds, fine_label=[1] * len(seeds),
                      coarse_label=[0] * len(seeds))  # fmt: skip
    data = load(f"parquet:{tmp_path / 'a'}", tmp_path)
    assert data.train_labels.tolist() == [1, 1]
    assert len(data.test_labels) == 1
    (tmp_path / "b").mkdir()
    for split, seeds, labels in (("train", [1, 2], ["x", "a"]), ("test", [3], ["x"])):
        table = pa.table({"picture": [png(seed) for seed in seeds], "label": labels})
        pyarrow.parquet.write_table(table, tmp_path / "b" / f"{split}.parquet")
    data = load(f"parquet:{tmp_path / 'b'}", tmp_path)
    assert data.classes == ("a", "x")
    assert data.train_labels.tolist() == [1, 0]
    assert np.array_equal(data.test_images[0].numpy(), pixels(3))


def test_wrong_parquet_files_are_one_sentence(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    folder = tmp_path / "a"
    train, test = folder / "train.parquet", folder / "test.parquet"
    write_parquet(train, [1, 2], label=[0, 1])

    def error() -> str:
        with pytest.raises(ResfastError) as caught:
            load(f"parquet:{folder}", tmp_path)
        return str(caught.value)

    assert "has no .parquet file for test: it has train.parquet; expected names that" in error()
    test.write_bytes(b"nothing")
    assert "test.parquet cannot be read (" in error()
    write_parquet(test, [1], label=[2])
    assert "has labels from 0 to 2; expected 0 to 1" in error()
    write_parquet(test, [1], other=[2])
    assert "test.parquet has no labels: it has the columns img, other; expected one" in error()
    write_parquet(test, [1], label=[0], target=[1])
    assert "has 2 columns that may be the labels" in error()
    write_parquet(test, [1], label=[None])
    assert "label in row 0 of" in error()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    outside = pa.array([{"bytes": None, "path": "1.png"}], struct)
    pyarrow.parquet.write_table(pa.table({"img": outside, "label": [0]}), test)
    assert "row 0 of" in error()
    assert "has no bytes of an image" in error()
    pyarrow.parquet.write_table(pa.table({"img": ["1.png"], "label": [0]}), test)
    assert "img in" in error()
    assert "is string; expected encoded images" in error()
    pyarrow.parquet.write_table(pa.table({"img": [b"no image"], "label": [0]}), test)
    assert "image 0 of test in" in error()
    assert "is not a readable JPEG" in error()
    with pytest.raises(ResfastError, match=r"gone does not exist; expected a folder of .parquet"):
        load(f"parquet:{tmp_path / 'gone'}", tmp_path)
    with pytest.raises(ResfastError, match="has no path, expected parquet:PATH"):
        load("parquet:", tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ResfastError, match=r'needs pyarrow .*pip install "resfast\[parquet\]"'):
        load(f"parquet:{tmp_path}", tmp_path)


# -- names of class folders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café"), "Unicode"),
        ("Cat", "cat", "case"),
        ("straße", "STRASSE", "case"),
    ],
)
@pytest.mark.parametrize("where", ["both", "between"])
def test_class_folders_that_look_the_same_are_named(
    first: str, second: str, how: str, where: str, tmp_path: Path
):
    tree = write_tree(tmp_path / "tree", train=1, test=1)
    for split in ("train", "test"):
        (tree / split / "left").rename(tree / split / first)
    if where == "both":
        for split in ("train", "test"):
            (tree / split / "right").rename(tree / split / second)
    else:
        (tree / "test" / first).rename(tree / "test" / second)
    with pytest.raises(
        ResfastError, match=f"differ only in their {how}.*: give each class one"
    ) as e:
        load(f"folder:{tree}", tmp_path)
    assert ascii(first) in str(e.value)
    assert ascii(second) in str(e.value)
