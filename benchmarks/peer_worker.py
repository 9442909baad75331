"""The process of one peer of ``benchmarks.peers``: answers lines of JSON.

``python -m benchmarks.peer_worker PEER NETWORK BATCH DTYPE`` prints the error of the peer's result,
then for each number of seconds on standard input the images per second of that time.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.worker_process import open_answers

Run = Callable[[Tensor], Tensor]
IMAGE_SIZE = 32
MOST_COMPARED = 64
"""Images that are compared with float32; all of a large batch would set the peak memory."""
CALIBRATION = 128
"""Images for the ranges of int8."""
MOST_STATISTICS = 64 * 32 * 32
"""Pixels of the images that batch norms take their statistics from."""
NETWORKS = "a preset, torchvision:NAME, timm:NAME or FILE.py:FUNCTION, with @PIXELS other than 32"


def build(network: str) -> tuple[nn.Module, int]:
    """A network in eval mode, its batch norms not the identity, and the pixels of an image's side.

    Args:
        network: what :data:`NETWORKS` says.

    Raises:
        ValueError: the pixels are not a number.
        LookupError: a preset or a function with this name does not exist.
    """
    torch.manual_seed(0)
    name, _, pixels = network.partition("@")
    size = int(pixels) if pixels else IMAGE_SIZE
    kind, _, rest = name.rpartition(":")
    if kind == "torchvision":
        from torchvision import models

        model = models.get_model(rest, weights=None, num_classes=10)
    elif kind == "timm":
        import timm

        model = timm.create_model(rest, num_classes=10)
    elif kind.endswith(".py"):
        sys.path.insert(0, str(Path(kind).parent))  # for imports of its neighbors
        model = runpy.run_path(kind)[rest]()
    else:
        import resfast

        model = resfast.create_model(name)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.momentum = 1.0
    count = max(4, min(64, MOST_STATISTICS // size**2))
    model.train()(torch.randn(count, 3, size, size))
    return model.eval().requires_grad_(False), size


def calibration_images(x: Tensor) -> Tensor:
    """Images like those that are timed, for the ranges of int8."""
    return torch.randn(CALIBRATION, *x.shape[1:], generator=torch.Generator().manual_seed(1))


def ours(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    import resfast

    calibration = calibration_images(x) if dtype == torch.int8 else None
    return resfast.fuse(model, dtype, calibration=calibration)


def compiled(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    from torch._inductor import config

    config.freezing = True
    model = model.to(dtype=dtype, memory_format=torch.channels_last)
    run = torch.compile(model, dynamic=False, mode="max-autotune")

    def call(images: Tensor) -> Tensor:
        return run(images.to(dtype, memory_format=torch.channels_last)).float()

    return call


def _onnx(model: nn.Module, x: Tensor, folder: str) -> Path:
    path = Path(folder, "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
    return path


def openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    import numpy
    import openvino

    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        network = core.read_model(_onnx(model, x, folder))
    network.reshape(list(x.shape))
    if dtype == torch.int8:
        import nncf

        images = calibration_images(x).split(len(x))
        whole = [one.numpy() for one in images if len(one) == len(x)] or [x.numpy()]
        network = nncf.quantize(network, nncf.Dataset(whole), subset_size=len(whole))
    # bfloat16 is its own choice where the processor has it.
    options = {"INFERENCE_PRECISION_HINT": "f32"} if dtype == torch.float32 else {}
    request = core.compile_model(network, "CPU", options).create_infer_request()

    def call(images: Tensor) -> Tensor:
        result = request.infer({0: images.numpy()}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(numpy.asarray(result[0]))

    return call


def onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    import onnxruntime as runtime

    with tempfile.TemporaryDirectory() as folder:
        session = runtime.InferenceSession(
            _onnx(model, x, folder), providers=["CPUExecutionProvider"]
        )
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


PEERS: dict[str, Callable[[nn.Module, Tensor, torch.dtype], Run]] = {
    "resfast": ours,
    "torch.compile": compiled,
    "OpenVINO": openvino,
    "ONNX Runtime": onnxruntime,
}

BESIDE = {f"resfast beside {name}": name for name in ("OpenVINO", "ONNX Runtime")}
"""resfast in a process where another library has just computed, so that its threads are alive."""
CALLS_BESIDE = 5
"""Calls of resfast after each of the other library, whose time does not count."""
NEEDED: dict[str, tuple[str, ...]] = {
    "OpenVINO": ("openvino", "onnxscript"),
    "ONNX Runtime": ("onnxruntime", "onnxscript"),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}


def installed(peer: str, dtype: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if dtype == "int8" and peer in ("torch.compile", "ONNX Runtime"):
        return "it quantizes no network by its defaults"
    if peer == "ONNX Runtime" and dtype == "bf16":
        return "it has no bfloat16 convolutions on the CPU"
    needed = NEEDED.get(BESIDE.get(peer, peer), ())
    needed += ("nncf",) if (peer, dtype) == ("OpenVINO", "int8") else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def main() -> None:
    answers = open_answers()
    peer, network, batch, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), DTYPES[sys.argv[4]]
    with torch.inference_mode():
        try:
            model, size = build(network)
        except (LookupError, ValueError, ImportError, OSError) as error:
            first = str(error).strip().partition("\n")[0]
            print(json.dumps({"missing": f"no network {network}: {first}"}), file=answers)
            return
        x = torch.randn(batch, 3, size, size)
        exact = model(x[:MOST_COMPARED])
        try:
            other = None
            if peer in BESIDE:
                other = PEERS[BESIDE[peer]](model, x, torch.float32)
                other(x)
            run = PEERS["resfast" if other else peer](model, x, dtype)
            result = run(x)
        except Exception as error:  # noqa: BLE001  # whatever a library raises is its answer
            first = str(error).strip().partition("\n")[0]
            print(json.dumps({"missing": f"{type(error).__name__}: {first}"}), file=answers)
            return
        error = float((result[:MOST_COMPARED] - exact).norm() / exact.norm())
        for _ in range(3):
            run(x)
        print(json.dumps({"error": error}), file=answers)
        for line in sys.stdin:
            spent, calls = 0.0, 0
            while spent < float(line) or calls < 3:
                if other is not None and calls % CALLS_BESIDE == 0:
                    other(x)
                start = time.perf_counter()
                run(x)
                spent += time.perf_counter() - start
                calls += 1
            rate = calls * batch / spent
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(json.dumps({"rate": rate, "peak_rss_mib": peak}), file=answers)


if __name__ == "__main__":
    main()
