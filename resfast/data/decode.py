"""Decodes the image files of a folder or archive, many at a time."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

Key = tuple[str, str, str]  # split, class, path inside the class folder with "/"

# A batch of images is decoded in a thread if its files are on average at least this large. For
# smaller files the interpreter dominates and threads only contend for its lock: on 2 cores, JPEGs
# of 1 KB took 1.7 times as long in threads, those of 30 KB 0.7 times.
_THREAD_BYTES = 8 << 10
_BATCH_IMAGES, _BATCH_BYTES = 256, 8 << 20


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decodes one JPEG, PNG or WebP file into uint8 ``[size, size, 3]`` RGB.

    EXIF orientation is applied, 16-bit grey is scaled to 8 bits, and transparency is dropped. An
    image of another size is cropped to the centre square and resized, antialiased bicubic.
    Raises one of ``_decode_errors()`` for a corrupt image or a decompression bomb.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError(
                f"{image.width}x{image.height} pixels exceed the limit of {limit}"
            )
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image)
        if rgb.size != (size, size):
            rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(rgb)


def _to_rgb(image: Any) -> Any:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip it
        from PIL import Image

        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _decode_errors() -> tuple[type[BaseException], ...]:
    """The exceptions that Pillow's readers raise for broken files."""
    from PIL import Image

    return (
        OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, OverflowError,
        RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    )  # fmt: skip


def decode_all(
    blobs: Iterable[tuple[Key, bytes]], places: dict[Key, np.ndarray], size: int
) -> Iterator[tuple[int, list[tuple[Key, str]]]]:
    """Decodes ``blobs`` into ``places``; yields counts and failures, batch by batch, in order."""
    errors = _decode_errors()

    def decode(batch: list[tuple[Key, bytes]]) -> tuple[int, list[tuple[Key, str]]]:
        failures = []
        for key, data in batch:
            try:
                places[key][...] = decode_image(data, size)
            except errors as error:
                reason = str(error).replace("\n", " ") or type(error).__name__
                if "cannot identify image file" in reason:  # the rest is a memory address
                    reason = "unknown format" if data else "empty file"
                failures.append((key, reason))
        return len(batch), failures

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[tuple[int, list[tuple[Key, str]]]]] = deque()
        for batch in _batches(blobs):
            mean_bytes = sum(len(data) for _, data in batch) / len(batch)
            if workers == 1 or mean_bytes < _THREAD_BYTES:
                while pending:
                    yield pending.popleft().result()
                yield decode(batch)
            else:
                pending.append(pool.submit(decode, batch))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _batches(blobs: Iterable[tuple[Key, bytes]]) -> Iterator[list[tuple[Key, bytes]]]:
    batch: list[tuple[Key, bytes]] = []
    size = 0
    for key, data in blobs:
        batch.append((key, data))
        size += len(data)
        if len(batch) >= _BATCH_IMAGES or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
