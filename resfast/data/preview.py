"""A contact sheet of augmentation policies, produced by the operator that training uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from resfast.data.augment import (
    Augment,
    check_augment,
    mixed_labels,
    order,
    sample,
    sample_mix,
    statistics,
)
from resfast.data.batches import split_sources
from resfast.data.dataset import Dataset
from resfast.data.duplicates import Pair
from resfast.data.statistics import channel_mean_std
from resfast.errors import ResfastError
from resfast.ops.augment.op import MixParams, augment
from resfast.text import printable

MAX_IMAGES = 100

_CELL, _GAP, _MARGIN, _SIDE_LABEL = 96, 6, 20, 70  # pixels
_TITLE_SIZE, _TEXT_SIZE, _CAPTION_SIZE = 17, 13, 11
_BACKGROUND, _INK, _PALE_INK, _RULE = "#ffffff", "#1a1a1a", "#5c5c5c", "#d8d8d8"


def contact_sheet(
    dataset: Dataset,
    policies: Mapping[str, Augment],
    *,
    images: int = 10,
    seed: int = 0,
    epochs: Sequence[int] = (0, 1),
) -> Image.Image:
    """Training images without augmentation, and then under each policy in each epoch.

    Every image is a separate batch, so that a row shows several draws of the parameters that are
    shared by a batch (MixUp or CutMix, lambda and box). Otherwise the images are what training with
    this seed sees in these epochs.

    Args:
        dataset: its training images are shown, from as many classes as fit.
        policies: heading to policy.
        images: images per row, 1 to 100 and at most the size of the training set.
        seed: seed for choosing the images and for augmentation.
        epochs: epochs to show; each policy gets one row per epoch.

    Returns:
        The sheet, RGB.

    Raises:
        ResfastError: a number out of range, or a policy that does not fit the images.
    """
    limit = min(MAX_IMAGES, len(dataset.train_images))
    if not 1 <= images <= limit:
        raise ResfastError(f"--images {images} is out of range: expected 1 to {limit}")
    if not epochs or not all(0 <= epoch < 2**32 for epoch in epochs):
        raise ResfastError(
            f"--epochs {' '.join(map(str, epochs)) or '(none)'}: expected one or more, counted "
            "from 0"
        )
    height, width = dataset.train_images.shape[1:3]
    for policy in policies.values():
        check_augment(policy, height, width)
    chosen = _one_of_each_class(dataset, images, seed)
    mean, std = channel_mean_std(dataset.train_images)
    names = [dataset.classes[label] for label in dataset.train_labels[chosen].tolist()]

    sheet = _Sheet(images, height, width)
    sheet.heading(
        f"{dataset.name}: training images, {width} x {height} pixels, seed {seed}", "", rule=False
    )
    sheet.captions([[name] for name in names])
    sheet.images("plain", dataset.train_images[chosen])
    for heading, policy in policies.items():
        sheet.heading(heading, str(policy))
        for epoch in epochs:
            pixels, labels = augmented(dataset, policy, chosen, mean, std, seed=seed, epoch=epoch)
            sheet.images(f"epoch {epoch}", pixels)
            if policy.mixes:
                sheet.captions([_label_lines(row, dataset.classes) for row in labels])
    return sheet.finish()


def sample_grid(dataset: Dataset, *, images: int = 10, seed: int = 0) -> Image.Image:
    """Training images without augmentation, a row for each class.

    Args:
        dataset: its training images are shown, drawn at random without repetition.
        images: images per row, 1 to 100; a class with fewer has a shorter row.
        seed: seed for choosing the images.

    Returns:
        The grid, RGB.

    Raises:
        ResfastError: a number out of range.
    """
    if not 1 <= images <= MAX_IMAGES:
        raise ResfastError(f"--images {images} is out of range: expected 1 to {MAX_IMAGES}")
    height, width = dataset.train_images.shape[1:3]
    shuffled = order(len(dataset.train_labels), seed=seed, epoch=0, device="cpu")
    labels = dataset.train_labels[shuffled]
    sheet = _Sheet(images, height, width)
    sheet.heading(
        f"{dataset.name}: training images, {width} x {height} pixels, seed {seed}", "", rule=False
    )
    for label, name in enumerate(dataset.classes):
        chosen = shuffled[labels == label][:images]
        sheet.images(
            _shortened(name, sheet.text_font, _SIDE_LABEL - 6), dataset.train_images[chosen]
        )
    return sheet.finish()


def duplicate_sheet(dataset: Dataset, pairs: Sequence[Pair], *, images: int = 10) -> Image.Image:
    """Pairs of images that are alike, one above the other.

    Of pairs across the splits, within the training images and within the test images, it shows
    those that are most alike, and then those that are least.

    Args:
        dataset: the data set.
        pairs: as :func:`resfast.data.duplicates.find_duplicates` returns them.
        images: pairs per row, 1 to 100.

    Raises:
        ResfastError: a number out of range.
    """
    if not 1 <= images <= MAX_IMAGES:
        raise ResfastError(f"--images {images} is out of range: expected 1 to {MAX_IMAGES}")
    height, width = dataset.train_images.shape[1:3]
    sheet = _Sheet(images, height, width)
    sheet.heading(f"{dataset.name}: {len(pairs):,} pairs of images that are alike", "", rule=False)
    pixels = {"train": dataset.train_images, "test": dataset.test_images}
    for title, first, second in (
        ("training and test images", "train", "test"),
        ("training images", "train", "train"),
        ("test images", "test", "test"),
    ):
        here = [pair for pair in pairs if (pair.first[0], pair.second[0]) == (first, second)]
        if not here:
            continue
        exact = sum(pair.exact for pair in here)
        sheet.heading(f"{title}: {len(here):,} pairs", f"{exact:,} with the same pixels")
        most = here[: 2 * images]
        least = here[2 * images :][-2 * images :]
        for name, shown in (("most alike", most), ("least alike", least)):
            for start in range(0, len(shown), images):
                row = shown[start : start + images]
                sheet.captions([_pair_lines(pair, dataset.classes) for pair in row])
                above = torch.stack([pixels[p.first[0]][p.first[1]] for p in row])
                below = torch.stack([pixels[p.second[0]][p.second[1]] for p in row])
                sheet.images(name, above)
                sheet.images("", below)
    return sheet.finish()


def _pair_lines(pair: Pair, classes: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(classes[label] for label in pair.labels))
    kind = "same pixels" if pair.exact else f"{pair.similarity:.3f}"
    return [" / ".join(names), kind + (", mirrored" if pair.mirrored else "")]


def class_plot(dataset: Dataset, *, val_fraction: float = 0.0, seed: int = 0) -> Figure:
    """Bars with the number of training, held-out and test images of each class.

    Args:
        dataset: the data set.
        val_fraction: fraction of the training images of each class to hold out, as in training.
        seed: seed of that choice.

    Raises:
        ResfastError: a part would be empty.
    """
    kept, held_out, test = split_sources(dataset, val_fraction, seed)
    count = len(dataset.classes)
    figure = Figure(figsize=(8, 1.6 + 0.28 * count), layout="constrained")
    axes = figure.subplots()
    left = torch.zeros(count, dtype=torch.int64)
    for name, source, color in (
        ("training", kept, "#1f6fb4"),
        ("held out", held_out, "#96650a"),
        ("test", test, "#c8442c"),
    ):
        if source is None:
            continue
        assert isinstance(source, tuple)
        counts = torch.bincount(source[1].cpu(), minlength=count)
        bars = axes.barh(range(count), counts.tolist(), left=left.tolist(), color=color, label=name)
        axes.bar_label(bars, label_type="center", color="white", fontsize=7, fmt="{:,.0f}")
        left += counts
    names = [printable(name).replace("$", r"\$") for name in dataset.classes]
    axes.set_yticks(range(count), names)
    axes.invert_yaxis()
    axes.set_xlabel("images")
    axes.set_title(printable(dataset.name).replace("$", r"\$"), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def augmented(
    dataset: Dataset,
    policy: Augment,
    indices: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """Training images after augmentation, each in a separate batch.

    Args:
        dataset: the data set.
        policy: the augmentation.
        indices: int64 ``[B]`` into the training images.
        mean: float32 ``[C]`` in units of pixel / 255; fills cutout's squares.
        std: float32 ``[C]``, in the same units.
        seed: seed of the run.
        epoch: epoch, from 0.

    Returns:
        Images uint8 ``[B, H, W, C]``, and their soft labels, float32 ``[B, classes]``.
    """
    images, labels = dataset.train_images, dataset.train_labels
    count, height, width, channels = images.shape
    size, batch = (height, width), len(indices)
    mixes = [
        sample_mix(policy, index, count=count, size=size, seed=seed, epoch=epoch)
        for index in indices.split(1)
    ]
    params_of_mixes = [mix for mix in mixes if mix is not None]
    sources, mix, soft_labels = (
        indices,
        None,
        mixed_labels(labels[indices], labels[indices], torch.ones(batch), len(dataset.classes)),
    )
    if params_of_mixes:
        partner = torch.cat([one.partner for one in params_of_mixes])
        sources = torch.cat([indices, partner])
        mix = MixParams(
            partner=torch.arange(batch, 2 * batch),
            weight=torch.cat([one.weight for one in params_of_mixes]),
            box=torch.cat([one.box for one in params_of_mixes]),
        )
        soft_labels = mixed_labels(
            labels[indices], labels[partner], mix.label_weights(*size), len(dataset.classes)
        )
    source_images = images[sources]
    params = sample(
        policy,
        sources,
        size=size,
        channels=channels,
        seed=seed,
        epoch=epoch,
        statistics=statistics(source_images),
    )
    result = augment(
        source_images,
        torch.arange(batch),
        params,
        mean,
        std,
        mix=mix,
        padding=policy.padding,
        noise=policy.noise,
    ).permute(0, 2, 3, 1)
    pixels = (result * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8), soft_labels


def _one_of_each_class(dataset: Dataset, images: int, seed: int) -> Tensor:
    """Indices of random training images: one per class, then a second per class, and so on."""
    shuffled = order(len(dataset.train_labels), seed=seed, epoch=0, device="cpu")
    labels = dataset.train_labels[shuffled]
    by_class = [shuffled[labels == label].tolist() for label in range(len(dataset.classes))]
    interleaved = (index for turn in zip_longest(*by_class) for index in turn if index is not None)
    return torch.tensor(list(islice(interleaved, images)))


def _label_lines(row: Tensor, classes: Sequence[str]) -> list[str]:
    """The classes of a soft label, largest first, in per cent that add up to 100."""
    largest = int(row.argmax())
    percent = round(100 * float(row[largest]))
    lines = [f"{percent} % {classes[largest]}"]
    if percent < 100:
        rest = row.clone()
        rest[largest] = -1
        lines.append(f"{100 - percent} % {classes[int(rest.argmax())]}")
    return lines


class _Sheet:
    """Rows of images with labels, drawn from top to bottom."""

    def __init__(self, columns: int, height: int, width: int) -> None:
        factor = max(1, round(_CELL / max(height, width)))
        self.cell_height, self.cell_width = factor * height, factor * width
        self.columns = columns
        self.width = 2 * _MARGIN + _SIDE_LABEL + columns * (self.cell_width + _GAP) - _GAP
        self.strips: list[Image.Image] = []
        # Pillow's built-in font has too few characters; this one comes with matplotlib.
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.title_font = ImageFont.truetype(fonts / "DejaVuSans-Bold.ttf", _TITLE_SIZE)
        self.text_font = ImageFont.truetype(fonts / "DejaVuSans.ttf", _TEXT_SIZE)
        self.caption_font = ImageFont.truetype(fonts / "DejaVuSans.ttf", _CAPTION_SIZE)

    def heading(self, title: str, text: str, rule: bool = True) -> None:
        """A title with ``text`` below it, wrapped at commas, and optionally a line above."""
        width = self.width - 2 * _MARGIN
        titles = _wrapped(title, self.title_font, width)
        lines = [] if text == title else _wrapped(text, self.text_font, width)
        above = 14
        _, draw = self._strip(above + 26 * len(titles) + 20 * len(lines) + 4)
        if rule:
            draw.line((_MARGIN, 6, self.width - _MARGIN, 6), fill=_RULE)
        y = above
        for lines_here, font, ink, step in (
            (titles, self.title_font, _INK, 26),
            (lines, self.text_font, _PALE_INK, 20),
        ):
            for line in lines_here:
                draw.text((_MARGIN, y), line, font=font, fill=ink)
                y += step

    def images(self, label: str, pixels: Tensor) -> None:
        """A row of uint8 ``[B, H, W, 3]`` images, enlarged without smoothing."""
        strip, draw = self._strip(self.cell_height + _GAP)
        middle = self.cell_height / 2
        draw.text((_MARGIN, middle), label, font=self.text_font, fill=_INK, anchor="lm")
        for column, image in enumerate(pixels):
            cell = Image.fromarray(image.numpy()).resize(
                (self.cell_width, self.cell_height), Image.Resampling.NEAREST
            )
            strip.paste(cell, (self._left(column), 0))

    def captions(self, columns: Sequence[Sequence[str]]) -> None:
        """Lines of small text below (or above) each image, shortened to its width."""
        step = _CAPTION_SIZE + 3
        _, draw = self._strip(step * max(map(len, columns)) + _GAP)
        for column, lines in enumerate(columns):
            x = self._left(column) + self.cell_width / 2
            for number, line in enumerate(lines):
                line = _shortened(line, self.caption_font, self.cell_width)
                y = number * step
                draw.text((x, y), line, font=self.caption_font, fill=_INK, anchor="ma")

    def finish(self) -> Image.Image:
        """The finished sheet: all rows, top to bottom."""
        height = sum(strip.height for strip in self.strips) + _MARGIN
        sheet = Image.new("RGB", (self.width, height), _BACKGROUND)
        y = 0
        for strip in self.strips:
            sheet.paste(strip, (0, y))
            y += strip.height
        return sheet

    def _strip(self, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        strip = Image.new("RGB", (self.width, height), _BACKGROUND)
        self.strips.append(strip)
        return strip, ImageDraw.Draw(strip)

    def _left(self, column: int) -> int:
        return _MARGIN + _SIDE_LABEL + column * (self.cell_width + _GAP)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """``text`` in lines no wider than ``width``, broken after commas where possible."""
    lines = [""]
    for piece in printable(text).replace(",", ",\0").split("\0"):
        if lines[-1] and font.getlength(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return [_shortened(line, font, width) for line in lines if line]
