"""Which files DALI decodes to the pixels of Pillow, by their first bytes.

Those whose image comes right after the headers, at most 8191 pixels high and wide: JPEG, grey or
YCbCr, as libjpeg writes it; PNG of at most 8 bits per channel; WebP. What else a file may have
(EXIF, profiles, comments, further colours) the two do not always take in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

LENGTH = 168
"""Number of bytes that are compared."""
_Part = tuple[int, bytes, bytes]  # position, expected bytes, bits that are compared


def headers(size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Expected bytes and compared bits of each kind of header, uint8 ``[K, LENGTH]``.

    Args:
        size: height and width in pixels of the images; None for any up to 8191.
    """
    kinds = [*_jpeg(size), _png(size), *_webp(size)]
    values, masks = np.zeros((2, len(kinds), LENGTH), np.uint8)
    for value, mask, parts in zip(values, masks, kinds, strict=True):
        for position, expected, bits in parts:
            place = slice(position, position + len(expected))
            mask[place] = np.frombuffer(bits, np.uint8)
            value[place] = np.frombuffer(expected, np.uint8) & mask[place]
    return values, masks


def _exactly(position: int, expected: bytes) -> _Part:
    return position, expected, b"\xff" * len(expected)


def _side(position: int, size: int | None, *, length: int = 2) -> _Part:
    """One side as an unsigned integer, the most significant byte first."""
    if size is not None:
        return _exactly(position, size.to_bytes(length, "big"))
    return position, bytes(length), b"\xff" * (length - 2) + b"\xe0\x00"


def _jpeg(size: int | None) -> Iterator[list[_Part]]:
    jfif = [_exactly(2, b"\xff\xe0\x00\x10JFIF\0")]
    for before, offset in ((jfif, 20), ([], 2)):
        for tables, channels in (((67, 67), 3), ((132,), 3), ((67,), 1)):
            parts = [_exactly(0, b"\xff\xd8"), *before]
            place = offset
            for length in tables:  # of quantization
                parts.append(_exactly(place, b"\xff\xdb" + length.to_bytes(2, "big")))
                place += 2 + length
            yield [
                *parts,
                (place, b"\xff\xc0", b"\xff\xfc"),  # baseline, extended or progressive
                _exactly(place + 2, bytes((0, 8 + 3 * channels, 8))),  # 8 bits
                _side(place + 5, size),
                _side(place + 7, size),
                _exactly(place + 9, bytes((channels,))),
            ]


def _png(size: int | None) -> list[_Part]:
    return [
        _exactly(0, b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"),
        _side(16, size, length=4),
        _side(20, size, length=4),
        (24, b"\x00", b"\x10"),  # not 16 bits
        _exactly(37, b"IDAT"),
    ]


def _webp(size: int | None) -> Iterator[list[_Part]]:
    start = [_exactly(0, b"RIFF"), _exactly(8, b"WEBPVP8")]
    any_size = b"\x00\x20"
    bits = any_size if size is None else b"\xff\x3f"
    side = (size or 0).to_bytes(2, "little")
    yield [*start, _exactly(15, b" "), (26, side, bits), (28, side, bits)]
    less_one = 0 if size is None else size - 1
    sides = (less_one | less_one << 14).to_bytes(4, "little")
    bits = (0x2000 | 0x2000 << 14 if size is None else 2**28 - 1).to_bytes(4, "little")
    yield [*start, _exactly(15, b"L"), (21, sides, bits)]
