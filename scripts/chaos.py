"""Merges whose actors, nodes and drivers are killed: every one has to end with the bytes of an undisturbed merge.

    python scripts/chaos.py --kinds actor driver --count 3 --no-examples     # a quick look
    python scripts/chaos.py --page                                           # 89 strikes; puts the table into the docs

A real Ray cluster runs on this machine: a head that wants a token and takes jobs, and a worker node that is lost and
replaced. Merges of pico models and of the example experts go to folders and to real S3 servers. From a seed they
are struck at moments of their own progress. This script sees that progress from outside: what the actors say that they
are busy with, and which shards the journal calls finished.

A takeover is two merges of different plans to one output: the older one is left, killed or stopped, the newer one comes
with --overwrite, and what was stopped goes on.

Exit status 1 if a merge was wrong or hung, or left something behind. Logs of those are kept.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pages import put_between

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from tests.chaos.cases import KINDS, MOMENTS, make_case, variant_named  # noqa: E402
from tests.chaos.full_store import run_full_store  # noqa: E402
from tests.chaos.leftovers import machine  # noqa: E402
from tests.chaos.runs import IDENTICAL, RESUMED, Outcome, run_case  # noqa: E402
from tests.chaos.watch import connected  # noqa: E402
from tests.soak.world import World, open_world  # noqa: E402

PAGE, MARK = ROOT / "docs/reliability.md", "<!-- table: scripts/chaos.py -->"
COUNTS = {"actor": 20, "node": 10, "cut off": 2, "driver": 20, "sigterm": 5, "takeover": 32, "store": 0}
Case = dict[str, Any]
Counted = dict[str, int]
VERDICTS = (IDENTICAL, RESUMED, "wrong", "hung")
HEAD_CPUS = 3
_CASES_A_STRIKE = 3  # at most: not every case is struck


def run_kind(world: World, kind: str, strikes: int, arguments: argparse.Namespace, end: float) -> Iterator[Outcome]:
    """Cases of a kind until so many strikes have hit (a merge that is over before its moment is none)."""
    if kind == "store":
        for outcome in run_full_store(world, arguments.logs, arguments.timeout):
            say(outcome, 0, 0)
            yield outcome
        return
    hit = 0
    only = variant_named(arguments.only) if arguments.only else None
    for number in range(arguments.first, arguments.first + _CASES_A_STRIKE * strikes):
        if hit >= strikes or time.monotonic() > end:
            return
        case = make_case(kind, number, arguments.seed, arguments.servers, only=only, examples=arguments.examples)
        try:
            outcome = run_case(world, case, arguments.logs, arguments.timeout)
        except Exception:
            outcome = Outcome(case=case, verdict="wrong", problems=[traceback.format_exc()])
        hit += len(outcome.strikes)
        say(outcome, hit, strikes)
        yield outcome


def sends_jobs(kinds: Sequence[str]) -> bool:
    """Whether cases of these kinds are sent by `raymoe submit`. The job server takes a while to start."""
    return any(make_case(kind, number, 0, ()).way == "job" for kind in kinds if kind != "store" for number in range(4))


def say(outcome: Outcome, hit: int, strikes: int) -> None:
    found = [*outcome.problems, *outcome.left]
    more = f"; {'; '.join(found)} ({outcome.log})" if found else ""
    stops = "".join(f", stopped in {seconds:.1f} s" for seconds in outcome.stops)
    struck = ", ".join(outcome.strikes) or "nothing"
    line = f"{outcome.verdict}; struck at {struck}{stops}; {outcome.runs} runs, {outcome.seconds:.1f} s{more}"
    print(f"{hit}/{strikes} {outcome.case.label}: {line}", flush=True)


# --- counting


def plain(outcome: Outcome) -> Case:
    """What is counted of an outcome, as the JSON file holds it."""
    case, merge = outcome.case, outcome.case.merge
    return {
        "case": case.label,
        "kind": case.kind,
        "way": case.way,
        "to_s3": merge.writes_s3,
        "to_fsspec": merge.writes_fsspec,
        "example_experts": merge.variant.name.startswith("example"),
        "gate_pass": case.has_gates,
        "struck_at": outcome.strikes,
        "verdict": outcome.verdict,
        "stop_seconds": [round(seconds, 2) for seconds in outcome.stops],
        "runs": outcome.runs,
        "seconds": round(outcome.seconds, 1),
        "errors": outcome.errors,
        "problems": outcome.problems,
        "left": outcome.left,
    }


def as_json(outcomes: Sequence[Outcome], seed: int, before: Counted, after: Counted) -> dict[str, Any]:
    """All of it so far. `before` and `after`: the machine's state (leftovers.py)."""
    return {"seed": seed, "before": before, "after": after, "cases": [plain(each) for each in outcomes]}


def summary(cases: Sequence[Case]) -> dict[str, int]:
    """Counts of one line of the table."""
    moments = Counter(moment for case in cases for moment in case["struck_at"])
    verdicts = Counter(case["verdict"] for case in cases)
    return {
        "merges": len(cases),
        "runs": sum(case["runs"] for case in cases),
        "struck": moments.total(),
        **{moment: moments[moment] for moment in MOMENTS},
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        "left behind": sum(len(case["left"]) for case in cases),
        "other findings": sum(1 for case in cases if case["problems"]),
    }


def lines(cases: Sequence[Case]) -> dict[str, dict[str, int]]:
    """The lines of the table: what was struck; of all of these, where merges went and what they were of."""
    found = {name: [case for case in cases if case["kind"] == kind] for kind, name in KINDS.items()}
    found["all"] = list(cases)
    found |= {
        "of these: to a folder": [case for case in cases if not case["to_s3"] and not case["to_fsspec"]],
        "to S3": [case for case in cases if case["to_s3"]],
        "by fsspec": [case for case in cases if case["to_fsspec"]],
        "of the example experts": [case for case in cases if case["example_experts"]],
        "with a gate pass": [case for case in cases if case["gate_pass"]],
        "sent by `raymoe submit`": [case for case in cases if case["way"] == "job"],
        "on a Ray of their own": [case for case in cases if case["way"] == "own"],
    }
    return {name: summary(some) for name, some in found.items() if some}


def table(parts: Sequence[dict[str, Any]]) -> str:
    """Counts of all parts as Markdown, and in words what else was measured."""
    cases = [case for part in parts for case in part["cases"]]
    counts = lines(cases)
    heads = list(counts["all"])
    text = [f"| what was struck | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    text += [f"| {name} | {' | '.join(str(line[head]) for head in heads)} |" for name, line in counts.items()]
    grown = sum(part["after"]["Ray folder bytes"] - part["before"]["Ray folder bytes"] for part in parts)
    said = f"Ray's own folder (logs) grew by {grown / 1000 / max(1, counts['all']['runs']):.0f} kB per run;"
    for what in ("spilled files", "shared memory files"):
        said += f" {what} left: {sum(part['after'][what] - part['before'][what] for part in parts)};"
    if stops := [seconds for case in cases for seconds in case["stop_seconds"]]:
        longest, median = max(stops), statistics.median(stops)
        said += f" from SIGTERM to the end of the driver: {median:.1f} s (median), {longest:.1f} s (longest);"
    return "\n".join([*text, "", f"{said[:-1]}."])


def update_page(text: str) -> None:
    """Put the table between the page's marks."""
    put_between(PAGE, MARK, text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="what is struck")
    parser.add_argument("--count", type=int, help=f"strikes of each kind (default: {COUNTS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="leave out the cases before this one")
    parser.add_argument(
        "--server", default="moto,juicefs", help="S3 servers (also seaweedfs), with commas; '' writes to folders alone"
    )
    parser.add_argument("--only", help="merge only this variant: ridge, 'many shards', wide")
    parser.add_argument(
        "--examples", action=argparse.BooleanOptionalAction, default=True, help="the example experts too"
    )
    parser.add_argument("--add", type=Path, action="append", default=[], help="count the cases of this --json file too")
    parser.add_argument("--minutes", type=float, default=600, help="begin no merge after that time")
    parser.add_argument("--timeout", type=float, default=240, help="seconds after which a run counts as hung")
    parser.add_argument("--work", type=Path, help="work folder (default: a temporary one)")
    parser.add_argument("--logs", type=Path, default=ROOT / "out/chaos", help="folder for the logs of failures")
    parser.add_argument("--json", type=Path, help="write counts and cases to this file")
    parser.add_argument("--page", action="store_true", help="put the table into docs/reliability.md")
    arguments = parser.parse_args()
    arguments.servers = [server for server in arguments.server.split(",") if server]
    return arguments


def main() -> int:
    arguments, outcomes = parse(), list[Outcome]()
    counts = COUNTS if arguments.count is None else dict.fromkeys(KINDS, arguments.count)
    earlier = [json.loads(path.read_text()) for path in arguments.add]
    end = time.monotonic() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what was started is ended
    with (
        tempfile.TemporaryDirectory(prefix="raymoe-chaos-", dir=arguments.work) as folder,
        open_world(Path(folder), arguments.servers, HEAD_CPUS, job_server=sends_jobs(arguments.kinds)) as world,
        connected(world.cluster.environment),
    ):
        before = machine([world.cluster.temp])
        result = as_json(outcomes, arguments.seed, before, before)
        for kind in arguments.kinds:
            for outcome in run_kind(world, kind, counts[kind], arguments, end):
                outcomes.append(outcome)
                result = as_json(outcomes, arguments.seed, before, machine([world.cluster.temp]))
                if arguments.json:
                    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    text = table([*earlier, result])
    print(text)
    if arguments.page:
        update_page(text)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
