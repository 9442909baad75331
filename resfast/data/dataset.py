"""Data sets as uint8 tensors in memory: CIFAR-10, CIFAR-100, digits, or a folder of images."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import queue
import shutil
import socket
import sys
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resfast.data import cache, folder
from resfast.errors import ResfastError, nearest

CHOICES = ("auto", "cifar10", "cifar100", "digits", "folder:PATH", "shards:PATH")
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 8, 1024
DIGITS_TEST_FRACTION, DIGITS_SPLIT_SEED = 0.2, 0
REACHABLE_TIMEOUT_S = 5.0
DOWNLOAD_STALL_S = 60.0


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, on the CPU."""

    name: str  # "cifar10", "cifar100", "digits", "folder:PATH"
    train_images: Tensor  # uint8 [N, H, W, C] contiguous, C = 3
    train_labels: Tensor  # int64 [N]
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    digest: str  # hex digest of the four tensors and the class names
    skipped: tuple[str, ...] = ()  # corrupt files left out under skip_corrupt

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.train_images.shape[1]


class DataUnavailableError(ResfastError):
    """A data set that is neither on disk nor to be fetched; ``reason`` leaves out the remedies."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}: {remedy}")
        self.reason = reason


def print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load_dataset(
    data: str = "auto",
    *,
    data_dir: Path,
    image_size: int = 32,
    skip_corrupt: bool = False,
    report: Callable[[str], None] = print_to_stderr,
    listing: folder.Listing | None = None,
) -> Dataset:
    """Load ``data``: ``cifar10``, ``cifar100``, ``digits``, ``folder:PATH`` or ``auto``.

    ``folder:PATH`` is a directory or a tar archive of ``train/<class>/*`` and ``test/<class>/*``;
    its decoded images are kept under ``data_dir/cache``. ``auto`` is CIFAR-10 where it is on disk
    or can be fetched, and otherwise digits, which is said. ``image_size`` is the height and width
    in pixels of every image returned. ``report`` is given one line for each step worth knowing.
    ``listing`` is what the directory of ``folder:PATH`` holds, where it was scanned already.

    Raises ``ResfastError`` for a bad value, and for data that is absent, damaged or of another
    layout.
    """
    data_dir = Path(data_dir).expanduser()
    check_image_size(image_size)
    if data.startswith("folder:"):
        return _load_folder(data, data_dir, image_size, skip_corrupt, report, listing)
    if data.startswith("shards:"):
        raise ResfastError(
            f"{data} is read as a stream and cannot be loaded whole: open it with "
            "resfast.data.sources.open_data, or use --data folder:PATH with the images"
        )
    if data in ("cifar10", "cifar100"):
        return _load_cifar(data, data_dir, image_size, report)
    if data == "digits":
        return _load_digits(image_size)
    if data == "auto":
        try:
            return _load_cifar("cifar10", data_dir, image_size, report)
        except DataUnavailableError as error:
            report(
                f"NOT CIFAR-10: --data auto wanted it, but {error.reason}; using the small digits "
                "data set of scikit-learn instead; choose with --data "
                f"{' | '.join(CHOICES[1:])}"
            )
            return _load_digits(image_size)
    hint = f"; did you mean 'folder:{data}'?" if os.path.exists(data) else nearest(data, CHOICES)
    raise ResfastError(f"unknown data {data!r}, expected one of {', '.join(CHOICES)}{hint}")


def check_image_size(image_size: int) -> None:
    """Raises ``ResfastError`` for a height and width, in pixels, that no loader takes."""
    if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
        raise ResfastError(
            f"image size {image_size} is out of range, expected {MIN_IMAGE_SIZE} to "
            f"{MAX_IMAGE_SIZE} pixels: choose 32 for CIFAR"
        )


def split_validation(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices of ``labels`` (int64 ``[N]``) into training and validation, by class.

    Returns ``(train_indices, val_indices)``, sorted int64 on the CPU. The validation part has
    ``round(N * fraction)`` images, and of each class its share rounded up or down. The same
    ``seed`` gives the same split. Raises ``ResfastError`` when either part would be empty.
    """
    if not 0 < fraction < 1:
        raise ResfastError(
            f"validation fraction {fraction} is out of range, expected more than 0 and less than 1"
            ": choose for example 0.1"
        )
    labels = labels.cpu()
    total = round(len(labels) * fraction)
    if not 0 < total < len(labels):
        raise ResfastError(
            f"validation fraction {fraction} of {len(labels)} images leaves one part empty, at "
            "least one image in each was expected: choose another fraction or more images"
        )
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    shares = [len(indices) * fraction for indices in members]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for indices, count in zip(members, counts, strict=True):
        chosen[indices[torch.randperm(len(indices), generator=generator)[:count]]] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()


def split_last(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Holds out the last ``count / classes`` images of each class of ``labels`` (int64 ``[N]``).

    Returns ``(train_indices, val_indices)``, sorted int64 on the CPU, a function of the data set
    alone. Raises ``ResfastError`` when ``count`` is no multiple of the classes, or a class would
    have no image left.
    """
    labels = labels.cpu()
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    each, rest = divmod(count, len(members))
    if rest or each < 1:
        nearest = max(1, round(count / len(members))) * len(members)
        raise ResfastError(
            f"--hold-out {count} cannot be shared out among {len(members)} classes, as many images "
            f"of each were expected: choose a multiple of {len(members)}, for example {nearest}"
        )
    smallest = min(map(len, members))
    if each >= smallest:
        raise ResfastError(
            f"--hold-out {count} takes {each} images of each class, and the smallest has "
            f"{smallest}: choose at most {(smallest - 1) * len(members)}"
        )
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat([indices[-each:] for indices in members])] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()


def channel_mean_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each channel of uint8 ``[N, H, W, C]`` images.

    Both are float32 ``[C]`` on the CPU in units of pixel / 255. Sums are integers and so exact.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
        raise ResfastError(
            f"images are {images.dtype} {tuple(images.shape)}, expected uint8 [N, H, W, C] with at "
            "least one image: pass the images as load_dataset returns them"
        )
    channels = images.shape[-1]
    sums = torch.zeros(channels, dtype=torch.int64, device=images.device)
    squares = torch.zeros_like(sums)
    for chunk in images.reshape(-1, channels).split(1 << 18):
        values = chunk.to(torch.int64)
        sums += values.sum(0)
        squares += values.square().sum(0)
    return mean_std_of_sums(sums.tolist(), squares.tolist(), images.numel() // channels)


def mean_std_of_sums(sums: list[int], squares: list[int], pixels: int) -> tuple[Tensor, Tensor]:
    """:func:`channel_mean_std` from the sum and the sum of squares of each channel."""
    means = [s / pixels / 255 for s in sums]
    variances = [pixels * q - s * s for s, q in zip(sums, squares, strict=True)]
    stds = [math.sqrt(variance) / pixels / 255 for variance in variances]
    return torch.tensor(means, dtype=torch.float32), torch.tensor(stds, dtype=torch.float32)


def _make(
    name: str, tensors: dict[str, Tensor], classes: tuple[str, ...], skipped: tuple[str, ...] = ()
) -> Dataset:
    digest = cache.tensor_digest(tensors, classes)
    return Dataset(name=name, **tensors, classes=classes, digest=digest, skipped=skipped)


def _load_folder(
    data: str,
    data_dir: Path,
    image_size: int,
    skip_corrupt: bool,
    report: Callable[[str], None],
    listing: folder.Listing | None,
) -> Dataset:
    location = data.removeprefix("folder:")
    if not location:
        raise ResfastError(
            "--data folder: names no path, expected folder:PATH of a directory or a tar archive: "
            "write the path after the colon"
        )
    source = folder.open_source(Path(location).expanduser())
    if isinstance(source, folder.Directory):
        listing = listing or source.scan()
        folder.check_listing(source.path, listing)
    key = cache.content_key(
        lambda update: source.update_hash(listing, update),
        image_size=image_size,
        skip_corrupt=skip_corrupt,
    )
    path = data_dir / "cache" / f"{key}.safetensors"
    fields = cache.load(path, image_size, report)
    if fields is not None:
        dataset = Dataset(name=data, **fields)
    else:
        listing = listing or source.scan()
        dataset = _make(data, *folder.read(source, listing, image_size, skip_corrupt, report))
        cache.store(path, dataset, report)
    if dataset.skipped:
        shown = ", ".join(dataset.skipped[:3]) + (", ..." if len(dataset.skipped) > 3 else "")
        report(f"left out {len(dataset.skipped):,} corrupt images of {source.path} ({shown})")
    return dataset


def _load_digits(image_size: int) -> Dataset:
    """The 1,797 8x8 grey digits that come with scikit-learn, as RGB; 80 % train, 20 % test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).to(torch.float32) * (255 / 16)  # [N, 8, 8], 0 to 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    images = resize(grey[..., None], image_size).expand(-1, -1, -1, 3)
    train, test = split_validation(labels, DIGITS_TEST_FRACTION, DIGITS_SPLIT_SEED)
    tensors = {
        "train_images": images[train].contiguous(),
        "train_labels": labels[train],
        "test_images": images[test].contiguous(),
        "test_labels": labels[test],
    }
    return _make("digits", tensors, tuple(str(name) for name in bunch.target_names))


def resize(images: Tensor, size: int) -> Tensor:
    """``images`` ``[N, H, W, C]`` in 0..255 as uint8 ``[N, size, size, C]``, bicubic."""
    resized = torch.empty((len(images), size, size, images.shape[-1]), dtype=torch.uint8)
    for chunk, out in zip(images.split(1024), resized.split(1024), strict=True):
        pixels = chunk.to(torch.float32)
        if images.shape[1:3] != (size, size):
            pixels = torch.nn.functional.interpolate(
                pixels.permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True
            ).permute(0, 2, 3, 1)
        out.copy_(pixels.round().clamp(0, 255))
    return resized


def _load_cifar(
    name: str, data_dir: Path, image_size: int, report: Callable[[str], None]
) -> Dataset:
    """CIFAR as torchvision keeps it in ``data_dir``, fetched first if it is not there."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    _prepare_cifar(name, kind, data_dir, report)
    tensors: dict[str, Tensor] = {}
    classes: tuple[str, ...] = ()
    for split in ("train", "test"):
        try:
            loaded = kind(data_dir, train=split == "train", download=False)
        except (OSError, RuntimeError) as error:
            raise _unavailable(name, kind, data_dir, f"it cannot be read ({error})") from error
        images = torch.from_numpy(np.ascontiguousarray(loaded.data))
        if image_size != images.shape[1]:
            images = resize(images, image_size)
        tensors[f"{split}_images"] = images
        tensors[f"{split}_labels"] = torch.tensor(loaded.targets, dtype=torch.int64)
        classes = tuple(loaded.classes)
    return _make(name, tensors, classes)


def _prepare_cifar(name: str, kind: Any, data_dir: Path, report: Callable[[str], None]) -> None:
    """Leave an intact, unpacked CIFAR in ``data_dir`` or raise ``DataUnavailableError``."""
    from torchvision.datasets.utils import check_integrity, download_url

    unpacked, archive = data_dir / kind.base_folder, data_dir / kind.filename
    wanted = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    try:
        damaged = [file for file, md5 in wanted if not check_integrity(unpacked / file, md5)]
        if not damaged:
            return
        if archive.exists():
            if not check_integrity(archive, kind.tgz_md5):
                raise _unavailable(
                    name, kind, data_dir, f"{archive} is truncated or damaged (MD5 differs)"
                )
        elif unpacked.exists():
            raise _unavailable(
                name, kind, data_dir, f"{unpacked / damaged[0]} is missing or damaged"
            )
        else:
            if problem := _unreachable(kind.url):
                raise _unavailable(
                    name, kind, data_dir, f"it is not there and {kind.url} {problem}"
                )
            report(f"downloading {kind.url} to {data_dir}")
            data_dir.mkdir(parents=True, exist_ok=True)
            # Into a folder of its own: a download cut short must not pass for the archive.
            with (
                tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as temporary,
                _stall_limit(),
                contextlib.redirect_stdout(sys.stderr),
            ):
                download_url(kind.url, temporary, kind.filename, kind.tgz_md5)
                shutil.move(Path(temporary) / kind.filename, archive)
        report(f"unpacking {archive}")
        with contextlib.redirect_stdout(sys.stderr):
            kind(data_dir, train=False, download=True)  # finds the archive, so fetches nothing
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:  # URLError is an OSError
        raise _unavailable(name, kind, data_dir, f"preparing it failed ({error})") from error


def _unavailable(name: str, kind: Any, data_dir: Path, why: str) -> DataUnavailableError:
    return DataUnavailableError(
        f"{name} was looked for in {data_dir} but {why}",
        f"put an intact {kind.filename} into {data_dir} (a damaged one removed), or use "
        "--data folder:PATH with your own images, or --data digits, which needs no download",
    )


def _unreachable(url: str) -> str:
    """Why ``url`` cannot be fetched, or "". Looking up a host may hang, hence the thread."""
    answer: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=REACHABLE_TIMEOUT_S):
                answer.put("")
        except urllib.error.HTTPError as error:
            refuses_head = error.code in (405, 501)
            answer.put("" if refuses_head else f"answers {error.code} {error.reason}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer.put(f"cannot be reached ({getattr(error, 'reason', error)})")

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=REACHABLE_TIMEOUT_S + 1)
    except queue.Empty:
        return f"did not answer within {REACHABLE_TIMEOUT_S:.0f} s"


@contextlib.contextmanager
def _stall_limit() -> Iterator[None]:
    """A default socket timeout, as torchvision's download sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_STALL_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
