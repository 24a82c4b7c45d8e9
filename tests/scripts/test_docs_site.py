"""The site of docs/ builds without a warning, its links lead somewhere, and it loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    no_network = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **no_network},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "scripts/docs_site.py"))


class _Links(HTMLParser):
    """What a page has: ids, links that a reader follows, and addresses that a browser loads by itself."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link":
            self.loaded += [values["href"]] if values.get("rel") not in ("canonical", "prev", "next") else []
        elif "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Links]:
    return {page: _Links(page) for page in site.rglob("*.html") if page.name != "404.html"}


def test_every_page_is_there_and_can_be_reached(site: Path) -> None:
    pages = {
        path.relative_to(REPOSITORY / "docs").with_suffix("").as_posix() for path in REPOSITORY.glob("docs/**/*.md")
    }
    assert {page for page in pages if not (site / f"{page}.html").is_file()} == set()
    start = _Links(site / "index.html").links
    assert {page for page in pages if f"{page}.html" not in start} <= {"index"}


def test_nothing_is_loaded_from_other_hosts(site: Path, pages: dict[Path, _Links]) -> None:
    for page, found in pages.items():
        assert [address for address in found.loaded if urlsplit(address).netloc] == [], page
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)|@import[^;]*", styles) == []


def test_links_lead_to_files_and_headings(pages: dict[Path, _Links]) -> None:
    for page, found in pages.items():
        for link in found.links + found.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{page}: {link}"


def test_nested_lists_and_tables_after_comments_are_lists_and_tables(site: Path) -> None:
    steps = (site / "architecture.html").read_text(encoding="utf-8")
    assert re.search(r"<li>(?:(?!</li>).)*<ul>\s*<li>(?:(?!</li>).)*load_spec", steps, re.DOTALL)
    for page in site.rglob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert re.findall(r"<p>\|.*|^(?:- |\d+\. ).*", text, re.MULTILINE) == [], page


def test_lists_are_as_python_markdown_wants_them(script: dict[str, Any]) -> None:
    forge = [
        "1. one",
        "   goes on",
        "   - inner",
        "     goes on",
        "",
        "       $ code of 1",
        "2. two",
        "3. three",
        "",
        "- list",
        "  ```",
        "  - no list",
        "  ```",
        "text",
        "",
        "    - code",
    ]
    site = [
        "1. one",
        "    goes on",
        "    - inner",
        "        goes on",
        "",
        "          $ code of 1",
        "",
        "2. two",
        "3. three",
        "",
        "- list",
        "    ```",
        "    - no list",
        "    ```",
        "text",
        "",
        "    - code",
    ]
    assert script["for_python_markdown"]("\n".join(forge)).split("\n") == site


def test_links_out_of_docs_and_back_are_rewritten(script: dict[str, Any]) -> None:
    known = frozenset({"a.md", "research/b.md", "repository/README.md", "repository/cluster/c.yaml"})
    for page, link, target in (
        ("a.md", "../README.md#install", "repository/README.md#install"),
        ("research/b.md", "../../cluster/c.yaml", "../repository/cluster/c.yaml"),
        ("repository/README.md", "docs/a.md", "../a.md"),
        ("repository/cluster/d.md", "../docs/a.md", "../../a.md"),
        ("a.md", "../no-such-file.md", "../no-such-file.md"),
        ("a.md", "https://docs.ray.io", "https://docs.ray.io"),
    ):
        assert script["rewritten"](page, f"[text]({link})", known) == f"[text]({target})"
