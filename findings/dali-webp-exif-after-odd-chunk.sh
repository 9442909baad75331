#!/usr/bin/env bash
# NVIDIA DALI 2.4.0 (nvimgcodec 0.9.0) cannot decode a WebP file in which a chunk of odd size comes
# before another chunk. RIFF pads such a chunk by a byte, which its size does not count. Pillow writes
# such a file for any lossless image whose data happen to have an odd size, if it is given EXIF data:
# about half of them. Without EXIF nothing follows the chunk, and the same image is decoded.
#
# Seen on 2026-11-30: "Could not retrieve image info from webp stream - Unexpected end of stream" for
# every file with an odd chunk and EXIF, and for no other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet nvidia-dali-cuda130==2.4.0 nvidia-nvimgcodec-cu13==0.9.0.20 numpy==2.4.6 pillow==13.0.0
venv/bin/python - <<'END'
import io
import struct

import numpy as np
import nvidia.dali as dali
from PIL import Image


def is_decoded(data):
    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        source = dali.fn.external_source(lambda: [np.frombuffer(data, np.uint8)], batch=True)
        pipeline.set_outputs(dali.fn.decoders.image(source))
    pipeline.build()
    try:
        pipeline.run()
    except RuntimeError:
        return False
    return True


def image_chunk_size(data):
    place = data.index(b"VP8L")
    return struct.unpack("<I", data[place + 4 : place + 8])[0]


exif = Image.Exif()
exif[0x010E] = "a description"
seen = set()
for seed in range(16):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    for options in ({}, {"exif": exif}):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, **options)
        data = buffer.getvalue()
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), pixels)  # the file is valid
        seen.add((image_chunk_size(data) % 2, bool(options), is_decoded(data)))
print("(odd chunk, EXIF after it, decoded):", sorted(seen))
assert seen == {(0, False, True), (0, True, True), (1, False, True), (1, True, False)}, seen
END
