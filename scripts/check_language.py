"""Checks code, docs and scripts for words that raymoe's prose avoids (CONTRIBUTING.md, Glossary).

    python scripts/check_language.py            # prints every finding that is not allowed; then the exit status is 1
    python scripts/check_language.py --count    # prints the findings per file, for `ALLOWED`

A list of words can check two rules: processes are not called persons ("who", "nobody"), and rates use "per"
("requests per hour").
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKED = ("raymoe", "docs", "cluster", "scripts", "README.md")
SUFFIXES = frozenset({".py", ".md", ".sh", ".yaml", ".yml"})

_UNITS = (
    "hour|minute|second|day|GB|MB|actor|expert|layer|shard|node|model|member|prompt|token|tensor|file|part|row|line"
)
_COUNTED = (
    "once|twice|times|seconds|minutes|requests|bytes|tokens|GB|MB|GiB|MiB|objects|actors|restarts|pieces|prompts|texts"
    "|rows|lines|files|GPUs|threads"
    "|one (?:actor|GPU|JSON object|object|prompt|tensor|value|row|line|file|copy|job|thread|process)"
)
RULES = {
    "name the thing: an actor, another process": re.compile(
        r"\b(?:who|whom|whoever|nobody|somebody|anybody|everybody|someone|anyone|everyone|no one)\b", re.IGNORECASE
    ),
    "write 'per' for a rate": re.compile(rf"\b(?:{_COUNTED}) an? (?:{_UNITS})\b"),
}

# Findings that are still there, by file. This list only shrinks: lower a number, or remove its line, with each rewrite.
ALLOWED: dict[str, int] = {
    "README.md": 2,
    "docs/benchmarks.md": 2,
    "docs/cluster.md": 3,
    "docs/config.md": 2,
    "docs/example-experts.md": 1,
    "docs/families.md": 1,
    "docs/gpu.md": 1,
    "docs/publishing.md": 1,
    "docs/reliability.md": 3,
    "docs/security.md": 1,
    "raymoe/architectures/moe/__init__.py": 1,
    "raymoe/checkpoints/merge_record.py": 2,
    "raymoe/cli/evaluate.py": 1,
    "raymoe/cli/merge.py": 1,
    "raymoe/config/cross_checks.py": 1,
    "raymoe/config/prompt_sources.py": 2,
    "raymoe/config/schema_errors.py": 1,
    "raymoe/console.py": 1,
    "raymoe/evaluation/dataset.py": 4,
    "raymoe/export/gguf/pretokenizer.py": 1,
    "raymoe/publish/push.py": 1,
    "raymoe/publish/repository.py": 3,
    "raymoe/report/eval_page.py": 2,
    "raymoe/report/model_card.py": 2,
    "raymoe/routers/activations.py": 1,
    "raymoe/routers/heldout_report.py": 2,
    "raymoe/routers/in_process.py": 3,
    "raymoe/routers/layer_loader.py": 1,
    "raymoe/routers/prompt_passes.py": 1,
    "raymoe/safe_text.py": 1,
    "raymoe/untrusted_files.py": 1,
    "scripts/bench_gpu.py": 1,
    "scripts/bench_routing.py": 1,
    "scripts/chaos.py": 1,
    "scripts/compare_mergekit.py": 1,
    "scripts/gpu_check.py": 1,
    "scripts/run_measures.py": 1,
    "scripts/soak_storage.py": 1,
    "scripts/train_example_experts.py": 1,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """An excluded word: its file (relative to the root), its line from 1 on, the word, and what to write instead."""

    file: str
    line: int
    word: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.word!r}: {self.remedy}"


def find_in_text(file: str, text: str) -> Iterator[Finding]:
    """The findings in the text of a file, in order of lines."""
    for number, line in enumerate(text.splitlines(), 1):
        for remedy, pattern in RULES.items():
            for match in pattern.finditer(line):
                yield Finding(file, number, match.group(), remedy)


def checked_files(root: Path) -> Iterator[Path]:
    """The files below `root` that are checked, but not this one, which lists the words."""
    for name in CHECKED:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in SUFFIXES and path.name != Path(__file__).name:
                yield path


def find_all(root: Path) -> dict[str, list[Finding]]:
    """Findings by file, for files that have any."""
    found = {}
    for path in checked_files(root):
        name = path.relative_to(root).as_posix()
        if findings := list(find_in_text(name, path.read_text(encoding="utf-8"))):
            found[name] = findings
    return found


def excess(found: dict[str, list[Finding]], allowed: dict[str, int]) -> list[Finding]:
    """The findings of files that have more of them than `allowed`."""
    return [each for name, findings in found.items() if len(findings) > allowed.get(name, 0) for each in findings]


def main(arguments: Iterable[str] | None = None) -> int:
    """Print what is found; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", action="store_true", help="print the findings per file, for ALLOWED")
    options = parser.parse_args(None if arguments is None else list(arguments))
    found = find_all(ROOT)
    if options.count:
        print("".join(f'    "{name}": {len(findings)},\n' for name, findings in sorted(found.items())), end="")
        return 0
    findings = excess(found, ALLOWED)
    print("".join(f"{each}\n" for each in findings), end="")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
