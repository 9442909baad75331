"""Augmentation: the policy, which is data, and the sampler, which draws random parameters from it.

The parameters of an image are a pure function of (policy, seed, epoch, index of the image): they
do not depend on the batch, the number of workers or ranks, or the device, and can be drawn again
without saved state. :func:`resfast.ops.augment.op.augment` applies them.

Shapes: N images in the data set, B rows, H x W pixels, C channels.
"""

from resfast.data.augment.geometry import LOG_RATIO, affine_maps
from resfast.data.augment.image_statistics import statistics
from resfast.data.augment.mixing import mixed_labels, prepare_mixing, sample_mix, sample_mixes
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
    "prepare_mixing",
    "resized",
    "sample",
    "sample_mix",
    "sample_mixes",
    "smaller",
    "statistics",
]
