"""The documentation: its examples run, its paths and links exist, its list of names is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import resfast

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "csrc/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # which names files that are gone
)
EXAMPLES = [
    pytest.param(code, id=f"{path.relative_to(ROOT).as_posix()}-{number}")
    for path in PAGES
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    )
]
TRAINS = "resfast.train("
"""A call in the examples that need training data or minutes, and are not run."""
SOURCES = re.compile(r"`((?:benchmarks|build_backend|csrc|docs|resfast|tests)/[\w./-]+)`")
BUILT = (".so", "_CUDA.json")
"""Endings of files that a build makes."""
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_compiles_and_runs_where_it_does_not_train(code: str, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where choices of kernels are kept
    program = compile(code, "example", "exec")
    if TRAINS not in code:
        exec(program, {"__name__": "example"})


def test_examples_are_found_and_some_run():
    codes = [parameter.values[0] for parameter in EXAMPLES]
    assert any(TRAINS in code for code in codes)
    assert sum(TRAINS not in code for code in codes) >= 2


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_and_links_of_a_page_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    sources = [path for path in SOURCES.findall(text) if not path.endswith(BUILT)]
    missing = [path for path in sources if not (ROOT / path).exists()]
    missing += [path for path in LINK.findall(text) if not (page.parent / path).exists()]
    assert not missing


def test_the_library_page_lists_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.M)}
    assert set(resfast.__all__) - {"__version__"} <= listed


def test_the_site_has_every_page():
    nav = re.findall(r"^  - .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(nav) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_network_is_in_the_documentation_with_its_parameters():
    from tests.test_models import PARAMETERS

    models = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \|", models, re.M)
    assert {name: int(count.replace(",", "")) for name, count in rows} == PARAMETERS
    assert f"lists the {len(PARAMETERS)} networks" in (ROOT / "README.md").read_text("utf-8")


def test_the_readme_names_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages == set(re.findall(r"\]\(docs/([\w-]+\.md)", readme))
