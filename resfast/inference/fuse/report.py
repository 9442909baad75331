"""What :func:`resfast.fuse` did to a network, and why it left what it left."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse` did; ``str`` of it is the text.

    Attributes:
        convolutions: convolutions that became one kernel each.
        batch_norms: batch norms folded into a convolution, those of ``left`` ones among them.
        residuals: additions of a residual that a convolution's kernel does.
        activations: activations that a convolution's kernel does.
        left: name of each convolution, batch norm, addition or activation that was left, and why.
        traced_by: ``torch.fx`` or ``torch.export``.
        blocks: pairs of those convolutions that are a residual block, which a GPU can run as one
            kernel (:class:`~resfast.ops.basic_block.op.BasicBlock`).
    """

    convolutions: int
    batch_norms: int
    residuals: int
    activations: int
    left: tuple[tuple[str, str], ...]
    traced_by: str
    blocks: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.convolutions} convolutions are one kernel each ({self.residuals} with the "
            f"addition of a residual, {self.activations} with an activation); {self.batch_norms} "
            f"batch norms were folded; traced by {self.traced_by}"
        ]
        if self.blocks:
            lines.append(f"{self.blocks} pairs of them are a residual block")
        reasons: dict[str, list[str]] = {}
        for name, why in self.left:
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            lines.append(f"left {len(names)}: {why} ({shown})")
        return "\n".join(lines)
