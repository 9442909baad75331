"""Triton kernels without a GPU: run by Triton's interpreter, compiled for an architecture."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest


def triton_kernels(name: str) -> ModuleType:
    """The Triton kernels of an operator; skips the test where there is no Triton."""
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    return importlib.import_module(f"resfast.ops.{name}.triton")


@functools.cache
def interpreted(name: str) -> ModuleType:
    """A second copy of such a module, whose kernels are run by Triton's interpreter.

    What it took from another one of them is that one's copy.
    """
    module, triton = triton_kernels(name), importlib.import_module("triton")
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec = importlib.util.spec_from_file_location(f"{module.__name__}_cpu", module.__file__)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
    for key, value in list(vars(copy).items()):
        if isinstance(value, triton.JITFunction):
            setattr(copy, key, getattr(interpreted(value.__module__.split(".")[-2]), key))
    return copy


def compiled(
    kernel: Any,
    signature: dict[str, str],
    constants: dict,
    capability: int,
    options: dict | None = None,
    aligned: Iterable[str] = ("out",),
) -> Any:
    """A Triton kernel compiled for an architecture.

    Args:
        kernel: the function.
        signature: type of each argument that is no constant, such as ``*bf16``.
        constants: value of each other argument.
        capability: of the architecture, 90 for sm_90.
        options: such as ``num_warps``.
        aligned: pointers to a multiple of 16 bytes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names
    }
    signature = {name: signature.get(name, "constexpr") for name in names}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options or {},
    )
