"""What :func:`resfast.fuse` fused, what it did not, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FusionReport:
    """What :func:`fuse` did; ``str(report)`` is readable text.

    Attributes:
        convolutions: convolutions that run as one fused kernel each.
        batch_norms: batch norms folded into a convolution or a linear layer, including
            convolutions in ``left``.
        residuals: residual additions fused into a convolution.
        activations: activations fused into a convolution.
        left: name of each convolution and batch norm that could not be fused, and of each addition
            and activation after a convolution that could not, and the reason. Such a batch norm
            runs as one operation with the activation after it and the concatenation before it.
        traced_by: ``torch.fx`` or ``torch.export``.
        rest: name of each activation, addition, concatenation and pool that is an operation of its
            own in the fused network, and the reason.
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
    rest: tuple[tuple[str, str], ...] = ()

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
        lines += by_reason("not fused", self.left)
        named = {name for name, _ in self.left}
        lines += by_reason("kept", [pair for pair in self.rest if pair[0] not in named])
        return "\n".join(lines)


def by_reason(what: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason, with the first few names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in pairs:
        reasons.setdefault(reason, []).append(name)
    return [
        f"{len(names)} {what}: {reason} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
        for reason, names in reasons.items()
    ]
