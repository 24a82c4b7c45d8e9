"""Owners: their texts, which records keep, and that only `planning/owner.py` knows these."""

from __future__ import annotations

import ast
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import raymoe
from raymoe.planning.owner import ALL_EXPERTS, ALL_SHARED, BASE, ROUTER, Owner
from tests.package_source import all_nodes, trees
from tests.pico import merge_config

OWNERS = {
    "base": BASE,
    "expert 0": Owner.expert(0),
    "expert 12": Owner.expert(12),
    "shared 1": Owner.shared(1),
    "experts": ALL_EXPERTS,
    "shared experts": ALL_SHARED,
    "router": ROUTER,
}


@pytest.mark.parametrize("text", OWNERS)
def test_text_and_back(text: str) -> None:
    owner = OWNERS[text]
    assert str(owner) == f"{owner}" == text
    assert Owner.parse(text) == owner
    for same in (copy.copy(owner), pickle.loads(pickle.dumps(owner))):
        assert same == owner and hash(same) == hash(owner)


@pytest.mark.parametrize(
    "text", ["", " ", "expert", "shared", "expert x", "expert -1", "base 0", "experts 0", "tutor 1"]
)
def test_other_texts_name_no_owner(text: str) -> None:
    assert Owner.parse(text) is None


def test_derived_sets(zoo: Callable[..., Path]) -> None:
    experts = [zoo("llama", seed=seed) for seed in (1, 2)]
    plan = raymoe.plan(merge_config(zoo("llama"), experts, mode="hidden"))
    assert (*plan.worker_shards, *plan.router_shards) == plan.shards
    assert {shard.owner for shard in plan.router_shards} == {ROUTER}
    assert [member.owner for member in plan.gates.members] == [Owner.expert(0), Owner.expert(1)]
    assert plan.gates.prompted == plan.gates.members
    drawn = raymoe.plan(merge_config(zoo("llama"), experts, mode="random")).gates
    assert len(drawn.members) == 2 and drawn.prompted == ()


def test_a_model_has_one_owner_object(zoo: Callable[..., Path]) -> None:
    """Plans may have a million tensors: what refers to an owner shares it."""
    experts = [zoo("llama", seed=seed) for seed in (1, 2)]
    plan = raymoe.plan(merge_config(zoo("llama"), experts, mode="hidden"))
    referring = [*plan.shards, *plan.sources, *plan.gates.members]
    assert len({id(each.owner) for each in referring}) == len({each.owner for each in referring})


# --- texts of owners are compared in one module only


def text_comparisons(tree: ast.AST) -> Iterator[int]:
    """The lines where an `owner` is compared with text, or where a text's beginning tells experts from others."""
    for node in all_nodes(tree):
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            if any(map(_is_owner, sides)) and any(map(_has_text, sides)):
                yield node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "removeprefix"):
            texts = [text for given in node.args for text in _texts(given)]
            if any(text.startswith(("expert", "shared")) for text in texts):
                yield node.lineno


def _is_owner(node: ast.AST) -> bool:
    return (getattr(node, "attr", "") or getattr(node, "id", "")) == "owner"


def _texts(node: ast.AST) -> list[str]:
    """The strings in an expression, those in tuples and f-strings included."""
    return [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def _has_text(node: ast.AST) -> bool:
    return not isinstance(node, ast.Call) and bool(_texts(node))


def test_no_other_module_compares_text_of_owners() -> None:
    modules = [path for path in trees() if path != "planning/owner.py"]
    found = [f"{path}:{line}" for path in modules for line in text_comparisons(trees()[path])]
    assert len(modules) > 100 and found == []


@pytest.mark.parametrize(
    "line",
    [
        'shard.owner == "router"',
        '"base" != owner',
        'owner in ("experts", "shared experts")',
        'shard.owner == f"expert {number}"',
        'shard.owner.startswith("expert")',
        'source["owner"].startswith("shared ")',
    ],
)
def test_what_is_found(line: str) -> None:
    assert list(text_comparisons(ast.parse(line))) == [1]
    assert not list(text_comparisons(ast.parse("shard.owner == ROUTER and shard.owner != Owner.parse('base')")))
