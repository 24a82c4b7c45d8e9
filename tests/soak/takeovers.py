"""A merge takes its output over from one of another plan, and is judged.

    older   command, struck at a moment of its own ......... goes on at a moment of the newer one ---> its end
    newer   ............................ command with --overwrite ---> its end (an error: the same command again)
                                                                       the same command without --overwrite

The newer merge has to end with the bytes of an undisturbed one, whatever the older one does; or with a clean error, and
then when it is run again. The older one has to end with an error, but where it was through before the newer one began.
What an output shows of both merges is looked at from outside, as places.py does.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.object_store.fault_proxy import FaultProxy, FaultRates
from tests.processes import send
from tests.soak.cases import MergeCase, Stage, Takeover
from tests.soak.compare import INDEX, JOURNAL, RECORD, differences, noted_shards
from tests.soak.places import Place
from tests.soak.tries import Running, Try
from tests.soak.world import Reference, World, command

__all__ = ["FINISHED", "Meeting", "Side", "side_of", "take_over"]

FINISHED = "already complete"
"""What a finished merge says when its command is run again."""
REPEATED = "the command of a finished merge is no success"
_HELD_BY_ANOTHER = "another merge is writing"
_REASONS = (
    _HELD_BY_ANOTHER,
    "taken over this output",
    "is no longer that of this run",
    "was replaced or removed",
    "was replaced as soon as it had been written",
    "an unfinished merge of another plan",
    "holds a finished merge",
)
"""What an older merge says of it when it ends with an error or is refused: another one is at its output."""
_LOOK_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of two merges: its command without --overwrite, and the proxy that its requests go through, if they do."""

    words: Sequence[str]
    env: Mapping[str, str]
    proxy: FaultProxy | None = None


def side_of(world: World, case: MergeCase, place: Place, proxy: FaultProxy | None = None) -> Side:
    """The merge of a case to that place, through a proxy or not."""
    endpoint = proxy.url if proxy is not None else world.endpoint(case)
    path = world.folder / f"configs/{Path(place.name).name}-{'-'.join(case.variant.experts)}.yaml"
    words = command(case, world.write_config(case, endpoint, path), place.at(endpoint))
    return Side(words=words, env=world.environment(case, endpoint), proxy=proxy)


@dataclass(kw_only=True)
class Meeting:
    """What came of two merges. `verdict`: identical, clean error (of the newer one; it went through when run again),
    wrong, hung. `struck`: the moment at which the older one was really struck."""

    verdict: str = ""
    struck: str | None = None
    problems: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    runs: int = 0
    story: list[str] = field(default_factory=list)


def take_over(
    takeover: Takeover,
    place: Place,
    reference: Reference,
    older: Side,
    newer: Side,
    timeout_s: float,
    actors: Callable[[], Sequence[int]] = lambda: (),
) -> Meeting:
    """Run both merges. `reference` is the newer one's; `actors` the processes of the older one's actors, while only
    that is there. Never raises for what a merge does."""
    return _Takeover(takeover, place, reference, older, newer, timeout_s, actors).run()


class _Takeover:
    def __init__(
        self,
        takeover: Takeover,
        place: Place,
        reference: Reference,
        older: Side,
        newer: Side,
        timeout_s: float,
        actors: Callable[[], Sequence[int]],
    ) -> None:
        self._takeover, self._place, self._reference = takeover, place, reference
        self._older, self._newer = older, newer
        self._timeout_s, self._actors = timeout_s, actors
        self._newer_digest = json.loads((reference.folder / RECORD).read_text())["plan_digest"]
        self._shards = sum(1 for name in os.listdir(reference.folder) if name.endswith(".safetensors")) - 1
        self._stopped: list[int] = []
        self._older_was_done = False
        self._began = time.monotonic()
        self._meeting = Meeting()

    def run(self) -> Meeting:
        older = self._start("older", self._older)
        if self._reaches(older, self._takeover.struck, is_newer=False) and self._strike(older):
            self._meeting.struck = self._takeover.struck.at
        newer = self._start("newer", self._newer, "--overwrite")
        self._reaches(newer, self._takeover.back, is_newer=True)
        self._bring_back()
        tries = {"newer": self._finish("newer", newer), "older": self._finish("older", older)}
        if any(tried.hung for tried in tries.values()):
            self._meeting.problems += [f"the {name} merge hung" for name, tried in tries.items() if tried.hung]
            self._meeting.verdict = "hung"
            return self._meeting
        is_refused = _HELD_BY_ANOTHER in tries["newer"].said
        self._judge_older(tries["older"], is_refused)
        self._meeting.verdict = self._judge_newer(tries["newer"], is_refused and tries["older"].status == 0)
        return self._meeting

    # --- the two of them

    def _start(self, name: str, side: Side, *more: str) -> Running:
        self._meeting.runs += 1
        self._say(f"{name} starts: {' '.join([*side.words, *more])}")
        return Running([*side.words, *more], side.env)

    def _finish(self, name: str, running: Running) -> Try:
        end = time.monotonic() + self._timeout_s
        while not running.ends(_LOOK_S) and time.monotonic() < end:
            self._look()
        tried = running.finish(0)
        self._say(f"{name}: {'hung' if tried.hung else f'status {tried.status}'}\n{tried.said}")
        return tried

    def _reaches(self, running: Running, stage: Stage, *, is_newer: bool) -> bool:
        """Wait for a moment of a merge; False if its command ends before."""
        end = time.monotonic() + self._timeout_s
        while not self._is_at(stage, is_newer):
            if running.ends(_LOOK_S) or time.monotonic() > end:
                return False
            self._look()
        return not running.ends(stage.seconds)

    def _is_at(self, stage: Stage, is_newer: bool) -> bool:
        if stage.at in ("start", "after"):
            return stage.at == "start"  # the end of a command is seen by whoever waits
        digest = _json(self._place, f"{JOURNAL}plan.json").get("digest")
        if digest is None or (digest == self._newer_digest) != is_newer:
            return False
        if stage.at == "begin":
            return True
        wanted = self._shards if stage.at == "end" else max(1, stage.share * self._shards)
        return noted_shards(self._place.files()) >= wanted

    def _look(self) -> None:
        """Note whether the older merge has come to its end."""
        digest = _json(self._place, RECORD).get("plan_digest")
        self._older_was_done = self._older_was_done or digest not in (None, self._newer_digest)

    def _strike(self, older: Running) -> bool:
        way = self._takeover.way
        if way == "beside":
            return True
        if way == "held":
            assert self._older.proxy is not None, "requests are held back by a proxy"
            self._older.proxy.hold()
            return True
        actors = list(self._actors()) if way in ("group", "frozen", "orphaned") else []
        if way != "group":
            self._stopped = [pid for pid in actors if send(pid, signal.SIGSTOP)]
        if way in ("stopped", "frozen"):
            self._stopped.append(older.pid)
            return send(older.pid, signal.SIGSTOP)
        is_struck = send(older.pid, signal.SIGKILL)
        for pid in actors if way == "group" else ():
            send(pid, signal.SIGKILL)
        return is_struck

    def _bring_back(self) -> None:
        """What was stopped goes on."""
        for pid in self._stopped:
            send(pid, signal.SIGCONT)
        if self._older.proxy is not None:
            self._say(f"the older one goes on, {self._older.proxy.held} requests were held back")
            self._older.proxy.let_go()
        else:
            self._say("the older one goes on")

    # --- judging

    def _judge_older(self, tried: Try, newer_was_refused: bool) -> None:
        problems = self._meeting.problems
        if tried.status is None:
            return  # killed by us
        if tried.status == 0:
            if not self._older_was_done and not newer_was_refused:
                problems.append("the older merge says that it is done, and the newer one had begun")
        elif not tried.is_clean_error:
            problems.append(f"the older merge: exit status {tried.status}, and no clean error: {tried.said[-300:]}")
        elif not any(reason in tried.said for reason in _REASONS):
            problems.append(f"the older merge does not say that there is another one: {tried.said[-300:]}")

    def _judge_newer(self, tried: Try, is_of_older: bool) -> str:
        """`is_of_older`: what is there is the finished merge of the older plan, by right."""
        meeting, verdict = self._meeting, "identical"
        if tried.status != 0:
            verdict = "clean error"
            meeting.errors.append(tried.said[tried.said.rfind("error: ") :].strip())
            if not tried.is_clean_error:
                meeting.problems.append(f"exit status {tried.status}, and no clean error: {tried.said[-300:]}")
            if not is_of_older and INDEX in self._place.files() and differences(self._place, self._reference.folder):
                meeting.problems.append("an index is visible after an error")
            again = self._again("newer, again", "--overwrite")
            if again.hung:
                return "hung"
            if again.status != 0:
                meeting.problems.append(f"the command did not go through when it was run again: {again.said[-300:]}")
        if wrong := differences(self._place, self._reference.folder):
            meeting.problems += wrong
            return "wrong"
        finished = self._again("newer, when it is finished", is_quiet=False)
        if finished.hung:
            return "hung"
        if finished.status != 0 or FINISHED not in finished.said:
            meeting.problems.append(f"{REPEATED}: status {finished.status}: {finished.said[-300:]}")
        if wrong := differences(self._place, self._reference.folder):
            meeting.problems += [f"when the command of a finished merge was run again: {each}" for each in wrong]
            return "wrong"
        return verdict

    def _again(self, name: str, *more: str, is_quiet: bool = True) -> Try:
        """The newer merge once more, with nothing in its way."""
        if self._newer.proxy is not None:
            self._newer.proxy.rates = FaultRates()
        words = [word for word in self._newer.words if is_quiet or word != "--quiet"]
        return self._finish(name, self._start(name, replace(self._newer, words=words), *more))

    def _say(self, line: str) -> None:
        self._meeting.story.append(f"--- {time.monotonic() - self._began:.2f} s: {line}")


def _json(place: Place, name: str) -> Mapping[str, object]:
    """A small file of an output; empty where there is none, or where it is not whole yet."""
    try:
        content = json.loads(place.content(name))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
