"""Decodes image files with Pillow, many at a time; what it gives is what every loader gives."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from resfast.errors import ResfastError

Key = tuple[str, str, str]  # split, class, path inside the class folder with "/"

# A batch of images is decoded in a thread if its files are on average at least this large. For
# smaller files the interpreter dominates and threads only contend for its lock: on 2 cores, JPEGs
# of 1 KB took 1.7 times as long in threads, those of 30 KB 0.7 times.
_THREAD_BYTES = 8 << 10
_BATCH_IMAGES, _BATCH_BYTES = 256, 8 << 20


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Formats that are read, whatever a file is called; AVIF where Pillow has it."""


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decodes one image file into uint8 ``[size, size, 3]`` RGB.

    As :func:`decode_whole`; an image of another size is cropped and resized as by :func:`fit`.
    """
    return np.asarray(_fitted(_decoded(data), size))


def decode_whole(data: bytes) -> np.ndarray:
    """Decodes one image file of :data:`FORMATS` into uint8 ``[H, W, 3]`` RGB.

    EXIF orientation is applied, 16-bit grey is scaled to 8 bits, transparency is dropped, and an
    animation is its first image.
    Raises one of :func:`decode_errors` for a corrupt image or a decompression bomb.
    """
    return np.asarray(_decoded(data))


def _decoded(data: bytes) -> Any:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise Image.DecompressionBombError(
                f"{image.width}x{image.height} pixels exceed the limit of {limit}"
            )
        image.load()  # also what a PNG says after its pixels
        if _has_orientation(image):
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def _has_orientation(image: Any) -> bool:
    """Whether EXIF says how the image is turned: Pillow asks XMP too, which DALI does not."""
    from PIL import ExifTags, Image

    content = image.info.get("exif")
    if not content:
        return ExifTags.Base.Orientation in getattr(image, "tag_v2", ())  # a TIFF is EXIF itself
    exif = Image.Exif()
    exif.load(content)
    return ExifTags.Base.Orientation in exif


@functools.cache
def _formats() -> tuple[str, ...]:
    has_avif = importlib.util.find_spec("PIL.AvifImagePlugin") is not None
    return tuple(name for name in FORMATS if name != "AVIF" or has_avif)


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """Crops uint8 ``[H, W, C]`` to the centre square and resizes it to ``[size, size, C]``.

    Pillow's antialiased bicubic filter; an image of that size is returned as it is.
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    from PIL import Image

    channels = [pixels] if pixels.shape[2] == 3 else np.moveaxis(pixels, 2, 0)
    images = [Image.fromarray(np.ascontiguousarray(channel)) for channel in channels]
    fitted = [np.asarray(_fitted(image, size)) for image in images]
    return fitted[0] if pixels.shape[2] == 3 else np.stack(fitted, -1)


def _fitted(image: Any, size: int) -> Any:
    from PIL import Image, ImageOps

    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


REPLACE = "replace or remove it"
REPLACE_OR_SKIP = f"{REPLACE}, or skip such images with --loader resident --skip-corrupt"


def unreadable(name: str, reason: str, remedy: str) -> ResfastError:
    """The error of an image that cannot be decoded, for the ``reason`` of :func:`reason_of`."""
    return ResfastError(f"{name} is not a readable image ({reason}): {remedy}")


def reason_of(error: BaseException, data: bytes) -> str:
    """Why ``data`` could not be decoded, in a few words."""
    reason = str(error).replace("\n", " ") or type(error).__name__
    if "cannot identify image file" in reason:  # the rest is a memory address
        expected = ", ".join(FORMATS[:-1])
        reason = f"not {expected} or {FORMATS[-1]}" if data else "empty file"
    return reason


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


def decode_errors() -> tuple[type[BaseException], ...]:
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
    errors = decode_errors()

    def decode(batch: list[tuple[Key, bytes]]) -> tuple[int, list[tuple[Key, str]]]:
        failures = []
        for key, data in batch:
            try:
                places[key][...] = decode_image(data, size)
            except errors as error:
                failures.append((key, reason_of(error, data)))
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
