"""``python -m resfast.doctor``: what of this machine resfast can use, a line each.

Every line is ``ok``, ``missing`` (it is optional, and the line says what takes its place) or
``problem`` (something is broken), with what to do. The exit code is 1 where there is a problem.
It needs no GPU and no network, and leaves nothing behind. Options: ``--data SPEC`` and
``--data-dir DIR`` as the training takes them, ``--json``.

Only the standard library is imported before a probe runs, and the probes run in a process of their
own: a library that crashes or hangs while it is loaded becomes a line as well.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import resfast
from resfast.cli.common import escape_unencodable

PACKAGE = Path(__file__).resolve().parent
TIME_LIMIT_S = 60.0
"""For all probes together; they take a few seconds."""
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
}
"""Modules that the commands need, beside torch, and the packages they come from."""
OPTIONAL = ("onnx", "onnxscript", "onnxruntime", "tensorboard", "wandb", "pytest", "hypothesis")
REBUILD = "build it again: pip install -v --no-build-isolation -e . (or make) says what is wrong"

State = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Line:
    """What one probe found."""

    name: str
    state: State
    text: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.name:<13} {self.text}{' → ' if self.todo else ''}{self.todo}"


@dataclass(frozen=True)
class Options:
    """What the probes are told."""

    data: str = "auto"
    data_dir: str = "data"


# -- probes ----------------------------------------------------------------------------------------


def _resfast(options: Options) -> Iterator[Line]:
    yield Line("resfast", "ok", f"{resfast.__version__} in {PACKAGE}")


def _python(options: Options) -> Iterator[Line]:
    text = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < PYTHON:
        yield Line("Python", "problem", text, f"use Python {_dotted(PYTHON)} or later")
    else:
        yield Line("Python", "ok", text)


def _torch(options: Options) -> Iterator[Line]:
    import torch

    cudnn = torch.backends.cudnn.version()
    cuda = f"CUDA {torch.version.cuda}, cuDNN {cudnn}" if torch.version.cuda else "no CUDA"
    text = f"{torch.__version__} ({cuda})"
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH:
        yield Line("torch", "problem", text, f"pip install 'torch>={_dotted(TORCH)}'")
    else:
        yield Line("torch", "ok", text)


def _packages(options: Options) -> Iterator[Line]:
    absent = [package for module, package in REQUIRED.items() if not _installed(module)]
    if absent:
        todo = f"pip install {' '.join(absent)}"
        yield Line("packages", "problem", f"not installed: {', '.join(absent)}", todo)
    else:
        import torchvision  # the one that breaks: it is built for one version of torch

        text = f"all {len(REQUIRED)} are there, torchvision {torchvision.__version__}"
        yield Line("packages", "ok", text)


def _devices(options: Options) -> Iterator[Line]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            name = f"cuda:{index}"
            try:
                torch.ones(1, device=name).add_(1).item()
                free, total = torch.cuda.mem_get_info(index)
            except RuntimeError as error:
                text = f"{properties.name} does not work: {_first(error)}"
                yield Line(name, "problem", text, "install a torch built for this GPU and driver")
                continue
            text = (
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, driver {_driver()}"
            )
            yield Line(name, "ok", text)
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [] if hidden in ("", "-1") else _said("nvidia-smi", "-L").splitlines()
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
            why = _first(error)
        todo = f"install a driver for CUDA {torch.version.cuda}, or a torch for driver {_driver()}"
        yield Line("CUDA device", "problem", f"torch cannot use {gpus[0]}: {why}", todo)


def _cpu(options: Options) -> Iterator[Line]:
    import torch

    from resfast import runtime

    flags = getattr(torch.cpu, "get_capabilities", dict)()
    names = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}
    has = [name for flag, name in names.items() if flags.get(flag)]
    onednn = torch.backends.mkldnn.is_available()
    bf16 = onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    kind = "with bf16" if bf16 else "without bf16" if onednn else "not in this torch"
    model = runtime.describe(torch.device("cpu")).rpartition(", ")[0]
    text = f"{model}, {_cores()} cores, {', '.join(has) or platform.machine()}, oneDNN {kind}"
    yield Line("CPU", "ok", text)


def _cpp_kernels(options: Options) -> Iterator[Line]:
    from resfast.ops import extension

    if extension.MISSING is None:
        import resfast.ops.add_relu.op
        import resfast.ops.augment.op
        import resfast.ops.conv.op  # noqa: F401  # registering fails for kernels of an old schema

        built = ", ".join(path.name for path in sorted(PACKAGE.glob("_C.*")))
        yield Line("C++ kernels", "ok", f"{built} in {PACKAGE}")
    elif "cannot be loaded" in extension.MISSING:
        yield Line("C++ kernels", "problem", extension.MISSING, REBUILD)
    else:
        text = f"slower PyTorch code takes their place: {extension.MISSING}"
        yield Line("C++ kernels", "missing", text, REBUILD)


def _cuda_kernels(options: Options) -> Iterator[Line]:
    import torch

    from resfast.ops import extension

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing, record = extension.CUDA_MISSING, PACKAGE / "_CUDA.json"
    if missing is not None and "cannot be loaded" in missing:
        yield Line("CUDA kernels", "problem", missing, REBUILD)
        return
    if missing is not None:
        text = f"{'cuDNN takes their place' if count else 'of no use without a GPU'}: {missing}"
        yield Line("CUDA kernels", "missing", text, REBUILD if count else "")
        return
    try:
        built = json.loads(record.read_text(encoding="utf-8"))
        architectures = [str(name) for name in built["architectures"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"what they were built for is unknown: {record} cannot be read ({error!r})"
        yield Line("CUDA kernels", "problem", text, REBUILD)
        return
    text = f"for {' '.join(architectures)}, by nvcc {built.get('nvcc')}, " + (
        "with CUTLASS" if built.get("cutlass") else "without CUTLASS"
    )
    capabilities = [torch.cuda.get_device_capability(index) for index in range(count)]
    bare = {c for c in capabilities if not any(covers(name, c) for name in architectures)}
    if bare:
        wanted = ";".join(_dotted(c) + "a" * (c == (9, 0)) for c in sorted(bare))
        text += f", but not for this machine's {wanted}"
        todo = f"build them again with TORCH_CUDA_ARCH_LIST='{wanted}' in the environment"
        yield Line("CUDA kernels", "problem", text, todo)
    else:
        yield Line("CUDA kernels", "ok", text)


def covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``architecture`` (``8.0``, ``9.0a``, ``8.6+PTX``) runs on a device."""
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if match is None:
        return False
    built = int(match[1]), int(match[2])
    if match[3] == "a":  # the features of that very chip
        return capability == built
    if match[4] and not match[3]:
        return capability >= built
    return capability[0] == built[0] and capability >= built


def _triton(options: Options) -> Iterator[Line]:
    import torch

    needed = torch.cuda.is_available()
    state: State = "problem" if needed else "missing"
    if not _installed("triton"):
        text = "not installed; augmentation, add_relu and torch.compile on CUDA need it"
        yield Line("Triton", state, text, "pip install triton")
        return
    import triton

    major, minor = torch.cuda.get_device_capability() if needed else (8, 0)
    try:
        _compile_triton(10 * major + minor)
    except Exception as error:  # noqa: BLE001  # any: of its compiler, of ptxas, of the C compiler
        text = f"{triton.__version__} cannot compile for sm_{major}{minor}: {_first(error)}"
        todo = "install the triton that this torch asks for (pip check)"
        yield Line("Triton", state, text, todo)
    else:
        text = f"{triton.__version__}, compiles for sm_{major}{minor}"
        yield Line("Triton", "ok", text)


def _compile_triton(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from resfast.ops.add_relu.triton import _backward_kernel

    pointers = dict.fromkeys(("out", "grad", "result"), "*bf16")
    signature = {**pointers, "count": "i32", "BLOCK": "constexpr"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # of this process: nothing from an earlier one
        source = ASTSource(_backward_kernel, signature, {(4,): 256})
        triton.compile(source, target=GPUTarget("cuda", capability, 32))


def _compiler(options: Options) -> Iterator[Line]:
    import torch

    from resfast import runtime

    missing = runtime.compiler_missing(torch.device("cpu"))
    if missing:
        text = f"{missing}; without one there are no C++ kernels and no torch.compile"
        yield Line("C++ compiler", "missing", text, "install g++, or name one in CXX")
        return
    names = (os.environ.get("CXX") or "g++", "clang++")
    path = next(found for name in names if (found := shutil.which(name)))
    yield Line("C++ compiler", "ok", f"{_said(path, '--version').partition(chr(10))[0]} ({path})")


def _nvcc(options: Options) -> Iterator[Line]:
    script = PACKAGE.parent / "csrc" / "cuda" / "build.py"
    if not script.exists():
        yield Line("nvcc", "ok", "not needed: resfast is installed without its sources")
        return
    spec = importlib.util.spec_from_file_location("resfast_cuda_build", script)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    why = build.obstacle()
    if why is not None:
        yield Line("nvcc", "missing", f"the CUDA kernels cannot be built: {why}")
        return
    path, cutlass = build.find_nvcc(), build.find_cutlass()
    text = f"{build.nvcc_version(path)} ({path})"
    if cutlass is None:
        text += "; no CUTLASS, so the kernels for Hopper are left out"
        yield Line("nvcc", "missing", text, "pip install --no-deps nvidia-cutlass")
    else:
        yield Line("nvcc", "ok", f"{text}, CUTLASS in {cutlass}")


def _dali(options: Options) -> Iterator[Line]:
    from resfast.data.dali_pipeline import import_dali
    from resfast.errors import ResfastError

    try:
        yield Line("DALI", "ok", import_dali().__version__)
    except ResfastError as error:
        yield Line("DALI", "missing", str(error))


def _optional(options: Options) -> Iterator[Line]:
    found = {name: _version(name) for name in OPTIONAL if _installed(name)}
    absent = [name for name in OPTIONAL if name not in found]
    text = ", ".join(f"{name} {version}" for name, version in found.items()) or "none"
    if absent:
        yield Line("optional", "missing", f"{', '.join(absent)} (there: {text})")
    else:
        yield Line("optional", "ok", text)


def _cache(options: Options) -> Iterator[Line]:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resfast"
    exists = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=exists):
            pass
    except OSError as error:
        text = f"{exists} cannot be written ({error.strerror}); nothing measured is kept"
        yield Line("cache", "missing", text, "set XDG_CACHE_HOME to a folder of yours")
        return
    kept = []
    for path in sorted(folder.glob("conv-*.json")):
        try:
            kept.append(f"{len(json.loads(path.read_text(encoding='utf-8')))} in {path.name}")
        except (OSError, ValueError, TypeError) as error:
            kept.append(f"{path.name} is unreadable ({error}) and will be written anew")
    text = f"{folder}, measured choices: {', '.join(kept) or 'none yet'}"
    yield Line("cache", "ok", text)


def _data(options: Options) -> Iterator[Line]:
    from resfast.errors import ResfastError

    try:
        yield _found(options.data, Path(options.data_dir).expanduser())
    except ResfastError as error:
        yield Line("data", "problem", str(error))


def _found(data: str, data_dir: Path) -> Line:
    """Where ``data`` is, without fetching or decoding it."""
    from resfast.data import folder, shards
    from resfast.data.sources import CHOICES
    from resfast.errors import ResfastError, nearest

    kind, _, location = data.partition(":")
    path = Path(location).expanduser()
    if kind == "folder" and location:
        source = folder.open_source(path)
        if isinstance(source, folder.Archive):
            size = path.stat().st_size / 2**20
            return Line("data", "ok", f"{path}, an archive of {size:.1f} MiB, not looked into")
        listing = source.scan()
        classes = folder.check_listing(path, listing)
        text = f"{path}, {len(listing.images):,} images of {len(classes)} classes"
        return Line("data", "ok", text)
    if kind == "shards" and location:
        found = shards.read_shards(path)
        text = f"{path}, {len(found.train) + len(found.test):,} images in shards"
        return Line("data", "ok", text)
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
    state = "damaged" if archive.exists() else "not there"
    otherwise = "digits are used instead" if data == "auto" else "the training ends with an error"
    return Line(
        "data",
        "missing" if data == "auto" else "problem",
        f"{archive} is {state}; it is fetched where there is a network, otherwise {otherwise}",
        f"put an intact {cifar.filename} into {data_dir}, or name other data with --data",
    )


def _threads(options: Options) -> Iterator[Line]:
    import torch

    threads, cores = torch.get_num_threads(), _cores()
    todo = f"set OMP_NUM_THREADS={cores}, or --threads {cores}" if threads > cores else ""
    yield Line("threads", "ok", f"torch uses {threads} of {cores} cores", todo)


def _allocator(options: Options) -> Iterator[Line]:
    from resfast import runtime

    if runtime.tune_allocator():
        yield Line("allocator", "ok", "glibc's, which training and inference tune")
    else:
        text = "not glibc's: memory goes back to the kernel after each step"
        yield Line("allocator", "missing", text)


PROBES: dict[str, Callable[[Options], Iterator[Line]]] = {
    "resfast": _resfast,
    "Python": _python,
    "torch": _torch,
    "packages": _packages,
    "CUDA device": _devices,
    "CPU": _cpu,
    "C++ kernels": _cpp_kernels,
    "CUDA kernels": _cuda_kernels,
    "Triton": _triton,
    "C++ compiler": _compiler,
    "nvcc": _nvcc,
    "DALI": _dali,
    "optional": _optional,
    "cache": _cache,
    "data": _data,
    "threads": _threads,
    "allocator": _allocator,
}


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _first(error: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _driver() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text):
            return match[1]
    return "of unknown version"


def _said(*command: str) -> str:
    """What a program prints; nothing where it is not there, fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


# -- running them ----------------------------------------------------------------------------------


def probe(name: str, options: Options) -> list[Line]:
    """The lines of one probe; its failure is one of them."""
    lines = []
    try:
        lines.extend(PROBES[name](options))
    except Exception as error:  # noqa: BLE001  # one probe must not end the others
        if isinstance(error, ModuleNotFoundError) and error.name and name != error.name:
            text = f"not looked at: there is no module {error.name}"
            lines.append(Line(name, "missing", text))
        else:
            text = f"{type(error).__name__}: {_first(error)}"
            lines.append(Line(name, "problem", text, "mend or reinstall it"))
    return lines


def examine(options: Options, time_limit_s: float = TIME_LIMIT_S) -> list[Line]:
    """The lines of all probes, which run in a process of their own.

    Args:
        options: what they are told.
        time_limit_s: for a process of probes; the one it is spent in has failed.
    """
    lines: list[Line] = []
    left = list(PROBES)
    while left:
        told = json.dumps([left, asdict(options)])
        command = [sys.executable, "-c", "from resfast import doctor; doctor.child()", told]
        path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                timeout=time_limit_s,
            )
            output, errors, code = done.stdout, done.stderr, done.returncode
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            how = f"it ended the process ({how})"
        except subprocess.TimeoutExpired as error:
            output, errors = error.stdout or b"", error.stderr or b""
            how = f"it did not answer within {time_limit_s:.0f} s"
        for answer in output.splitlines():
            left.pop(0)
            lines += [Line(**line) for line in json.loads(answer)]
        if left:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            todo = "mend or reinstall it"
            lines.append(Line(left.pop(0), "problem", f"{how} {last}".rstrip(), todo))
    return lines


def child() -> None:
    """What :func:`examine` runs: answers a line of JSON for each probe named in the arguments."""
    # What libraries print must not get between the answers.
    answers: Any = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    names, options = json.loads(sys.argv[1])
    for name in names:
        print(json.dumps([asdict(line) for line in probe(name, Options(**options))]), file=answers)


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    escape_unencodable()
    # argparse, since tyro may be what is missing.
    parser = argparse.ArgumentParser("python -m resfast.doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=Options.data, help="data set, as the training takes it")
    parser.add_argument("--data-dir", default=Options.data_dir, help="where data sets are kept")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(args)
    lines = examine(Options(given.data, given.data_dir))
    fine = not any(line.state == "problem" for line in lines)
    if given.json:
        print(json.dumps({"ok": fine, "lines": [asdict(line) for line in lines]}, indent=2))
    else:
        print(*lines, sep="\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
