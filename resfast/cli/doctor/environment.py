"""Probes of the installation and the machine: Python, packages, devices, data, caches."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import resfast
from resfast.cli.doctor.line import (
    PACKAGE,
    Line,
    Options,
    cores,
    dotted,
    driver,
    first_line,
    installed,
    output_of,
    version_of,
)

PYTHON, TORCH = (3, 11), (2, 11)
REQUIRED = {
    "torchvision": "torchvision",
    "numpy": "numpy",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "tyro": "tyro",
    "rich": "rich",
    "torchinfo": "torchinfo",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "typing_extensions": "typing-extensions",
}
"""Modules that the commands need besides torch, and the packages they come from."""
OPTIONAL = (
    *("onnx", "onnxscript", "onnxruntime", "tensorboard", "wandb", "optuna", "pyarrow"),
    *("pytest", "hypothesis"),
)


def probe_resfast(options: Options) -> Iterator[Line]:
    yield Line("resfast", "ok", f"{resfast.__version__} in {PACKAGE}")


def probe_python(options: Options) -> Iterator[Line]:
    text = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < PYTHON:
        yield Line("Python", "problem", text, f"use Python {dotted(PYTHON)} or later")
    else:
        yield Line("Python", "ok", text)


def probe_torch(options: Options) -> Iterator[Line]:
    import torch

    cudnn = torch.backends.cudnn.version()
    cuda = f"CUDA {torch.version.cuda}, cuDNN {cudnn}" if torch.version.cuda else "no CUDA"
    text = f"{torch.__version__} ({cuda})"
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH:
        yield Line("torch", "problem", text, f"pip install 'torch>={dotted(TORCH)}'")
    else:
        yield Line("torch", "ok", text)


def probe_packages(options: Options) -> Iterator[Line]:
    absent = [package for module, package in REQUIRED.items() if not installed(module)]
    if absent:
        todo = f"pip install {' '.join(absent)}"
        yield Line("packages", "problem", f"not installed: {', '.join(absent)}", todo)
    else:
        import torchvision  # breaks easily: each build is for one version of torch

        text = f"all {len(REQUIRED)} installed, torchvision {torchvision.__version__}"
        yield Line("packages", "ok", text)


def probe_devices(options: Options) -> Iterator[Line]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            name = f"cuda:{index}"
            try:
                torch.ones(1, device=name).add_(1).item()
                free, total = torch.cuda.mem_get_info(index)
            except RuntimeError as error:
                text = f"{properties.name} does not work: {first_line(error)}"
                yield Line(name, "problem", text, "install a torch built for this GPU and driver")
                continue
            text = (
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, driver {driver()}"
            )
            yield Line(name, "ok", text)
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [] if hidden in ("", "-1") else output_of("nvidia-smi", "-L").splitlines()
    gpus = [line for line in seen if line.startswith("GPU ")]
    if not gpus:
        why = f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "no GPU was found"
        yield Line("CUDA device", "missing", f"{why}; everything runs on the CPU")
    elif torch.version.cuda is None:
        todo = "install a torch built for CUDA"
        yield Line("CUDA device", "problem", f"this torch cannot use {gpus[0]}", todo)
    else:
        try:
            torch.cuda.init()
            why = "torch.cuda is not available"
        except RuntimeError as error:
            why = first_line(error)
        todo = f"install a driver for CUDA {torch.version.cuda}, or a torch for driver {driver()}"
        yield Line("CUDA device", "problem", f"torch cannot use {gpus[0]}: {why}", todo)


def probe_cpu(options: Options) -> Iterator[Line]:
    import torch

    from resfast import runtime

    flags: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    names = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}
    has = [name for flag, name in names.items() if flags.get(flag)]
    onednn = torch.backends.mkldnn.is_available()
    bf16 = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    kind = "with bf16" if bf16 else "without bf16" if onednn else "not in this torch"
    model = runtime.describe(torch.device("cpu")).rpartition(", ")[0]
    text = f"{model}, {cores()} cores, {', '.join(has) or platform.machine()}, oneDNN {kind}"
    yield Line("CPU", "ok", text)


def probe_dali(options: Options) -> Iterator[Line]:
    from resfast.data.dali_pipeline import import_dali
    from resfast.errors import ResfastError

    try:
        yield Line("DALI", "ok", import_dali().__version__)
    except ResfastError as error:
        yield Line("DALI", "missing", str(error))


def probe_optional(options: Options) -> Iterator[Line]:
    found = {name: version_of(name) for name in OPTIONAL if installed(name)}
    absent = [name for name in OPTIONAL if name not in found]
    text = ", ".join(f"{name} {version}" for name, version in found.items()) or "none"
    if absent:
        yield Line("optional", "missing", f"not installed: {', '.join(absent)} (installed: {text})")
    else:
        yield Line("optional", "ok", text)


def cache_folder() -> Path:
    """The folder of measured choices."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resfast"


def choice_files() -> list[Path]:
    """The files of measured choices."""
    folder = cache_folder()
    return sorted([*folder.glob("conv-*.json"), *folder.glob("network-*.json")])


def probe_cache(options: Options) -> Iterator[Line]:
    folder = cache_folder()
    exists = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=exists):
            pass
    except OSError as error:
        text = f"{exists} is not writable ({error.strerror}); measured choices are not cached"
        yield Line("cache", "missing", text, "set XDG_CACHE_HOME to a writable folder")
        return
    files = []
    for path in choice_files():
        try:
            files.append(f"{len(json.loads(path.read_text(encoding='utf-8')))} in {path.name}")
        except (OSError, ValueError, TypeError) as error:
            files.append(f"{path.name} is unreadable ({error}) and will be rewritten")
    text = f"{folder}, measured choices: {', '.join(files) or 'none yet'}"
    yield Line("cache", "ok", text)


def probe_data(options: Options) -> Iterator[Line]:
    from resfast.errors import ResfastError

    try:
        yield _locate(options.data, Path(options.data_dir).expanduser())
    except ResfastError as error:
        yield Line("data", "problem", str(error))


def _locate(data: str, data_dir: Path) -> Line:
    """Finds ``data`` without downloading or decoding it."""
    from resfast.data import folder, shards
    from resfast.data.sources import CHOICES, SOURCES
    from resfast.errors import ResfastError, nearest

    kind, _, location = data.partition(":")
    path = Path(location).expanduser()
    if kind == "folder" and location:
        source = folder.open_source(path)
        if isinstance(source, folder.Archive):
            size = path.stat().st_size / 2**20
            return Line("data", "ok", f"{path}, an archive of {size:.1f} MiB, not opened")
        listing = source.scan()
        classes = folder.check_listing(path, listing)
        text = f"{path}, {len(listing.images):,} images of {len(classes)} classes"
        return Line("data", "ok", text)
    if kind == "shards" and location:
        found = shards.read_shards(path, report=lambda line: None)
        text = f"{path}, {len(found.train) + len(found.test):,} images in shards"
        return Line("data", "ok", text)
    if f"{kind}:" in SOURCES and location:
        without_part = Path(location.rpartition("#")[0] or location).expanduser()
        if not (path.exists() or without_part.exists()):
            raise ResfastError(f"{path} does not exist: check --data {data}")
        return Line("data", "ok", f"{data}, not opened")
    if data in ("svhn", "fashion-mnist", "stl10"):
        return Line("data", "ok", f"{data}, not opened")
    if data == "digits":
        return Line("data", "ok", "digits come with scikit-learn")
    if data not in ("auto", "cifar10", "cifar100"):
        raise ResfastError(
            f"unknown data {data!r}, expected one of {', '.join(CHOICES)}{nearest(data, CHOICES)}"
        )
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    cifar = datasets.CIFAR100 if data == "cifar100" else datasets.CIFAR10
    try:
        cifar(data_dir, train=False, download=False)  # checks every file of both splits
        return Line("data", "ok", f"{data_dir / cifar.base_folder}")
    except (OSError, RuntimeError):
        archive = data_dir / cifar.filename
    if check_integrity(archive, cifar.tgz_md5):
        return Line("data", "ok", f"{archive}, not unpacked yet")
    state = "damaged" if archive.exists() else "missing"
    otherwise = "digits are used instead" if data == "auto" else "training stops with an error"
    return Line(
        "data",
        "missing" if data == "auto" else "problem",
        f"{archive} is {state}; with network access it is downloaded, otherwise {otherwise}",
        f"put an intact {cifar.filename} into {data_dir}, or name other data with --data",
    )


def probe_threads(options: Options) -> Iterator[Line]:
    import torch

    threads, available = torch.get_num_threads(), cores()
    todo = ""
    if threads > available:
        todo = f"set OMP_NUM_THREADS={available}, or --threads {available}"
    yield Line("threads", "ok", f"torch uses {threads} of {available} cores", todo)


def probe_allocator(options: Options) -> Iterator[Line]:
    from resfast import runtime

    if runtime.tune_allocator():
        yield Line("allocator", "ok", "glibc's, which training and inference tune")
    else:
        text = "not glibc's: freed memory returns to the operating system after each step"
        yield Line("allocator", "missing", text)
