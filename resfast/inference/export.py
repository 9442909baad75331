"""``resfast.export(run, format)``: a trained network as a file that runs without resfast.

``torch.export`` traces the network with its batch norms folded, image normalization included, and
only standard PyTorch operators. The file is loaded again and compared with the run before it
replaces an existing one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from resfast import __version__, atomic, runtime
from resfast.data.dataset import print_to_stderr
from resfast.errors import ResfastError
from resfast.inference import aoti
from resfast.inference import load as inference
from resfast.inference.fuse import fuse
from resfast.inference.load import TrainedRun, Which
from resfast.ops.basic_block.op import BasicBlock
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.conv.reference import unfused
from resfast.ops.scale_shift.op import ScaleShiftAct
from resfast.runs import folder as records

METADATA = "metadata.json"
"""Name of the file inside a ``torch-export`` archive that holds the metadata."""

Format = Literal["torch-export", "onnx", "aoti"]
Dtype = Literal["float32", "bfloat16", "float16"]
FILES = {"torch-export": "model.pt2", "onnx": "model.onnx", "aoti": "model-aoti.pt2"}
LIMITS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}
"""Largest accepted relative error (Frobenius norm) against the run's float32 logits: several times
the rounding error of the deepest networks here, and far below the error of a wrong graph."""
OPSETS = (18, 25)
"""Lowest and highest opset that the ONNX exporter accepts."""
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MIN_CHECK_IMAGES = 64
"""Minimum number of images on which an exported network is compared with the run."""


@dataclass(frozen=True)
class Exported:
    """Result of :func:`export`.

    Attributes:
        path: the file.
        metadata: the metadata in the file.
        max_error: largest absolute difference from the run's float32 logits.
        relative_error: Frobenius norm of the differences over that of the logits.
        agreement: fraction of the images that get the same class as from the run, 0 to 1.
        images: number of images compared.
    """

    path: Path
    metadata: dict[str, str]
    max_error: float
    relative_error: float
    agreement: float
    images: int

    def __str__(self) -> str:
        metadata = self.metadata
        load = {
            "torch-export": f'torch.export.load("{self.path}").module()',
            "onnx": f'onnxruntime.InferenceSession("{self.path}")',
            "aoti": f'torch._inductor.aoti_load_package("{self.path}")',
        }[metadata["format"]]
        return (
            f"{self.path}: {metadata['format']}, {metadata['dtype']}, "
            f"{self.path.stat().st_size / 1e6:.3g} MB\n"
            f"  {metadata['input']}\n  {metadata['output']}\n"
            f"checked on {self.images} images against the run in float32: logits differ by up to "
            f"{self.max_error:.1e} (relative error {self.relative_error:.1e}), "
            f"{self.agreement:.1%} of the classes agree\nload it with {load}"
        )


def export(
    run: str | Path | TrainedRun,
    format: Format = "torch-export",
    *,
    output: str | Path | None = None,
    dtype: Dtype = "float32",
    batch: int | None = None,
    normalize: bool = True,
    opset: int | None = None,
    weights: Which = "final",
    device: str = "cpu",
    report: Callable[[str], None] = print_to_stderr,
) -> Exported:
    """Writes a trained network as a file that runs without resfast, and checks it.

    The exported network takes RGB pixels, uint8 ``[N, H, W, 3]`` at the run's image size, or,
    without ``normalize``, float32 ``[N, 3, H, W]`` of ``(pixel / 255 - mean) / std``. It returns
    logits, float32 ``[N, classes]``. The metadata holds class names, mean, standard deviation, test
    accuracy and more: ``metadata_props`` in ONNX, the extra file ``metadata.json`` with
    ``torch.export``, ``get_metadata()`` with AOTInductor. An ``aoti`` file takes contiguous images
    only, and raises ``RuntimeError`` for another shape, dtype, layout or device.

    Args:
        run: path of a run or its weights, see :func:`resfast.load`, or a loaded run (``weights``
            and ``device`` are then ignored).
        format: ``torch-export``, ``onnx`` or ``aoti``.
        output: file to write or replace (None: in the folder ``export`` inside the run's).
        dtype: compute dtype: ``float32``, ``bfloat16`` (not in ONNX) or ``float16``.
        batch: fixed batch size (None: any).
        normalize: whether the exported network normalizes raw pixels.
        opset: ONNX opset, 18 to 25 (None: the exporter's default).
        weights: ``final`` or ``best``.
        device: device that ``torch-export`` and ``aoti`` files will run on, see
            :func:`resfast.load`.
        report: called with a line of text for each notable step.

    Returns:
        The path of the file and how close its logits are to the run's.

    Raises:
        ResfastError: the run does not exist, a package or compiler is missing, a value is out of
            range, the file cannot be written, or its logits differ; an existing file is then left
            intact.
    """
    _check(format, dtype, batch, opset)
    if not isinstance(run, TrainedRun):
        run = inference.load(run, weights=weights, device=device, precision="fp32")
    if format == "aoti" and (missing := runtime.compiler_missing(run.device)):
        raise ResfastError(
            f"--format aoti compiles the network, but {missing}; install it (or set CXX to another "
            "C++ compiler), or choose --format torch-export"
        )
    default = run.path / "export" / FILES[format]
    target = _target(default if output is None else Path(output).expanduser(), default.suffix)
    run = dataclasses.replace(run, dtype=torch.float32)  # reference for the comparison
    metadata = _metadata(run, format, dtype, batch, normalize)
    network = _Portable(run, getattr(torch, dtype), normalize).eval()
    images = _images(run, batch)
    tf32 = dtype == "float32" and run.device.type == "cuda"  # as coarse as float16
    limit = LIMITS["float16" if tf32 else dtype]

    report(f"exporting {run.file} as {format}")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        inputs = network.prepared(images.to(run.device))
        draft = Path(folder) / target.name
        _write(_trace(network, inputs, batch), draft, metadata, opset)
        result = _compare(run, _load(format, draft, run.device), images, inputs, batch)
        if not result["relative_error"] <= limit:  # also NaN
            raise ResfastError(
                f"{target} was not written: its logits differ from the run's in float32 (relative "
                f"error {result['relative_error']:.1e}, allowed {limit:.0e} in {dtype}); "
                "choose another --dtype or --format"
            )
        _move(draft, target)
    return Exported(path=target, metadata=metadata, **result)


def _check(format: str, dtype: str, batch: int | None, opset: int | None) -> None:
    inference.check_choice("format", format, get_args(Format))
    inference.check_choice("dtype", dtype, get_args(Dtype))
    if batch is not None and batch < 1:
        raise ResfastError(f"--batch {batch} is out of range: expected at least 1")
    if format != "onnx":
        if opset is not None:
            raise ResfastError(f"--opset {opset} is for --format onnx, but this is {format}")
        return
    if opset is not None and not OPSETS[0] <= opset <= OPSETS[1]:
        raise ResfastError(
            f"--opset {opset} is out of range: expected {OPSETS[0]} to {OPSETS[1]}; leave it out "
            "for the exporter's default"
        )
    if dtype == "bfloat16":
        raise ResfastError(
            "--dtype bfloat16 cannot be checked as ONNX: ONNX Runtime has no bfloat16 convolution "
            "on the CPU; choose float32 or float16"
        )
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ResfastError(
            f'--format onnx needs {", ".join(missing)}; pip install "resfast[export]"'
        )


def _target(path: Path, suffix: str) -> Path:
    """Checks the output path and creates its folder."""
    if path.is_dir():
        raise ResfastError(f"--output {path} is a folder; expected the name of a {suffix} file")
    if path.suffix != suffix:
        raise ResfastError(f"--output {path} must end in {suffix} for this --format")
    atomic.make_folder(path.parent, "--output")
    return path


def _move(draft: Path, target: Path) -> None:
    try:
        with atomic.replacing(target) as temporary:
            shutil.copyfile(draft, temporary)
    except OSError as error:
        raise ResfastError(
            f"cannot write {target}: {error.strerror or error}; choose another path with --output"
        ) from None


def _metadata(
    run: TrainedRun, format: str, dtype: str, batch: int | None, normalize: bool
) -> dict[str, str]:
    """What a user of the file needs to know, as strings; lists are JSON."""
    n, size = batch or "N", run.image_size
    images = (
        f"uint8 [{n}, {size}, {size}, 3], RGB pixels of 0 to 255"
        if normalize
        else f"float32 [{n}, 3, {size}, {size}], RGB, (pixel / 255 - mean) / std"
    )
    summary = run.summary
    accuracy = summary.test_accuracy if summary and run.file.name == records.WEIGHTS else None
    return {
        "format": format,
        "dtype": dtype,
        "device": "any" if format == "onnx" else run.device.type,
        "input": f"images: {images}",
        "output": f"logits: float32 [{n}, {len(run.classes)}], in the order of classes",
        "classes": json.dumps(run.classes),
        "mean": json.dumps(run.mean.tolist()),
        "std": json.dumps(run.std.tolist()),
        "image_size": str(size),
        "model": run.config.model.model,
        "data": summary.data if summary else run.config.data.data,
        **({} if accuracy is None else {"test_accuracy": f"{accuracy:.6f}"}),
        "run": run.path.resolve().name,
        "weights": run.file.name,
        "resfast": __version__,
        "torch": torch.__version__,
    }


# -- the network -------------------------------------------------------------------------------


class _Portable(nn.Module):
    """A run's network from images to float32 logits: batch norms folded, PyTorch operators only."""

    def __init__(self, run: TrainedRun, dtype: torch.dtype, normalize: bool) -> None:
        super().__init__()
        self.network = fuse(run.model, dtype).network
        for name, module in list(self.network.named_modules()):
            if isinstance(module, BasicBlock):
                self.network.set_submodule(name, _Block(module.conv1, module.conv2))
            elif isinstance(module, ConvBiasAct):
                self.network.set_submodule(name, _Conv(module))
            elif isinstance(module, ScaleShiftAct):
                self.network.set_submodule(name, _ScaleShift(module))
            elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size == 1:
                self.network.set_submodule(name, _GlobalAvgPool2d())
        self.register_buffer("scale", (1 / (255 * run.std)).to(run.device))
        self.register_buffer("shift", (-run.mean / run.std).to(run.device))
        self.dtype = dtype
        self.normalize = normalize

    def forward(self, images: Tensor) -> Tensor:
        x = self._normalized(images) if self.normalize else images
        return self.network(x.to(self.dtype)).float()

    def prepared(self, images: Tensor) -> Tensor:
        """The network's input for images uint8 ``[N, H, W, 3]``: unchanged, or normalized."""
        return images if self.normalize else self._normalized(images).contiguous()

    def _normalized(self, images: Tensor) -> Tensor:
        return (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)


class _Conv(nn.Module):
    """:class:`ConvBiasAct` with PyTorch operators, which compilers can fuse."""

    def __init__(self, conv: ConvBiasAct) -> None:
        super().__init__()
        self.register_buffer("weight", conv.weight)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.to(conv.weight.dtype))
        epilogue = (conv.activation, conv.negative_slope)
        self.rest = (conv.stride, conv.padding, *epilogue, conv.groups, conv.dilation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return unfused(x, self.weight, self.bias, residual, *self.rest)


class _ScaleShift(nn.Module):
    """:class:`ScaleShiftAct` with PyTorch operators."""

    def __init__(self, norm: ScaleShiftAct) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, *maps: Tensor) -> Tensor:
        return self.norm.unfused(*maps)


class _Block(nn.Module):
    """:class:`BasicBlock` as two separate layers."""

    def __init__(self, conv1: nn.Module, conv2: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), x)


class _GlobalAvgPool2d(nn.Module):
    """``nn.AdaptiveAvgPool2d(1)``, whose own decomposition would put strides into the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def _trace(network: nn.Module, images: Tensor, batch: int | None) -> ExportedProgram:
    # An example of one image would specialize the graph to batch size 1.
    example = images[: batch or 2]
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
        if getattr(node.target, "namespace", "aten") == "resfast":
            raise ResfastError(
                f"the exported network still calls {node.target}; please report this and the "
                "run's model"
            )
    return program


def _images(run: TrainedRun, batch: int | None) -> Tensor:
    """Smooth random images, uint8 ``[n, H, W, 3]`` on the CPU, n a multiple of the batch size."""
    count = -(-_MIN_CHECK_IMAGES // (batch or 1)) * (batch or 1)
    colors = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(colors, run.image_size, mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _compare(
    run: TrainedRun,
    exported: Callable[[Tensor], Tensor],
    images: Tensor,
    inputs: Tensor,
    batch: int | None,
) -> dict[str, Any]:
    """Compares the exported network's logits with the run's: the fields of :class:`Exported`."""
    expected = run.logits(images)
    # If any batch size is allowed: all images at once, then batches of 3 and a last one of 1.
    actual = [
        torch.cat([exported(chunk).cpu() for chunk in inputs.split(size)])
        for size in ((batch,) if batch else (len(inputs), 3))
    ]
    expected, actual = expected.repeat(len(actual), 1), torch.cat(actual)
    difference = actual - expected
    return {
        "max_error": float(difference.abs().max()),
        "relative_error": float(difference.norm() / expected.norm()),
        "agreement": float((actual.argmax(1) == expected.argmax(1)).float().mean()),
        "images": len(images),
    }


# -- formats -----------------------------------------------------------------------------------


def _write(
    program: ExportedProgram, path: Path, metadata: dict[str, str], opset: int | None
) -> None:
    """Writes a draft of the file, including the metadata."""
    match metadata["format"]:
        case "torch-export":
            extra = {METADATA: json.dumps(metadata, indent=2)}
            # Caused by channels_last weights; the comparison shows that the file is right.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "No complete tensor found in the group")
                torch.export.save(program, path, extra_files=extra)
        case "onnx":
            _write_onnx(program, path, metadata, opset)
        case "aoti":
            _write_aoti(program, path, metadata)


def _write_onnx(
    program: ExportedProgram, path: Path, metadata: dict[str, str], opset: int | None
) -> None:
    import onnx

    onnx_program = torch.onnx.export(
        program,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: "batch"}},  # names the dimension; a fixed size stays fixed
        opset_version=opset,
    )
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)
    actual = next(o.version for o in onnx.load(path).opset_import if o.domain == "")
    if opset not in (None, actual):
        raise ResfastError(
            f"this version of onnxscript cannot write opset {opset} and wrote {actual}; update "
            "onnxscript, or leave --opset out"
        )


def _write_aoti(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    from torch._inductor.exc import CppCompileError, InductorError

    # On the CPU, freezing packs the weights for oneDNN if the batch size is fixed.
    configs = {"aot_inductor.metadata": metadata, "freezing": metadata["device"] == "cpu"}
    try:
        aoti.compile_checked(program, path, configs)
    except (CppCompileError, InductorError) as error:
        raise ResfastError(
            f"AOTInductor cannot compile the network ({str(error).splitlines()[0]}); check the "
            "compiler (or set CXX to another), or choose --format torch-export"
        ) from error


def _load(format: str, path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Loads a file as a function from images on the device to logits."""
    match format:
        case "torch-export":
            return torch.export.load(path).module()
        case "aoti":
            index = -1 if device.index is None else device.index
            return torch._inductor.aoti_load_package(str(path), device_index=index)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])
