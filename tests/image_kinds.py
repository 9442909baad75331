"""Small image files of every kind that a loader may be given, by name."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 21, 24
# Written by libjpeg-turbo's cjpeg -arithmetic: Pillow reads such files and writes none.
_ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+"
    "MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09P"
    "T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAYABgDASIAAhEBAxEB/8wACgAQEAUBEBEF"
    "/9oADAMBAAIRAxEAPwDQHDgrHUumwaxAFr/Va0eX+rotrV+OiboXYpddWAJ1zy42yDECqQdV0+HDRj2syKY/"
    "V7Ol5pxETTiJ2uilxsVBjl7GsyGfxnWee4/OQSkK32pRvMDj8raHOPRFJ5br5m7fed+CI6eRRPR0Zdl/cED/"
    "2Q=="
)
_TURNED_BY_XMP = (
    b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf="
    b"'http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description xmlns:tiff="
    b"'http://ns.adobe.com/tiff/1.0/' tiff:Orientation=\"6\"/></rdf:RDF></x:xmpmeta>"
)


def noise(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    """High contrast everywhere, where filters and decoders differ most."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    content = Image.Exif()
    content[0x112] = orientation
    return content


def intact() -> dict[str, bytes]:
    """Files that hold an image, each by a name that says what is special about it."""
    rgb = noise()
    kinds = dict([*_jpeg(rgb), *_png(rgb), *_webp(rgb), *_turned(rgb), *_others(rgb)])
    for height, width in ((1, 1), (1, 9), (9, 1), (8, 8), (130, 90)):
        small = noise(height, width)
        kinds[f"jpeg {height}x{width}"] = encode(small, "JPEG")
        kinds[f"png {height}x{width}"] = encode(small, "PNG")
        kinds[f"webp {height}x{width}"] = encode(small, "WEBP", lossless=True)
    return kinds


def _jpeg(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
        yield f"jpeg {sampling}", encode(rgb, "JPEG", subsampling=sampling)
    plain = encode(rgb, "JPEG")
    yield "jpeg progressive", encode(rgb, "JPEG", progressive=True)
    yield "jpeg grey", encode(rgb.convert("L"), "JPEG")
    cmyk = encode(rgb.convert("CMYK"), "JPEG")
    yield "jpeg CMYK", cmyk
    yield "jpeg YCCK", cmyk.replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2")
    yield "jpeg RGB", encode(rgb, "JPEG", keep_rgb=True)
    yield "jpeg arithmetic", _ARITHMETIC
    yield "jpeg restarts", encode(rgb, "JPEG", restart_marker_blocks=1)
    yield "jpeg comment", encode(rgb, "JPEG", comment=b"a comment")
    yield "jpeg profile", encode(rgb, "JPEG", icc_profile=b"profile" * 50)
    yield "jpeg bytes after it", plain + b"junk" * 50
    yield "jpeg without JFIF", plain[:2] + plain[20:]
    xmp = b"\xff\xe1" + struct.pack(">H", len(_TURNED_BY_XMP) + 2) + _TURNED_BY_XMP
    yield "jpeg turned by XMP alone", plain[:20] + xmp + plain[20:]
    turned = encode(rgb, "JPEG", exif=exif(6))
    start = turned.index(b"\xff\xe1")
    end = start + 2 + struct.unpack(">H", turned[start + 2 : start + 4])[0]
    rest, segment = turned[:start] + turned[end:], turned[start:end]
    place = rest.index(b"\xff\xdb") + 69
    yield "jpeg EXIF after tables", rest[:place] + segment + rest[place:]
    yield "jpeg EXIF first", rest[:2] + segment + rest[20:]
    yield "MPO", encode(rgb, "MPO", save_all=True, append_images=[noise(seed=1)])


def _png(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    red, grey = rgb.getchannel(0), rgb.convert("L")
    palette = rgb.quantize(64)
    yield "png RGB", encode(rgb, "PNG")
    yield "png grey", encode(grey, "PNG")
    yield "png grey alpha", encode(Image.merge("LA", (grey, red)), "PNG")
    yield "png RGBA", encode(Image.merge("RGBA", (*rgb.split(), grey)), "PNG")
    yield "png 1 bit", encode(rgb.convert("1"), "PNG")
    yield "png palette", encode(palette, "PNG")
    yield "png palette 2 bits", encode(rgb.quantize(4), "PNG", bits=2)
    yield "png palette transparent", encode(palette, "PNG", transparency=3)
    yield "png palette alpha", encode(palette, "PNG", transparency=bytes(range(64)))
    yield "png RGB transparent", encode(rgb, "PNG", transparency=rgb.getpixel((3, 3)))
    yield "png grey transparent", encode(grey, "PNG", transparency=5)
    yield "png profile", encode(rgb, "PNG", icc_profile=b"profile" * 50)
    plain = encode(rgb, "PNG")
    yield "png gamma", plain[:33] + _chunk(b"gAMA", struct.pack(">I", 100000)) + plain[33:]
    turned = exif(6).tobytes().removeprefix(b"Exif\0\0")
    yield "png EXIF after pixels", plain[:-12] + _chunk(b"eXIf", turned) + plain[-12:]
    yield "png 16 bits grey", _raw_png(16, 0, 1)
    yield "png 16 bits grey alpha", _raw_png(16, 4, 2)
    yield "png 16 bits RGB", _raw_png(16, 2, 3)
    yield "png 16 bits RGBA", _raw_png(16, 6, 4)
    yield "png 2 bits grey", _raw_png(2, 0, 1)
    yield "png 4 bits grey", _raw_png(4, 0, 1)
    yield "png Adam7", _interlaced(np.asarray(rgb))
    yield "png animated", encode(rgb, "PNG", save_all=True, append_images=[noise(seed=1)])


def _webp(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    rgba = Image.merge("RGBA", (*rgb.split(), rgb.convert("L")))
    yield "webp", encode(rgb, "WEBP")
    yield "webp lossless", encode(rgb, "WEBP", lossless=True)
    yield "webp alpha", encode(rgba, "WEBP")
    yield "webp lossless alpha", encode(rgba, "WEBP", lossless=True)
    yield "webp animated", encode(rgb, "WEBP", save_all=True, append_images=[noise(seed=1)])
    sizes = set()
    for seed in range(99):  # DALI refuses EXIF after a chunk of odd size
        data = encode(noise(seed=seed), "WEBP", lossless=True, exif=exif(6))
        place = data.index(b"VP8L") + 4
        is_odd = struct.unpack("<I", data[place : place + 4])[0] % 2
        if is_odd not in sizes:
            sizes.add(is_odd)
            yield f"webp EXIF after {'an odd' if is_odd else 'an even'} chunk", data
        if len(sizes) == 2:
            break


def _turned(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    for orientation in range(10):  # 1 to 8 are valid
        yield f"jpeg turned {orientation}", encode(rgb, "JPEG", exif=exif(orientation))
    for kind in ("PNG", "WEBP", "TIFF", "AVIF"):
        for orientation in (3, 5, 6):
            name = f"{kind.lower()} turned {orientation}"
            yield name, encode(rgb, kind, exif=exif(orientation))


def _others(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    rgba = Image.merge("RGBA", (*rgb.split(), rgb.convert("L")))
    modes = {"RGB": rgb, "grey": rgb.convert("L"), "1 bit": rgb.convert("1")}
    modes |= {"palette": rgb.quantize(64), "RGBA": rgba}
    for name, image in modes.items():
        yield f"bmp {name}", encode(image, "BMP")
        yield f"tiff {name}", encode(image, "TIFF")
    yield "bmp run-length", _run_length_bmp()
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"tiff {compression}", encode(rgb, "TIFF", compression=compression)
    pixels = np.asarray(rgb)[..., 0]
    yield "tiff CMYK", encode(rgb.convert("CMYK"), "TIFF")
    yield "tiff 16 bits", encode(Image.fromarray(pixels.astype(np.uint16) * 257), "TIFF")
    yield "tiff 32 bits", encode(Image.fromarray(pixels.astype(np.int32) * 257), "TIFF")
    yield "tiff float", encode(Image.fromarray(pixels.astype(np.float32)), "TIFF")
    frames = [noise(seed=seed).quantize(64) for seed in (1, 2)]
    yield "gif", encode(rgb.quantize(64), "GIF")
    yield "gif transparent", encode(rgb.quantize(64), "GIF", transparency=2)
    for disposal in (0, 2, 3):
        yield (
            f"gif animated {disposal}",
            encode(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=disposal),
        )
    yield "avif", encode(rgb, "AVIF")
    yield "avif alpha", encode(rgba, "AVIF")
    yield "avif animated", encode(rgb, "AVIF", save_all=True, append_images=[noise(seed=1)])


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _png_of(
    bits: int,
    colour: int,
    lines: bytes,
    interlaced: int = 0,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _raw_png(bits: int, colour: int, channels: int) -> bytes:
    width = (WIDTH * bits * channels + 7) // 8
    lines = np.random.default_rng(3).integers(0, 256, (HEIGHT, 1 + width)).astype(np.uint8)
    lines[:, 0] = 0  # no filter
    return _png_of(bits, colour, lines.tobytes())


def _interlaced(pixels: np.ndarray) -> bytes:
    passes = (
        (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4),
        (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1),
    )  # fmt: skip
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes]
    return _png_of(8, 2, b"".join(b"\0" + line.tobytes() for part in parts for line in part), 1)


def _run_length_bmp() -> bytes:
    """Runs of 8-bit indices into a palette of greys, in lines of one run and single pixels."""
    palette = b"".join(bytes((level, level, level, 0)) for level in range(256))
    line = bytes((WIDTH - 4, 200, 0, 4, 9, 99, 199, 255, 0, 0))
    body = line * HEIGHT + b"\0\1"
    start = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 8, 1, len(body), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start) + header + palette + body


def unreadable() -> dict[str, bytes]:
    """Files that are refused, or whose damage at most one of two decoders notices."""
    whole = {
        "jpeg": encode(noise(), "JPEG"),
        "jpeg progressive": encode(noise(), "JPEG", progressive=True),
        "png": encode(noise(), "PNG"),
        "webp": encode(noise(), "WEBP"),
        "bmp": encode(noise(), "BMP"),
        "gif": encode(noise().quantize(64), "GIF"),
        "tiff": encode(noise(), "TIFF"),
        "avif": encode(noise(), "AVIF"),
    }
    kinds = {f"{name} cut": data[: len(data) * 2 // 3] for name, data in whole.items()}
    kinds |= {f"{name} without its end": data[:-3] for name, data in whole.items()}
    for name in ("jpeg", "png"):
        data = bytearray(whole[name])
        data[len(data) // 2 : len(data) // 2 + 4] = b"\xff\xd5\0\0"
        kinds[f"{name} damaged"] = bytes(data)
    kinds["png of too many pixels"] = _png_of(1, 0, b"", width=65000, height=65000)
    others = {"jpeg 2000": "JPEG2000", "ppm": "PPM"}
    kinds |= {name: encode(noise(), kind) for name, kind in others.items()}
    return kinds | {"empty": b"", "text": b"not an image\n" * 9, "header": whole["jpeg"][:100]}
