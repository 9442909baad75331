"""``resfast::philox`` on CUDA: one Triton kernel, Philox 4x32-10 (Salmon et al., SC 2011)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit(do_not_specialize=["count", "key_low", "key_high", "epoch", "stream"])
def _philox_kernel(out, indices, count, key_low, key_high, epoch, stream, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + at, mask=at < count, other=0)
    a, b = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    c = tl.full((BLOCK,), 0, tl.uint32) + epoch.to(tl.uint32)
    d = tl.full((BLOCK,), 0, tl.uint32) + stream.to(tl.uint32)
    first, second = key_low.to(tl.uint32), key_high.to(tl.uint32)
    for _ in tl.static_range(10):
        e, f = tl.umulhi(c, 0xCD9E8D57) ^ b ^ first, tl.umulhi(a, 0xD2511F53) ^ d ^ second
        b, d = c * 0xCD9E8D57, a * 0xD2511F53
        a, c = e, f
        first, second = first + 0x9E3779B9, second + 0xBB67AE85
    target, mask = out + at, at < count
    tl.store(target, a.to(tl.int64), mask=mask)
    tl.store(target + count, b.to(tl.int64), mask=mask)
    tl.store(target + 2 * count.to(tl.int64), c.to(tl.int64), mask=mask)
    tl.store(target + 3 * count.to(tl.int64), d.to(tl.int64), mask=mask)


def philox(indices: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    """Launches the kernel; arguments and result as for :func:`resfast.ops.philox.op.philox`."""
    count = len(indices)
    out = torch.empty((4, count), dtype=torch.int64, device=indices.device)
    if count:
        words = (_word(seed), _word(seed >> 32), _word(epoch), _word(stream))
        with torch.cuda.device_of(indices):
            _philox_kernel[(triton.cdiv(count, BLOCK),)](out, indices, count, *words, BLOCK=BLOCK)
    return out


def _word(value: int) -> int:
    """The low 32 bits as int32; Triton would compile another kernel for a wider integer."""
    return (value + 2**31) % 2**32 - 2**31
