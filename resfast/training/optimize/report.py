"""What :func:`resfast.optimize` replaced, what it did not, and why."""

from __future__ import annotations

from dataclasses import dataclass

from resfast.inference.fuse.report import by_reason


@dataclass(frozen=True)
class OptimizationReport:
    """What :func:`resfast.optimize` did; ``str(report)`` is readable text.

    A replaced module uses a kernel of ours where one applies to its input: ``channels_last``
    images on the CPU, computed in bfloat16, with gradients.

    Attributes:
        convolutions: convolutions that are replaced.
        batch_norms: batch norms that are replaced, including those in fused calls.
        activations: activations that are computed with the norm or addition before them.
        residuals: residual additions that are computed with the norm before or the ReLU after them.
        blocks: modules whose forward is rewritten for that.
        dtype: compute dtype in training.
        channels_last: whether contiguous images are converted to ``channels_last``.
        optimizer: what changed about the optimizer, or why nothing did.
        left: name of each convolution, batch norm and rewritable forward that was left alone, and
            the reason.
    """

    convolutions: int
    batch_norms: int
    activations: int
    residuals: int
    blocks: int
    dtype: str
    channels_last: bool
    optimizer: str
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        images = "are converted to" if self.channels_last else "use the kernels if they are in"
        lines = [
            f"{self.convolutions} convolutions and {self.batch_norms} batch norms replaced, "
            f"{self.activations} activations and {self.residuals} residual additions computed with "
            f"them in {self.blocks} rewritten forwards",
            f"computed in {self.dtype}; images {images} channels_last",
            f"optimizer: {self.optimizer}",
        ]
        return "\n".join([*lines, *by_reason("left", self.left)])
