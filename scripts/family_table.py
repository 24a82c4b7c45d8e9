"""Runs the identity tests of every pair of dense family and MoE host, and writes the tables of docs/families.md.

    python scripts/family_table.py           # all pairs, a few minutes
    python scripts/family_table.py --check   # runs nothing: is the page's list of pairs that of the code?

A row is written for a pair whose every test passed; if any failed, nothing is written.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from pages import put_between

from raymoe.architectures import MOE_ARCHITECTURES
from raymoe.architectures.support_matrix import SupportedPair, supported_pairs, wrapped_types
from raymoe.architectures.unsupported_families import UNSUPPORTED
from raymoe.formatting import plural

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/families.md"
MARK = "<!-- table {}: scripts/family_table.py -->"
COPIES, FORCED, WRAPPED = "test_same_experts", "test_forced_router", "test_wrapped_models"
SHARED = {"no": "no", "gated": "optional, gated", "plain": "optional", "always": "optional, zeros without"}


@dataclass
class Measured:
    """What the tests of one pair found: how many there were, and the largest difference of logits."""

    tests: dict[str, int] = field(default_factory=lambda: {COPIES: 0, FORCED: 0, WRAPPED: 0})
    difference: dict[str, float] = field(default_factory=lambda: {COPIES: 0.0, FORCED: 0.0, WRAPPED: 0.0})

    def add(self, kind: str, difference: float) -> None:
        self.tests[kind] += 1
        self.difference[kind] = max(self.difference[kind], difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run nothing, compare the page with the code")
    if parser.parse_args().check:
        sys.exit(0 if pairs_of_page(PAGE.read_text()) == pairs_of_code() else "docs/families.md is not of this code")
    measured = run_tests()
    put_between(PAGE, MARK.format("exact"), exact_table(measured))
    put_between(PAGE, MARK.format("wrapped"), wrapped_table(measured))
    put_between(PAGE, MARK.format("refused"), refused_table())
    put_between(PAGE, MARK.format("engines"), engines_table())


def run_tests() -> dict[str, Measured]:
    """By pair and `-shared`. Ends the program where a test fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/architectures/{name}.py" for name in (COPIES, FORCED, WRAPPED)]
        command = [sys.executable, "-m", "pytest", *files, f"--junitxml={report}"]
        result = subprocess.run(command, cwd=ROOT, check=False)
        if result.returncode:
            sys.exit("tests failed: the tables are left as they are")
        return read_report(report)


def read_report(report: Path) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        values = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        if "pair" in values:
            kind = case.attrib["classname"].rpartition(".")[2]
            found.setdefault(values["pair"], Measured()).add(kind, float(values["difference"]))
    return found


def exact_table(measured: dict[str, Measured]) -> str:
    lines = [
        "| dense models | `model_type` | become | `architecture` | shared expert | copies: difference "
        "| alone: difference | transformers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes: dict[str, list[str]] = {}
    for pair in supported_pairs():
        parts = [m for name in variants(pair) if (m := measured.get(name)) is not None]
        if not parts:
            sys.exit(f"no test of {pair.family} in {pair.host}")
        cells = [
            pair.family_title,
            f"`{pair.family}`",
            pair.host_title + (" (default)" if pair.is_default else ""),
            f"`{pair.host}`",
            SHARED[pair.shared_expert],
            *(summed(parts, kind) for kind in (COPIES, FORCED)),
            f"{pair.since} and later" if pair.since else "code of its own",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if pair.note:
            titles = notes.setdefault(pair.note, [])
            titles += [pair.host_title] if pair.host_title not in titles else []
    lines += ["", *(f"- {', '.join(titles)}: {note}." for note, titles in notes.items())]
    return "\n".join(lines)


def variants(pair: SupportedPair) -> tuple[str, str]:
    """What the tests call a pair, without and with a shared expert."""
    return f"{pair.family}-{pair.host}", f"{pair.family}-{pair.host}-shared"


def summed(parts: list[Measured], kind: str) -> str:
    tests, difference = sum(m.tests[kind] for m in parts), max(m.difference[kind] for m in parts)
    return f"{tests} {plural('test', tests)}, {f'{difference:.1e}' if difference else 'none'}"


def wrapped_table(measured: dict[str, Measured]) -> str:
    lines = [
        "| image-text and audio-text models | `model_type` | text model, usually | copies: difference |",
        "|---|---|---|---|",
    ]
    for each in wrapped_types():
        found = measured.get(f"wrapped-{each.wrapper}")
        if found is None:
            sys.exit(f"no test of {each.wrapper}")
        lines.append(f"| {each.title} | `{each.wrapper}` | `{each.family}` | {found.difference[WRAPPED]:.1e} |")
    return "\n".join(lines)


def refused_table() -> str:
    lines = ["| dense models | `model_type` | why not |", "|---|---|---|"]
    for family in UNSUPPORTED:
        types = ", ".join(f"`{name}`" for name in family.model_types)
        lines.append(f"| {family.title} | {types} | {family.reason} |")
    return "\n".join(lines)


def engines_table() -> str:
    """What is written though transformers does without it."""
    lines = ["| MoE architecture | what | for |", "|---|---|---|"]
    for each in MOE_ARCHITECTURES.values():
        forms = dict(each.written_for)
        if each.tied_head_for:
            forms["the head of a tied model, a copy of the embedding"] = each.tied_head_for
        lines += [f"| {each.title} | {what} | {engines} |" for what, engines in forms.items()]
    return "\n".join(lines)


# --- what the page says, for tests


def rows_of(page: str, name: str) -> Iterator[list[str]]:
    """The cells of a table's rows, but for the head."""
    lines = page.split(MARK.format(name))[1].strip().splitlines()
    for line in lines[2:]:
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def pairs_of_page(page: str) -> list[tuple[str, str]]:
    return [(cells[1].strip("`"), cells[3].strip("`")) for cells in rows_of(page, "exact")]


def wrapped_of_page(page: str) -> list[str]:
    return [cells[1].strip("`") for cells in rows_of(page, "wrapped")]


def pairs_of_code() -> list[tuple[str, str]]:
    return [(pair.family, pair.host) for pair in supported_pairs()]


def refused_of_page(page: str) -> list[str]:
    return [name for cells in rows_of(page, "refused") for name in re.findall(r"`([\w.-]+)`", cells[1])]


if __name__ == "__main__":
    main()
