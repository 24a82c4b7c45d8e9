"""How many tests each tier has, and how many assertions: the table of CONTRIBUTING.md.

python scripts/tier_table.py             # collects the tests, runs none
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

from pages import put_between

ROOT = Path(__file__).resolve().parent.parent
PAGE, MARK = ROOT / "CONTRIBUTING.md", "<!-- table: scripts/tier_table.py -->"
# What each tier proves, and which command runs it. A test of several tiers counts in each.
TIERS = {
    "unit": ("check", "plans, configs, formats, refusals, gate arithmetic, each decision of the scheduler"),
    "s3": ("test", "object stores and the Hub: what is there after an upload is whole, late writers change nothing"),
    "ray": ("test", "merges on Ray give the same bytes whatever the number of actors, and go on after a kill"),
    "processes": (
        "test",
        "commands as a shell runs them: exit statuses, signals, closed pipes, imports that must not be",
    ),
    "engines": ("test", "merged models compute in transformers and llama.cpp what their sources compute"),
    "slow": (
        "test",
        "more cases and larger inputs of what unit tests show, and pairs that share their code",
    ),
    "soak": ("soak", "the same with more kills, faults, servers and models, and the notebook as it is"),
}
SUITES = {"make check": "unit", "make test": "not soak", "make soak": "soak"}


def main() -> None:
    asserted = assertions(ROOT / "tests")
    lines = ["| tier | run by | tests | assertions in them | proves |", "|---|---|---|---|---|"]
    for tier, (command, proves) in TIERS.items():
        chosen = f"{tier} and not soak" if tier != "soak" else tier
        lines.append(f"| `{tier}` | `make {command}` | {_counts(chosen, asserted)} | {proves} |")
    for name, chosen in SUITES.items():
        lines.append(f"| all of `{name}` | | {_counts(chosen, asserted)} | |")
    put_between(PAGE, MARK, "\n".join(lines))
    print("\n".join(lines))


def assertions(folder: Path) -> dict[str, int]:
    """Assertions (`assert`, `raises`, numpy's) written in each test function, by file and name."""
    found: dict[str, int] = {}
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"{path.relative_to(ROOT)}::{node.name}"] = sum(map(_is_assertion, ast.walk(node)))
    return found


def _is_assertion(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return name == "raises" or name.startswith(("assert_", "check_", "refused"))


def _counts(chosen: str, asserted: dict[str, int]) -> str:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-o",
        "addopts=--import-mode=importlib",
        "-q",
        "-m",
        chosen,
    ]
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    functions = Counter(line.partition("[")[0] for line in listed.splitlines() if "::" in line)
    return f"{functions.total():,} | {sum(asserted.get(name, 0) for name in functions):,}"


if __name__ == "__main__":
    main()
