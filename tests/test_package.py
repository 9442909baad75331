"""The package as a whole: quick import, correct metadata, complete wheel."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from runpy import run_module

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import resfast
from resfast.cli import main as console
from resfast.studies import definition as catalog

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "nvidia": "nvidia-dali-cuda130"}
"""Imported name to distribution, where they differ."""
BUILT_ON = {"nvidia-dali-cuda130", "triton"}
"""Dependencies that may be declared before the package imports them."""

# Refuses what a plain import must not do.
GUARD = """
import sys

def refuse(event, args):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.system", "os.fork"):
        raise AssertionError(f"{event} {args}")

sys.addaudithook(refuse)
"""


def run_python(
    code: str, tmp_path: Path, *, bare: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds resfast; ``bare`` without any program on PATH."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    env["PYTHONPATH"] = str(ROOT)
    if bare:
        env["PATH"] = str(tmp_path)
        env.pop("CC", None)
        env.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def requirements(*groups: str) -> dict[str, Requirement]:
    """Declared dependencies by canonical name, those of the optional ``groups`` among them."""
    lines = list(PROJECT["dependencies"])
    for group in groups:
        lines += PROJECT["optional-dependencies"][group]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def imported_distributions() -> set[str]:
    """Distributions outside the standard library that a module of resfast imports anywhere."""
    found = set()
    for path in (ROOT / "resfast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module)
    tops = {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {"resfast"}
    return {canonicalize_name(DISTRIBUTIONS.get(top, top)) for top in tops}


# -- import ------------------------------------------------------------------------------------


def test_import_is_quick_and_loads_no_heavy_module(tmp_path):
    code = """
import sys, time
start = time.perf_counter()
import resfast
print(time.perf_counter() - start)
heavy = {"torch", "torchvision", "numpy", "matplotlib", "sklearn", "tyro", "pydantic", "rich"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    seconds = min(float(run_python(code, tmp_path).stdout) for _ in range(5))
    assert seconds < 0.2


def test_import_needs_no_compiler_no_network_and_no_other_program(tmp_path):
    run_python(GUARD + "import resfast; dir(resfast)", tmp_path, bare=True)


def test_network_is_made_without_compiler_and_network(tmp_path):
    code = "import torch\nimport resfast\n" + GUARD
    code += "model = resfast.create_model('resnet-member1m').eval()\n"
    code += "assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)"
    run_python(code, tmp_path, bare=True)


@pytest.mark.parametrize("name", ["train", "evaluate", "ensemble", "predict", "export"])
def test_entry_point_is_function_and_module_in_either_import_order(name, tmp_path):
    check = f"""
import types
assert isinstance(resfast.{name}, types.ModuleType)
assert callable(resfast.{name})
"""
    code = f"import resfast\n{check}\nimport resfast.{name}\n{check}"
    run_python(code, tmp_path)
    run_python(
        f"import resfast.{name}\n{check}\nfrom resfast import {name}\n{name}.__call__", tmp_path
    )


def test_train_called_is_the_training_function():
    with pytest.raises(resfast.ResfastError, match="needs a configuration"):
        resfast.train()


# Each line is right, unless it says that it is wrong.
TYPED_CALLS = """
import resfast
import resfast.train
import resfast.export
from resfast import evaluate, predict

path = resfast.train(resfast.recipe("default"), resume=None).path
run = resfast.load(path)
resfast.train("default")  # wrong
reached: float | None = resfast.train(resfast.Config()).summary.test_accuracy
reached_text: str = resfast.train(resfast.Config()).summary.test_accuracy  # wrong
resfast.train(resfast.Config()).summary.test_acuracy  # wrong
wanted: float | None = run.summary.test_loss if run.summary else None
run.summary.test_loss  # wrong
resfast.train(resfast.Config(), epochs=3)  # wrong
accuracy: float = evaluate(path, "digits", tta="flip").accuracy
evaluate(run, tta="both")  # wrong
resfast.evaluate(run, batchsize=3)  # wrong
label: str = predict(run, ["a.png"], top=1)[0][0][0]
predict(run, ["a.png"], top="1")  # wrong
resfast.predict(run, ["a.png"], topk=1)  # wrong
size: int = resfast.export(run, "onnx", batch=1).images
resfast.export(run, "tflite")  # wrong
resfast.export(run, output=3)  # wrong
resfast.create_model("resnet-2111", classes="ten")  # wrong
resfast.trian(resfast.Config())  # wrong
"""


def test_type_checkers_know_what_the_package_offers(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "calls.py").write_text(TYPED_CALLS, encoding="utf-8")
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", str(tmp_path), "calls.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    wrong = {
        int(line) for line in re.findall(r"^calls\.py:(\d+): error", done.stdout, re.MULTILINE)
    }
    lines = TYPED_CALLS.splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert wrong == expected, done.stdout + done.stderr


def test_type_checkers_and_python_find_a_name_in_the_same_module():
    tree = ast.parse((ROOT / "resfast" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and not node.orelse and isinstance(node.test, ast.Name)
    )
    typed = {alias.asname: node.module for node in checked.body for alias in node.names}
    assert set(typed) == set(resfast.__all__) - {"__version__"}
    for name, module in typed.items():
        found = getattr(resfast, name)
        found = getattr(found, "__wrapped__", found)
        assert found is getattr(import_module(module), name), name


def test_public_names_resolve():
    assert len(resfast.__all__) == len(set(resfast.__all__))
    for name in resfast.__all__:
        assert getattr(resfast, name) is not None, name
    assert set(resfast.__all__) <= set(dir(resfast))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        resfast.no_such_name  # noqa: B018


# -- metadata ----------------------------------------------------------------------------------


def test_console_scripts_exist():
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


def test_help_and_version_of_the_console_script_do_not_load_torch(tmp_path):
    code = """
import sys
from resfast.cli.main import main
assert main(["--help"]) == 0 and main(["--version"]) == 0
assert not {"torch", "numpy", "tyro"} & set(sys.modules)
"""
    shown = run_python(code, tmp_path).stdout
    for name in console.COMMANDS:
        assert f"\n  {name} " in shown
    assert shown.endswith(f"\nresfast {resfast.__version__}\n")


def test_an_unknown_command_is_one_sentence_with_the_nearest(capsys):
    assert console.main(["evalute", "runs/x"]) == 2
    output = capsys.readouterr().err
    assert output.startswith("resfast: error: unknown command 'evalute', expected one of train, ")
    assert output.endswith("; did you mean 'evaluate'?\n")


@pytest.mark.parametrize("name", console.COMMANDS)
def test_the_console_script_and_python_m_are_the_same_command(name, monkeypatch, capsys):
    def shown(argv: list[str], start: Callable[[], object]) -> str:
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            start()
        assert ended.value.code in (None, 0)
        return capsys.readouterr().out

    by_script = " ".join(shown(["resfast", name, "--help"], console.main).split())
    # As python -m does, in this process: a new one would import torch first.
    start = partial(run_module, f"resfast.{name}", run_name="__main__", alter_sys=True)
    by_module = shown([f"{ROOT}/resfast/{name}.py", "--help"], start)
    # Each names itself in its usage, whose lines are then broken elsewhere.
    usage = f"usage: resfast {name} "
    assert by_script.startswith(usage)
    by_module = " ".join(by_module.split())
    assert by_script == by_module.replace(f"usage: python -m resfast.{name} ", usage)


def test_version_has_one_home():
    assert "version" in PROJECT["dynamic"]
    assert "version" not in PROJECT
    version = Version(resfast.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(str(version))}\]", changelog, re.MULTILINE)


def test_python_that_is_too_old_is_refused():
    assert PROJECT["requires-python"] == ">=3.11"
    assert sys.version_info >= (3, 11)


def test_every_import_is_declared():
    optional = [group for group in PROJECT["optional-dependencies"] if group != "dev"]
    assert imported_distributions() <= set(requirements(*optional))


def test_every_dependency_is_imported():
    assert set(requirements()) <= imported_distributions() | BUILT_ON


def test_constraints_are_exact_versions_within_the_declared_bounds():
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line:
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.!]*)", line)
        assert match, f"{line!r} is not NAME==VERSION"
        assert match[1] not in pins, f"{match[1]} is pinned twice"
        pins[match[1]] = match[2]
    for name, requirement in requirements("dev", "docs", "wheel").items():
        assert name in pins, f"{name} is not pinned"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is not {requirement}"


# -- files -------------------------------------------------------------------------------------


def test_wheel_builds_without_compiler_and_holds_the_package_alone(tmp_path):
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.so", "_CUDA.json")
    for folder in ("resfast", "tests", "benchmarks", "csrc", "build_backend"):
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    empty = tmp_path / "empty"
    empty.mkdir()
    variables = ("CC", "CXX", "RESFAST_EXTENSION", "RESFAST_CUDA")
    env = {name: value for name, value in os.environ.items() if name not in variables}
    arguments = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *arguments, str(tmp_path), str(source)],
        env={**env, "PATH": str(empty)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"resfast-{resfast.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"resfast-{resfast.__version__}.dist-info/METADATA").decode()
    modules = {str(p.relative_to(ROOT).as_posix()) for p in (ROOT / "resfast").rglob("*.py")}
    recipes = {f"resfast/config/recipes/{name}.toml" for name in resfast.RECIPES}
    pages = {f"resfast/reporting/page.{kind}" for kind in ("css", "html.jinja")}
    studies = {f"resfast/studies/catalog/{name}.toml" for name in (*catalog.names(), "bases")}
    others = {"resfast/py.typed", "resfast/runs/targets.json"}
    assert names == modules | recipes | pages | studies | others
    assert "Requires-Python: >=3.11" in metadata
    assert "License-File: LICENSE" in metadata


def test_benchmarks_are_collected():
    options = ["--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_train_step[default-cpu-resfast]" in done.stdout


def run_make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs make as if no other make ran the tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("python", "message"),
    [("no-such-python", "there is no"), ("./old", "is Python 3.10.9"), ("./bare", "venv module")],
)
def test_make_says_what_is_wrong_with_the_python(python, message, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("constraints.txt", "pyproject.toml", "setup.py"):
        (tmp_path / name).touch()
    for name, script in {
        "old": 'if [ "$1" = --version ]; then echo Python 3.10.9; else exit 1; fi',
        "bare": 'case "$2" in *ensurepip*) exit 1; esac',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    done = run_make("lint", f"PYTHON={python}", cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_without_a_target_lists_the_targets(tmp_path):
    done = run_make(cwd=ROOT)
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"^  ([a-z-]+) ", done.stdout, re.MULTILINE)
    reports = {"bench-report", "gpu-report", "doctor", "wheel", "faults"}
    assert {"help", "train", "test", "bench", "lint", "docs", "clean"} | reports == set(listed)
