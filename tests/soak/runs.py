"""One case of a soak from its beginning to its verdict.

    tries that are killed ... last try --> identical
                                       \\-> clean error: no index to be seen; again without faults --> identical

Anything else is `corrupt` or `hung`. After that nothing of ours may be left, and nothing of others be touched. A case
that is a takeover is two merges of different plans (takeovers.py), each with a proxy of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.object_store.fault_proxy import FaultProxy, FaultRates
from tests.soak.cases import Case, Kill
from tests.soak.compare import INDEX, JOURNAL, differences
from tests.soak.places import Place
from tests.soak.takeovers import side_of, take_over
from tests.soak.tries import Try
from tests.soak.world import Reference, World, command

__all__ = ["Outcome", "run_case"]

_SLOW_S = (0.05, 0.6)
# Of takeovers: what is slow is under way for long when the other merge begins.
_SLOW_RATE = 0.1


@dataclass(kw_only=True)
class Outcome:
    """What came of a case. `verdict`: identical, clean error, corrupt, hung; `problems` are findings beside it."""

    case: Case
    verdict: str = ""
    kills: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    left_open: int = 0
    journal_left: bool = False
    seconds: float = 0.0
    log: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict in ("corrupt", "hung") or bool(self.problems)


def run_case(world: World, case: Case, logs: Path, timeout_s: float) -> Outcome:
    """Run a case; the log of one that fails is kept in `logs`. Never raises for what a merge does."""
    reference, began = world.reference(case), time.monotonic()
    outcome = Outcome(case=case)
    shards = [name for name in sorted(os.listdir(reference.folder)) if name.endswith(".safetensors")]
    place = world.place(case, shards)
    run = _run_one if case.takeover is None else _run_takeover
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(proxy) for proxy in _proxies(world, case)]
        story = run(world, case, place, reference, proxies, timeout_s, outcome)
        if outcome.verdict != "hung":
            _look_around(place, outcome)
        for proxy in proxies:
            outcome.faults.update({kind: count for kind, count in proxy.stats().faults.items() if count})
            story += ["--- faults"]
            story += [f"{fault.number} {fault.kind} {fault.method} {fault.target}" for fault in proxy.recent_faults()]
    outcome.seconds = time.monotonic() - began
    if outcome.failed:
        outcome.log = _keep_log(logs, outcome, story)
    place.remove()
    return outcome


def _proxies(world: World, case: Case) -> list[FaultProxy]:
    """One for each merge of a case."""
    endpoint, rates = world.servers[case.server].endpoint, FaultRates.spread(case.rate, slow_seconds=_SLOW_S)
    if case.takeover is None:
        return [FaultProxy(endpoint, case.seed, rates)]
    # What a file system of fsspec does about errors is its own affair.
    slow = dataclasses.replace(FaultRates() if case.writes_fsspec else rates, slow=_SLOW_RATE, slow_seconds=_SLOW_S)
    return [FaultProxy(endpoint, case.seed + number, slow) for number in range(2)]


def _run_one(
    world: World,
    case: Case,
    place: Place,
    reference: Reference,
    proxies: list[FaultProxy],
    timeout_s: float,
    outcome: Outcome,
) -> list[str]:
    """A merge that is killed and run again, until its verdict. What was done and said."""
    (proxy,) = proxies
    config = world.write_config(case, proxy.url, world.folder / "configs" / f"{Path(place.name).name}.yaml")
    runner = _Runner(world, case, config, place, proxy, timeout_s)
    last = _disturbed(runner, case, reference, outcome)
    proxy.rates = FaultRates()
    outcome.verdict = _verdict(runner, last, place, reference, outcome)
    return runner.story


def _run_takeover(
    world: World,
    case: Case,
    place: Place,
    reference: Reference,
    proxies: list[FaultProxy],
    timeout_s: float,
    outcome: Outcome,
) -> list[str]:
    """Two merges of different plans, until the verdict. What was done and said."""
    assert case.takeover is not None
    older = dataclasses.replace(case, variant=case.variant.with_other_experts)
    sides = [side_of(world, each, place, proxy) for each, proxy in zip((older, case), proxies, strict=True)]
    meeting = take_over(case.takeover, place, reference, *sides, timeout_s)
    outcome.verdict = "corrupt" if meeting.verdict == "wrong" else meeting.verdict
    outcome.kills = int(meeting.struck is not None and case.takeover.way == "killed")
    outcome.problems += meeting.problems
    return [case.label, *meeting.story]


def _disturbed(runner: _Runner, case: Case, reference: Reference, outcome: Outcome) -> Try:
    """All tries but the one that mends an error. Kills may come too late: then that try was the last."""
    for kill in case.kills:
        tried = runner.run(kill, reference.requests)
        if tried.status is not None or tried.hung:
            return tried
        outcome.kills += 1
    return runner.run()


def _verdict(runner: _Runner, last: Try, place: Place, reference: Reference, outcome: Outcome) -> str:
    if last.hung:
        return "hung"
    verdict = "identical"
    if last.status != 0:
        if not last.is_clean_error:
            outcome.problems.append(f"exit status {last.status}, and no clean error")
        verdict = "clean error"
        if INDEX in place.files() and differences(place, reference.folder):
            outcome.problems.append("an index is visible after an error")
        again = runner.run()
        if again.hung:
            return "hung"
        if again.status != 0:
            outcome.problems.append(f"the run without faults failed: {again.said[-300:]}")
    if wrong := differences(place, reference.folder):
        outcome.problems += wrong
        return "corrupt"
    return verdict


def _look_around(place: Place, outcome: Outcome) -> None:
    outcome.journal_left = any(name.startswith(JOURNAL) for name in place.files())
    found = place.leftovers()
    outcome.left_open = sum(1 for problem in found if problem.startswith("upload left open"))
    outcome.problems += found
    if outcome.journal_left:
        outcome.problems.append("journal left: " + ", ".join(n for n in place.files() if n.startswith(JOURNAL)))


# --- running


class _Runner:
    """Runs the command of a case, and keeps what it says."""

    def __init__(
        self, world: World, case: Case, config: Path, place: Place, proxy: FaultProxy, timeout_s: float
    ) -> None:
        self._words = command(case, config, place.name)
        self._env = world.environment(case, proxy.url)
        self._proxy, self._timeout_s = proxy, timeout_s
        self.story = [case.label, " ".join(self._words)]

    def run(self, kill: Kill | None = None, requests: int = 0) -> Try:
        """Run the command to its end, or until `kill`; `requests` are those of an undisturbed merge."""
        began = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                self._words,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            ended = self._ends(process) if kill is None else self._ends_before(process, kill, requests)
            if not ended:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.seek(0)
            said = output.read()
        hung = not ended and time.monotonic() - began >= self._timeout_s
        status = process.returncode if ended else None
        how = "hung" if hung else "killed" if not ended else f"status {status}"
        self.story.append(f"--- {how} after {time.monotonic() - began:.1f} s\n{said}")
        return Try(status=status, said=said, hung=hung)

    def _ends(self, process: subprocess.Popen[bytes], seconds: float | None = None) -> bool:
        try:
            process.wait(self._timeout_s if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _ends_before(self, process: subprocess.Popen[bytes], kill: Kill, requests: int) -> bool:
        """Whether the command ends before its time has come."""
        limit, until = time.monotonic() + self._timeout_s, self._requests() + kill.share * requests
        while self._requests() < until and time.monotonic() < limit:
            if self._ends(process, 0.02):
                return True
        return self._ends(process, kill.seconds)

    def _requests(self) -> int:
        return sum(self._proxy.stats().requests.values())


def _keep_log(logs: Path, outcome: Outcome, story: list[str]) -> str:
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{outcome.case.variant.name.replace(' ', '-').replace(',', '')}-{outcome.case.number}.log"
    parts = [*story, f"--- {outcome.verdict}", *outcome.problems]
    path.write_text("\n".join(parts) + "\n")
    return str(path)
