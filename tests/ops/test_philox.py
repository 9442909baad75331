"""``philox``: its known answers, and every kernel against the reference.

``operator`` is the registered operator on the CPU (C++ if it was built), ``interpreter`` the Triton
kernel run by Triton's interpreter, ``cuda`` the same kernel on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resfast.ops.augment import reference
from resfast.ops.philox import op as philox
from tests.triton_code import compiled, interpreted, triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
KERNELS = ("operator", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu))
KNOWN = [  # counter, key and result of Random123's kat_vectors, philox4x32 10
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def run(kernel: str, indices: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    signed = (seed + 2**63) % 2**64 - 2**63
    if kernel == "reference":
        return reference.philox(indices, signed, epoch, stream)
    if kernel == "interpreter":
        return interpreted("philox").philox(indices, signed, epoch, stream)
    if kernel == "cuda":
        indices = indices.cuda()
    return philox.philox(indices, seed=seed, epoch=epoch, stream=stream).cpu()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_has_the_known_answers(kernel: str, counter: str, key: str, expected: str) -> None:
    words = [int(word, 16) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    index = (words[0] + (words[1] << 32) + 2**63) % 2**64 - 2**63
    result = run(kernel, torch.tensor([index]), low + (high << 32), words[2], words[3])
    assert result.dtype == torch.int64
    assert [f"{word:08x}" for word in result[:, 0].tolist()] == expected.split()


@pytest.mark.parametrize("count", [0, 1, 511, 513, 2000])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_reference(kernel: str, count: int) -> None:
    indices = torch.randint(-(2**63), 2**63 - 1, (count,))
    for seed, epoch, stream in ((0, 0, 0), (2**64 - 1, 2**32 - 1, 2**31), (2**31, 1, 2)):
        result = run(kernel, indices, seed, epoch, stream)
        assert torch.equal(result, run("reference", indices, seed, epoch, stream))


def test_depends_on_the_index_alone_and_not_on_its_place() -> None:
    indices = torch.tensor([7, 3, 3, 2**33 + 3])
    words = philox.philox(indices, seed=5, epoch=1, stream=0)
    assert torch.equal(words[:, 1], words[:, 2])
    assert not torch.equal(words[:, 2], words[:, 3])
    alone = philox.philox(torch.tensor([3]), seed=5, epoch=1, stream=0)
    assert torch.equal(words[:, 1:2], alone)
    for other in ({"seed": 6}, {"epoch": 2}, {"stream": 1}):
        changed = philox.philox(indices, **{"seed": 5, "epoch": 1, "stream": 0, **other})
        assert not (changed == words).any()


def test_uniform_is_a_multiple_of_two_to_the_minus_24_below_one() -> None:
    ends = philox.uniform(torch.tensor([0, 255, 256, 2**32 - 1]))
    assert ends.tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]
    words = philox.philox(torch.arange(40_000), seed=0, epoch=0, stream=0)
    values = philox.uniform(words)
    counts = torch.stack([torch.histc(row, 50, 0, 1) for row in values])
    chi_square = ((counts - 800) ** 2 / 800).sum(1)
    assert (chi_square < 94).all()  # 49 degrees of freedom: 94 is passed once in 10,000
    assert torch.corrcoef(values).fill_diagonal_(0).abs().max() < 0.02  # 4 standard deviations


@pytest.mark.parametrize(
    ("indices", "words", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int32), (0, 0), TypeError, "int32; expected int64"),
        (torch.zeros(3, 1, dtype=torch.int64), (0, 0), ValueError, r"\[3, 1\]; expected \[B\]"),
        (torch.zeros(3, dtype=torch.int64), (-1, 0), ValueError, "epoch -1 .* expected 0 to"),
        (torch.zeros(3, dtype=torch.int64), (0, 2**32), ValueError, "stream 4294967296 .* 0 to"),
    ],
)
def test_says_what_is_wrong(
    indices: Tensor, words: tuple[int, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        philox.philox(indices, seed=0, epoch=words[0], stream=words[1])


@pytest.mark.parametrize("device", DEVICES)
def test_passes_opcheck(device: str) -> None:
    indices = torch.tensor([0, 5, -1, 2**40], device=device)
    torch.library.opcheck(torch.ops.resfast.philox.default, (indices, 7, 3, 2**32 - 1))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_for_the_architecture(capability: int) -> None:
    kernels = triton_kernels("philox")
    signature = {"out": "*i64", "indices": "*i64"}
    signature |= dict.fromkeys(("count", "key_low", "key_high", "epoch", "stream"), "i32")
    constants = {"BLOCK": kernels.BLOCK}
    made = compiled(kernels._philox_kernel, signature, constants, capability)
    assert made.asm["cubin"]
