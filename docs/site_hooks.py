"""Hooks of MkDocs: pages link to files of the repository, which are outside of the site.

``![…](../benchmarks/….png)`` is a figure of the repository; the site gets a copy of it. Any other
link out of ``docs/`` becomes text with the path, as the site does not know where the repository is.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FIGURE = re.compile(r"!\[([^\]]*)\]\(\.\./([^)]+\.png)\)")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)]+)\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([^<]+)</code>")
"""A reference of a docstring in Sphinx's notation, as Markdown renders it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures that the pages show."""
    for page in Path(config.docs_dir).glob("*.md"):
        for _, path in FIGURE.findall(page.read_text(encoding="utf-8")):
            if files.get_file_from_path(path) is None:
                content = (ROOT / path).read_bytes()
                files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point figures at their copies, and write other links out of ``docs/`` as paths."""
    return LINK.sub(r"\1 (`\2`)", FIGURE.sub(r"![\1](\2)", markdown))


def on_page_content(html: str, **_: object) -> str:
    """Show references of docstrings as code."""
    return ROLE.sub(r"<code>\1</code>", html)
