"""``resfast.fuse`` on random networks: the original's values in float64, or a refusal."""

from __future__ import annotations

import copy
import os
import random
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import resfast
from resfast.errors import ResfastError
from resfast.ops.conv import choice as conv_choice
from resfast.ops.conv import cpu as conv_cpu
from resfast.ops.network import network as network_op
from tests.random_networks import HEADS, STEPS, Network

EXAMPLES = int(os.environ.get("RESFAST_FUSE_EXAMPLES", "200"))
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.06}
"""Largest error, relative to the largest value of the result."""


@pytest.fixture(autouse=True)
def any_algorithm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Convolutions take a random algorithm of those that apply; nothing is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("RESFAST_CONV", raising=False)
    monkeypatch.setattr(conv_choice, "MAX_SPREAD", -1.0)  # keeps nothing for other processes
    monkeypatch.setattr(
        conv_choice,
        "host_seconds",
        lambda calls, seconds=0.0: {name: [random.random()] for name in calls},
    )
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="RESFAST_FUSE_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(
    steps=STEPS,
    head=HEADS,
    size=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    with_example=st.booleans(),
    dtype=st.sampled_from(list(LIMITS)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_a_random_network_keeps_its_values(
    steps: list[dict[str, Any]],
    head: str,
    size: tuple[int, int],
    with_example: bool,
    dtype: torch.dtype,
    batch: int,
    seed: int,
) -> None:
    random.seed(seed)
    conv_cpu.CHOICES.forget()
    network_op.CHOICES.forget()
    shape = (2, 3, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = Network(copy.deepcopy(steps), head, shape, seed, False)
            exact = Network(copy.deepcopy(steps), head, shape, seed, True)
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(batch, *shape[1:], generator=generator)
            with torch.no_grad():
                expected = exact(x.double())
        except (RuntimeError, ValueError):  # no such network: the images become too small
            assume(False)
        try:
            fused = resfast.fuse(model, dtype, example=torch.randn(shape) if with_example else None)
        except ResfastError:
            return
        with torch.no_grad():
            result = fused(x.clone()).double()
            assert result.shape == expected.shape
            assert torch.equal(result.isfinite(), expected.isfinite())
            finite = expected.isfinite()  # a mean of no pixels is NaN
            if not finite.any():
                return
            result, expected = result[finite], expected[finite]
            error = (result - expected).abs().max() / expected.abs().max().clamp(min=0.1)
            assert error <= LIMITS[dtype], f"error {error:.2g}\n{fused.network.code}"
