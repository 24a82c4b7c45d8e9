"""What a report of several problems looks like: one mistake is one problem there, wherever it was found."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from importlib import metadata

import pytest

from raymoe.errors import CheckpointError, Problem, ProblemCollector, ProblemReport, first_few, install_remedy


def report(*wheres: str, what: str = "unknown key", remedy: str = "remove it") -> ProblemReport:
    return ProblemReport([Problem(where=where, what=what, remedy=remedy) for where in wheres])


@pytest.mark.parametrize(
    ("wheres", "together"),
    [
        (["m.yaml:6: experts[0].key"], "m.yaml:6: experts[0].key"),
        (["m.yaml:6: experts[0].key", "m.yaml:9: experts[1].key"], "m.yaml:6, 9: experts[0-1].key"),
        ([f"experts[{n}].key" for n in (0, 1, 2, 5)], "experts[0-2, 5].key"),
        (["p.txt:1: a", "p.txt:2: a", "p.txt:3: a", "q.txt:1: b"], "p.txt:1-3: a; q.txt:1: b"),
        # Numbers in names are part of them.
        (["s3://b/m1/config.json", "s3://b/m2/config.json"], "s3://b/m1/config.json; s3://b/m2/config.json"),
        ([f"s3://b/m{n}" for n in range(1, 8)], "s3://b/m1; s3://b/m2; s3://b/m3; s3://b/m4 and 3 more"),
        (["", ""], ""),
    ],
)
def test_places_of_one_problem_are_told_together(wheres: list[str], together: str) -> None:
    prefix = f"{together}: " if together else ""
    assert str(report(*wheres)) == f"{prefix}unknown key\n    -> remove it"
    assert len(report(*wheres).problems) == len(wheres)


def test_other_problems_stay_in_their_order() -> None:
    first = report("a:1", "a:2").problems
    second = report("a:1", what="no value").problems
    assert str(ProblemReport([first[0], *second, first[1]])) == (
        "2 problems:\n  a:1-2: unknown key\n      -> remove it\n  a:1: no value\n      -> remove it"
    )


def test_reports_cross_processes() -> None:
    caught = report("m:1: a[0]", "m:2: a[1]")
    assert str(pickle.loads(pickle.dumps(caught))) == str(caught)


def test_a_few_of_many() -> None:
    """Problems are made one by one, since each takes its time."""
    made: list[int] = []

    def problems(count: int) -> Iterator[Problem]:
        for number in range(count):
            made.append(number)
            yield Problem(where="file", what=f"problem {number}", remedy="mend it")

    assert [problem.what for problem in first_few(problems(3), 3)] == ["problem 0", "problem 1", "problem 2"]
    made.clear()
    found = first_few(problems(100_000), 2)
    assert [problem.what for problem in found] == ["problem 0", "problem 1", "and more problems of this kind"]
    assert len(made) == 3


def test_steps_that_fail_are_in_one_report_each_problem_once() -> None:
    def fails(where: str, *, kind: type[ProblemReport] = ProblemReport) -> str:
        raise kind([Problem(where=where, what="wrong")])

    collector = ProblemCollector([Problem(where="first", what="wrong")])
    assert collector.run(sorted, "ba") == ["a", "b"]
    assert [collector.run(fails, where) for where in ("second", "second", "third")] == [None] * 3
    report = collector.report()
    assert type(report) is ProblemReport
    assert [problem.where for problem in report.problems] == ["first", "second", "third"]

    checkpoints = ProblemCollector(kind=CheckpointError)
    assert checkpoints.run(fails, "model", kind=CheckpointError) is None
    assert type(checkpoints.report()) is CheckpointError
    with pytest.raises(ProblemReport, match="other"):
        checkpoints.run(fails, "other")


def test_extras_are_installed_by_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which works without a clone of raymoe."""
    lines = ["numpy>=1.26", "gguf>=0.17; extra == 'gguf'", 'protobuf; extra == "gguf"', "x; extra == 'y'"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert install_remedy("gguf") == "pip install 'gguf>=0.17' protobuf"

    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert install_remedy("gguf") == "install raymoe with its extra gguf"
