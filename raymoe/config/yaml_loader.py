"""Parses config text into plain values, with the line of every key and item.

`yaml.safe_load` forgets lines and lets a second `experts:` overwrite the first. So the text is composed to
a tree of nodes, which have both, and one walk over the tree builds the values and notes the marks. Only the
tags of plain YAML are known: nothing in a config can make Python objects. JSON is read as the YAML it is.

With anchors, a tree can contain itself, or grow a thousandfold when it is written out. Both are reported as problems.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from raymoe.config.schema import NUMBER_KEYS
from raymoe.config.source_positions import Finding, Loc, Mark, SourcePositions, short_text
from raymoe.errors import Problem, ProblemReport

_MAX_VALUES = 200_000
_MAX_DEPTH = 32
# YAML 1.1 has numbers to the base 60 (1:30:00): PyYAML's time for one grows with the square of its length.
_MAX_BASE_60_CHARACTERS = 100
_Entries = dict[str, tuple[ScalarNode, Node]]
_PLAIN_TAGS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_NUMBER_TAGS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_MERGE_TAG = "tag:yaml.org,2002:merge"
# A number in JSON and in YAML 1.2, but text in PyYAML's YAML 1.1.
_EXPONENT_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

_QUOTE_REMEDY = (
    "check the indentation here and in the lines before, and put text in quotes if it begins with one of "
    "[ { * & ! % @ ` | > or holds ': ' or ' #'"
)
_DUPLICATE_KEY_REMEDIES = {"source_model": "begin each expert with '- source_model: ...'; or keep one of the two"}
_TAB_REMEDY = "indent with spaces: YAML takes no tabs there"


class NotYaml(ProblemReport):
    """A text that YAML's grammar refuses; `error` is the parser's own."""

    def __init__(self, error: yaml.MarkedYAMLError, problems: Sequence[Problem]):
        super().__init__(problems)
        self.error = error


def parse_tree(text: str, name: str) -> tuple[Any, SourcePositions, list[Finding]]:
    """Read YAML or JSON: the values, their lines, and what is wrong with single keys and values.

    Raises ProblemReport if the text as a whole cannot be read, NotYaml if it is not YAML.
    """
    loader = yaml.SafeLoader("")
    root = _compose(text, name)
    walk = _NodeReader(loader, name)
    try:
        value = walk.value(root, ())
    finally:
        loader.dispose()
    return value, walk.lines, walk.found


def _report(name: str, line: int | None, what: str, remedy: str = "") -> ProblemReport:
    return ProblemReport([Problem(where=f"{name}:{line}" if line else name, what=what, remedy=remedy)])


def _compose(text: str, name: str) -> Node:
    text = _without_json_tabs(text)
    _check_size(text, name)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except _TooManyError:
        raise _too_many(name) from None
    except yaml.MarkedYAMLError as error:
        raise NotYaml(error, _syntax_report(error, name).problems) from None
    except yaml.reader.ReaderError as error:
        # Its position counts characters, not lines.
        line = text.count("\n", 0, error.position) + 1
        code = f"U+{ord(text[error.position]):04X}"
        raise _report(name, line, f"the character {code} is not allowed in YAML", "remove it") from None
    except RecursionError:
        raise _too_deep(name, 1) from None
    if root is None:
        raise _report(name, None, "the config is empty", "write at least base_model and experts")
    return root


class _Loader(yaml.SafeLoader):
    """PyYAML's own, which composes no more nodes than a config may have."""

    composed = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.composed += 1
        if self.composed > _MAX_VALUES:
            raise _TooManyError
        return super().compose_node(parent, index)


class _TooManyError(Exception):
    pass


def _check_size(text: str, name: str) -> None:
    """Raises ProblemReport for a text with too many values, or nested too deeply.

    The C parser counts, as far as it accepts the text: it is much faster than composing a tree in Python.
    """
    if not hasattr(yaml, "CSafeLoader"):
        return
    values = depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.NodeEvent):
                values += 1
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if values > _MAX_VALUES:
                raise _too_many(name)
            if depth > _MAX_DEPTH + 1:  # the root is a level too; each makes the parser slower
                raise _too_deep(name, event.start_mark.line + 1 if event.start_mark else 1)
    except (yaml.YAMLError, ValueError):  # the latter for text that is no UTF-8
        pass


def _too_many(name: str) -> ProblemReport:
    return _report(name, None, f"it holds more than {_MAX_VALUES} values", "is this a merge config?")


def _too_deep(name: str, line: int) -> ProblemReport:
    return _report(name, line, "lists and mappings are nested too deeply", "a merge config has four levels")


def _syntax_report(error: yaml.MarkedYAMLError, name: str) -> ProblemReport:
    mark = error.problem_mark or error.context_mark
    what = ", ".join(part for part in (error.context, error.problem) if part)
    remedy = _TAB_REMEDY if "'\\t'" in what else _QUOTE_REMEDY
    return _report(name, mark.line + 1 if mark else None, f"not valid YAML: {short_text(what, 200)}", remedy)


def _without_json_tabs(text: str) -> str:
    """JSON may be indented with tabs, YAML may not. In valid JSON a raw tab is never part of a value."""
    if "\t" not in text or not text.lstrip().startswith("{"):
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text.replace("\t", " ")


class _NodeReader:
    """One walk over a node tree. `lines` and `found` are complete when `value` of the root has returned."""

    def __init__(self, loader: yaml.SafeLoader, name: str):
        self._loader = loader
        self._name = name
        self._marks: dict[Loc, Mark] = {}
        self._open: set[int] = set()
        self._entries_of: dict[int, _Entries] = {}
        self._join_cache = 0
        self.lines = SourcePositions(name=name, marks=self._marks)
        self.found: list[Finding] = []

    def value(self, node: Node, loc: Loc) -> Any:
        self._marks.setdefault(loc, _mark(node))
        if len(self._marks) > _MAX_VALUES:
            raise _too_many(self._name)
        if len(loc) > _MAX_DEPTH:
            raise _too_deep(self._name, _mark(node).line)
        if isinstance(node, ScalarNode):
            return self._scalar(node, loc)
        if id(node) in self._open:
            raise _report(self._name, _mark(node).line, "an anchor holds an alias of itself", "write the value out")
        if node.tag not in _PLAIN_TAGS:
            self._problem(loc, f"the tag {short_text(node.tag)} has no meaning here", "remove the tag")
        self._open.add(id(node))
        try:
            return self._mapping(node, loc) if isinstance(node, MappingNode) else self._items(node, loc)
        finally:
            self._open.remove(id(node))

    def _problem(self, loc: Loc, what: str, remedy: str, mark: Mark | None = None) -> None:
        self.found.append(Finding(loc=loc, what=what, remedy=remedy, mark=mark))

    def _items(self, node: Node, loc: Loc) -> list[Any]:
        return [self.value(item, (*loc, index)) for index, item in enumerate(node.value)]

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, (key_node, value_node) in self._entries(node, loc).items():
            # The mark is the key's: that is the line that the user looks for.
            value_loc = (*loc, key)
            self._marks[value_loc] = _mark(key_node, value_node)
            values[key] = self.value(value_node, value_loc)
        return values

    def _entries(self, node: MappingNode, loc: Loc) -> _Entries:
        """The entries by key, with `<<` resolved: a key that is written out wins over a merged one."""
        if id(node) in self._entries_of:
            return self._entries_of[id(node)]
        self._entries_of[id(node)] = {}  # what a mapping that merges itself gets from itself
        own: _Entries = {}
        merged: _Entries = {}
        duplicates: dict[str, Finding] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._problem(loc, "a key must be text", "write 'key: value'", _mark(key_node))
            elif key_node.tag == _MERGE_TAG:
                merged = self._join(self._read_merge_key(value_node, loc), merged)
            elif (first := own.setdefault(key_node.value, (key_node, value_node)))[0] is not key_node:
                what = f"the key is given twice, first in line {_mark(first[0]).line}"
                remedy, place = (
                    _DUPLICATE_KEY_REMEDIES.get(key_node.value, "keep one of the two"),
                    (*loc, key_node.value),
                )
                duplicates[key_node.value] = Finding(loc=place, what=what, remedy=remedy, mark=_mark(key_node))
        # If the dash between two experts is missing, all keys occur twice.
        self.found += [duplicates["source_model"]] if "source_model" in duplicates else duplicates.values()
        self._entries_of[id(node)] = {**merged, **own}
        return self._entries_of[id(node)]

    def _read_merge_key(self, node: Node, loc: Loc) -> _Entries:
        """What `<<: node` brings in; of several mappings, the first that has a key gives it."""
        merged: _Entries = {}
        for source in node.value if isinstance(node, SequenceNode) else [node]:
            if isinstance(source, MappingNode):
                merged = self._join(self._entries(source, loc), merged)
            else:
                what = "'<<' merges a mapping or a list of mappings, and this is neither"
                self._problem(loc, what, "write '<<: *name' for a mapping marked '&name'", _mark(source))
        return merged

    def _join(self, later: _Entries, first: _Entries) -> _Entries:
        """The entries of both. A long list of aliases may merge the same ones many times."""
        self._join_cache += len(later) + len(first)
        if self._join_cache > _MAX_VALUES:
            raise _too_many(self._name)
        return {**later, **first}

    def _scalar(self, node: ScalarNode, loc: Loc) -> Any:
        try:
            if node.tag in _NUMBER_TAGS and len(node.value) > _MAX_BASE_60_CHARACTERS and ":" in node.value:
                raise ValueError("too long for a number to the base 60")
            if loc and loc[-1] in NUMBER_KEYS and node.style is None and _EXPONENT_NUMBER.fullmatch(node.value):
                return float(node.value)
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError):
            # PyYAML's constructors trust the tag: any of these means that the text does not fit it.
            # 2024-13-45 has the form of a date and is none; !!int x is no number; !python/object is refused.
            kind = node.tag.rpartition(":")[2] if node.tag.startswith("tag:yaml.org,2002:") else node.tag
            what = f"'{short_text(node.value)}' cannot be read as {short_text(kind)}"
            self._problem(loc, what, "put it in quotes, if it is text" if node.style is None else "remove the tag")
            return node.value


def _mark(node: Node, value_node: Node | None = None) -> Mark:
    """The mark of `node`, with the text of `value_node` (by default `node`) if that is a plain scalar."""
    shown_node = node if value_node is None else value_node
    plain = isinstance(shown_node, ScalarNode) and shown_node.style is None
    return Mark(
        line=node.start_mark.line + 1,
        column=node.start_mark.column + 1,
        text=shown_node.value if plain else None,
    )
