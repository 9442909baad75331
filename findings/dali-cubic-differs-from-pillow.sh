#!/usr/bin/env bash
# NVIDIA DALI 2.4.0's resize with INTERP_CUBIC and antialias=True and Pillow 13.0.0's BICUBIC, which
# filters when it reduces an image, are not the same function, though both are antialiased cubic: a
# network that was trained on images resized by one sees other pixels from the other. For uniform noise
# the difference is largest where the size changes little; it is not limited to borders.
#
# Seen on 2026-11-30 (largest difference of 256 levels, and without 3 pixels at each border):
# 33 to 32 pixels: 15, 15; 8 to 32: 12, 7; 64 to 32: 6, 1; 800 to 32: 4, 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet nvidia-dali-cuda130==2.4.0 nvidia-nvimgcodec-cu13==0.9.0.20 numpy==2.4.6 pillow==13.0.0
venv/bin/python - <<'END'
import numpy as np
import nvidia.dali as dali
from PIL import Image


def resized(image, size):
    pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        source = dali.fn.external_source(lambda: [image], batch=True, layout="HWC")
        pipeline.set_outputs(
            dali.fn.resize(
                source, size=[size, size], interp_type=dali.types.INTERP_CUBIC, antialias=True
            )
        )
    pipeline.build()
    return np.asarray(pipeline.run()[0].at(0)).astype(int)


found = {}
for size in (33, 8, 64, 800):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    other = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    difference = np.abs(resized(image, 32) - np.asarray(other).astype(int))
    found[size] = (int(difference.max()), int(difference[3:-3, 3:-3].max()))
print(found)
assert found[33][1] >= 8 and found[8][1] >= 4 and found[64][0] >= 4, found
END
