"""Hooks of MkDocs for mkdocs.yml: pages that are written for a forge become pages of the site.

    python -m mkdocs build --strict            # `make docs`: docs/ -> site/

Links: pages of docs/ link to files beside docs/ (`../CONTRIBUTING.md`, `../notebooks/merge_and_publish.ipynb`), which
MkDocs does not know. Each such file becomes a file of the site at `repository/`, with the files that it links to:
Markdown as a page, anything else as it is. Links are rewritten to match, so that `--strict` checks them all.

Lists and tables: Python-Markdown wants four spaces per level of a list, forges the width of the marker. Python-Markdown
also wants an empty line before a table, and after a list item of several paragraphs.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
DOCS, OUTSIDE = "docs/", "repository/"
# Pages of the repository that the navigation of mkdocs.yml names.
STARTS = ("CONTRIBUTING.md", "CHANGELOG.md", "cluster/README.md")
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<rest>(?:#[^)\s]*)?(?: [^)]*)?)(?=\))")
_MARKER = re.compile(r" *(?:[-*]|\d+\.) +(?=\S)")


def linked_paths(page: str, text: str) -> Iterator[str]:
    """The paths that a page links to. `page` and the result are relative to the repository."""
    for link in _LINK.finditer(text):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(page), link["path"]))


def outside_files(root: Path) -> list[str]:
    """Files beside docs/ that its pages and `STARTS` link to, directly or through each other."""
    waiting = [*STARTS, *(path.relative_to(root).as_posix() for path in sorted(root.glob(f"{DOCS}**/*.md")))]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        if page.endswith(".md"):
            found = set(linked_paths(page, (root / page).read_text(encoding="utf-8"))) - seen
            found = {path for path in found if not path.startswith((DOCS, "..")) and (root / path).is_file()}
            seen |= found
            waiting += found
    return sorted(path for path in seen if not path.startswith(DOCS))


def site_path(path: str) -> str:
    """Where a file of the repository is among the site's sources."""
    return path.removeprefix(DOCS) if path.startswith(DOCS) else OUTSIDE + path


def repository_path(source: str) -> str:
    """The opposite of `site_path`."""
    return source.removeprefix(OUTSIDE) if source.startswith(OUTSIDE) else DOCS + source


def rewritten(source: str, text: str, known: frozenset[str]) -> str:
    """The text of a page with its links as links among the site's sources, where these are `known`.

    Other links stay, and MkDocs warns of them.
    """
    page = repository_path(source)

    def target(link: re.Match[str]) -> str:
        path = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(page), link["path"])))
        if path not in known:
            return link[0]
        return posixpath.relpath(path, posixpath.dirname(source) or ".") + link["rest"]

    return _LINK.sub(target, text)


def for_python_markdown(text: str) -> str:
    """The text with lists indented by four spaces per level, and empty lines where Python-Markdown needs them."""
    lines: list[str] = []
    contents: list[int] = []  # The columns at which the contents of the open list items begin.
    fence = shift = 0
    has_paragraphs = False  # Whether the last list item has an empty line in it: the next one needs one before it.
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        marks = len(line.strip()) - len(line.strip().lstrip("`"))
        if fence:
            fence = 0 if marks >= fence and set(line.strip()) == {"`"} else fence
        elif line.strip():
            while contents and indent < contents[-1]:
                contents.pop()
            column = contents[-1] if contents else 0
            shift = 4 * len(contents) - column
            if indent < column + 4 and (marker := _MARKER.match(line)):  # deeper is code
                contents.append(len(marker[0]))
                lines += [""] if has_paragraphs and lines[-1] else []
                has_paragraphs = False
            fence = marks if marks >= 3 else 0
        else:
            has_paragraphs = bool(contents)
        if line.startswith("|") and lines and lines[-1].startswith("<!--"):
            lines.append("")
        lines.append(" " * shift + line if line.strip() else line)
    return "\n".join(lines)


# --- what MkDocs calls


def on_files(files: Files, config: Any) -> Files:
    """Add the files that are outside of docs/."""
    for path in outside_files(ROOT):
        source = site_path(path)
        in_nav = InclusionLevel.INCLUDED if path in STARTS else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, source, abs_src_path=str(ROOT / path), inclusion=in_nav))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Rewrite one page."""
    known = frozenset(file.src_uri for file in files)
    return for_python_markdown(rewritten(page.file.src_uri, markdown, known))
