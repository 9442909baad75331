"""``resfast.export(run, format)``: a trained network as a file that runs without resfast.

The network is traced by ``torch.export`` with its batch
norms folded, the normalization of the images included, and plain PyTorch operators alone. What was
written is loaded again and compared with the run before it takes its place.
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
from resfast.inference import load as inference
from resfast.inference.fuse import fuse
from resfast.inference.load import TrainedRun, Which
from resfast.ops.basic_block.op import BasicBlock
from resfast.ops.conv.op import ConvBiasAct
from resfast.ops.conv.reference import ACTIVATIONS
from resfast.runs import folder as records

METADATA = "metadata.json"
"""Name of the file inside a ``torch-export`` archive that holds the metadata."""

Format = Literal["torch-export", "onnx", "aoti"]
Dtype = Literal["float32", "bfloat16", "float16"]
FILES = {"torch-export": "model.pt2", "onnx": "model.onnx", "aoti": "model-aoti.pt2"}
LIMITS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}
"""Largest relative error (Frobenius norm) against the run's float32 logits: several times what
rounding makes of the deepest networks here, and far below what a wrong graph does."""
OPSETS = (18, 25)
"""Lowest and highest opset that the ONNX exporter can be asked for."""
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_CHECKED = 64
"""Images that an exported network is compared on, at least."""


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: the file.
        metadata: the metadata in the file.
        max_error: largest absolute difference from the run's float32 logits.
        relative_error: Frobenius norm of the differences over that of the logits.
        agreement: fraction of the images classified as by the run, 0 to 1.
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

    The file takes uint8 ``[N, H, W, 3]``, RGB pixels, H and W the run's image size, or, without
    ``normalize``, float32 ``[N, 3, H, W]`` of ``(pixel / 255 - mean) / std``. It returns float32
    ``[N, classes]``, logits. Class names, mean, standard deviation, test accuracy and more are its
    metadata: ``metadata_props`` in ONNX, the extra file ``metadata.json`` with ``torch.export``,
    ``get_metadata()`` with AOTInductor.

    Args:
        run: a run or its weights, see :func:`resfast.load`, or what that returned (then
            ``weights`` and ``device`` are not looked at).
        format: ``torch-export``, ``onnx`` or ``aoti``.
        output: file to write or replace (None: in the folder ``export`` of the run's).
        dtype: what it computes in: ``float32``, ``bfloat16`` (not in ONNX) or ``float16``.
        batch: the one batch size that it takes (None: any).
        normalize: whether raw pixels are normalized inside.
        opset: of ONNX, 18 to 25 (None: the exporter's own).
        weights: ``final`` or ``best``.
        device: where ``torch-export`` and ``aoti`` files are to run, as of :func:`resfast.load`.
        report: is given one line for each step worth knowing.

    Returns:
        Where it is and how close it comes to the run.

    Raises:
        ResfastError: no such run, a package or compiler is missing, a value out of range, a file
            that cannot be written, or one whose logits differ; an old file is intact.
    """
    _check(format, dtype, batch, opset)
    if not isinstance(run, TrainedRun):
        run = inference.load(run, weights=weights, device=device, precision="fp32")
    if format == "aoti" and (missing := runtime.compiler_missing(run.device)):
        raise ResfastError(
            f"--format aoti compiles the network, and {missing}; install it (CXX names another "
            "C++ compiler) or choose --format torch-export"
        )
    default = run.path / "export" / FILES[format]
    target = _target(default if output is None else Path(output).expanduser(), default.suffix)
    run = dataclasses.replace(run, dtype=torch.float32)  # what the file is compared with
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
            raise ResfastError(f"--opset {opset} is for --format onnx, and this is {format}")
        return
    if opset is not None and not OPSETS[0] <= opset <= OPSETS[1]:
        raise ResfastError(
            f"--opset {opset} is out of range: expected {OPSETS[0]} to {OPSETS[1]}; leave it out "
            "for the exporter's own"
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
    """A file that can be written to, its folder made."""
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
            f"cannot write {target}: {error.strerror or error}; choose another place with --output"
        ) from None


def _metadata(
    run: TrainedRun, format: str, dtype: str, batch: int | None, normalize: bool
) -> dict[str, str]:
    """What a user of the file must know; all of it text, lists as JSON."""
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
    """A run's network from images to float32 logits, batch norms folded, in PyTorch's operators."""

    def __init__(self, run: TrainedRun, dtype: torch.dtype, normalize: bool) -> None:
        super().__init__()
        self.network = fuse(run.model, dtype).network
        for name, module in list(self.network.named_modules()):
            if isinstance(module, BasicBlock):
                self.network.set_submodule(name, _Block(module.conv1, module.conv2))
            elif isinstance(module, ConvBiasAct):
                self.network.set_submodule(name, _Conv(module))
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
        """The input for uint8 ``[N, H, W, 3]``: the same, or normalized."""
        return images if self.normalize else self._normalized(images)

    def _normalized(self, images: Tensor) -> Tensor:
        return (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)


class _Conv(nn.Module):
    """:class:`ConvBiasAct` in PyTorch's operators, which compilers know how to fuse."""

    def __init__(self, conv: ConvBiasAct) -> None:
        super().__init__()
        self.register_buffer("weight", conv.weight)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.to(conv.weight.dtype))
        self.stride, self.padding = conv.stride, conv.padding
        self.activation = ACTIVATIONS[conv.activation]
        self.negative_slope = conv.negative_slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return self.activation(x if residual is None else x + residual, self.negative_slope)


class _Block(nn.Module):
    """:class:`BasicBlock` as its two layers."""

    def __init__(self, conv1: nn.Module, conv2: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), x)


class _GlobalAvgPool2d(nn.Module):
    """``nn.AdaptiveAvgPool2d(1)``, without the strides that its decomposition puts into a graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def _trace(network: nn.Module, images: Tensor, batch: int | None) -> ExportedProgram:
    # An example of one image would bind a batch size that is to be free.
    example = images[: batch or 2]
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
        if getattr(node.target, "namespace", "aten") == "resfast":
            raise ResfastError(f"{node.target} is left in the network; report the run's model")
    return program


def _images(run: TrainedRun, batch: int | None) -> Tensor:
    """Smooth random images, uint8 ``[n, H, W, 3]`` on the CPU, n a multiple of the batch size."""
    count = -(-_CHECKED // (batch or 1)) * (batch or 1)
    colours = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(colours, run.image_size, mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _compare(
    run: TrainedRun,
    written: Callable[[Tensor], Tensor],
    images: Tensor,
    inputs: Tensor,
    batch: int | None,
) -> dict[str, Any]:
    """How far the logits of a file are from the run's, as fields of :class:`Exported`."""
    wanted = run.logits(images)
    # Where any batch size is promised: all at once, then threes and a last one by itself.
    found = [
        torch.cat([written(part).cpu() for part in inputs.split(size)])
        for size in ((batch,) if batch else (len(inputs), 3))
    ]
    wanted, found = wanted.repeat(len(found), 1), torch.cat(found)
    difference = found - wanted
    return {
        "max_error": float(difference.abs().max()),
        "relative_error": float(difference.norm() / wanted.norm()),
        "agreement": float((found.argmax(1) == wanted.argmax(1)).float().mean()),
        "images": len(images),
    }


# -- formats -----------------------------------------------------------------------------------


def _write(
    program: ExportedProgram, path: Path, metadata: dict[str, str], opset: int | None
) -> None:
    """Writes a draft of the file, its metadata in it."""
    match metadata["format"]:
        case "torch-export":
            extra = {METADATA: json.dumps(metadata, indent=2)}
            with warnings.catch_warnings():  # channels_last weights; the comparison is the proof
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

    made = torch.onnx.export(
        program,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: "batch"}},  # names it; a fixed one stays
        opset_version=opset,
    )
    made.model.metadata_props.update(metadata)
    made.save(path, external_data=False)
    onnx.checker.check_model(path, full_check=True)
    found = next(o.version for o in onnx.load(path).opset_import if o.domain == "")
    if opset not in (None, found):
        raise ResfastError(
            f"this onnxscript cannot make opset {opset}, and made {found}; update it, or leave "
            "--opset out"
        )


def _write_aoti(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError, InductorError

    # On the CPU freezing packs the weights for oneDNN, where the batch size is fixed.
    configs = {"aot_inductor.metadata": metadata, "freezing": metadata["device"] == "cpu"}
    try:
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    except (CppCompileError, InductorError) as error:
        raise ResfastError(
            f"AOTInductor cannot compile the network ({str(error).splitlines()[0]}); check the "
            "compiler (CXX names another), or choose --format torch-export"
        ) from error


def _load(format: str, path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A file as a function of images on the device."""
    match format:
        case "torch-export":
            return torch.export.load(path).module()
        case "aoti":
            index = -1 if device.index is None else device.index
            return torch._inductor.aoti_load_package(str(path), device_index=index)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])
