"""The layout of the package: one direction of imports, no circles, nothing too long unexplained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from resfast.runtime import MIN_COMPUTE_CAPABILITY

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "resfast"

LAYERS = (
    ("resfast.cli",),
    ("resfast.studies",),
    ("resfast.training", "resfast.reporting"),
    ("resfast.inference",),
    ("resfast.runs", "resfast.optim"),
    ("resfast.config",),
    ("resfast.models", "resfast.data"),
    ("resfast.layers",),
    ("resfast.ops",),
    ("resfast.errors", "resfast.runtime", "resfast.atomic", "resfast.text", "resfast.cuda_graph"),
)
"""From the top to the bottom: a module imports from its own layer and from those below."""
EXEMPT = {
    "resfast",
    "resfast.train",
    "resfast.ensemble",
    "resfast.evaluate",
    "resfast.predict",
    "resfast.export",
    "resfast.doctor",
    "resfast.report",
    "resfast.sweep",
    "resfast.study",
    "resfast.data.__main__",
}
"""Public names and commands, which import from anywhere."""

MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_CLASS = 500, 250


def modules() -> dict[str, Path]:
    """Dotted name to file of each module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(name: str, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports anywhere, in a function or for types too."""
    for node in ast.walk(parsed(known[name])):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, name, known[name])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                if inner in known:
                    yield inner
                elif module in known:
                    yield module


def absolute(node: ast.ImportFrom, name: str, path: Path) -> str:
    """The module that a ``from`` names. Those of operators are relative, all others absolute.

    So a collection of kernels can hold the operators under a name of its own.
    """
    assert (node.level > 0) == (name.startswith("resfast.ops") and not is_foreign(node)), (
        f"{name} imports {node.module}: relative imports are for resfast.ops, and for all of it"
    )
    if not node.level:
        return node.module or ""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    above = package[: len(package) - node.level + 1]
    return ".".join([*above, *filter(None, [node.module])])


def is_foreign(node: ast.ImportFrom) -> bool:
    """Whether a module is not one of this package."""
    return node.level == 0 and (node.module or "").partition(".")[0] != "resfast"


def layer(name: str) -> int | None:
    """The number of a module's layer from the top, or None for an exempt one."""
    if name in EXEMPT:
        return None
    for number, prefixes in enumerate(LAYERS):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return number
    raise AssertionError(f"{name} has no layer: give it one in LAYERS")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by way of others too."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reached = {name: reachable(name) for name in graph}
    groups = {
        frozenset({name, *(other for other in reached[name] if name in reached[other])})
        for name in graph
        if name in reached[name]
    }
    return sorted(sorted(group) for group in groups)


def has_reason(path: Path) -> bool:
    """Whether the head of a file says why it is long."""
    text = path.read_text(encoding="utf-8")
    head = ast.get_docstring(parsed(path)) or ""
    comments = re.match(r"(?:#.*\n|\n)*", text)
    return any(
        line.lstrip("# ").startswith("Long because ")
        for line in (*head.splitlines(), *(comments[0].splitlines() if comments else ()))
    )


def test_imports_go_one_way():
    known = modules()
    upward = [
        f"{name} imports {other}"
        for name in known
        if (own := layer(name)) is not None
        for other in sorted(set(imported(name, known)))
        if other != "resfast" and ((theirs := layer(other)) is None or theirs < own)
    ]
    assert upward == []


def test_no_modules_import_each_other():
    known = modules()
    graph = {name: set(imported(name, known)) - {name, "resfast"} for name in known}
    assert circles(graph) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


@pytest.mark.parametrize("path", [*modules().values()], ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_long_says_why(path: Path):
    if has_reason(path):
        return
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES_OF_A_FILE, "split it, or say in its head: Long because …"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_LINES_OF_A_CLASS, f"split {node.name}, or say why it is long"


def test_the_build_and_the_package_agree_on_the_oldest_gpu():
    """``csrc/cuda/build.py`` runs before the package can be imported."""
    for node in parsed(ROOT / "csrc" / "cuda" / "build.py").body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "MIN_COMPUTE_CAPABILITY"
        ):
            assert ast.literal_eval(node.value) == MIN_COMPUTE_CAPABILITY
            return
    raise AssertionError("csrc/cuda/build.py no longer defines MIN_COMPUTE_CAPABILITY")
