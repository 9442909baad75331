"""``--data folder:PATH``: an image folder decoded into memory, or left encoded as a stream.

resfast.data.folder reads the folder or archive, resfast.data.cache caches the decoded images.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from resfast.data import cache, folder
from resfast.data.dataset import (
    CHANNELS,
    Dataset,
    Files,
    Request,
    Stream,
    make_dataset,
    refuse_skipping,
)
from resfast.errors import ResfastError
from resfast.runtime import free_memory


def open_folder(request: Request) -> Dataset | Stream:
    """Opens an image folder or a tar archive of one.

    A folder is streamed if the loader is ``dali``, or if it is ``auto`` and the decoded images
    would take more than half of the free memory.
    """
    if not request.location:
        raise ResfastError(
            "--data folder: has no path, expected folder:PATH of a directory or a tar archive: "
            "add the path after the colon"
        )
    path = Path(request.location).expanduser()
    listing = None
    if request.loader != "resident":
        if path.is_dir():
            listing = folder.Directory(path).scan()
            needed = len(listing.images) * request.image_size**2 * CHANNELS
            if request.loader == "dali" or needed > free_memory(request.device) / 2:
                if request.loader == "auto":
                    request.report(
                        f"{request.data} takes {needed / 2**30:.1f} GiB decoded, more than half of "
                        "the free memory: streaming it through DALI (to load it anyway: --loader "
                        "resident)"
                    )
                return _open_stream(request, path, listing)
        elif request.loader == "dali" and path.exists():
            raise ResfastError(
                f"--loader dali cannot read inside the archive {path}; unpack it, or convert it to "
                f"shards with python -m resfast.data --shards DIR --data {request.data}"
            )
    return _load(request, path, listing)


def file_names(dataset: Dataset) -> dict[str, list[str]]:
    """Path of each image inside the folder or archive, by split; empty for other data."""
    kind, _, location = dataset.name.partition(":")
    if kind != "folder":
        return {}
    keys = sorted(folder.open_source(Path(location).expanduser()).scan().images)
    skipped = set(dataset.skipped)
    names = {
        split: ["/".join(k) for k in keys if k[0] == split and "/".join(k) not in skipped]
        for split in folder.SPLITS
    }
    fits = all(
        len(names[split]) == len(images)
        for split, images in (("train", dataset.train_images), ("test", dataset.test_images))
    )
    return names if fits else {}


def _load(request: Request, path: Path, listing: folder.Listing | None) -> Dataset:
    source = folder.open_source(path)
    if isinstance(source, folder.Directory):
        listing = listing or source.scan()
        folder.check_listing(source.path, listing)
    key = cache.content_key(
        lambda update: source.update_hash(listing, update),
        image_size=request.image_size,
        skip_corrupt=request.skip_corrupt,
    )
    cached = request.data_dir / "cache" / f"{key}.safetensors"
    fields = cache.load(cached, request.image_size, request.report)
    if fields is not None:
        dataset = Dataset(name=request.data, **fields)
    else:
        listing = listing or source.scan()
        dataset = make_dataset(
            request.data,
            *folder.read(source, listing, request.image_size, request.skip_corrupt, request.report),
        )
        cache.store(cached, dataset, request.report)
    if dataset.skipped:
        examples = ", ".join(dataset.skipped[:3]) + (", …" if len(dataset.skipped) > 3 else "")
        request.report(
            f"skipped {len(dataset.skipped):,} corrupt images of {source.path} ({examples})"
        )
    return dataset


def _open_stream(request: Request, path: Path, listing: folder.Listing) -> Stream:
    refuse_skipping(request)
    classes = folder.check_listing(path, listing)
    label_of = {name: label for label, name in enumerate(classes)}
    digest = hashlib.blake2b(repr(classes).encode(), digest_size=16)
    parts = {}
    for split in folder.SPLITS:
        keys = sorted(key for key in listing.images if key[0] == split)
        paths = [os.fspath(listing.images[key]) for key in keys]
        for key, file in zip(keys, paths, strict=True):
            digest.update(
                f"{'/'.join(key)}\0{folder.size_of(file)}\0".encode("utf-8", "surrogateescape")
            )
        labels = torch.tensor([label_of[key[1]] for key in keys], dtype=torch.int64)
        parts[split] = Files(tuple(paths), labels)
    return Stream(
        request.data,
        parts["train"],
        parts["test"],
        classes,
        request.image_size,
        digest.hexdigest(),
    )
