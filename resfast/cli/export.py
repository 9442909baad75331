"""``resfast export RUN --format …``: writes a trained network as a file for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from resfast.cli import common as entry
from resfast.data.dataset import print_to_stderr
from resfast.inference import load as inference
from resfast.inference.export import Dtype, Format, export
from resfast.inference.load import Which
from resfast.runs.find import one_of

COMMAND = "export"


@dataclass(frozen=True)
class Options:
    """Writes a trained network as a file that runs without resfast.

    torch-export: a .pt2 for torch.export.load. onnx: an .onnx for ONNX Runtime and others. aoti: a
    .pt2 compiled by AOTInductor for processors like this one. The file is loaded again and compared
    with the run. Exit codes: 0 written, 2 bad input or logits that differ.
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of the run, runs/NAME, or a .safetensors file of one. Of a folder of --runs, the run
    that is best on held-out images is written, or the first if none were held out."""
    format: Format
    """File format."""
    output: Path | None = None
    """File to write or replace (None: export/model.pt2, model.onnx or model-aoti.pt2 in the run's
    folder)."""
    dtype: Dtype = "float32"
    """Compute dtype; onnx: float32 or float16."""
    batch: int | None = None
    """Fixed batch size (None: any)."""
    normalize: bool = True
    """Accept raw pixels, uint8 [N, H, W, 3], and normalize them inside; otherwise accept normalized
    images, float32 [N, 3, H, W]."""
    opset: int | None = None
    """ONNX opset, 18 to 25 (None: the exporter's default)."""
    weights: Which = "final"
    """Weights of the last epoch, or of the best evaluation."""
    device: str = "cpu"
    """Device that torch-export and aoti files will run on: cpu, cuda, cuda:N, or auto: CUDA if
    available."""
    trust: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A Python file whose code may run, since it makes the network of the run; may be repeated."""


def main(args: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""

    def command() -> None:
        options = entry.parse(Options, args, COMMAND)
        path = one_of(options.run.expanduser(), inference.FILES[options.weights], print_to_stderr)
        run = inference.load(path, weights=options.weights, device=options.device, precision="fp32")
        inference.prepare(run)
        print(
            export(
                run,
                options.format,
                output=options.output,
                dtype=options.dtype,
                batch=options.batch,
                normalize=options.normalize,
                opset=options.opset,
            )
        )

    return entry.run(command)
