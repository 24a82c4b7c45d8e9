"""Merges from and to object stores while things break, many times: every one has to end right.

    python scripts/soak_storage.py --merges 10 --example-merges 0     # a quick look
    python scripts/soak_storage.py --page                             # 200 + 20; puts the table into the docs

Real S3 servers run on loopback. Between them and every merge stands a proxy that breaks requests, from a seed: errors,
resets, truncated bodies, lost replies. Every third case is a takeover: a merge of another plan runs, or was
killed, stopped or cut off, when the case's own merge begins with --overwrite; what stood still goes on later. Half of
the other merges are killed (SIGKILL, the whole process group) at a random moment, some of them twice, and run again.
Afterwards every file is compared byte for byte with an undisturbed merge. A run that ends with an error is right too,
if no index is to be seen and the same command, without faults, ends in the same bytes. No multipart upload of a merge
may be left open, and no upload of another program touched.

Exit status 1 if any merge was corrupt or hung, or left something behind. Logs of those are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from pages import put_between

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from tests.object_store.fault_proxy import KINDS  # noqa: E402
from tests.soak.cases import EXAMPLE_VARIANTS, TAKEOVER_DIRECTIONS, Case, make_cases  # noqa: E402
from tests.soak.runs import Outcome, run_case  # noqa: E402
from tests.soak.world import World, open_world  # noqa: E402

PAGE, MARK = ROOT / "docs/object-storage.md", "<!-- table: scripts/soak_storage.py -->"
VERDICTS = ("identical", "clean error", "corrupt", "hung")
SERVERS = ("moto", "juicefs", "seaweedfs")
LINES = ("pico models", "example experts", "takeovers")


def run_all(
    world: World, cases: Sequence[Case], logs: Path, jobs: int, timeout_s: float, end: float = math.inf
) -> list[Outcome]:
    """The outcomes of all cases, in their order; `jobs` of them run at once. None is begun after `end`."""
    outcomes: dict[int, Outcome] = {}

    def run(case: Case) -> Outcome | None:
        return run_case(world, case, logs, timeout_s) if time.monotonic() < end else None

    with ThreadPoolExecutor(jobs) as pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # where it is stopped early
        futures = {pool.submit(run, case): case for case in cases}
        for future in as_completed(futures):
            case = futures[future]
            try:
                outcome: Outcome | None = future.result()
            except Exception:
                outcome = Outcome(case=case, verdict="corrupt", problems=[traceback.format_exc()])
            if outcome is None:
                continue
            outcomes[case.number] = outcome
            say(outcome, len(outcomes), len(cases))
    return [outcomes[number] for number in sorted(outcomes)]


def used_servers(cases: Sequence[Case]) -> list[str]:
    """The servers that these cases need, each once."""
    return list(dict.fromkeys(case.server for case in cases))


def say(outcome: Outcome, done: int, count: int) -> None:
    more = f"; {'; '.join(outcome.problems)} ({outcome.log})" if outcome.problems else ""
    line = f"{outcome.verdict}, {outcome.kills} kills, {outcome.faults.total()} faults, {outcome.seconds:.1f} s{more}"
    print(f"{done}/{count} #{outcome.case.number} {outcome.case.label}: {line}", flush=True)


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Counts of one line of the table."""
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    return {
        "merges": len(outcomes),
        "killed": sum(1 for outcome in outcomes if outcome.kills),
        "kills": sum(outcome.kills for outcome in outcomes),
        "faults": sum(outcome.faults.total() for outcome in outcomes),
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        "uploads left open": sum(outcome.left_open for outcome in outcomes),
        "other findings": sum(1 for outcome in outcomes if outcome.problems),
    }


def rows(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """The lines of the table: models and direction and server, takeovers apart, then all."""
    found: dict[str, dict[str, int]] = {}
    for kind in LINES:
        for direction in TAKEOVER_DIRECTIONS:
            for server in SERVERS:
                line = (kind, direction, server)
                chosen = [o for o in outcomes if (kind_of(o), o.case.direction, o.case.server) == line]
                if chosen:
                    found[f"{kind}, {direction}, {server}"] = summary(chosen)
    return found | {"all": summary(outcomes)}


def kind_of(outcome: Outcome) -> str:
    """The line's name: one of LINES."""
    if outcome.case.takeover:
        return "takeovers"
    return "example experts" if outcome.case.variant in EXAMPLE_VARIANTS else "pico models"


def table(lines: Mapping[str, Mapping[str, int]], faults: Mapping[str, int]) -> str:
    """Counts (of `rows`), and faults by kind, as Markdown."""
    heads = list(lines["all"])
    text = [f"| models, direction, server | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    text += [f"| {name} | {' | '.join(str(counts[head]) for head in heads)} |" for name, counts in lines.items()]
    text += ["", "| fault | how often |", "|---|---|", *(f"| {kind} | {faults.get(kind, 0)} |" for kind in KINDS)]
    return "\n".join(text)


def added(parts: Sequence[dict[str, Any]]) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Counts and faults of several parts of a soak, as `as_json` gives them, together."""
    lines: dict[str, Counter[str]] = {}
    for part in parts:
        for name, counts in part["counts"].items():
            lines.setdefault(name, Counter()).update(counts)
    total = lines.pop("all")
    faults = sum((Counter(part["faults"]) for part in parts), Counter())
    return dict(sorted(lines.items(), key=_order)) | {"all": total}, faults


def _order(line: tuple[str, Any]) -> tuple[int, int]:
    """Of a line among those of the table: kinds and directions as they are listed."""
    kind = next(i for i, name in enumerate(LINES) if line[0].startswith(name))
    return kind, next(i for i, way in enumerate(TAKEOVER_DIRECTIONS) if way in line[0])


def faults_of(outcomes: Sequence[Outcome]) -> Counter[str]:
    return sum((outcome.faults for outcome in outcomes), Counter())


def as_json(outcomes: Sequence[Outcome], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    return {
        "seed": arguments.seed,
        "rate": arguments.rate,
        "seconds": round(seconds, 1),
        "counts": rows(outcomes),
        "faults": faults_of(outcomes),
        "findings": [
            {"case": o.case.label, "number": o.case.number, "verdict": o.verdict, "problems": o.problems, "log": o.log}
            for o in outcomes
            if o.failed
        ],
    }


def update_page(text: str) -> None:
    """Put the table between the page's marks."""
    put_between(PAGE, MARK, text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--merges", type=int, default=200, help="of pico models")
    parser.add_argument("--example-merges", type=int, default=20, help="of the example experts (750 MB each)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.05, help="share of requests that suffer, on average")
    parser.add_argument("--server", default="moto,juicefs", help=f"which of {', '.join(SERVERS)}, with commas")
    parser.add_argument("--impatient", action="store_true", help="give up requests early: merges end with errors")
    parser.add_argument("--takeovers", action="store_true", help="leave out what is no takeover")
    parser.add_argument("--only", type=int, action="append", help="number of a case to be run alone; repeat for more")
    parser.add_argument("--first", type=int, default=0, help="leave out the cases before this one")
    parser.add_argument("--add", type=Path, action="append", default=[], help="add the counts of this --json file")
    parser.add_argument("--jobs", type=int, default=3, help="merges at once")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no merge after that time")
    parser.add_argument("--timeout", type=float, default=120, help="seconds after which a run counts as hung")
    parser.add_argument("--work", type=Path, help="work folder (default: a temporary one)")
    parser.add_argument("--logs", type=Path, default=ROOT / "out/soak", help="folder for the logs of failures")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--page", action="store_true", help="put the table into docs/object-storage.md")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    servers, began = arguments.server.split(","), time.monotonic()
    cases = make_cases(arguments.merges, arguments.seed, arguments.rate, servers)[arguments.first :]
    examples = make_cases(arguments.example_merges, arguments.seed, arguments.rate, servers, EXAMPLE_VARIANTS)
    cases = [dataclasses.replace(case, impatient=arguments.impatient) for case in cases]
    if arguments.takeovers:
        cases, examples = ([case for case in some if case.takeover] for some in (cases, examples))
    if arguments.only is not None:
        cases = [case for case in cases if case.number in arguments.only]
        examples = [case for case in examples if case.number in arguments.only]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what was started is ended
    with (
        tempfile.TemporaryDirectory(prefix="raymoe-soak-", dir=arguments.work) as folder,
        open_world(Path(folder), used_servers([*cases, *examples]), cpus=4 * arguments.jobs) as world,
    ):
        common = (arguments.logs, arguments.jobs, arguments.timeout, began + 60 * arguments.minutes)
        outcomes = run_all(world, cases, *common) + run_all(world, examples, *common)
    result = as_json(outcomes, arguments, time.monotonic() - began)
    text = table(*added([*(json.loads(path.read_text()) for path in arguments.add), result]))
    print(f"{text}\n\n{result['seconds']:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.page:
        update_page(text)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
