"""What a browser would forgive and a test doesn't: unbalanced tags, ids twice, pictures without words."""

from __future__ import annotations

from html.parser import HTMLParser

__all__ = ["Page"]

VOID = {"meta", "link", "br", "hr", "img", "input"}
RAW = {"style", "script"}


class Page(HTMLParser):
    """A parsed page: its visible text, the titles (tooltips) in it, elements by tag, and what is wrong with it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.problems: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.open]
        self._check_references()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len({name for name, _ in attrs}) < len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if "svg" not in self.open:
            self.problems.append(f"<{tag}/> closes itself outside of a drawing")
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes what isn't open")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in RAW:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def _check_references(self) -> None:
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        self.problems += [f"id {name!r} stands twice" for name in set(ids) if ids.count(name) > 1]
        for tag, attributes in self.elements:
            name = attributes.get("aria-labelledby")
            if name is not None and name not in ids:
                self.problems.append(f"<{tag}> is labelled by {name!r}, which isn't there")
        self.problems += [
            "a drawing says nothing to a screen reader" for s in self.all("svg") if not s.get("aria-label")
        ]
        self.problems += ["a table's head has no scope" for head in self.all("th") if "scope" not in head]
