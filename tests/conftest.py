"""Shared fixtures: a tiny image folder and a tiny network that train in about a second."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resfast.cli.doctor.line import cores
from resfast.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    RuntimeConfig,
)
from resfast.data.augment import Augment
from resfast.ops.conv import choice as conv_choice
from resfast.ops.network import network
from resfast.runs.summary import RunSummary

GROUPS = {
    "sanitizers": (  # one build of the kernels
        "test_wheel_holds_the_extension_and_compiles_without_a_warning",
        "test_kernels_stay_inside_their_memory_and_have_no_undefined_behaviour",
    ),
    "compiler": (  # each process asks the compiler what it can do, which takes seconds
        "test_aoti_file_runs_with_torch_alone",
        "test_aoti_file_takes_contiguous_images_without_normalization",
        "test_compiled_gradients_are_those_of_eager",
        "test_every_seed_ends_with_the_bits_of_the_same_seed_alone",
        "test_the_step_is_compiled_once",
        "test_a_step_that_is_compiled_ahead_is_not_compiled_again",
        "test_only_the_networks_of_captured_steps_are_run_as_such",
        "test_the_parts_are_compiled_once",
        "test_the_compiled_step_equals_the_plain_one",
    ),
    "digits": ("test_the_main_command_reaches_98_percent_on_digits",),
}
"""Tests that one worker runs, as it does those of each file that are in no group."""
SLOWEST_FIRST = (
    "compiler",
    "sanitizers",
    "test_fuse",
    "test_norm_act",
    "test_resume",
    "test_network",
    "test_basic_block",
    "test_gpu_report",
    "test_race",
    "test_training",
    "test_sweep",
    "test_report",
    "test_build",
    "test_runs",
    "test_studies",
    "test_package",
    "test_export",
    "test_augment",
    "test_predict",
    "test_conv_hopper_source",
    "test_conv_cuda_source",
    "test_conv_amx",
    "digits",
    "test_doctor",
    "test_step",
)
"""The slowest groups and files, in descending order of their processor time."""


def pytest_configure(config: pytest.Config) -> None:
    workers = worker_count(config)
    if workers == 1:
        return
    # Benchmarks that a test starts measure nothing where they see these variables.
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        os.environ.pop(name, None)
    # Idle threads leave the cores to the other workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Each worker uses its share of the cores: on tiny networks, more threads than cores triple the
    # processor time. Tests that depend on the number of threads set it themselves.
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, cores() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start


def worker_count(config: pytest.Config) -> int:
    """Number of processes that run tests in parallel."""
    return getattr(config, "workerinput", {"workercount": 1})["workercount"]


def group_of(nodeid: str) -> str:
    """Name of the group of tests that a test belongs to; that of its file if it is in none."""
    name = nodeid.partition("[")[0].rpartition("::")[2]
    groups = (group for group, names in GROUPS.items() if name in names)
    return next(groups, Path(nodeid.partition("::")[0]).stem)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``--dist loadfile``, which would keep the tests of a file together.

    ``--dist loadgroup`` has no effect in pytest-xdist 3.8 with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A slow group that started last would leave the other workers idle.
    rank = {name: position for position, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: rank.get(group_of(item.nodeid), len(rank)))
    if sys.version_info < (3, 12) and config.pluginmanager.hasplugin("_cov"):
        measure_first_cases(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def measure_first_cases(items: list[pytest.Item]) -> None:
    """Counts only the first case of each parametrized test towards the coverage.

    Without sys.monitoring, coverage traces every call and adds half of the processor time.
    """
    measured = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in measured:
            item.add_marker("no_cover")  # a marker of pytest-cov
        measured.add(name)


MEASUREMENT = conv_choice.MEASURE_SECONDS, conv_choice.MAX_REPEATS
"""How kernels are timed outside the tests."""


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Kernels are chosen by few timings: each of them must be right, whichever is the fastest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "MEASURE_SECONDS", 0.0)
        patch.setattr(conv_choice, "MEASURE_SECONDS", 0.0)
        patch.setattr(conv_choice, "MAX_REPEATS", 2)
        yield


def write_tree(root: Path, train: int = 24, test: int = 8, size: int = 16) -> Path:
    """Two classes that can be told apart: bright on the left or on the right, with noise."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(("left", "right")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image = random.integers(0, 120, (size, size, 3), dtype=np.uint8)
                half = slice(0, size // 2) if label == 0 else slice(size // 2, size)
                image[:, half] += 110
                Image.fromarray(image).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: 48 training and 16 test images of 16x16 pixels, two classes."""
    return write_tree(tmp_path_factory.mktemp("tree"))


TINY_OPTIONS = (
    "--model resnet --blocks 1,1 --channels 8,16 --stem 8 --image-size 16 --augment crop=1 "
    "--batch-size 12 --compile off --precision fp32 --lr 0.05 --save-seconds 0 --threads 1"
).split()
"""The tiny run as command line options (``--data`` and ``--out`` are left to the test)."""


@pytest.fixture
def tiny(image_tree: Path, tmp_path: Path) -> Config:
    """A run of the tiny network on the tiny folder, 3 epochs of 4 steps."""
    return Config(
        model=ModelConfig(model="resnet", blocks=(1, 1), channels=(8, 16), stem=8),
        data=DataConfig(
            data=f"folder:{image_tree}",
            data_dir=tmp_path / "data",
            image_size=16,
            augment=Augment(crop=1),
        ),
        optim=OptimConfig(epochs=3, batch_size=12, lr=0.05, ema=0.9, label_smoothing=0.1),
        evaluation=EvalConfig(tta="flip"),
        runtime=RuntimeConfig(device="cpu", precision="fp32", compile="off", threads=1),
        run=RunConfig(name="tiny", out=tmp_path / "runs", save_seconds=0),
    )


def change(config: Config, **values: object) -> Config:
    """The configuration with fields replaced by name, whichever group they are in."""
    for group in ("model", "data", "optim", "transfer", "evaluation", "runtime", "run"):
        part = getattr(config, group)
        own_values = {name: values.pop(name) for name in list(values) if hasattr(part, name)}
        # `model` and `data` are names of groups and of fields within them.
        config = replace(config, **{group: replace(part, **own_values)})
    assert not values, f"no such fields: {values}"
    return config


def example_summary(**values: object) -> RunSummary:
    """The result of a run on two classes that the first version wrote, with some other values."""
    usual: dict = {
        **{"run": "tiny", "recipe": "default", "model": "resnet", "params": 1000, "macs": 20000},
        **{"epochs": 3, "data": "digits", "data_digest": "abc", "train_images": 48},
        **{"test_images": 16, "test_accuracy": 0.75, "test_loss": 0.5},
        **{"tta": "flip", "tta_accuracy": 0.8125},
        **{"best_accuracy": 0.8125, "best_epoch": 2, "best_on": "test"},
        **{"per_class_accuracy": {"left": 0.75, "right": 0.75}, "confusion": ((6, 2), (2, 6))},
        **{"train_seconds": 1.5, "compile_seconds": 0.5, "eval_seconds": 0.25},
        **{"images_per_second": 96.0, "device": "CPU, 1 thread", "precision": "fp32"},
        **{"compile": "off", "batch_size": 12, "mean": (0.5, 0.25, 0.125)},
        **{"std": (0.2, 0.3, 0.4), "torch": "2.15.0", "resfast": "0.1.0", "seed": 5},
    }
    return RunSummary(**usual | values)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends SIGINT to this process in a training's step of this number, counted over all epochs."""
    from resfast.training.loss_watch import LossWatch

    poll, calls = LossWatch.poll, 0

    def stop_here(self: LossWatch, at: int):
        nonlocal calls
        if calls == step:
            signal.raise_signal(signal.SIGINT)
        calls += 1
        return poll(self, at)

    monkeypatch.setattr(LossWatch, "poll", stop_here)
