"""What Pillow does in DALI's pipelines, so that they give the pixels of the resident loader.

DALI decodes the usual JPEG, PNG and WebP files bit for bit as Pillow does, and much faster. It does
not decode all formats, some it decodes to other pixels, and its bicubic filter is another one
(findings/dali-cubic-differs-from-pillow.sh).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from resfast.data import decode
from resfast.errors import ResfastError

logger = logging.getLogger("resfast")

# As in decode: threads are worth it from this many bytes per file, or pixels per image.
_THREAD_BYTES = 8 << 10
_THREAD_PIXELS = 64 * 64


class Pillow:
    """Functions that a pipeline calls with the images of a batch, as uint8 arrays.

    Args:
        image_size: height and width S of the images, in pixels.
        threads: number of threads.

    Attributes:
        decoded: number of images that Pillow has decoded.
        everything: whether it decodes all images, because DALI failed at one.
    """

    def __init__(self, image_size: int, threads: int) -> None:
        self.image_size = image_size
        self.decoded, self.everything, self._said = 0, False, False
        self._refused: tuple[bytes, str] | None = None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resfast-pillow")
        self._lock = threading.Lock()

    def decode(self, files: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Files ``[bytes]`` as images ``[S, S, 3]``."""
        return self._decoded(files, lambda data: decode.decode_image(data, self.image_size))

    def decode_whole(self, files: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Files ``[bytes]`` as images ``[H, W, 3]``."""
        return self._decoded(files, decode.decode_whole)

    def fit(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Images ``[H, W, C]`` as ``[S, S, C]``."""
        pixels = sum(image.shape[0] * image.shape[1] for image in images)
        return self._each(
            images,
            lambda image: decode.fit(image, self.image_size),
            pixels >= _THREAD_PIXELS * len(images),
        )

    def _decoded(
        self, files: Sequence[np.ndarray], function: Callable[[bytes], np.ndarray]
    ) -> list[np.ndarray]:
        def decoded(file: np.ndarray) -> np.ndarray:
            data = file.tobytes()
            try:
                return function(data)
            except errors as error:
                self._refused = data, decode.reason_of(error, data)
                raise

        errors = decode.decode_errors()
        with self._lock:  # DALI has several threads
            self.decoded += len(files)
        size = sum(len(file) for file in files)
        return self._each(files, decoded, size >= _THREAD_BYTES * len(files))

    def _each(
        self, values: Sequence[Any], function: Callable[[Any], np.ndarray], in_threads: bool
    ) -> list[np.ndarray]:
        return list((self._pool.map if in_threads else map)(function, values))

    def raise_refused(self, images: Iterable[tuple[str, bytes]], remedy: str) -> None:
        """Raises ResfastError for the image, one of ``images``, that Pillow refused, if any."""
        if self._refused is not None:
            refused, reason = self._refused
            for name, data in images:
                if data == refused:
                    raise decode.unreadable(name, reason, remedy)
            raise ResfastError(f"an image is not readable ({reason}): {remedy}")

    def say_taken_over(self, error: BaseException) -> None:
        """Says that DALI failed with ``error`` at an image that Pillow could decode."""
        self._said = True
        text = str(error).replace("\n", " ")
        logger.warning(
            "DALI cannot decode an image that Pillow can (%s): Pillow decodes all images from here "
            "on, which takes longer",
            text if len(text) < 200 else f"{text[:200]} …",
        )

    def say(self, count: int) -> None:
        """Says once, after an epoch of ``count`` images, how many of them Pillow has decoded."""
        if self.decoded and not self._said:
            self._said = True
            logger.warning(
                "Pillow has decoded %s of %s images, whose format DALI does not decode, or not to "
                "the same pixels; it takes longer",
                f"{min(self.decoded, count):,}",
                f"{count:,}",
            )
