"""Augmentation: the policy, which is data, and the sampler, which draws parameters from it.

What is drawn for an image is a pure function of (policy, seed, epoch, index of the image): it does
not depend on the batch, on the number of workers or ranks, or on the device, and nothing has to be
saved to draw it again. :func:`resfast.ops.augment.op.augment` carries it out.

Shapes: N images in the data set, B rows, H x W pixels, C channels.
"""

from resfast.data.augment.geometry import LOG_RATIO, affine_maps
from resfast.data.augment.image_statistics import statistics
from resfast.data.augment.mixing import mixed_labels, sample_mix, sample_mixes
from resfast.data.augment.policy import (
    POLICIES,
    Augment,
    Flip,
    check_augment,
    needs_statistics,
    parse_augment,
)
from resfast.data.augment.resizing import ResizeBy, crop_words, cropped, resized, smaller
from resfast.data.augment.sampling import sample
from resfast.data.augment.streams import WINDOW_STREAM, generator, order

__all__ = [
    "LOG_RATIO",
    "POLICIES",
    "WINDOW_STREAM",
    "Augment",
    "Flip",
    "ResizeBy",
    "affine_maps",
    "check_augment",
    "crop_words",
    "cropped",
    "generator",
    "mixed_labels",
    "needs_statistics",
    "order",
    "parse_augment",
    "resized",
    "sample",
    "sample_mix",
    "sample_mixes",
    "smaller",
    "statistics",
]
