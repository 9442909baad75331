"""``python -m resfast.export``: its files need no resfast and match the run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import resfast
from resfast import runtime
from resfast.cli.export import main
from resfast.config.network import network
from resfast.config.schema import Config, DataConfig, ModelConfig, RuntimeConfig
from resfast.errors import ResfastError
from resfast.inference import export as exporting
from resfast.inference.export import export
from resfast.inference.fuse.blocks import group_blocks
from resfast.models.presets import build_model
from resfast.ops.basic_block.op import BasicBlock
from resfast.runs import folder as records
from resfast.runs.checkpoint import save_weights
from tests.conftest import example_summary

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("bird", "cat", "dog", "ship", "日本")
ACCURACY = 0.8675
NEEDS_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs resfast[export]",
)
NEEDS_COMPILER = pytest.mark.skipif(
    runtime.compiler_missing(torch.device("cpu")) is not None, reason="needs a C++ compiler"
)
FORMATS = ["torch-export", pytest.param("onnx", marks=NEEDS_ONNX)]

# A fresh interpreter in which resfast cannot be imported.
PLAIN = """
import json, sys
import torch

class Refuse:
    def find_spec(self, name, *args):
        assert name.partition(".")[0] != "resfast", name

sys.meta_path.insert(0, Refuse())
images = torch.load("images.pt")
"""


def make_run(folder: Path, size: int = 12, **model: object) -> Path:
    """A run as training leaves it, of a network with drawn weights and statistics."""
    config = Config(
        model=ModelConfig(
            **{"model": "resnet", "blocks": (1, 1), "channels": (8, 16), "stem": 8} | model
        ),
        data=DataConfig(data="digits", image_size=size),
        runtime=RuntimeConfig(device="cpu", precision="fp32"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = build_model(network(config.model), len(CLASSES))
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    folder.mkdir(parents=True)
    mean, std = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.25, 0.24, 0.26])
    save_weights(folder / records.WEIGHTS, made, config, CLASSES, mean, std)
    records.write_config(folder, config)
    records.write_summary(folder, example_summary(data="digits", test_accuracy=ACCURACY))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("export") / "runs" / "tiny")


@pytest.fixture(scope="module")
def trained(run) -> resfast.inference.load.TrainedRun:
    return resfast.load(run, device="cpu")


def pixels(count: int, size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def in_plain_torch(folder: Path, code: str, images: Tensor) -> list[Tensor]:
    """What code makes of ``images`` where resfast cannot be imported: it must set ``out``."""
    torch.save(images, folder / "images.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = f"{PLAIN}\n{code}\ntorch.save(out, 'out.pt')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


def loaded(made: exporting.Exported):
    """The file as a function, by means of its format's own library alone."""
    if made.metadata["format"] == "torch-export":
        return torch.export.load(made.path).module()
    if made.metadata["format"] == "aoti":
        return torch._inductor.aoti_load_package(str(made.path))
    import onnxruntime

    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def check_metadata(metadata: dict[str, str], format: str) -> None:
    assert metadata["format"] == format
    assert tuple(json.loads(metadata["classes"])) == CLASSES
    assert json.loads(metadata["mean"]) == pytest.approx([0.49, 0.48, 0.45])
    assert json.loads(metadata["std"]) == pytest.approx([0.25, 0.24, 0.26])
    assert float(metadata["test_accuracy"]) == ACCURACY
    assert metadata["image_size"] == "12"
    assert metadata["input"].startswith("images: uint8 [N, 12, 12, 3], RGB")
    assert metadata["output"].startswith("logits: float32 [N, 5]")
    assert metadata["data"] == "digits"
    assert metadata["run"] == "tiny"


# -- formats -----------------------------------------------------------------------------------


def test_torch_export_file_runs_with_torch_alone_for_any_batch_size(trained, tmp_path):
    made = export(trained, "torch-export", output=tmp_path / "net.pt2")
    code = """
extra = {"metadata.json": ""}
network = torch.export.load("net.pt2", extra_files=extra).module()
out = [network(images[:n]) for n in (1, 2, 9)]
json.dump(json.loads(extra["metadata.json"]), open("found.json", "w"))
"""
    images = pixels(9)
    for found in in_plain_torch(tmp_path, code, images):
        assert relative_error(found, trained.logits(images[: len(found)])) < 1e-5
    metadata = json.loads((tmp_path / "found.json").read_text())
    assert metadata == made.metadata
    check_metadata(metadata, "torch-export")


def test_torch_export_graph_is_convolutions_with_bias_in_channels_last(trained, tmp_path):
    made = export(trained, "torch-export", output=tmp_path / "net.pt2")
    program = torch.export.load(made.path)
    calls = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")
    assert calls["aten.conv2d.default"] == 6
    assert calls["aten.add.Tensor"] == 3  # two residuals, and the normalization
    assert not [name for name in calls if "norm" in name or not name.startswith("aten.")]
    weights = [t for t in program.state_dict.values() if t.ndim == 4]
    assert len(weights) == 6
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in weights)


@NEEDS_ONNX
def test_onnx_file_runs_in_onnxruntime_for_any_batch_size(trained, tmp_path):
    made = export(trained, "onnx", output=tmp_path / "net.onnx")
    run = loaded(made)
    for count in (1, 2, 9):
        assert relative_error(run(pixels(count)), trained.logits(pixels(count))) < 1e-5


@NEEDS_ONNX
def test_onnx_graph_is_convolutions_with_bias_and_says_what_it_is(trained, tmp_path):
    import onnx

    made = export(trained, "onnx", output=tmp_path / "net.onnx", opset=21)
    model = onnx.load(made.path)
    onnx.checker.check_model(model, full_check=True)
    calls = Counter(node.op_type for node in model.graph.node)
    assert calls.pop("Conv") == 6
    assert set(calls) <= {
        "Cast",
        "Mul",
        "Add",
        "Transpose",
        "Relu",
        "ReduceMean",
        "Reshape",
        "Gemm",
    }
    assert all(len(node.input) == 3 for node in model.graph.node if node.op_type == "Conv")
    assert {p.key: p.value for p in model.metadata_props} == made.metadata
    check_metadata(made.metadata, "onnx")
    assert [o.version for o in model.opset_import if o.domain == ""] == [21]
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    shapes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (images, logits)
    ]
    assert shapes == [["batch", 12, 12, 3], ["batch", 5]]


WRONG_INPUTS = """
def refusal(x):
    try:
        network(x)
    except RuntimeError as error:
        return str(error)
    return "no error"

wrong = {
    "size": images[:2, 1:],
    "dtype": images[:2].float(),
    "rank": images[:2, :, :, 0],
    "stride": images[:2].permute(0, 2, 1, 3),
    "batch": images[:3],
}
json.dump({name: refusal(x) for name, x in wrong.items()}, open("refused.json", "w"))
"""


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, 2])
def test_aoti_file_runs_with_torch_alone(batch, trained, tmp_path):
    made = export(trained, "aoti", output=tmp_path / "net.pt2", batch=batch)
    code = """
network = torch._inductor.aoti_load_package("net.pt2")
out = [network(images[:n]) for n in SIZES]
json.dump(network.get_metadata(), open("found.json", "w"))
""".replace("SIZES", "(1, 2, 9)" if batch is None else "(2,)")
    images = pixels(9)
    for found in in_plain_torch(tmp_path, code + WRONG_INPUTS, images):
        assert relative_error(found, trained.logits(images[: len(found)])) < 1e-5
    metadata = json.loads((tmp_path / "found.json").read_text())
    assert made.metadata.items() <= metadata.items()
    if batch is None:
        check_metadata(metadata, "aoti")
    refused = json.loads((tmp_path / "refused.json").read_text())
    for name, message in {
        "size": "unmatched dim value at 1, expected: 12, but got: 11",
        "dtype": "unmatched dtype",
        "rank": "unmatched number of dimensions, expected: 4, but got: 3",
        "stride": "unmatched stride value",
        "batch": "unmatched dim value at 0, expected: 2, but got: 3" if batch else "no error",
    }.items():
        assert message in refused[name]


@NEEDS_COMPILER
@pytest.mark.slow
def test_aoti_file_takes_contiguous_images_without_normalization(trained, tmp_path):
    output = tmp_path / "net.pt2"
    made = export(trained, "aoti", output=output, batch=3, normalize=False)
    images = pixels(3)
    x = (images / 255 - trained.mean) / trained.std
    x = x.permute(0, 3, 1, 2).contiguous()
    assert relative_error(loaded(made)(x), trained.logits(images)) < 1e-5


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "dtype", "limit"),
    [
        ("torch-export", "bfloat16", 3e-2),
        ("torch-export", "float16", 3e-3),
        pytest.param("onnx", "float16", 3e-3, marks=NEEDS_ONNX),
    ],
)
def test_dtype_is_that_of_the_weights_and_logits_stay_float32(
    format, dtype, limit, trained, tmp_path
):
    made = export(trained, format, dtype=dtype, output=tmp_path / f"net{suffix(format)}")
    error = relative_error(loaded(made)(pixels(9)), trained.logits(pixels(9)))
    assert 1e-6 < error < limit
    if format == "onnx":
        import onnx

        initializers = onnx.load(made.path).graph.initializer
        kinds = {t.data_type for t in initializers if t.name.endswith("conv1.weight")}
        assert kinds == {onnx.TensorProto.FLOAT16}
    else:
        state = torch.export.load(made.path).state_dict
        assert {t.dtype for t in state.values() if t.ndim == 4} == {getattr(torch, dtype)}


def suffix(format: str) -> str:
    return ".onnx" if format == "onnx" else ".pt2"


@pytest.mark.parametrize("format", FORMATS)
def test_without_normalize_the_input_is_normalized_images(format, trained, tmp_path):
    output = tmp_path / f"net{suffix(format)}"
    made = export(trained, format, output=output, normalize=False)
    assert made.metadata["input"].startswith("images: float32 [N, 3, 12, 12]")
    images = ((pixels(9) / 255 - trained.mean) / trained.std).permute(0, 3, 1, 2).contiguous()
    assert relative_error(loaded(made)(images), trained.logits(pixels(9))) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_size_binds_the_file_to_it(format, trained, tmp_path):
    made = export(trained, format, output=tmp_path / f"net{suffix(format)}", batch=70)
    assert made.images == 70
    network = loaded(made)
    assert relative_error(network(pixels(70)), trained.logits(pixels(70))) < 1e-5
    with pytest.raises(Exception, match="70"):
        network(pixels(69))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("size", "model"),
    [
        (13, {"block": "bottleneck", "shortcut": "pool", "activation": "leaky_relu"}),
        (11, {"shortcut": "conv3", "activation": "silu", "strides": (2, 2)}),
        (12, {"activation": "gelu", "head": (7,), "dropout": 0.5}),
    ],
    ids=["bottleneck-pool-leaky", "conv3-silu", "head-gelu"],
)
def test_every_kind_of_network_can_be_exported(format, size, model, tmp_path):
    run = resfast.load(make_run(tmp_path / "run", size, **model), device="cpu")
    network = loaded(export(run, format))
    for count in (1, 5):
        wanted = run.logits(pixels(count, size))
        assert relative_error(network(pixels(count, size)), wanted) < 1e-5


def test_blocks_that_were_grouped_are_plain_convolutions_again(tmp_path, monkeypatch):
    run = resfast.load(make_run(tmp_path / "run", channels=(16, 16), stem=16), device="cpu")

    def grouped(model: nn.Module, dtype: torch.dtype) -> nn.Module:
        fused = resfast.fuse(model, dtype)
        group_blocks(fused.network)
        assert any(isinstance(module, BasicBlock) for module in fused.modules())
        return fused

    monkeypatch.setattr(exporting, "fuse", grouped)
    program = torch.export.load(export(run, dtype="bfloat16").path)
    calls = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")
    assert calls["aten.conv2d.default"] == 6


def test_an_operator_of_resfast_in_the_graph_is_refused(trained, monkeypatch):
    monkeypatch.setattr(exporting, "ConvBiasAct", type(None))  # nothing is one: all are left
    with pytest.raises(ResfastError, match=r"still calls resfast\.conv2d_bias_act\.default"):
        export(trained)


def test_the_command_writes_into_the_run_and_says_how_close_it_came(run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run")
    shutil.copy(copied / records.WEIGHTS, copied / records.BEST)
    assert main([str(copied), "--format", "torch-export"]) == 0
    path = copied / "export" / "model.pt2"
    out = capsys.readouterr().out
    assert f"{path}: torch-export, float32, " in out
    assert "uint8 [N, 12, 12, 3]" in out
    assert "100.0% of the classes agree" in out
    assert f'torch.export.load("{path}").module()' in out
    assert [p.name for p in path.parent.iterdir()] == ["model.pt2"]

    weights = ["--weights", "best", "--no-normalize"]
    assert main([str(copied), "--format", "torch-export", *weights]) == 0
    extra = {exporting.METADATA: ""}
    torch.export.load(path, extra_files=extra)
    metadata = json.loads(extra[exporting.METADATA])
    assert metadata["weights"] == "best.safetensors"
    assert metadata["input"].startswith("images: float32")
    assert "test_accuracy" not in metadata  # it is that of the final weights


def test_a_weights_file_by_itself_can_be_exported(run, tmp_path):
    shutil.copy(run / records.WEIGHTS, tmp_path / "alone.safetensors")
    made = export(tmp_path / "alone.safetensors", report=lambda line: None)
    assert made.path == tmp_path / "export" / "model.pt2"
    assert made.metadata["data"] == "digits"
    assert "test_accuracy" not in made.metadata


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_names_no_path_of_the_machine(format, trained, tmp_path):
    made = export(trained, format, output=tmp_path / f"net{suffix(format)}")
    parts = [made.path.read_bytes()]
    if zipfile.is_zipfile(made.path):
        with zipfile.ZipFile(made.path) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
    for place in (ROOT, Path(torch.__file__).parent):
        assert not any(os.fsencode(place) in part for part in parts)


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_differs_from_the_run_is_not_left(format, trained, tmp_path, monkeypatch):
    output = tmp_path / f"net{suffix(format)}"
    output.write_text("old")
    forward = exporting._Conv.forward
    monkeypatch.setattr(exporting._Conv, "forward", lambda self, x, residual=None: forward(self, x))
    with pytest.raises(ResfastError, match=r"was not written: its logits differ .* allowed 1e-03"):
        export(trained, format, output=output)
    assert output.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [output.name]


def test_logits_that_are_not_finite_are_refused(run, tmp_path):
    trained = resfast.load(run, device="cpu")
    trained.model.head[-1].bias.fill_(float("nan"))
    with pytest.raises(ResfastError, match="relative error nan"):
        export(trained, output=tmp_path / "net.pt2")
    assert not (tmp_path / "net.pt2").exists()


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("tflite", {}, "format 'tflite' is unknown; choose torch-export, onnx, aoti"),
        ("torch-export", {"dtype": "int8"}, "dtype 'int8' is unknown; choose float32, bfloat16"),
        ("torch-export", {"batch": 0}, "--batch 0 is out of range"),
        ("torch-export", {"opset": 20}, "--opset 20 is for --format onnx, but this is torch-exp"),
        ("onnx", {"opset": 17}, "--opset 17 is out of range: expected 18 to 25"),
        ("onnx", {"dtype": "bfloat16"}, "bfloat16 .* choose float32 or float16"),
        ("torch-export", {"output": "net.onnx"}, r"net\.onnx must end in \.pt2"),
        ("torch-export", {"output": "."}, "is a folder; expected the name of a .pt2 file"),
        ("torch-export", {"output": "file/net.pt2"}, "cannot create the folder file: .*--output"),
        ("torch-export", {"device": "tpu"}, "device 'tpu' is unknown"),
        ("torch-export", {"weights": "best"}, "no best weights .*--weights final"),
    ],
)
def test_bad_values_are_refused_with_what_to_do(
    format, options, message, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ResfastError, match=message):
        export(run, format, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_missing_run_is_one_sentence_and_code_2(run, capsys):
    assert main([str(run.parent / "tinny"), "--format", "onnx"]) == 2
    err = capsys.readouterr().err.strip()
    assert "there is no run" in err
    assert "did you mean 'tiny'?" in err
    assert len(err.splitlines()) == 1


def test_missing_packages_are_named_with_how_to_install_them(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "onnx" or None)
    with pytest.raises(ResfastError, match=r'onnxscript, onnxruntime; pip install "resfast\[exp'):
        export(run, "onnx")


def test_a_missing_compiler_is_said_before_the_work(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ResfastError, match=r"no C\+\+ compiler .* choose --format torch-export"):
        export(run, "aoti")


def test_a_compiler_that_fails_is_one_sentence(run, tmp_path, monkeypatch):
    from torch._inductor.exc import CppCompileError

    def fail(*args: object, **kwargs: object) -> None:
        raise CppCompileError(["g++", "net.cpp"], "net.cpp:1: error: no such instruction")

    monkeypatch.setenv("CXX", sys.executable)  # a program that is there
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    with pytest.raises(
        ResfastError, match=r"AOTInductor cannot compile the network .*torch-export"
    ):
        export(run, "aoti", output=tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_leaves_the_old_file(trained, tmp_path, monkeypatch):
    output = tmp_path / "net.pt2"
    output.write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ResfastError, match="No space left on device; choose another path with"):
        export(trained, output=output)
    assert output.read_text() == "old"


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["torch-export", "aoti", pytest.param("onnx", marks=NEEDS_ONNX)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_export_on_a_gpu_matches_the_run(format, dtype, run, tmp_path):
    made = export(run, format, dtype=dtype, device="cuda", output=tmp_path / f"n{suffix(format)}")
    assert made.metadata["device"] == ("any" if format == "onnx" else "cuda")
    trained = dataclasses.replace(resfast.load(run, device="cuda"), dtype=torch.float32)
    where = "cpu" if format == "onnx" else "cuda"
    for count in (1, 9):
        found = loaded(made)(pixels(count).to(where)).cpu()
        assert relative_error(found, trained.logits(pixels(count))) < 1e-2
