"""Every operator is declared in one call of ``register``, and in the same way."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from resfast.ops import registration
from resfast.ops.registration import register

OPS = Path(registration.__file__).parent
ORDER = list(inspect.signature(register).parameters)


def calls(path: Path) -> list[ast.Call]:
    """The calls of ``register`` in a file."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "register"
    ]


FILES = sorted(OPS.glob("*/op.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_operator_is_declared_in_the_same_order(path: Path):
    found = calls(path)
    assert found, "no operator is registered"
    for call in found:
        names = [keyword.arg for keyword in call.keywords]
        assert names == sorted(names, key=ORDER.index)
        assert {"cpu", "cuda"} & set(names)


def test_nothing_is_registered_elsewhere():
    other = re.compile(r"torch\.library\.(?!opcheck)\w+|\blibrary\.Library\b")
    found = [
        path.relative_to(OPS).as_posix()
        for path in OPS.parent.rglob("*.py")
        if path.name != "registration.py" and other.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_an_operator_has_kernels_fake_kernel_and_gradients():
    calls = []

    def kernel(x: torch.Tensor) -> torch.Tensor:
        calls.append("kernel")
        return x.sin()

    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()

    for name, opaque in (("sine_for_tests", False), ("opaque_sine_for_tests", True)):
        register(
            f"{name}(Tensor x) -> Tensor",
            cpu=kernel,
            fake=torch.empty_like,
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
            backward=backward,
            opaque=opaque,
        )
        operator = getattr(torch.ops.resfast, name)
        x = torch.tensor([0.5, -1.0], requires_grad=True)
        torch.library.opcheck(operator.default, (x,))
        torch.testing.assert_close(torch.autograd.grad(operator(x).sum(), x)[0], x.cos())
        assert operator(x.to("meta")).shape == (2,)


@pytest.mark.parametrize("opaque", [False, True])
def test_an_opaque_kernel_is_not_traced_where_the_graph_breaks(opaque: bool):
    name = f"traced_for_tests_{opaque}".lower()
    register(f"{name}(Tensor x) -> Tensor", cpu=lambda x: x.sin(), opaque=opaque)
    operator, graphs = getattr(torch.ops.resfast, name), []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    @contextlib.contextmanager
    def context():
        yield

    def run(x):
        with context():
            torch._dynamo.graph_break()
            try:
                torch._dynamo.graph_break()
                return operator(x)
            finally:
                graphs.append("")

    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(run, backend=backend)(torch.ones(3))
    torch.testing.assert_close(result, torch.ones(3).sin())
    assert any("sin" in code for code in graphs) != opaque
