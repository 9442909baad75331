"""Processor time per image that ``--loader dali`` reads, by kind and size of the files.

    python -m benchmarks.stream_sizes [--epochs 3] [--threads 2]

Writes files of smooth random colours with noise to a temporary folder and prints µs of processor
time of all threads per image, the best epoch: unlike elapsed time, it hardly depends on what else
runs. To compare two versions, run the file of one of them with each of them in PYTHONPATH, in turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resfast.data.augment import Augment
from resfast.data.dali import DaliLoader
from resfast.data.dataset import Files

# Height, width, suffix, size of the batch's images, whether the files have EXIF, their number.
KINDS = {
    "JPEG, 32x32": (32, 32, "jpg", 32, False, 4096),
    "JPEG, 64x64 to 32": (64, 64, "jpg", 32, False, 2048),
    "PNG, 96x96 to 32": (96, 96, "png", 32, False, 1024),
    "JPEG, 500x375 to 64": (375, 500, "jpg", 64, False, 192),
    "JPEG with EXIF, 32x32": (32, 32, "jpg", 32, True, 2048),
    "JPEG with EXIF, 500x375 to 64": (375, 500, "jpg", 64, True, 192),
}


def write(folder: Path, height: int, width: int, suffix: str, exif: bool, count: int) -> Files:
    folder.mkdir()
    options: dict[str, object] = {"quality": 90} if suffix == "jpg" else {}
    if exif:
        options["exif"] = content = Image.Exif()
        content[0x112] = 1
    paths = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        noisy = np.clip(smooth + random.integers(-9, 9, (height, width, 1)), 0, 255)
        paths.append(str(folder / f"{seed}.{suffix}"))
        Image.fromarray(noisy.astype(np.uint8)).save(paths[-1], **options)
    return Files(tuple(paths), torch.zeros(count, dtype=torch.int64))


def microseconds(files: Files, size: int, epochs: int) -> float:
    """Processor time per image in the best of some epochs, after one that is not timed."""
    loader = DaliLoader(
        files,
        batch_size=min(512, len(files) // 2),
        image_size=size,
        mean=torch.zeros(3),
        std=torch.ones(3),
        augment=Augment(crop=4, flip="random"),
        classes=1,
    )
    times = []
    for epoch in range(epochs + 1):
        begin = time.process_time()
        for _ in loader.epoch(epoch):
            pass
        times.append(time.process_time() - begin)
    return min(times[1:]) / len(files) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (height, width, suffix, size, exif, count)) in enumerate(KINDS.items()):
            files = write(Path(folder, str(number)), height, width, suffix, exif, count)
            found[name] = round(microseconds(files, size, options.epochs), 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
