"""``torch.onnx.export`` of fused networks, run by ONNX Runtime."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import resfast
from tests.test_fuse_operations import images, one_thread_and_no_cache_of_the_user, ready

__all__ = ["one_thread_and_no_cache_of_the_user"]

pytest.importorskip("onnxscript", reason="needs the extra export")
onnx = pytest.importorskip("onnx", reason="needs the extra export")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")


class Everything(nn.Module):
    """Every kind of operation that ``fuse`` makes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 2, 2, groups=16)
        self.conv2 = nn.Conv2d(16, 16, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.bn3 = nn.BatchNorm2d(32)
        self.first = nn.Conv2d(32, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.down, self.up = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.conv1(x)))
        y = F.hardswish(self.bn2(self.conv2(self.depthwise(x))) + x)
        x = F.leaky_relu(self.bn3(torch.cat([x, y], 1)), 0.2)
        x = F.relu(x + self.second(F.relu(self.first(x))))
        gate = self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.fc(F.gelu(x * gate).mean((2, 3)))


def exported(fused: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """The ONNX model and a session that runs it."""
    file = io.BytesIO()
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    torch.onnx.export(fused, (x,), dynamic_shapes=shapes, verbose=False).save(file)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()), full_check=True)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return onnx.load_from_string(file.getvalue()), session


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        Everything,
        lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
        lambda: torchvision.models.squeezenet1_1(num_classes=5),
    ],
    ids=["everything", "mobilenet_v3_small", "squeezenet1_1"],
)
def test_onnx_runtime_computes_what_the_fused_network_does(make: Any):
    model = ready(make())
    fused = resfast.fuse(model, torch.float32)
    x = images(2, 3, 64, 64)
    graph, session = exported(fused, x)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    for batch in (2, 1, 5):
        x = images(batch, 3, 64, 64)
        with torch.no_grad():
            expected = model(x)
        (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        error = (torch.from_numpy(result) - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_float16_is_exported_too():
    model = ready(Everything())
    x = images(2, 3, 32, 32)
    _, session = exported(resfast.fuse(model, torch.float16), x)
    with torch.no_grad():
        expected = model(x)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(result) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_torch_export_keeps_the_fused_operators():
    """Only ONNX needs other ones."""
    fused = resfast.fuse(ready(Everything()), torch.float32)
    program = torch.export.export(fused, (images(2, 3, 32, 32),))
    found = {str(node.target) for node in program.graph.nodes}
    assert {"resfast.conv2d_bias_act.default", "resfast.scale_shift_act.default"} <= found


@pytest.mark.filterwarnings("ignore")
def test_an_int8_network_has_the_same_values_in_onnx() -> None:
    """In floating point, on the values that the 8-bit operands stand for."""
    torch.manual_seed(0)
    model = ready(Everything())
    x = images(8, 3, 16, 16)
    fused = resfast.fuse(model, torch.int8, calibration=x)
    with torch.no_grad():
        expected = fused(x)
        _, session = exported(fused, x[:2])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    error = (torch.from_numpy(found) - expected).norm() / expected.norm()
    assert error < 0.02  # a value between two steps may be rounded to either
