"""What the docs name in backticks exists: paths, modules and what is in them, flags, keys. So do the files of links."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.package_source import trees

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT_PAGES = ("AGENTS.md", "CONTRIBUTING.md", "README.md")
PAGES = [*sorted((REPOSITORY / "docs").rglob("*.md")), *(REPOSITORY / name for name in ROOT_PAGES)]
# Names of other programs, and placeholders.
FOREIGN = frozenset(
    [
        "--attention-backend",
        "--compilation-config",
        "--model-impl",
        "--working-dir",
        "AbortIncompleteMultipartUpload",
        "P_e",
        "RAY_JOB_STOP_WAIT_TIME_S",
        "local_lock",
        "nolock",
        "preload_python_modules",
        "stale_uploads_expiry",
    ]
)
PLACEHOLDERS = ("./", "OUT/", "out/", "org/")


@cache
def defined_names() -> dict[str, set[str]]:
    """By the name of a module of the package: what modules of that name define, methods as `Class.method`."""
    found: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees().items():
        for node in tree.body:
            found[Path(path).stem] |= set(_defined(node))
    return found


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    if isinstance(node, ast.ClassDef):
        yield from (f"{node.name}.{name}" for each in node.body for name in _defined(each))
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


@cache
def known_files() -> frozenset[str]:
    """The names of files, without their folders."""
    below = [path for folder in ("docs", "raymoe", "scripts", "tests") for path in (REPOSITORY / folder).rglob("*.*")]
    return frozenset(path.name for path in (*REPOSITORY.iterdir(), *below))


@cache
def known_words() -> frozenset[str]:
    """Words and flags of the code, the tests, the scripts and the Makefile."""
    files = [path for folder in ("raymoe", "scripts", "tests") for path in (REPOSITORY / folder).rglob("*.py")]
    files = [path for path in files if path != Path(__file__)]
    files += [REPOSITORY / "pyproject.toml", REPOSITORY / "Makefile"]
    texts = [path.read_text(encoding="utf-8") for path in files]
    return frozenset(word for text in texts for word in re.findall(r"--[a-z][\w-]+|\w+", text))


def unknown_names(text: str, folder: Path) -> list[str]:
    """The names in backticks that do not exist; `folder` is the page's, for paths that start there."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [span for span in re.findall(r"`([^`\n]+)`", prose) if not _exists(span, folder)]


def _exists(span: str, folder: Path) -> bool:
    if span in FOREIGN or span.startswith(PLACEHOLDERS) or "NAME" in span:
        return True
    if not all(flag in FOREIGN or flag in known_words() for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", span)):
        return False
    if re.fullmatch(r"[\w-]+\.(py|md)", span):
        return span in known_files()
    if re.fullmatch(r"[\w.*-]+/[\w./*-]*", span):
        places = (REPOSITORY, REPOSITORY / "raymoe", folder)
        return any(path for place in places for path in place.glob(span.rstrip("/")))
    if not (name := re.fullmatch(r"([A-Za-z_][\w.]*\w)(\(.*\))?", span)):
        return True
    module, _, rest = name[1].removeprefix("raymoe.").rpartition("/")[2].partition(".")
    if rest and module in defined_names() and f".{rest}" not in (".json", ".toml", ".yaml"):
        return rest in defined_names()[module] or rest.split(".")[0] in defined_names()
    return all(_as_in_code(word) in known_words() for word in name[1].split("."))


def _as_in_code(word: str) -> str:
    """Ray puts `ray_` before the names of metrics, and Prometheus `_total` behind those of counters."""
    return word.removeprefix("ray_").removesuffix("_total") if word.startswith("ray_raymoe_") else word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_what_a_page_names_exists(page: Path) -> None:
    assert unknown_names(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_what_does_not_exist_is_found() -> None:
    text = "`scheduler.run_jobs` `scheduler.run_work` `runtime/scheduler.py` `runtime/schedule.py` `--actors` `--actor`"
    assert unknown_names(text, REPOSITORY) == ["scheduler.run_work", "runtime/schedule.py", "--actor"]
    text = "`MoeArchitecture` `Moe` + `Host` `gate_mode` `gate_kind` `raymoe.json` `expert_actor.ExpertWorker.capture`"
    assert unknown_names(text.replace("` + `", ""), REPOSITORY) == ["MoeHost", "gate_kind"]
