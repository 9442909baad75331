"""On-disk cache of decoded data sets: one safetensors file per content, image size and format.

A file is named after the BLAKE2b hash of its source, so changed images mean a new file. It stores
the digest of its tensors, so a damaged file is detected and rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from resfast import atomic
from resfast.data.dataset import TENSORS, Dataset, tensor_digest

FORMAT_VERSION = 2


def content_key(
    update: Callable[[Callable[[bytes], Any]], None], *, image_size: int, skip_corrupt: bool
) -> str:
    """The cache key, 32 hex digits; ``update`` passes the source's bytes to its argument."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"resfast {FORMAT_VERSION} {image_size} {skip_corrupt:d}\n".encode())
    update(digest.update)
    return digest.hexdigest()


def load(path: Path, image_size: int, report: Callable[[str], None]) -> dict[str, Any] | None:
    """The fields, except the name, of the ``Dataset`` cached in ``path``.

    Returns None if the file does not exist or is damaged; damage is reported.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.exists(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        fields = {
            **tensors,
            "classes": tuple(json.loads(metadata["classes"])),
            "digest": metadata["digest"],
            "skipped": tuple(json.loads(metadata["skipped"])),
        }
        _validate(fields, image_size)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        report(f"the cache {path} cannot be used ({error}); rebuilding it")
        return None
    return fields


def store(path: Path, dataset: Dataset, report: Callable[[str], None]) -> None:
    """Caches ``dataset`` in ``path``; failure to write is reported but is not an error."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {
        "classes": json.dumps(dataset.classes),
        "digest": dataset.digest,
        "skipped": json.dumps(dataset.skipped),
        "name": json.dumps(dataset.name),
        "version": str(FORMAT_VERSION),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.remove_stale(path.parent)
        with atomic.replacing(path) as temporary:
            save_file({name: getattr(dataset, name) for name in TENSORS}, temporary, metadata)
        size = path.stat().st_size
    except (OSError, SafetensorError) as error:
        report(f"the decoded images are not cached: {path.parent} cannot be written ({error})")
    else:
        report(f"cached as {path} ({size / 2**20:.1f} MiB)")


def _validate(fields: Mapping[str, Any], image_size: int) -> None:
    """Raises ``ValueError`` unless ``fields`` are as :func:`store` wrote them."""
    for split in ("train", "test"):
        images, labels = fields[f"{split}_images"], fields[f"{split}_labels"]
        expected = (len(labels), image_size, image_size, 3)
        if images.dtype != torch.uint8 or tuple(images.shape) != expected or not len(labels):
            raise ValueError(f"{split} images are {images.dtype} {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise ValueError(f"{split} labels are {labels.dtype} {tuple(labels.shape)}")
        if labels.min() < 0 or labels.max() >= len(fields["classes"]):
            raise ValueError(f"{split} labels exceed {len(fields['classes'])} classes")
    if tensor_digest(fields, fields["classes"]) != fields["digest"]:
        raise ValueError("its tensors do not match its digest")
