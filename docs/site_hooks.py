"""MkDocs hooks for links to files of the repository outside ``docs/``.

``![…](../benchmarks/….png)`` is a figure, which is copied into the site. Any other link out of
``docs/`` becomes text with the path, because the site does not know the repository's address.
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
"""A Sphinx-style reference in a docstring, as rendered by Markdown."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the figures that the pages show."""
    for page in Path(config.docs_dir).glob("*.md"):
        for _, path in FIGURE.findall(page.read_text(encoding="utf-8")):
            if files.get_file_from_path(path) is None:
                content = (ROOT / path).read_bytes()
                files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Points figures at their copies and replaces other links out of ``docs/`` by paths."""
    return LINK.sub(r"\1 (`\2`)", FIGURE.sub(r"![\1](\2)", markdown))


def on_page_content(html: str, **_: object) -> str:
    """Renders references in docstrings as code."""
    return ROLE.sub(r"<code>\1</code>", html)
