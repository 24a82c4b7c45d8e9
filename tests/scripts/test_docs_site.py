"""The site of docs/ builds without a warning, its links lead somewhere, and it loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
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


def test_every_page_is_there_and_can_be_reached(site: Path) -> None:
    pages = {
        path.relative_to(REPOSITORY / "docs").with_suffix("").as_posix() for path in REPOSITORY.glob("docs/**/*.md")
    }
    assert {page for page in pages if not (site / f"{page}.html").is_file()} == set()
    start = _Links(site / "index.html").links
    assert {page for page in pages if f"{page}.html" not in start} <= {"index"}


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert [address for address in _Links(page).loaded if urlsplit(address).netloc] == [], page
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)|@import[^;]*", styles) == []


def test_links_lead_to_files_and_headings(site: Path) -> None:
    pages = {page: _Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
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
        assert "<p>|" not in page.read_text(encoding="utf-8"), page
