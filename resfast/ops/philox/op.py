"""``resfast::philox``: random numbers that are a function of (seed, epoch, stream, index) alone.

The counter-based generator Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011). A sample's numbers do not depend on how many are drawn, in which order, by which
worker or on which device, and nothing has to be saved to draw them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..augment import reference
from ..registration import fallback, register

SCHEMA = "philox(Tensor indices, int seed, int epoch, int stream) -> Tensor"


def philox(indices: Tensor, *, seed: int, epoch: int, stream: int) -> Tensor:
    """Four random words for each index.

    Args:
        indices: int64 ``[B]``, any values; the low and high half of each are the first two
            counter words.
        seed: the key, modulo 2^64.
        epoch: the third counter word, 0 to 2^32 - 1.
        stream: the fourth; draws of different streams are independent.

    Returns:
        int64 ``[4, B]`` of values 0 to 2^32 - 1, on the device of ``indices``.

    Raises:
        TypeError: ``indices`` is not int64.
        ValueError: ``indices`` is not one-dimensional, or a counter word is out of range.
    """
    if indices.dtype != torch.int64:
        raise TypeError(f"indices are {indices.dtype}; expected int64")
    if indices.ndim != 1:
        raise ValueError(f"indices are {list(indices.shape)}; expected [B]")
    for name, word in (("epoch", epoch), ("stream", stream)):
        if not 0 <= word < 2**32:
            raise ValueError(f"{name} {word} is out of range; expected 0 to 2^32 - 1")
    seed &= 0xFFFFFFFFFFFFFFFF
    signed = seed - 2**64 if seed >= 2**63 else seed  # an operator takes int64
    return torch.ops.resfast.philox(indices.contiguous(), signed, epoch, stream)


def uniform(words: Tensor) -> Tensor:
    """float32 in [0, 1), exact multiples of 2^-24, from words of :func:`philox`."""
    return (words >> 8).to(torch.float32) * 2**-24


def _cuda(indices: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    from . import triton as triton_philox

    return triton_philox.philox(indices, seed, epoch, stream)


def _fake(indices: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    return indices.new_empty((4, *indices.shape))


register(SCHEMA, cpu=fallback(reference.philox), cuda=_cuda, fake=_fake, opaque=True)
