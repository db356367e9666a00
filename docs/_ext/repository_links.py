"""Links to files of the repository: to our page of the target, if any.

``CONTRIBUTING.md`` links ``conf/README.md`` so that it works where the repository is browsed; on the site that is the
page which includes ``conf/README.md``. Other files are copied beside the site; folders have no page, and stay as text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

TOP = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "conf/README.md": "methods.md",
    "experiments/README.md": "paper_tables.md",
    "examples/plugin/README.md": "tutorials/add_a_method.ipynb",
}
"""File of the repository -> page of the site that includes it, or takes its place."""

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)]*)?\)")


def rewrite(text: str, source: Path, page: Path) -> str:
    """The text of `source` with links that lead to the same places from `page`."""

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / match["target"]))
        if target.is_dir():
            return match["text"]
        name = target.relative_to(TOP).as_posix()
        target = TOP / "docs" / PAGES[name] if name in PAGES else target
        anchor = match["anchor"] or ""
        return f"[{match['text']}]({os.path.relpath(target, page.parent)}{anchor})"

    return LINK.sub(link, text)


def included(app: Sphinx, relative_path: Path, parent_docname: str, content: list[str]) -> None:
    """Rewrite what is included from outside of the documentation; an event of Sphinx."""
    source = Path(os.path.normpath(Path(app.srcdir) / relative_path))
    if source.suffix == ".md" and not source.is_relative_to(app.srcdir):
        content[0] = rewrite(content[0], source, Path(app.env.doc2path(parent_docname)))


def read(app: Sphinx, docname: str, content: list[str]) -> None:
    """Rewrite a page of our own, whose links work where the repository is browsed, too; an event of Sphinx."""
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md":
        content[0] = rewrite(content[0], page, page)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("include-read", included)
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
