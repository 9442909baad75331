"""``--data csv:PATH``: images whose labels are in a CSV file, as on Kaggle.

Source of the layout: https://www.kaggle.com/c/cifar-10, ``train/1.png`` and so on, and
``trainLabels.csv`` with the columns ``id`` and ``label``.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resfast.data import labelled
from resfast.data.dataset import Dataset, Request
from resfast.data.folder import IMAGE_SUFFIXES, TEST_FOLDERS, read_file
from resfast.errors import ResfastError

TRAIN_FILES = ("trainLabels.csv", "train_labels.csv", "train.csv", "labels.csv")
TEST_FILES = ("testLabels.csv", "test_labels.csv", "test.csv", "val.csv", "validation.csv")
IMAGES = ("image", "img", "file", "filename", "file_name", "path", "filepath", "file_path",
          "image_path")  # fmt: skip
_IDS = ("id", "image_id", "name", "image_name")  # if there is none of IMAGES
_SPLITS = ("split", "set", "subset")
EVERY = 10
"""Without labels of test images, one training image in this many of each class is one."""


@dataclass(frozen=True)
class _Row:
    """A row of a CSV file: the image's file, and the name of its class."""

    file: str
    label: str
    split: str


def open_csv(request: Request) -> Dataset:
    """Opens a CSV file, or a folder with ``trainLabels.csv`` or another of :data:`TRAIN_FILES`.

    The column of the images has paths or names, with or without their suffix, in the folder of the
    CSV file or in ``train/`` or ``images/`` there. A column ``split`` says which are test images;
    or the folder has a ``testLabels.csv`` with labels. Otherwise every tenth image of each class is
    a test image, which is reported.

    Raises:
        ResfastError: a file or column is missing, a column is ambiguous, an image is missing or
            there twice, or cannot be decoded.
    """
    if not request.location:
        raise ResfastError(
            "--data csv: has no path, expected csv:PATH of a CSV file, or of a folder with one: "
            "add the path after the colon"
        )
    path = Path(request.location).expanduser()
    files = _files(path)
    rows: list[_Row] = []
    for file, split in files:
        rows += _rows(file, split)
    twice = [file for file, count in Counter(row.file for row in rows).items() if count > 1]
    if twice:
        raise ResfastError(
            f"{path} names images twice, {len(twice):,} in all, for example {twice[0]}; expected "
            "each once"
        )
    if len(files) == 1 and not any(row.split == "test" for row in rows):
        rows = _held_out(rows)
        count = sum(row.split == "test" for row in rows)
        if not count:
            raise ResfastError(
                f"{files[0][0]} has labels of training images only, and fewer than {EVERY} of each "
                "class, of which every tenth would be a test image: add a column split, or a "
                "testLabels.csv"
            )
        request.report(
            f"{files[0][0]} has labels of training images only: every {EVERY}th of each class, "
            f"{count:,} in all, is a test image"
        )
    classes = labelled.numbered(row.label for row in rows)
    label_of = {name: label for label, name in enumerate(classes)}
    parts = {split: [row for row in rows if row.split == split] for split in labelled.SPLITS}

    def blobs() -> Iterator[tuple[str, int, bytes]]:
        for split, found in parts.items():
            for index, row in enumerate(found):
                yield split, index, read_file(row.file)

    def update_hash(update: Callable[[bytes], Any]) -> None:
        for split, found in parts.items():
            for row in found:
                data = read_file(row.file)
                name = os.path.basename(row.file)
                head = f"csv\0{split}\0{name}\0{row.label}\0{len(data)}\0"
                update(head.encode("utf-8", "surrogateescape"))
                update(data)

    return labelled.load(
        request,
        labelled.Labelled(
            source=str(path),
            names={split: [row.file for row in found] for split, found in parts.items()},
            labels={
                split: [label_of[row.label] for row in found] for split, found in parts.items()
            },
            classes=classes,
            blobs=blobs,
            update_hash=update_hash,
        ),
    )


def _files(path: Path) -> list[tuple[Path, str]]:
    """The CSV files to read, and the split of their rows unless a column says it."""
    if not path.exists():
        raise ResfastError(f"{path} does not exist; expected a CSV file, or a folder with one")
    if not path.is_dir():
        return [(path, "train")]
    train = next((path / name for name in TRAIN_FILES if (path / name).is_file()), None)
    if train is None:
        held = sorted(file.name for file in path.glob("*.csv"))
        if len(held) != 1:
            raise ResfastError(
                f"{path} has none of {', '.join(TRAIN_FILES)}; it has {', '.join(held[:5]) or 'no'}"
                f"{'' if held else ' CSV file'}: name the file, --data csv:{path}/NAME.csv"
            )
        train = path / held[0]
    found = [(train, "train")]
    test = next((path / name for name in TEST_FILES if (path / name).is_file()), None)
    if test is not None and test != train and _has_labels(test):
        found.append((test, "test"))
    return found


def _has_labels(file: Path) -> bool:
    """Whether a file has labels: Kaggle's ``test.csv`` and the like often have none."""
    header, _ = _read(file)
    return any(name.strip().lower() in labelled.LABELS for name in header)


def _read(file: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The names of the columns, and the line number and values of each row."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = []
            for values in reader:
                if not any(value.strip() for value in values):
                    continue
                if len(values) != len(header):
                    raise ResfastError(
                        f"line {reader.line_num} of {file} has {len(values)} values; expected "
                        f"{len(header)}: {', '.join(header)}"
                    )
                named = zip(header, (value.strip() for value in values), strict=True)
                rows.append((reader.line_num, dict(named)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResfastError(f"{file} cannot be read ({reason}); expected CSV in UTF-8") from error
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated or not header:
        what = f"the column {repeated[0]!r} twice" if repeated else "no columns"
        raise ResfastError(f"{file} has {what}; expected a line with a name for each column")
    return header, rows


def _rows(file: Path, split: str) -> list[_Row]:
    header, rows = _read(file)
    label = _column(file, header, labelled.LABELS, "labels")
    assert label is not None
    strong = [name for name in header if name.lower() in IMAGES]
    wanted = IMAGES if strong else _IDS
    rest = [name for name in header if name != label]
    image = rest[0] if len(rest) == 1 else _column(file, header, wanted, "images")
    assert image is not None
    splits = _column(file, header, _SPLITS, "splits", needed=False)
    if not rows:
        raise ResfastError(f"{file} has no rows; expected one for each image")
    files = _Files(file.parent, split)
    found, missing = [], []
    for line, values in rows:
        if not values[label]:
            raise ResfastError(f"line {line} of {file} has no {label}; expected a class")
        place = files.find(values[image]) if values[image] else None
        if place is None:
            missing.append((line, values[image]))
            continue
        part = _split(file, line, values[splits]) if splits else split
        found.append(_Row(place, values[label], part))
    if missing:
        line, name = missing[0]
        raise ResfastError(
            f"{len(missing):,} of {len(rows):,} images in {file} are missing, for example {name!r} "
            f"in line {line}; expected {files.expected(name)}"
        )
    return found


def _column(
    file: Path, header: Sequence[str], names: Sequence[str], what: str, needed: bool = True
) -> str | None:
    found = [name for name in header if name.lower() in names]
    if len(found) == 1 or not (found or needed):
        return found[0] if found else None
    if found:
        raise ResfastError(
            f"{file} has {len(found)} columns that may be the {what}: {', '.join(found)}; rename "
            "all but one"
        )
    raise ResfastError(
        f"{file} has no column with the {what}: it has {', '.join(header)}; expected one named "
        f"{', '.join(names[:-1])} or {names[-1]}"
    )


def _split(file: Path, line: int, value: str) -> str:
    if value.lower() in ("train", "training"):
        return "train"
    if value.lower() in (*TEST_FOLDERS, "testing"):
        return "test"
    raise ResfastError(
        f"line {line} of {file} has the split {value!r}; expected train, or test or validation"
    )


class _Files:
    """Finds images by the values in a CSV file."""

    def __init__(self, folder: Path, split: str) -> None:
        names = ("train", "images") if split == "train" else (*TEST_FOLDERS, "images")
        self.folders = [folder, *(folder / name for name in names if (folder / name).is_dir())]
        self._stems: list[dict[str, str]] | None = None

    def find(self, value: str) -> str | None:
        """The path of an image, or None.

        Raises:
            ResfastError: more than one of the folders has it.
        """
        if value.lower().endswith(IMAGE_SUFFIXES):
            paths = [os.path.normpath(os.path.join(folder, value)) for folder in self.folders]
            paths = [path for path in dict.fromkeys(paths) if os.path.isfile(path)]
        else:
            if self._stems is None:
                self._stems = [_stems(folder) for folder in self.folders]
            paths = [stems[value] for stems in self._stems if value in stems]
        if len(paths) > 1:
            raise ResfastError(
                f"{paths[0]} and {paths[1]} may both be the image {value!r}; expected one: write "
                "its path in the CSV file, or remove the other"
            )
        return paths[0] if paths else None

    def expected(self, value: str) -> str:
        """What was looked for."""
        suffix = "" if value.lower().endswith(IMAGE_SUFFIXES) else IMAGE_SUFFIXES[2]
        return f"{value}{suffix} in {' or '.join(map(str, self.folders))}"


def _stems(folder: Path) -> dict[str, str]:
    """The images directly in a folder, by name without suffix."""
    found: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if file.name.lower().endswith(IMAGE_SUFFIXES):
            other = found.setdefault(file.stem, str(file))
            if other != str(file):
                raise ResfastError(
                    f"{other} and {file.name} differ only in their suffix; expected one image for "
                    "each id: write the suffix in the CSV file, or remove one"
                )
    return found


def _held_out(rows: Sequence[_Row]) -> list[_Row]:
    """The rows, every tenth of each class as a test image."""
    seen: Counter[str] = Counter()
    changed = []
    for row in rows:
        seen[row.label] += 1
        split = "test" if seen[row.label] % EVERY == 0 else "train"
        changed.append(_Row(row.file, row.label, split))
    return changed
