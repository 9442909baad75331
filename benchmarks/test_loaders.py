"""Throughput of each loader, and its time as a fraction of a training step.

All deliver augmented (crop 4, flip) and normalized batches of 512 in bf16 on the device. Set
``RESFAST_BENCH_DATA`` to an image folder to time real images (its ``train/<class>/*`` files);
otherwise JPEGs of smooth random colours are written to a temporary folder. Loaders of arrays get
the same images, decoded.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.report import hardware, installed, rate, timed
from resfast.data.augment import Augment, parse_augment
from resfast.data.dataset import Files
from resfast.data.resident import ResidentLoader
from resfast.data.sources import load_dataset, open_data

BATCH, SIDE = 512, 32
MEAN, STD = torch.full((3,), 0.48), torch.full((3,), 0.25)
POLICY = Augment(crop=4, flip="random")
PART_OF_STEP = {"cpu": 0.03, "cuda": 0.05}

pytestmark = pytest.mark.timeout(1800)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@dataclass(frozen=True)
class Data:
    files: Files
    images: torch.Tensor
    labels: torch.Tensor
    classes: int
    root: Path


def _write_images(root: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 1000), ("test", 1)):
        for label in range(10):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                image = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                image.save(folder / f"{index}.jpg", quality=95)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    given = os.environ.get("RESFAST_BENCH_DATA")
    temporary = tmp_path_factory.mktemp("images")
    root = Path(given) if given else temporary / "tree"
    if not given:
        _write_images(root)
    where = {"data_dir": temporary / "data", "image_size": SIDE}
    stream = open_data(f"folder:{root}", loader="dali", **where)
    loaded = load_dataset(f"folder:{root}", **where)
    return Data(
        stream.train, loaded.train_images, loaded.train_labels, len(stream.classes), root / "train"
    )


def resident(data: Data, device: str) -> Iterator[torch.Tensor]:
    loader = ResidentLoader(
        data.images, data.labels, MEAN, STD, batch_size=BATCH, augment=POLICY,
        classes=data.classes, device=device, dtype=torch.bfloat16,
    )  # fmt: skip
    for epoch in range(1 << 30):
        for images, *_ in loader.epoch(epoch):
            yield images


def _dali(source: object, data: Data, device: str) -> Iterator[torch.Tensor]:
    from resfast.data.dali import DaliLoader

    loader = DaliLoader(
        source, batch_size=BATCH, image_size=SIDE, mean=MEAN, std=STD, augment=POLICY,
        classes=data.classes, device=device, dtype=torch.bfloat16,
    )  # fmt: skip
    for epoch in range(1 << 30):
        for images, *_ in loader.epoch(epoch):
            yield images


def dali_arrays(data: Data, device: str) -> Iterator[torch.Tensor]:
    from resfast.data.dali import Arrays

    return _dali(Arrays(data.images, data.labels), data, device)


def dali_jpeg(data: Data, device: str) -> Iterator[torch.Tensor]:
    return _dali(data.files, data, device)


def torchvision_jpeg(data: Data, device: str) -> Iterator[torch.Tensor]:
    """``ImageFolder`` in a DataLoader with two workers."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop(SIDE, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN.tolist(), STD.tolist()),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(data.root, transform),
        BATCH,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
        pin_memory=device == "cuda",
    )
    while True:
        for images, _ in loader:
            yield images.to(
                device, torch.bfloat16, memory_format=torch.channels_last, non_blocking=True
            )


LOADERS: dict[str, Callable[[Data, str], Iterator[torch.Tensor]]] = {
    "resident": resident,
    "DALI, arrays": dali_arrays,
    "DALI, JPEG": dali_jpeg,
    "torchvision DataLoader, 2 workers, JPEG": torchvision_jpeg,
}


@devices
@pytest.mark.parametrize("name", LOADERS)
def test_loader(name: str, device: str, data: Data, benchmark, comparisons: list[str]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name.startswith("DALI") and not installed("nvidia.dali"):
        pytest.skip("nvidia.dali is not installed")
    batches = LOADERS[name](data, device)
    next(batches)
    steps = max(1, len(data.images) // BATCH)

    def run() -> None:
        for _ in range(steps):
            next(batches)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"training batches, {device}"
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    speed = steps * BATCH / benchmark.stats.stats.median
    batches.close()
    benchmark.extra_info.update(hardware(device), images_per_second=round(speed))
    comparisons.append(f"training batches, {device}: {name}: {rate(speed)}")
    assert speed > 0


@devices
@pytest.mark.parametrize("policy", ["standard", "strong"])
def test_part_of_a_training_step(
    policy: str, device: str, data: Data, benchmark, comparisons: list[str]
) -> None:
    """Time to make a batch as a fraction of the default recipe's compiled step."""
    from benchmarks import resfast_step

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    step = resfast_step.build(torch.device(device), BATCH, "default")
    loader = ResidentLoader(
        data.images, data.labels, MEAN, STD, batch_size=BATCH, augment=parse_augment(policy),
        classes=data.classes, device=device, dtype=torch.bfloat16,
    )  # fmt: skip
    batches = (batch for epoch in range(1 << 30) for batch in loader.epoch(epoch))
    many = 20 if device == "cpu" else 200

    def warm(call: Callable[[], object], repeats: int) -> float:
        call()
        return timed(call, repeats, device)

    parts = []

    def pair() -> None:
        making = warm(lambda: next(batches), many)
        parts.append(making / warm(step, 2 if device == "cpu" else 50))

    benchmark.group = "data path in a training step"
    benchmark.pedantic(pair, rounds=3, warmup_rounds=1)
    part = statistics.median(parts)
    benchmark.extra_info.update(hardware(device), part_of_step=round(part, 4))
    comparisons.append(f"data path with {policy}, {device}: {part:.2%} of a training step")
    if policy == "standard":
        assert part < PART_OF_STEP[device]
