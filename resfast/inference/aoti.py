"""AOTInductor files that check their inputs: :func:`compile_checked`.

The code that AOTInductor generates compares dtype, shape, strides and device of the inputs with
those it was compiled for only if ``AOTI_RUNTIME_CHECK_INPUTS`` is set where it runs. Without the
comparison an input of another shape or dtype gives wrong logits or reads foreign memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from resfast.errors import ResfastError

_GATE = "if (!_check_aoti_runtime_check_inputs_env()){"
"""Line of the generated code before the return that skips the comparison."""


def compile_checked(program: ExportedProgram, path: Path, configs: dict[str, Any]) -> None:
    """Compiles a program as a file that raises ``RuntimeError`` for inputs it is not made for.

    Args:
        program: with tensors as inputs, of any size where dynamic.
        path: the file to write, ``.pt2``.
        configs: of the compiler, as ``inductor_configs``.

    Raises:
        ResfastError: this version of PyTorch generates the comparison in another way.
    """
    from torch._inductor import aoti_compile_and_package, config

    # The compiler's bounds of a dynamic batch are tighter than what the code can run.
    for name in ("check_lowerbound", "check_upperbound"):
        if hasattr(config.aot_inductor, name):
            configs = {**configs, f"aot_inductor.{name}": False}
    with _always_checked():
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


@contextlib.contextmanager
def _always_checked() -> Iterator[None]:
    """Registers code generators that write the comparison without its condition."""
    from torch._inductor.codegen import common

    common.init_backend_registration()
    before = dict(common.device_codegens)
    try:
        for device, codegen in before.items():
            if codegen.cpp_wrapper_codegen is not None:
                checked = _checked(codegen.cpp_wrapper_codegen)
                common.device_codegens[device] = replace(codegen, cpp_wrapper_codegen=checked)
        yield
    finally:
        common.device_codegens.update(before)


def _checked(base: Any) -> type:
    """A code generator whose comparison of inputs has no condition."""
    from torch._inductor.virtualized import V

    class Checked(base):
        @staticmethod
        def create(*args: Any, **kwargs: Any) -> Any:
            made = base.create(*args, **kwargs)
            return Checked() if type(made) is base else made

        def generate_input_output_runtime_checks(self) -> None:
            super().generate_input_output_runtime_checks()
            lines = self.prefix._lines
            gates = [i for i, line in enumerate(lines) if _GATE in str(line)]
            if len(gates) != 1:
                raise ResfastError(
                    "this version of PyTorch generates no check of the inputs that resfast knows; "
                    "choose --format torch-export"
                )
            ranks = _rank_checks(V.graph.graph_inputs.values())
            lines[gates[0]] = str(lines[gates[0]]).replace(_GATE, f"{ranks} if (false) {{")

    return Checked


def _rank_checks(inputs: Iterable[Any]) -> str:
    """Statements in C++ that compare numbers of dimensions, which AOTInductor does not."""
    return " ".join(
        f"{{ int64_t rank; "
        f"AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(input_handles[{index}], &rank)); "
        f"if (rank != {len(x.get_size())}) throw std::runtime_error("
        f'"input_handles[{index}]: unmatched number of dimensions, expected: '
        f'{len(x.get_size())}, but got: " + std::to_string(rank)); }}'
        for index, x in enumerate(inputs)
    )
