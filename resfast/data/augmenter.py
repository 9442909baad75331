"""``resfast.Augment`` and ``resfast.DeviceLoader``: augmentation for any training loop.

Images of a batch are augmented each on its own and normalized by one call of
:mod:`resfast.ops.augment.op`, on the device where they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from resfast.data import augment as policies
from resfast.data.augment import order as shuffle
from resfast.errors import ResfastError
from resfast.ops.augment.op import DTYPES, MAX_CHANNELS, augment_unchecked, normalization

Layout = Literal["auto", "NHWC", "NCHW"]


class Augment(nn.Module):
    """Augments and normalizes batches of images, each image differently, in one pass.

    In eval mode images are only normalized. Without ``epoch`` and ``indices``, each call draws new
    parameters; with them, the parameters are a function of (seed, epoch, index), so that they do
    not depend on batches, workers and ranks, and can be drawn again. The module compiles with
    ``fullgraph=True``, but anew for each ``epoch`` that is given.

    Args:
        policy: a name (``light``, ``standard``, ``strong``, …), values such as
            ``"crop=4,flip=random,cutout=8"``, or both: ``"strong,rotate=0"``.
        mean: mean of each channel, of pixels / 255; a number for all channels.
        std: standard deviation, in the same units, above 0.
        classes: number of classes; needed where the policy mixes images.
        dtype: of the result: float32, bfloat16 or float16.
        layout: of the images, ``NHWC`` or ``NCHW``; ``auto`` takes the axis of at most 4 channels.
        seed: of the random parameters.
        generator: draws the seed of each call instead, from its state; on the CPU.

    Raises:
        ResfastError: an unknown policy, or a value out of range.

    Shape: images ``[B, H, W, C]`` or ``[B, C, H, W]``, C from 1 to 4, uint8, or floating point from
    0 to 1, which is rounded to 256 levels; result ``[B, C, H, W]`` in ``channels_last`` memory.
    """

    def __init__(
        self,
        policy: str | policies.Augment = "standard",
        *,
        mean: float | Sequence[float] | Tensor = 0.0,
        std: float | Sequence[float] | Tensor = 1.0,
        classes: int | None = None,
        dtype: torch.dtype = torch.float32,
        layout: Layout = "auto",
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        with _in_own_words():
            self.policy = policies.parse_augment(policy) if isinstance(policy, str) else policy
        if dtype not in DTYPES:
            expected = ", ".join(map(str, DTYPES))
            raise ResfastError(f"dtype is {dtype}; expected one of {expected}")
        if layout not in ("auto", "NHWC", "NCHW"):
            raise ResfastError(f"layout is {layout!r}; expected auto, NHWC or NCHW")
        if classes is not None and classes < 1:
            raise ResfastError(f"classes is {classes}; expected at least 1")
        if generator is not None and generator.device.type != "cpu":
            raise ResfastError(f"generator is on {generator.device}; expected one on the CPU")
        values = {name: _channels(name, value) for name, value in (("mean", mean), ("std", std))}
        if len({len(value) for value in values.values()} - {1}) > 1:
            raise ResfastError(
                f"mean has {len(values['mean'])} channels and std {len(values['std'])}; expected "
                "the same"
            )
        policies.prepare_mixing(self.policy)
        self.register_buffer("mean", values["mean"], persistent=False)
        self.register_buffer("std", values["std"], persistent=False)
        self.classes, self.dtype, self.layout = classes, dtype, layout
        self.seed, self.generator = seed, generator
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        """The policy and the dtype."""
        return f"{str(self.policy)!r}, dtype={self.dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> Augment:
        super()._apply(fn, recurse)
        policies.prepare_mixing(self.policy, self.mean.device)
        return self

    @overload
    def forward(
        self,
        images: Tensor,
        labels: None = None,
        *,
        epoch: int | None = None,
        indices: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        epoch: int | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        epoch: int | None = None,
        indices: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """An augmented batch, and its labels if they are given.

        Args:
            images: the batch; see the class.
            labels: int64 ``[B]``, less than ``classes``.
            epoch: epoch, from 0; with ``indices``.
            indices: int64 ``[B]``, what identifies each image in its data set.

        Returns:
            images ``[B, C, H, W]`` on their device; with ``labels`` also these, or, where the
            policy mixes images, the weight of each class, float32 ``[B, classes]``.

        Raises:
            ResfastError: a tensor of a wrong shape or dtype, on another device, or with values out
                of range; or a policy that does not fit the images or needs labels.
        """
        pixels = self._pixels(images)
        self._check_labels(labels, pixels)
        policy = self.policy if self.training else policies.Augment()
        mean, std = _normalization(self, pixels)
        seed, epoch, indices = self._keys(pixels, epoch, indices)
        rows = torch.arange(len(pixels), device=pixels.device)
        size, channels = tuple(pixels.shape[1:3]), pixels.shape[3]
        measured = policies.statistics(pixels) if policies.needs_statistics(policy) else None
        with _in_own_words():
            params = policies.sample(
                policy,
                indices,
                size=size,
                channels=channels,
                seed=seed,
                epoch=epoch,
                statistics=measured,
            )
        mix = None
        if policy.mixes:
            mix = policies.sample_mix(
                policy, indices, count=len(pixels), size=size, seed=seed, epoch=epoch
            )
            assert mix is not None
            mix.partner.copy_(rows.roll(-1))
        out = augment_unchecked(
            pixels,
            rows,
            params,
            normalization(mean, std),
            mix=mix,
            padding=policy.padding,
            dtype=self.dtype,
            noise=policy.noise,
        )
        if labels is None:
            return out
        if mix is not None:
            assert self.classes is not None  # as _check_labels found
            weights = mix.label_weights(*size)
            labels = policies.mixed_labels(labels, labels.roll(-1), weights, self.classes)
        return out, labels

    def _pixels(self, images: Tensor) -> Tensor:
        """uint8 ``[B, H, W, C]``, contiguous."""
        shape = f"{images.dtype} {list(images.shape)}"
        if images.dim() != 4 or 0 in images.shape:
            raise ResfastError(f"images are {shape}; expected [B, H, W, C] or [B, C, H, W]")
        layout = self.layout
        if layout == "auto":
            is_last, is_first = images.shape[3] <= MAX_CHANNELS, images.shape[1] <= MAX_CHANNELS
            if is_last == is_first:
                raise ResfastError(
                    f"images are {shape}, and which axis has the channels is not clear: pass "
                    "layout='NHWC' or 'NCHW'"
                )
            layout = "NHWC" if is_last else "NCHW"
        if layout == "NCHW":
            images = images.permute(0, 2, 3, 1)
        if images.shape[3] > MAX_CHANNELS:
            raise ResfastError(
                f"images are {shape} with {images.shape[3]} channels in {layout}; expected 1 to "
                f"{MAX_CHANNELS}"
            )
        if images.dtype.is_floating_point:
            if not images.is_cuda and not torch.compiler.is_compiling():  # would wait for a GPU
                low, high = (float(value) for value in images.detach().aminmax())
                if not (low >= 0 and high <= 1):
                    raise ResfastError(
                        f"images are {images.dtype} from {low:g} to {high:g}; expected 0 to "
                        "1, not yet normalized, or uint8"
                    )
            images = (images.detach().float() * 255).round().to(torch.uint8)
        elif images.dtype != torch.uint8:
            raise ResfastError(f"images are {images.dtype}; expected uint8, or floats from 0 to 1")
        return images.contiguous()

    def _check_labels(self, labels: Tensor | None, pixels: Tensor) -> None:
        mixes = self.policy.mixes and self.training
        if labels is None:
            if mixes:
                raise ResfastError(
                    f"the policy {str(self.policy)!r} mixes images, which mixes their labels: pass "
                    "labels, or leave out mixup and cutmix"
                )
            return
        if labels.dtype != torch.int64 or list(labels.shape) != [len(pixels)]:
            raise ResfastError(
                f"labels are {labels.dtype} {list(labels.shape)}; expected int64 [{len(pixels)}], "
                "one for each image"
            )
        if labels.device != pixels.device:
            raise ResfastError(
                f"labels are on {labels.device}; expected {pixels.device}, as images"
            )
        if mixes and self.classes is None:
            raise ResfastError(
                f"the policy {str(self.policy)!r} mixes labels: pass classes=N to Augment"
            )
        if self.classes is None or labels.is_cuda or torch.compiler.is_compiling():
            return
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= self.classes:
            raise ResfastError(
                f"labels are from {low} to {high}; expected 0 to {self.classes - 1}, as there are "
                f"{self.classes} classes"
            )

    def _keys(
        self, pixels: Tensor, epoch: int | None, indices: Tensor | None
    ) -> tuple[int, int, Tensor]:
        """Seed, epoch and index of each image, which determine its parameters."""
        if (epoch is None) != (indices is None):
            raise ResfastError("epoch and indices belong together: pass both, or neither")
        if epoch is not None and indices is not None:
            if not 0 <= epoch < 2**31:
                raise ResfastError(f"epoch is {epoch}; expected 0 to 2**31 - 1")
            if indices.dtype != torch.int64 or list(indices.shape) != [len(pixels)]:
                raise ResfastError(
                    f"indices are {indices.dtype} {list(indices.shape)}; expected int64 "
                    f"[{len(pixels)}], one for each image"
                )
            return self.seed, epoch, indices.to(pixels.device)
        rows = torch.arange(len(pixels), device=pixels.device)
        if not self.training:
            return self.seed, 0, rows
        if self.generator is not None:
            return int(torch.randint(2**62, (), generator=self.generator)), 0, rows
        # Rows of a call, not images: a flip that alternates with the epoch is then random.
        self.calls += 1
        return self.seed, 0, rows + self.calls.to(rows.device) * 2**32


class DeviceLoader:
    """Augmented batches of a data set that stays on the training device, or of another loader.

    ``for images, labels in loader`` is an epoch; the next one begins the next epoch. Under
    ``torch.distributed`` each rank gets its part of every batch.

    Args:
        source: a pair of tensors (images uint8 ``[N, H, W, C]`` or ``[N, C, H, W]``, labels int64
            ``[N]``); a data set of ``torch.utils.data`` with a length, whose items (image, label)
            are of one size (PIL images, arrays or uint8 tensors), read once into memory; or any
            iterable of batches, such as DALI's iterators, which are augmented as they come.
        batch_size: images per batch and rank; for an iterable of batches leave it out.
        augment: an :class:`Augment`, or what it takes as its policy.
        shuffle: whether the order changes from epoch to epoch.
        drop_last: skip an incomplete last batch.
        device: of the batches.
        rank: rank of this process; by default that of ``torch.distributed``, or 0.
        world: number of ranks; likewise, or 1.

    Raises:
        ResfastError: a source, batch size or rank that does not fit.
    """

    def __init__(
        self,
        source: Any,
        batch_size: int | None = None,
        augment: Augment | policies.Augment | str = "standard",
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        device: torch.device | str = "cpu",
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        self.augment = augment if isinstance(augment, Augment) else Augment(augment)
        self.device, self.shuffle, self.drop_last = torch.device(device), shuffle, drop_last
        self.augment.to(self.device)
        self.epoch, self.batches = 0, None
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        self.rank = rank
        self.world = world or (torch.distributed.get_world_size() if distributed else 1)
        if not 0 <= self.rank < self.world:
            raise ResfastError(f"rank is {self.rank}; expected 0 to {self.world - 1}")
        tensors = _tensors(source)
        if tensors is None:
            if batch_size is not None:
                raise ResfastError(
                    f"batch_size is {batch_size}, but {type(source).__name__} yields batches of "
                    "its own: leave it out"
                )
            self.batches, self.batch_size = source, 0
            return
        self.images, self.labels = (tensor.to(self.device) for tensor in tensors)
        most = len(self.images) // self.world
        if batch_size is None or not 1 <= batch_size <= most:
            raise ResfastError(
                f"batch_size is {batch_size}; expected 1 to {most} for {len(self.images):,} images"
            )
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        if self.batches is not None:
            return len(self.batches)
        whole, rest = divmod(len(self.images), self.batch_size * self.world)
        return whole + (rest >= self.world and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """The epoch, from 0, of the next iteration; for resuming."""
        if epoch < 0:
            raise ResfastError(f"epoch is {epoch}; expected at least 0")
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch: images ``[B, C, H, W]`` and labels, as from :class:`Augment`."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        if self.batches is not None:
            for batch in self.batches:
                images, labels = _pair(batch)
                yield self.augment(images.to(self.device), labels.to(self.device))
            return
        count, size = len(self.images), self.batch_size * self.world
        if self.shuffle:
            order = shuffle(count, seed=self.augment.seed, epoch=epoch, device=self.device)
        else:
            order = torch.arange(count, device=self.device)
        for step in range(len(self)):
            rows = order[step * size : (step + 1) * size].tensor_split(self.world)[self.rank]
            yield self.augment(self.images[rows], self.labels[rows], epoch=epoch, indices=rows)


def _normalization(augment: Augment, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32 ``[C]``, on the device of the images."""
    channels = pixels.shape[3]
    found = []
    for name in ("mean", "std"):
        value = getattr(augment, name)
        if len(value) not in (1, channels):
            raise ResfastError(
                f"{name} has {len(value)} channels, and the images {channels}; expected the same"
            )
        found.append(value.to(pixels.device).expand(channels).contiguous())
    return found[0], found[1]


def _tensors(source: Any) -> tuple[Tensor, Tensor] | None:
    """Images and labels in memory, or None for an iterable of batches."""
    if isinstance(source, tuple | list):
        if len(source) != 2 or not all(isinstance(part, Tensor) for part in source):
            raise ResfastError(
                f"source is a {type(source).__name__} of {len(source)}; expected a pair of "
                "tensors, images and labels"
            )
        images, labels = source
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        images, labels = _read(source)
    elif hasattr(source, "__iter__"):
        return None
    else:
        raise ResfastError(
            f"source is a {type(source).__name__}; expected a pair of tensors, a data set with a "
            "length, or an iterable of batches"
        )
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ResfastError(
            f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, H, W, C] or "
            "[N, C, H, W]"
        )
    if list(labels.shape) != [len(images)] or labels.dtype != torch.int64:
        raise ResfastError(
            f"labels are {labels.dtype} {list(labels.shape)}; expected int64 [{len(images)}]"
        )
    return images, labels


def _read(source: Any) -> tuple[Tensor, Tensor]:
    """All items of a data set of ``torch.utils.data``."""
    import numpy as np

    images: list[Tensor] = []
    labels: list[int] = []
    for row in range(len(source)):
        item = source[row]
        try:
            image, label = item
            image = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
            image = image[..., None] if image.dim() == 2 else image
            labels.append(int(label))
        except (TypeError, ValueError) as error:
            raise ResfastError(
                f"item {row} of {type(source).__name__} is not an image and a label ({error})"
            ) from error
        if image.dtype != torch.uint8 or image.shape != (images[0] if images else image).shape:
            raise ResfastError(
                f"image {row} of {type(source).__name__} is {image.dtype} {list(image.shape)}; "
                "expected uint8 and all of one size: leave out transforms to tensors, resize before"
            )
        images.append(image)
    if not images:
        raise ResfastError(f"{type(source).__name__} is empty; expected at least one image")
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch of some loader; DALI's are lists of dicts, one per GPU."""
    if isinstance(batch, list | tuple) and len(batch) == 1 and isinstance(batch[0], dict):
        batch = list(batch[0].values())
    if not (isinstance(batch, list | tuple) and len(batch) == 2):
        raise ResfastError(f"a batch is a {type(batch).__name__}; expected images and labels")
    images, labels = (torch.as_tensor(part) for part in batch)
    return images, labels.reshape(-1).to(torch.int64)


def _channels(name: str, value: float | Sequence[float] | Tensor) -> Tensor:
    """float32 ``[C]``, checked."""
    tensor = torch.as_tensor(value, dtype=torch.float32).detach().reshape(-1)
    low, bound = (0.0, "at least 0") if name == "mean" else (1e-6, "above 0")
    if not (1 <= len(tensor) <= MAX_CHANNELS and bool(((tensor >= low) & (tensor <= 1)).all())):
        shown = [round(channel, 4) for channel in tensor.tolist()]
        raise ResfastError(
            f"{name} is {shown}; expected a value for each of 1 to {MAX_CHANNELS} channels, "
            f"{bound} and at most 1, in units of pixel / 255"
        )
    return tensor


@contextlib.contextmanager
def _in_own_words() -> Iterator[None]:
    """Errors of policies without the name of the command line's option."""
    try:
        yield
    except ResfastError as error:
        raise ResfastError(str(error).replace("--augment ", "")) from None
