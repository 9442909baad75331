"""``--data parquet:PATH``: Parquet files of encoded images, as on the Hugging Face Hub.

Source of the layout: https://huggingface.co/docs/datasets/image_dataset: a file
``train-00000-of-00001.parquet`` and the like per shard; an image is a struct of ``bytes`` and
``path``; the names of the classes are in the schema's metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resfast.data import labelled
from resfast.data.dataset import MAX_CLASSES, Dataset, Request
from resfast.data.folder import TEST_FOLDERS
from resfast.errors import ResfastError

IMAGES = ("img", "image", "images")
_READ = 1 << 20


def open_parquet(request: Request) -> Dataset:
    """Opens a folder of Parquet files, the images of each split in files named after it.

    A file belongs to the split that its name or its folder begins with: ``train``, and ``test`` or
    else ``val``, ``valid`` or ``validation``. The images are in a column ``img`` or ``image``, as
    bytes or as a struct with a field ``bytes``; the labels in a column ``label``, ``fine_label`` or
    similar, as numbers or names.

    Raises:
        ResfastError: pyarrow is not installed, or a file or column is missing or damaged.
    """
    if not request.location:
        raise ResfastError(
            "--data parquet: has no path, expected parquet:PATH of a folder of .parquet files: add "
            "the path after the colon"
        )
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ResfastError(
            f"--data {request.data} needs pyarrow ({error}); install it with "
            'pip install "resfast[parquet]"'
        ) from None
    path = Path(request.location).expanduser()
    files = _files(path)
    columns = {file: _columns(file) for paths in files.values() for file in paths}
    labels: dict[str, list[Any]] = {
        split: [value for file in paths for value in _labels(file, columns[file][1])]
        for split, paths in files.items()
    }
    classes, numbers = _numbered(labels, _common_class_names(columns), path)

    def blobs() -> Iterator[tuple[str, int, bytes]]:
        for split, paths in files.items():
            index = 0
            for file in paths:
                for data in _images(file, columns[file][0]):
                    yield split, index, data
                    index += 1

    def update_hash(update: Callable[[bytes], Any]) -> None:
        for split, paths in files.items():
            for file in paths:
                update(f"parquet\0{split}\0{file.stat().st_size}\0".encode())
                with open(file, "rb") as stream:
                    while data := stream.read(_READ):
                        update(data)

    return labelled.load(
        request,
        labelled.Labelled(
            source=str(path),
            names={
                split: [f"image {row:,} of {split} in {path}" for row in range(len(values))]
                for split, values in labels.items()
            },
            labels=numbers,
            classes=classes,
            blobs=blobs,
            update_hash=update_hash,
        ),
    )


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each split, sorted by name."""
    if not path.is_dir():
        state = "is no folder" if path.exists() else "does not exist"
        raise ResfastError(
            f"{path} {state}; expected a folder of .parquet files whose names begin with train and "
            "test"
        )
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        parts = file.relative_to(path).parts
        if any(part.startswith(".") for part in parts):
            continue
        for part in reversed(parts):
            name = re.match("[a-z]+", part.lower())
            if name and name[0] in ("train", *TEST_FOLDERS):
                found.setdefault(name[0], []).append(file)
                break
    for split, files in found.items():
        folders = sorted({file.parent for file in files})
        if len(folders) > 1:
            raise ResfastError(
                f"{folders[0]} and {folders[1]} both have files for {split}, as different versions "
                "of one data set do; give the path of one of them"
            )
    test = next((name for name in TEST_FOLDERS if name in found), None)
    if "train" not in found or test is None:
        held = ", ".join(file.name for file in sorted(path.rglob("*.parquet"))[:5])
        missing = "train" if "train" not in found else "test"
        raise ResfastError(
            f"{path} has no .parquet file for {missing}: it has {held or 'none'}; expected names "
            f"that begin with {missing}, such as {missing}-00000-of-00001.parquet"
        )
    return {"train": found["train"], "test": found[test]}


def _guarded(file: Path, read: Callable[[], Any]) -> Any:
    import pyarrow

    try:
        return read()
    except (OSError, pyarrow.ArrowException, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResfastError(
            f"{file} cannot be read ({reason}); expected a Parquet file: download it again"
        ) from error


def _columns(file: Path) -> tuple[str, str]:
    """Names of the columns of images and of labels."""
    import pyarrow.parquet

    schema = _guarded(file, lambda: pyarrow.parquet.read_schema(file))
    image = [name for name in IMAGES if name in schema.names]
    image = image or [field.name for field in schema if _is_image(field.type)]
    label = [name for name in labelled.LABELS if name in schema.names]
    for what, found, names in (("images", image, IMAGES), ("labels", label, labelled.LABELS)):
        if len(found) != 1:
            state = f"{len(found)} columns that may be the {what}" if found else f"no {what}"
            raise ResfastError(
                f"{file} has {state}: it has the columns {', '.join(schema.names)}; expected one "
                f"named {', '.join(names[:-1])} or {names[-1]}"
            )
    if not _is_image(schema.field(image[0]).type):
        raise ResfastError(
            f"{image[0]} in {file} is {schema.field(image[0]).type}; expected encoded images, as "
            "bytes or as a struct with a field bytes"
        )
    return image[0], label[0]


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_image(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _labels(file: Path, column: str) -> list[Any]:
    import pyarrow.parquet

    table = _guarded(file, lambda: pyarrow.parquet.read_table(file, columns=[column]))
    values = table.column(0).to_pylist()
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ResfastError(
                f"{column} in row {row:,} of {file} is {value!r}; expected a whole number or a name"
            )
    return values


def _class_names(file: Path, column: str) -> tuple[str, ...]:
    """Names of the classes in Hugging Face's metadata, or an empty tuple."""
    import pyarrow.parquet

    metadata = _guarded(file, lambda: pyarrow.parquet.read_schema(file)).metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _common_class_names(columns: Mapping[Path, tuple[str, str]]) -> tuple[str, ...]:
    """The names of the classes, which all files that have any must agree on."""
    found = {file: _class_names(file, label) for file, (_, label) in columns.items()}
    first = next((file for file, names in found.items() if names), None)
    for file, names in found.items():
        if first is not None and names and names != found[first]:
            raise ResfastError(
                f"{first} and {file} name the classes differently ({', '.join(found[first][:5])} "
                f"and {', '.join(names[:5])}); expected files of one data set"
            )
    return () if first is None else found[first]


def _numbered(
    labels: dict[str, list[Any]], names: tuple[str, ...], path: Path
) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """The classes, and the labels as numbers."""
    values = [value for split in labels.values() for value in split]
    if not values:
        raise ResfastError(f"{path} has no images; expected at least one in train and in test")
    if all(isinstance(value, int) for value in values):
        most = max(values)
        limit = len(names) or MAX_CLASSES
        if min(values) < 0 or most >= limit:
            raise ResfastError(
                f"{path} has labels from {min(values)} to {most}; expected 0 to {limit - 1}"
            )
        return names or tuple(map(str, range(most + 1))), labels
    if any(isinstance(value, int) for value in values):
        raise ResfastError(f"{path} has numbers and names as labels; expected one of these")
    classes = names if set(values) <= set(names) else labelled.numbered(values)
    label_of = {name: label for label, name in enumerate(classes)}
    return classes, {split: [label_of[value] for value in found] for split, found in labels.items()}


def _images(file: Path, column: str) -> Iterator[bytes]:
    import pyarrow.parquet

    stream: Any = _guarded(file, lambda: pyarrow.parquet.ParquetFile(file))
    batches: Iterator[Any] = stream.iter_batches(batch_size=1000, columns=[column])
    row = 0
    while (batch := _guarded(file, lambda: next(batches, None))) is not None:
        for value in _bytes(batch.column(0)):
            if value is None:
                raise ResfastError(
                    f"row {row:,} of {file} has no bytes of an image; expected the images inside "
                    "the Parquet file, not their paths"
                )
            row += 1
            yield value
    stream.close()


def _bytes(column: Any) -> Sequence[bytes | None]:
    import pyarrow as pa

    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    return column.to_pylist()
