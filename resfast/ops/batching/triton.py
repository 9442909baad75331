"""A step's bookkeeping on CUDA, in Triton: which images are next, and the metrics of a step.

One program each, where PyTorch's operators would be a dozen launches a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
"""Images handled at a time."""


@triton.jit(do_not_specialize=["images", "count"])
def _next_kernel(
    indices, batch_labels, positions, order, labels, position, images, count, BLOCK: tl.constexpr
):
    first = tl.load(position)
    tl.debug_barrier()  # all threads have read it
    for start in range(0, images, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = (first + i) % count
        index = tl.load(order + at, mask=i < images, other=0)
        label = tl.load(labels + index, mask=i < images, other=0)
        tl.store(positions + i, at, mask=i < images)
        tl.store(indices + i, index, mask=i < images)
        tl.store(batch_labels + i, label, mask=i < images)
    tl.store(position, first + images)


@triton.jit(do_not_specialize=["images", "steps"])
def _record_kernel(
    losses,
    correct,
    step,
    image_losses,
    loss,
    right,
    batch_losses,
    indices,
    images,
    steps,
    BLOCK: tl.constexpr,
):
    number = tl.load(step)
    total = tl.load(correct) + tl.load(right)
    tl.debug_barrier()  # all threads have read them
    tl.store(losses + number % steps, tl.load(loss))
    tl.store(correct, total)
    tl.store(step, number + 1)
    if image_losses is not None:
        for start in range(0, images, BLOCK):
            i = start + tl.arange(0, BLOCK)
            index = tl.load(indices + i, mask=i < images, other=0)
            value = tl.load(batch_losses + i, mask=i < images, other=0)
            tl.store(image_losses + index, value, mask=i < images)


def next_batch(
    order: Tensor, labels: Tensor, position: Tensor, images: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The next images of an order; ``position`` is advanced past them.

    Args:
        order: int64 ``[N]``.
        labels: int64 ``[N]``, of the data set.
        position: int64 ``[1]``, where in the order to begin.
        images: B, how many.
        count: length of the part of the order that is repeated.

    Returns:
        Indices in the data set, labels and positions in the order, int64 ``[B]`` each.
    """
    indices, batch_labels, positions = (order.new_empty(images) for _ in range(3))
    with torch.cuda.device_of(order):
        _next_kernel[(1,)](
            indices, batch_labels, positions, order, labels, position, images, count, BLOCK=BLOCK
        )
    return indices, batch_labels, positions


def record_step(
    losses: Tensor,
    correct: Tensor,
    step: Tensor,
    image_losses: Tensor | None,
    loss: Tensor,
    right: Tensor,
    batch_losses: Tensor | None,
    indices: Tensor | None,
) -> None:
    """Records a step; the arguments are the tensors of
    ``resfast.training.step_metrics.StepMetrics`` and those of its ``add``."""
    images = 0 if image_losses is None else len(indices)
    with torch.cuda.device_of(losses):
        _record_kernel[(1,)](
            losses, correct, step, image_losses, loss, right, batch_losses, indices, images,
            len(losses), BLOCK=BLOCK,
        )  # fmt: skip
