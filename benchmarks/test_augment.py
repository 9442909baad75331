"""Crop + flip + normalization of CIFAR-sized images: resfast's operator against other libraries.

All get the same uint8 images ``[50000, 32, 32, 3]`` in memory, shuffle them, translate each by up
to 4 pixels, flip half of them and normalize, in batches of 512. The result is bf16, except for
DALI, which does not support it: fp32, in which it is faster than in fp16. Remaining differences:
DALI pads with zeros; torchvision's v2 transforms use one translation and flip for a whole batch.

The speed-up over DALI is measured in alternating rounds. On CUDA the operator's bandwidth (bytes
read + written) is compared with that of a device-to-device copy measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from benchmarks.report import hardware, installed, rate
from resfast import runtime
from resfast.data.augment import Augment, sample
from resfast.data.resident import ResidentLoader
from resfast.ops.augment.op import augment_unchecked, normalization

COUNT, SIDE, BATCH, CROP = 50_000, 32, 512, 4
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
PAIRS = 11
CPU_IMAGES_PER_SECOND, TIMES_DALI, PART_OF_COPY = 250_000, 3.0, 0.8

pytestmark = pytest.mark.timeout(1200)

Round = Callable[[], int]
"""Makes a number of batches and returns the number of images in them."""


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    runtime.tune_allocator()  # as in training
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (COUNT, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)


def resfast_round(images: torch.Tensor) -> Round:
    loader = ResidentLoader(
        images,
        torch.zeros(COUNT, dtype=torch.int64),
        torch.tensor(MEAN),
        torch.tensor(STD),
        batch_size=BATCH,
        augment=Augment(crop=CROP, flip="random"),
        classes=10,
        dtype=torch.bfloat16,
    )
    epochs = iter(range(1 << 30))
    return lambda: sum(len(batch.images) for batch in loader.epoch(next(epochs)))


def plain_round(images: torch.Tensor) -> Round:
    """The operator's reference in plain PyTorch."""
    from resfast.ops.augment import reference

    offset, scale = normalization(torch.tensor(MEAN), torch.tensor(STD))
    everything = torch.arange(COUNT)
    policy = Augment(crop=CROP, flip="random")
    params = sample(policy, everything, size=(SIDE, SIDE), channels=3, seed=0, epoch=0)

    def run() -> int:
        order = torch.randperm(COUNT)[: 16 * BATCH]
        for indices in order.split(BATCH):
            reference.augment(
                images, indices, offset, scale, params.shift, params.flip, None, None, None, None,
                None, None, False, torch.bfloat16,
            )  # fmt: skip
        return len(order)

    return run


def dali_round(images: torch.Tensor) -> Round:
    """Arrays, sliced with zero padding, then ``crop_mirror_normalize``: the fastest on the CPU of
    the graphs tried (pad and crop, fp16, random parameters from Python)."""
    from nvidia.dali import fn, pipeline_def, types

    arrays = images.numpy()

    def batches() -> Iterator[np.ndarray]:
        while True:
            order = np.random.default_rng(0).permutation(COUNT)
            for first in range(0, COUNT - BATCH + 1, BATCH):
                yield arrays[order[first : first + BATCH]]

    @pipeline_def(
        batch_size=BATCH, num_threads=torch.get_num_threads(), device_id=None, seed=0,
        prefetch_queue_depth=2,
    )  # fmt: skip
    def graph() -> object:
        batch = fn.external_source(source=batches(), layout="HWC", batch=True, no_copy=True)
        shift = fn.random.uniform(values=[float(s) for s in range(-CROP, CROP + 1)], shape=[2])
        batch = fn.slice(
            batch, start=fn.cast(shift, dtype=types.INT32), shape=[SIDE, SIDE], axes=[0, 1],
            out_of_bounds_policy="pad", fill_values=0,
        )  # fmt: skip
        return fn.crop_mirror_normalize(
            batch,
            mirror=fn.random.coin_flip(),
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=types.FLOAT,
            output_layout="HWC",
        )

    pipeline = graph()
    pipeline.build()

    def run() -> int:
        for _ in range(COUNT // BATCH):
            pipeline.run()
        return COUNT // BATCH * BATCH

    return run


def torchvision_v2_round(images: torch.Tensor) -> Round:
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(SIDE, padding=CROP, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    nchw = images.permute(0, 3, 1, 2)

    def run() -> int:
        order = torch.randperm(COUNT)[: 16 * BATCH]
        for indices in order.split(BATCH):
            transform(nchw[indices]).to(torch.bfloat16, memory_format=torch.channels_last)
        return len(order)

    return run


class _Images(torch.utils.data.Dataset):
    """Transforms images one by one, as CIFAR scripts do."""

    def __init__(self, images: torch.Tensor) -> None:
        from torchvision import transforms

        self.arrays = images[: 16 * BATCH].numpy()
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(SIDE, padding=CROP, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.arrays[index])


def torchvision_v1_round(images: torch.Tensor) -> Round:
    loader = torch.utils.data.DataLoader(
        _Images(images), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    )

    def run() -> int:
        made = 0
        for batch in loader:
            made += len(batch.to(torch.bfloat16, memory_format=torch.channels_last))
        return made

    return run


def kornia_round(images: torch.Tensor) -> Round:
    import kornia.augmentation as K

    transform = K.AugmentationSequential(
        K.RandomCrop((SIDE, SIDE), padding=CROP, padding_mode="reflect"),
        K.RandomHorizontalFlip(),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    nchw = images.permute(0, 3, 1, 2)

    def run() -> int:
        order = torch.randperm(COUNT)[: 4 * BATCH]
        for indices in order.split(BATCH):
            batch = transform(nchw[indices].float() / 255)
            batch.to(torch.bfloat16, memory_format=torch.channels_last)
        return len(order)

    return run


ROUNDS: dict[str, Callable[[torch.Tensor], Round]] = {
    "resfast": resfast_round,
    "resfast, plain PyTorch": plain_round,
    "DALI": dali_round,
    "torchvision v2, batched": torchvision_v2_round,
    "torchvision v1, DataLoader with 2 workers": torchvision_v1_round,
    "Kornia": kornia_round,
}
NEEDS = {"DALI": "nvidia.dali", "Kornia": "kornia"}


def _built(name: str, images: torch.Tensor) -> Round:
    if not installed(NEEDS.get(name, "torch")):
        pytest.skip(f"{NEEDS[name]} is not installed")
    return ROUNDS[name](images)


@pytest.mark.parametrize("name", ROUNDS)
def test_crop_flip_normalize_on_the_cpu(
    name: str, images: torch.Tensor, benchmark, comparisons: list[str]
) -> None:
    run = _built(name, images)
    made = run()
    benchmark.group = f"crop + flip + normalize, batch {BATCH}, cpu"
    benchmark.pedantic(run, rounds=5)
    speed = made / benchmark.stats.stats.median
    benchmark.extra_info.update(hardware("cpu"), images_per_second=round(speed))
    comparisons.append(f"crop + flip + normalize, cpu: {name}: {rate(speed)}")
    if name == "resfast":
        assert speed >= CPU_IMAGES_PER_SECOND


def test_the_operator_is_three_times_as_fast_as_dali_on_the_cpu(
    images: torch.Tensor, benchmark, comparisons: list[str]
) -> None:
    ours, theirs = _built("resfast", images), _built("DALI", images)
    ours(), theirs()
    ratios = []

    def pair() -> None:
        seconds = []
        for run in (ours, theirs):
            start = time.perf_counter()
            made = run()
            seconds.append((time.perf_counter() - start) / made)
        ratios.append(seconds[1] / seconds[0])

    benchmark.group = "resfast against DALI, alternating"
    benchmark.pedantic(pair, rounds=PAIRS)
    ratio = statistics.median(ratios)
    benchmark.extra_info.update(hardware("cpu"), times_as_fast_as_dali=round(ratio, 2))
    comparisons.append(
        f"crop + flip + normalize, cpu: resfast is {ratio:.2f} times as fast as DALI "
        f"(median of {PAIRS} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
    )
    assert ratio >= TIMES_DALI


@pytest.fixture(scope="module")
def on_gpu(images: torch.Tensor) -> torch.Tensor:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return images.cuda()


def _gpu_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median device time of a call, in seconds."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["crop=4,flip=random", "standard", "strong"])
def test_bandwidth_on_cuda(
    policy: str, on_gpu: torch.Tensor, benchmark, comparisons: list[str]
) -> None:
    from resfast.data.augment import needs_statistics, parse_augment, sample_mix
    from resfast.data.augment import statistics as image_statistics

    augment = parse_augment(policy)
    everything = torch.randperm(COUNT, device="cuda")
    size = (SIDE, SIDE)
    params = sample(
        augment,
        torch.arange(COUNT, device="cuda"),
        size=size,
        channels=3,
        seed=0,
        epoch=0,
        statistics=image_statistics(on_gpu) if needs_statistics(augment) else None,
    )
    mix = sample_mix(augment, everything, count=COUNT, size=size, seed=0, epoch=0)
    constants = normalization(torch.tensor(MEAN).cuda(), torch.tensor(STD).cuda())

    def call() -> torch.Tensor:
        return augment_unchecked(
            on_gpu, everything, params, constants, mix=mix, padding=augment.padding,
            dtype=torch.bfloat16,
        )  # fmt: skip

    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _gpu_seconds(lambda: target.copy_(source))
    moved = on_gpu.numel() * (1 + 2)
    seconds = _gpu_seconds(call)
    part = moved / seconds / copy
    benchmark.group = "augment, cuda"
    benchmark.pedantic(lambda: (call(), torch.cuda.synchronize()), rounds=20)
    benchmark.extra_info.update(
        hardware("cuda"),
        bytes_per_second=moved / seconds,
        copy_bytes_per_second=copy,
        part_of_copy=round(part, 3),
        images_per_second=round(COUNT / seconds),
    )
    comparisons.append(
        f"augment {policy}, cuda: {moved / seconds / 1e9:,.0f} GB/s, {part:.0%} of a copy's "
        f"{copy / 1e9:,.0f} GB/s, {rate(COUNT / seconds)}"
    )
    if policy == "crop=4,flip=random":
        assert part >= PART_OF_COPY
