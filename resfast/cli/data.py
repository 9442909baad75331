"""``resfast data``: shows what augmentation does, and packs image folders into shards."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from resfast import atomic
from resfast.cli import common as entry
from resfast.data.augment import POLICIES, parse_augment
from resfast.data.dataset import Dataset, print_to_stderr
from resfast.data.duplicates import SIMILARITY, find_duplicates
from resfast.data.image_folder import file_names
from resfast.data.sources import load_dataset
from resfast.errors import ResfastError

COMMAND = "data"
_PICTURES = ("preview", "samples", "distribution", "duplicates")


@dataclass(frozen=True)
class Options:
    """Shows a data set, what augmentation does to it, and images that it has twice; or packs an
    image folder into tar shards.

    Exit codes: 0 done, 2 bad input.
    """

    preview: Path | None = None
    """PNG to write: a contact sheet of training images, unaugmented and under each policy."""
    samples: Path | None = None
    """PNG to write: training images without augmentation, a row for each class."""
    distribution: Path | None = None
    """PNG to write: bars with the number of training, held-out and test images of each class."""
    duplicates: Path | None = None
    """PNG to write: pairs of images that are the same or nearly so, within and across the splits.
    A CSV file of the same name lists all of them."""
    similarity: float = SIMILARITY
    """For --duplicates: least similarity of a pair, 0.6 to 1; 1 for only the same pixels."""
    shards: Path | None = None
    """Folder to write WebDataset tar shards of --data folder:PATH to."""
    data: str = "auto"
    """cifar10, cifar100, svhn, fashion-mnist, stl10, digits, folder:PATH (an image folder or a tar
    of one), arrays:PATH (a .npz or a folder of .npy), csv:PATH, parquet:PATH, or auto: CIFAR-10 if
    it is on disk or can be fetched, otherwise digits."""
    data_dir: Path = Path("data")
    """Where data sets are looked for, downloaded to and cached."""
    image_size: int = 32
    """Height and width that all images are resized to, in pixels."""
    skip_corrupt: bool = False
    """Skip images that cannot be decoded instead of stopping."""
    augment: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Policy to show, in the notation of train's --augment; may be repeated (not given: every
    named policy)."""
    images: int = 10
    """Images per row of the contact sheet and of the samples."""
    val_fraction: float = 0.0
    """For --distribution: fraction of the training set held out, as in training."""
    seed: int = 0
    """Seed for choosing the images, the held-out ones too, and for augmentation."""
    epochs: tuple[int, ...] = (0, 1)
    """Epochs to show; each policy gets one row per epoch."""
    images_per_shard: int = 10_000
    """Images per shard; the last shard of a split holds the rest."""


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        options = entry.parse(Options, args, COMMAND)
        if not any(getattr(options, name) for name in (*_PICTURES, "shards")):
            raise ResfastError(
                "nothing to do: expected --preview PNG for a contact sheet of the augmentations, "
                "--samples PNG or --distribution PNG for the images of each class, --duplicates "
                "PNG for images that are alike, or --shards FOLDER --data folder:PATH to pack an "
                "image folder"
            )
        for name in _PICTURES:
            path = getattr(options, name)
            if path is not None and path.suffix.lower() != ".png":
                raise ResfastError(f"--{name} {path}: expected a name that ends in .png")
        if not 0 <= options.val_fraction < 1:
            raise ResfastError(
                f"--val-fraction {options.val_fraction:g} is out of range: expected at least 0 and "
                "below 1"
            )
        if options.preview is not None:
            _preview(options, options.preview.expanduser())
        if options.samples is not None:
            _samples(options, options.samples.expanduser())
        if options.distribution is not None:
            _distribution(options, options.distribution.expanduser())
        if options.duplicates is not None:
            _duplicates(options, options.duplicates.expanduser())
        if options.shards is not None:
            _shards(options, options.shards.expanduser())

    return entry.run(command)


def _preview(options: Options, path: Path) -> None:
    policies = {text: parse_augment(text) for text in options.augment} or {
        name: policy for name, policy in POLICIES.items() if name != "none"
    }
    from resfast.data.preview import contact_sheet  # matplotlib and Pillow are slow to import

    sheet = contact_sheet(
        _dataset(options), policies, images=options.images, seed=options.seed, epochs=options.epochs
    )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    _save(path, buffer, "--preview")


def _samples(options: Options, path: Path) -> None:
    from resfast.data.preview import sample_grid

    buffer = io.BytesIO()
    grid = sample_grid(_dataset(options), images=options.images, seed=options.seed)
    grid.save(buffer, "PNG", optimize=True)
    _save(path, buffer, "--samples")


def _distribution(options: Options, path: Path) -> None:
    from resfast.data.preview import class_plot

    buffer = io.BytesIO()
    figure = class_plot(_dataset(options), val_fraction=options.val_fraction, seed=options.seed)
    figure.savefig(buffer, format="png", dpi=130)
    _save(path, buffer, "--distribution")


def _duplicates(options: Options, path: Path) -> None:
    from resfast.data.preview import duplicate_sheet

    dataset = _dataset(options)
    pairs = find_duplicates(dataset, options.similarity)
    names = file_names(dataset)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = ("split", "index", "class")
    sides = [f"{side}_{part}" for side in ("first", "second") for part in parts]
    columns = [*sides, "similarity", "exact", "mirrored"]
    writer.writerow([*columns, "first_file", "second_file"] if names else columns)
    for pair in pairs:
        row: list[Any] = []
        for (split, index), label in zip((pair.first, pair.second), pair.labels, strict=True):
            row += [split, index, dataset.classes[label]]
        row += [f"{pair.similarity:.4f}", int(pair.exact), int(pair.mirrored)]
        if names:
            row += [names[split][index] for split, index in (pair.first, pair.second)]
        writer.writerow(row)
    buffer = io.BytesIO()
    duplicate_sheet(dataset, pairs, images=options.images).save(buffer, "PNG", optimize=True)
    for title, kinds in (
        ("training and test images", ("train", "test")),
        ("training images", ("train", "train")),
        ("test images", ("test", "test")),
    ):
        here = [pair for pair in pairs if (pair.first[0], pair.second[0]) == kinds]
        exact = sum(pair.exact for pair in here)
        print(f"{title}: {len(here):,} pairs alike, {exact:,} of them with the same pixels")
    _save(path, buffer, "--duplicates")
    atomic.save(path.with_suffix(".csv"), text.getvalue().encode("utf-8", "surrogateescape"))
    print(path.with_suffix(".csv"))


def _dataset(options: Options) -> Dataset:
    return load_dataset(
        options.data,
        data_dir=options.data_dir,
        image_size=options.image_size,
        skip_corrupt=options.skip_corrupt,
    )


def _save(path: Path, buffer: io.BytesIO, option: str) -> None:
    atomic.make_folder(path.parent, option)
    atomic.save(path, buffer.getvalue())
    print(path)


def _shards(options: Options, destination: Path) -> None:
    kind, _, location = options.data.partition(":")
    if kind != "folder" or not location:
        raise ResfastError(
            f"--shards packs an image folder, not --data {options.data}: use --data folder:PATH"
        )
    from resfast.data.shards import write_shards

    write_shards(
        Path(location).expanduser(),
        destination,
        images_per_shard=options.images_per_shard,
        report=print_to_stderr,
    )
    print(destination)
