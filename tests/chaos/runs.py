"""One case of a chaos run from its beginning to its verdict.

    actor, node, cut off   command, struck once or twice ------------------> its end
    driver, sigterm        command, struck; the same command again, ... ---> its end
    takeover               two commands of different plans (soak/takeovers.py) ---> the end of both
    its end --> identical | clean error: the same command again --> identical

Anything else is `wrong` or `hung`. After that nothing may be left behind but the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.cases import NODE_KINDS, ChaosCase, Moment
from tests.chaos.leftovers import left_in_cluster, left_of_own_ray
from tests.chaos.watch import Seen, Watch, actor_processes
from tests.processes import is_alive, kill, send, with_words
from tests.soak.compare import INDEX, JOURNAL, RECORD, differences
from tests.soak.places import Place
from tests.soak.takeovers import side_of, take_over
from tests.soak.tries import Try
from tests.soak.world import Reference, World, command

__all__ = ["IDENTICAL", "RESUMED", "Outcome", "Runner", "keep_log", "run_case", "verdict_of"]

IDENTICAL, RESUMED = "identical", "clean error, resumed"
_STOPPED = "stopped; a merge that had begun goes on from here"
_LOOK_S = 0.01


@dataclass(kw_only=True)
class Outcome:
    """What came of a case. `strikes`: the moments at which it was really struck. `stops`: of each SIGTERM that found a
    merge, the seconds until its command had ended. `problems`: what is wrong; `left` what was left behind."""

    case: ChaosCase
    verdict: str = ""
    strikes: list[str] = field(default_factory=list)
    stops: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    runs: int = 0
    seconds: float = 0.0
    log: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict not in (IDENTICAL, RESUMED) or bool(self.problems or self.left)


def run_case(world: World, case: ChaosCase, logs: Path, timeout_s: float) -> Outcome:
    """Run a case; the log of one that fails is kept in `logs`. Never raises for what a merge does."""
    merge = case.merge
    if case.kind in NODE_KINDS and not world.cluster.workers:
        world.cluster.add_worker(cpus=2)
    reference, began = world.reference(merge), time.monotonic()
    outcome = Outcome(case=case)
    shards = [name for name in sorted(os.listdir(reference.folder)) if name.endswith(".safetensors")]
    place = world.place(merge, shards)
    run = _run_one if case.takeover is None else _run_takeover
    story = run(world, case, place, reference, timeout_s, outcome)
    outcome.seconds = time.monotonic() - began
    if outcome.failed:
        outcome.log = keep_log(logs, outcome, story)
    place.remove()
    return outcome


def _run_one(
    world: World, case: ChaosCase, place: Place, reference: Reference, timeout_s: float, outcome: Outcome
) -> list[str]:
    """A merge that is struck, until its verdict and what it left. What was done and said."""
    merge = case.merge
    config = world.write_config(merge, world.endpoint(merge), world.folder / f"configs/{Path(place.name).name}.yaml")
    with contextlib.ExitStack() as stack:
        own = Path(stack.enter_context(_short_folder())) if case.way == "own" else None
        runner = Runner(world, case, config, place, outcome, timeout_s, own)
        last = _disturbed(runner, case, place, outcome)
        outcome.verdict = verdict_of(runner, last, place, reference, outcome)
        if case.kind == "cut off" and outcome.strikes:
            _bring_back(world, place, reference, outcome)
        runner.end()
        outcome.left += _left(world, place, own)
    return runner.story


def _run_takeover(
    world: World, case: ChaosCase, place: Place, reference: Reference, timeout_s: float, outcome: Outcome
) -> list[str]:
    """Two merges of different plans, until the verdict and what they left. What was done and said."""
    assert case.takeover is not None

    def actors() -> list[int]:
        return [process.pid for process in actor_processes(world.cluster.pids)]

    older = dataclasses.replace(case.merge, variant=case.merge.variant.with_other_experts)
    sides = [side_of(world, each, place) for each in (older, case.merge)]
    meeting = take_over(case.takeover, place, reference, *sides, timeout_s, actors)
    outcome.verdict = {"identical": IDENTICAL, "clean error": RESUMED}.get(meeting.verdict, meeting.verdict)
    if meeting.struck is not None:
        outcome.strikes.append({"begin": "start"}.get(meeting.struck, meeting.struck))
    outcome.problems += meeting.problems
    outcome.errors += meeting.errors
    outcome.runs += meeting.runs
    for process in with_words("merge", place.name):  # nothing, but for one that hung
        kill(process)
    outcome.left += _left(world, place, None)
    return [case.label, *meeting.story]


def _short_folder() -> tempfile.TemporaryDirectory[str]:
    """For sockets, whose paths may not be long."""
    return tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp", ignore_cleanup_errors=True)


def _disturbed(runner: Runner, case: ChaosCase, place: Place, outcome: Outcome) -> Try:
    """All runs up to the first that ends by itself. A strike may come too late: then that run was the last."""
    if case.kind in ("actor", *NODE_KINDS):
        return runner.run(case.moments)
    for moment in case.moments:
        before = len(outcome.strikes)
        tried = runner.run((moment,))
        if len(outcome.strikes) == before or tried.hung:
            return tried
        if case.kind == "sigterm":
            _check_stop(tried, place, outcome)
    return runner.run()


def _bring_back(world: World, place: Place, reference: Reference, outcome: Outcome) -> None:
    """A node that was cut off wakes up with what it was at: nothing of that may get into the output any more."""
    world.cluster.bring_back_worker(0)
    outcome.left += left_in_cluster(world.cluster, place.name)
    outcome.problems += [f"when the node was back: {wrong}" for wrong in differences(place, reference.folder)]
    world.cluster.lose_worker(0)


def _check_stop(tried: Try, place: Place, outcome: Outcome) -> None:
    """After a SIGTERM: one line, and nothing that is half done."""
    files = place.files()
    if RECORD in files and JOURNAL not in "".join(files):
        return  # the merge was over when the signal came
    if "Traceback" in tried.said or _STOPPED not in tried.said:
        outcome.problems.append(f"no clean stop, status {tried.status}: {tried.said[-300:]}")
    outcome.problems += [f"after the stop: {found}" for found in place.leftovers()]
    if parts := [name for name in files if name.startswith(f"{JOURNAL}parts/")]:
        outcome.problems.append(f"half-written files after the stop: {', '.join(parts)}")


def verdict_of(runner: Runner, last: Try, place: Place, reference: Reference, outcome: Outcome) -> str:
    """What the last run came to. After an error `runner` runs the command again."""
    if last.hung:
        return "hung"
    verdict = IDENTICAL
    if last.status != 0:
        verdict = RESUMED
        outcome.errors.append(last.said[last.said.rfind("error: ") :].strip())
        if not last.is_clean_error:
            outcome.problems.append(f"exit status {last.status}, and no clean error: {last.said[-300:]}")
        if INDEX in place.files() and differences(place, reference.folder):
            outcome.problems.append("an index is visible after an error")
        again = runner.run()
        if again.hung:
            return "hung"
        if again.status != 0:
            outcome.problems.append(f"the command did not go through when it was run again: {again.said[-300:]}")
    if wrong := differences(place, reference.folder):
        outcome.problems += wrong
        return "wrong"
    return verdict


def _left(world: World, place: Place, own: Path | None) -> list[str]:
    found = left_in_cluster(world.cluster, place.name)
    if own is not None:
        found += left_of_own_ray(own)
    journal = [name for name in place.files() if name.startswith(JOURNAL)]
    return [*found, *place.leftovers(), *(f"journal left: {name}" for name in journal)]


class Runner:
    """Runs the command of a case, strikes, and keeps what it says."""

    def __init__(
        self,
        world: World,
        case: ChaosCase,
        config: Path,
        place: Place,
        outcome: Outcome,
        timeout_s: float,
        own: Path | None = None,
    ) -> None:
        self._world, self._case, self._place, self._reference = world, case, place, world.reference(case.merge)
        self._timeout_s, self._outcome = timeout_s, outcome
        self._dice = random.Random(case.merge.seed)
        self._words = command(case.merge, config, place.name)
        self._env = world.environment(case.merge, world.endpoint(case.merge))
        if case.way == "job":
            self._words[self._words.index("merge")] = "submit"
            self._env |= {"RAY_ADDRESS": world.cluster.job_server or ""}
        elif own is not None:
            self._env = {key: value for key, value in self._env.items() if not key.startswith("RAY_")}
            self._env |= {"RAY_TMPDIR": str(own)}
        self.story = [case.label, " ".join(self._words)]

    def run(self, moments: Sequence[Moment] = ()) -> Try:
        """Run the command to its end, and strike at each of these moments on the way."""
        self._outcome.runs += 1
        self._began = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                self._words,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            is_blind = self._case.way == "own"
            watch = Watch(self._place, self._shards(), has_gates=self._case.has_gates, is_blind=is_blind)
            for moment in moments:
                if (seen := self._wait_for(moment, process, watch)) is None or not self._strike(seen, process):
                    break
            ended = self._ends(process, self._timeout_s)
            if not ended:
                self.end()
                process.kill()
            process.wait()
            output.seek(0)
            said = output.read()
        status = process.returncode if ended else None
        self._say(f"{'hung' if not ended else f'status {status}'}\n{said}")
        return Try(status=status, said=said, hung=not ended)

    def end(self) -> None:
        """End what is still there of the command, wherever it runs: nothing, but for one that hung."""
        for process in with_words("merge", self._place.name):
            kill(process)

    # --- when

    def _wait_for(self, moment: Moment, process: subprocess.Popen[bytes], watch: Watch) -> Seen | None:
        """Wait for a moment; what is seen then, or None if the command ends before."""
        if moment.at == "start" and self._case.kind != "actor":
            while self._driver(process) is None:  # of a job: it takes a while until it is begun
                if self._ends(process, _LOOK_S):
                    return None
            if self._ends(process, moment.share * self._phase("start of actors")[1]):
                return None
            return watch.look()
        seen, first = watch.look(), None
        while self._is_before(seen, moment, first):
            if self._ends(process, _LOOK_S) or time.monotonic() > self._began + self._timeout_s:
                return None
            seen = watch.look()
            if first is None and (seen.up or self._case.way == "own"):
                first = seen.done
        if self._ends(process, self._delay(moment)):
            return None
        return watch.look()

    def _is_before(self, seen: Seen, moment: Moment, first: int | None) -> bool:
        """`first`: how many shards were finished when the first actor was seen."""
        if moment.at == "start":  # of an actor: as soon as its process is there
            return seen.at == "start" and not actor_processes(self._world.cluster.pids)
        if seen.at == "end":
            return False
        if moment.at == "shards":  # they are written beside all else
            wanted = 1 if first is None else first + moment.share * (self._shards() - first)
            return seen.done < wanted
        return seen.at != moment.at and (moment.at, seen.at) != ("prompts", "routers")

    def _delay(self, moment: Moment) -> float:
        """Seconds from the moment's beginning, by what the undisturbed merge took."""
        if moment.at in ("prompts", "routers"):
            start, end = self._phase("gates")
            return moment.share * (end - start) * (0.6 if moment.at == "prompts" else 0.3)
        if moment.at == "shards":
            start, end = self._phase("shards")
            return self._dice.random() * (end - start) / self._shards()
        if moment.at == "end":
            start, end = self._phase("end")
            return moment.share * (end - start)
        return moment.share * 0.5

    def _phase(self, name: str) -> tuple[float, float]:
        phase = self._reference.phases[name]
        return phase["start_s"], phase["end_s"]

    def _shards(self) -> int:
        """Shards that actors write."""
        return sum(1 for name in os.listdir(self._reference.folder) if name.endswith(".safetensors")) - 1

    # --- what

    def _strike(self, seen: Seen, process: subprocess.Popen[bytes]) -> bool:
        """Strike, if there is still something to be struck."""
        strike = {
            "actor": self._kill_actor,
            "node": self._lose_node,
            "cut off": self._cut_off_node,
            "driver": self._kill,
            "sigterm": self._terminate,
        }
        if not strike[self._case.kind](seen, process):
            return False
        self._outcome.strikes.append(seen.at)
        self._say(f"struck at {seen.at}, {seen.done} of {self._shards()} shards finished, actors at {seen.up}")
        return True

    def _kill_actor(self, seen: Seen, process: subprocess.Popen[bytes]) -> bool:
        busy = [pid for pid, jobs in seen.up.items() if jobs]
        victims = busy or list(seen.up) or [found.pid for found in actor_processes(self._world.cluster.pids)]
        return bool(victims) and send(self._dice.choice(victims), signal.SIGKILL)

    def _lose_node(self, seen: Seen, process: subprocess.Popen[bytes]) -> bool:
        self._world.cluster.lose_worker(0)
        return True

    def _cut_off_node(self, seen: Seen, process: subprocess.Popen[bytes]) -> bool:
        self._world.cluster.cut_off_worker(0)
        return True

    def _kill(self, seen: Seen, process: subprocess.Popen[bytes]) -> bool:
        return (driver := self._driver(process)) is not None and send(driver, signal.SIGKILL)

    def _terminate(self, seen: Seen, process: subprocess.Popen[bytes]) -> bool:
        """As `ray job stop` does it to a job, and as most else does it to a command."""
        if (driver := self._driver(process)) is None:
            return False
        began = time.monotonic()
        if self._case.way == "job":
            from ray.job_submission import JobSubmissionClient

            jobs = JobSubmissionClient(self._world.cluster.job_server)
            for job in jobs.list_jobs():
                if job.submission_id and (job.metadata or {}).get("output") == self._place.name:
                    jobs.stop_job(job.submission_id)
        else:
            send(driver, signal.SIGTERM)
        while is_alive(driver) and time.monotonic() < began + self._timeout_s:
            process.poll()  # else it would stay as a zombie
            time.sleep(0.02)
        self._outcome.stops.append(time.monotonic() - began)
        return True

    def _driver(self, process: subprocess.Popen[bytes]) -> int | None:
        if self._case.way != "job":
            return process.pid if process.poll() is None else None
        return next((found.pid for found in with_words("merge", self._place.name)), None)

    def _ends(self, process: subprocess.Popen[bytes], seconds: float) -> bool:
        try:
            process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _say(self, line: str) -> None:
        self.story.append(f"--- {time.monotonic() - self._began:.2f} s: {line}")


def keep_log(logs: Path, outcome: Outcome, story: Sequence[str]) -> str:
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{outcome.case.kind}-{outcome.case.merge.number}.log"
    parts = [*story, f"--- {outcome.verdict}", *outcome.problems, *outcome.left]
    path.write_text("\n".join(parts) + "\n")
    return str(path)
