"""What :func:`resfast.fuse` fused, what it did not, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse` did; ``str(report)`` is readable text.

    Attributes:
        convolutions: convolutions that run as one fused kernel each.
        batch_norms: batch norms folded into a convolution, including convolutions in ``left``.
        residuals: residual additions fused into a convolution.
        activations: activations fused into a convolution.
        left: name of each convolution, batch norm, addition or activation not fused, and the
            reason.
        traced_by: ``torch.fx`` or ``torch.export``.
        blocks: pairs of the fused convolutions that form a residual block, which a GPU can run as
            one kernel (:class:`~resfast.ops.basic_block.op.BasicBlock`).
        int8: those of the fused convolutions that run with 8-bit operands.
    """

    convolutions: int
    batch_norms: int
    residuals: int
    activations: int
    left: tuple[tuple[str, str], ...]
    traced_by: str
    blocks: int = 0
    int8: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.convolutions} convolutions fused into one kernel each ({self.residuals} with a "
            f"residual, {self.activations} with an activation); {self.batch_norms} batch norms "
            f"folded; traced by {self.traced_by}"
        ]
        if self.blocks:
            lines.append(f"{self.blocks} pairs of them form residual blocks")
        if self.int8:
            lines.append(f"{self.int8} of them in int8")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left:
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            lines.append(f"{len(names)} not fused: {reason} ({shown})")
        return "\n".join(lines)
