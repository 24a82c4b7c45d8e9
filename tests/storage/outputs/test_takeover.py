"""An older run that is still at work while a newer one takes its output over: on a folder, on fsspec stores and on S3.

Each test puts the calls of two runs into one order in one process; nothing of the product is changed. `Interrupted`
lets the other run come in before each single call of a store, so that every order of calls is tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import raymoe
from raymoe.errors import MergeFailed, ProblemReport, RaymoeError
from raymoe.object_store.location import Location
from raymoe.object_store.s3_store import S3Store
from raymoe.planning import MergeOptions, MergePlan
from raymoe.planning.owner import Owner
from raymoe.planning.plan import Shard
from raymoe.runtime.coordinator import _begin, output_problems
from raymoe.runtime.settings import RuntimeSettings
from raymoe.runtime.source_files import SourceFiles
from raymoe.sources.hub import HubOptions
from raymoe.storage.claim import TakenOver
from raymoe.storage.file_names import INDEX_NAME, JOURNAL, RECORD_NAME
from raymoe.storage.outputs.fsspec import StreamOutput
from raymoe.storage.outputs.local import LocalOutput
from raymoe.storage.outputs.object_store import StoreOutput
from raymoe.storage.outputs.open_output import open_output
from raymoe.storage.outputs.output_checks import find_complete_merge
from raymoe.storage.outputs.protocol import Output
from raymoe.storage.outputs.s3 import S3Output
from raymoe.storage.source_reader import SourceReader
from tests.object_store.servers import STARTERS
from tests.storage.outputs.places import (
    OPTIONS,
    Place,
    check_is_alone,
    do_shard,
    expected,
    finish,
    killed_driver,
    made_place,
    record_of,
    started,
    write_rest,
    write_shards,
)

PLAN = MergeOptions(max_shard_bytes=1 << 30, model_card=False)
SOAKED = [pytest.param(kind, marks=[pytest.mark.s3, pytest.mark.soak]) for kind in STARTERS if kind != "moto"]


# --- two merges of one shape, and places to write them to


@pytest.fixture(scope="module")
def plans(zoo: Callable[..., Path]) -> tuple[MergePlan, MergePlan]:
    """Other experts of the same shapes: shards of the same names and sizes."""
    from tests.pico import merge_config

    def plan(*seeds: int) -> MergePlan:
        experts = [zoo("llama", seed=seed) for seed in seeds]
        return raymoe.plan(merge_config(zoo("llama"), experts, mode="random"), PLAN)

    return plan(1, 2), plan(3, 4)


@pytest.fixture(scope="module")
def small(zoo: Callable[..., Path]) -> MergePlan:
    """A plan whose shards are more than those of `plans`, and have other names."""
    from tests.pico import merge_config

    config = merge_config(zoo("llama"), [zoo("llama", seed=seed) for seed in (1, 2)], mode="random")
    return raymoe.plan(config, MergeOptions(max_shard_bytes=200_000, model_card=False))


@pytest.fixture(params=["folder", "memory", pytest.param("moto", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield from made_place(request.param, tmp_path)


@pytest.fixture(params=["memory", pytest.param("moto", marks=pytest.mark.s3)])
def store_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield from made_place(request.param, tmp_path)


@pytest.fixture(
    params=[
        ("memory", 3),
        pytest.param(("memory", 1), marks=pytest.mark.slow),
        pytest.param(("moto", None), marks=pytest.mark.s3),
    ],
    ids=["memory", "memory, each call", "moto"],
)
def tried(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Place, int | None]]:
    """A place for `every_order`, and of how many calls one is tried; None where that is the test's choice."""
    kind, step = request.param
    for place in made_place(kind, tmp_path):
        yield place, step


def shard_of(plan: MergePlan, owner: Owner) -> Shard:
    return next(shard for shard in plan.shards if shard.owner == owner)


# --- a write that is under way when the newer run begins


class Before:
    """A store before whose first call of a method, `then` is called."""

    def __init__(self, output: Output, method: str, then: Callable[[], None]) -> None:
        assert isinstance(output, StoreOutput)
        self._store, self._method, self._then = output.files.store, method, then
        output.files.store = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            self._method = ""
            self._then()
        return getattr(self._store, name)


@pytest.mark.parametrize("kind", [pytest.param("moto", marks=pytest.mark.s3), *SOAKED])
@pytest.mark.parametrize("method", ["upload_part", "complete_upload"])
def test_uploads_of_a_run_that_was_taken_over_end_it(
    plans: tuple[MergePlan, MergePlan], tmp_path: Path, kind: str, method: str
) -> None:
    """The newer run has aborted the upload. moto answers its parts and its completion with 500, others with 404."""
    for place in made_place(kind, tmp_path):
        first, newer = started(place, plans[0]), list[Output]()
        shard = shard_of(plans[0], Owner.expert(0))
        Before(first, method, lambda: newer.append(started(place, plans[1], fresh=True)))  # noqa: B023
        with pytest.raises(TakenOver):
            first.complete(shard, do_shard(first, plans[0], shard))
        first.release()
        finish(newer[0], plans[1])
        check_is_alone(place, plans[1], tmp_path)


@pytest.mark.parametrize("written", ["config.json", INDEX_NAME, RECORD_NAME, f"{JOURNAL}/done/"])
def test_whole_files_of_a_run_that_was_taken_over_are_not_tried_again(
    plans: tuple[MergePlan, MergePlan], tmp_path: Path, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store loses a request, and the newer run begins before it is sent again: the file is that run's by now."""
    for place in made_place("memory", tmp_path):
        first, newer = started(place, plans[0]), list[Output]()
        filesystem, path = place.open()
        pipe = type(filesystem).pipe_file

        def lost(this: Any, name: str, content: bytes, **named: Any) -> None:
            if name.removeprefix(f"{path}/").startswith(written) and not newer:  # noqa: B023
                newer.append(started(place, plans[1], fresh=True))  # noqa: B023
                raise ConnectionResetError
            pipe(this, name, content, **named)  # noqa: B023

        with monkeypatch.context() as here:
            here.setattr(type(filesystem), "pipe_file", lost)
            with pytest.raises(TakenOver):
                finish(first, plans[0])
        first.release()
        finish(newer[0], plans[1])
        check_is_alone(place, plans[1], tmp_path)


# --- an actor that is in the middle of a shard


class Waiting(SourceReader):
    """Sources that stand still after some bytes, until they are let go on, and fail then if they are to."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__(HubOptions())
        self.reached, self.go_on, self.fails = threading.Event(), threading.Event(), fails

    def _wait(self) -> None:
        self.reached.set()
        assert self.go_on.wait(60)
        if self.fails:
            raise OSError(5, "Input/output error")

    def read_into(self, file: Any, start: int, buffer: memoryview) -> None:
        self._wait()
        super().read_into(file, start, buffer)

    def chunks(self, file: Any, start: int, end: int) -> Iterator[memoryview]:
        self._wait()
        yield from super().chunks(file, start, end)


@pytest.mark.soak_on("moto-ends well")
@pytest.mark.soak_on("moto-fails-the same plan")
@pytest.mark.parametrize("other_plan", [True, False], ids=["another plan", "the same plan"])
@pytest.mark.parametrize("fails", [True, False], ids=["fails", "ends well"])
def test_late_actor(
    place: Place, plans: tuple[MergePlan, MergePlan], tmp_path: Path, fails: bool, other_plan: bool
) -> None:
    """It neither replaces nor removes what the newer run has written, however it ends, and leaves nothing."""
    old, new = plans if other_plan else (plans[0], plans[0])
    first = started(place, old)
    shard, reader, ended = shard_of(old, Owner.expert(0)), Waiting(fails=fails), list[BaseException]()
    actor = open_output(Location.parse(place.location), OPTIONS, first.run)
    jobs = first.jobs(shard)

    def work() -> None:
        try:
            for job in jobs:
                actor.do(job, reader, lambda sent, copied: None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert reader.reached.wait(60)
    killed_driver(first)
    second = started(place, new, fresh=other_plan)
    finish(second, new)
    reader.go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    assert len(ended) == 1 and isinstance(ended[0], (OSError, RaymoeError))
    check_is_alone(place, new, tmp_path)


def test_shard_of_another_plan_is_not_taken_for_finished(
    place: Place, plans: tuple[MergePlan, MergePlan], tmp_path: Path
) -> None:
    """The older run's shard is whole, and of the right name and size. Neither run takes it for the newer one's."""
    old, new = plans
    first = started(place, old)
    one, two = shard_of(old, Owner.expert(0)), shard_of(old, Owner.expert(1))
    first.complete(one, do_shard(first, old, one))
    done = do_shard(first, old, two)
    killed_driver(first)
    second = started(place, new, fresh=True)
    with pytest.raises(MergeFailed, match="another run has taken over"):
        first.complete(two, done)
    first.release()
    if not isinstance(second, LocalOutput):
        assert all(second.jobs(shard) for shard in new.shards)
    finish(second, new)
    check_is_alone(place, new, tmp_path)


def test_same_plan_from_other_sources(place: Place, plans: tuple[MergePlan, MergePlan], tmp_path: Path) -> None:
    """--overwrite after sources have changed: the digest is the same, and what was finished is of no use."""
    plan = plans[0]
    first = started(place, plan)
    shard = shard_of(plan, Owner.expert(0))
    first.complete(shard, do_shard(first, plan, shard))
    first.release()
    second = started(place, plan, fresh=True)
    assert shard.file_name not in place.files()
    finish(second, plan)
    check_is_alone(place, plan, tmp_path)


@pytest.mark.soak_on("moto-the same plan")
@pytest.mark.parametrize("other_plan", [True, False], ids=["another plan", "the same plan from other sources"])
def test_note_that_comes_late_is_not_accepted(
    place: Place, plans: tuple[MergePlan, MergePlan], tmp_path: Path, other_plan: bool
) -> None:
    """A shard of another merge and its note, brought back by what was still under way when the old run died."""
    old, new = plans if other_plan else (plans[0], plans[0])
    first = started(place, old)
    shard = shard_of(old, Owner.expert(0))
    first.complete(shard, do_shard(first, old, shard))
    late = {name: content for name, content in place.files().items() if "/done/" in name or name == shard.file_name}
    assert len(late) == 2
    killed_driver(first)
    killed_driver(started(place, new, fresh=True))
    for name, content in late.items():
        place.put(name, content)
    third = started(place, new)
    if isinstance(third, LocalOutput):
        assert third.finished(shard.file_name, shard.nbytes) is None
    else:
        assert third.jobs(shard)
    finish(third, new)
    check_is_alone(place, new, tmp_path)


# --- what planning has read


def test_kept_reads_are_those_of_this_merge(store_place: Place, plans: tuple[MergePlan, MergePlan]) -> None:
    """Every run of the merge finds them. They are gone where another merge begins, and when this one is finished."""
    old, new = plans
    first = started(store_place, old)
    assert open_output(Location.parse(store_place.location), OPTIONS).kept_reads() == b""
    first.keep_reads(b"read")
    killed_driver(first)
    second = started(store_place, old)
    assert second.kept_reads() == b"read"
    second.keep_reads(b"read again")
    third = started(store_place, old)
    assert third.kept_reads() == b"read again"
    other = started(store_place, new, fresh=True)
    assert other.kept_reads() == b""
    third.keep_reads(b"late")
    assert other.kept_reads() == b""
    third.release()
    assert not [name for name in store_place.files() if "/reads/" in name]
    other.keep_reads(b"read")
    finish(other, new)
    assert not [name for name in store_place.files() if name.startswith(".raymoe/")]
    other.keep_reads(b"late")
    other.release()
    assert not [name for name in store_place.files() if name.startswith(".raymoe/")]


def test_no_reads_are_kept_in_a_folder(tmp_path: Path, plans: tuple[MergePlan, MergePlan]) -> None:
    place = Place(str(tmp_path / "out"))
    output = started(place, plans[0])
    output.keep_reads(b"read")
    assert output.kept_reads() == b"" and not [name for name in place.files() if "reads" in name]


# --- every order of the calls of two runs to a store


CHANGES = (
    "put",
    "delete",
    "move",
    "create_upload",
    "upload_part",
    "copy_part",
    "complete_upload",
    "abort_upload",
    "delete_all",
)


class Interrupted:
    """A store before whose call number `at` (from 0) `then` is called, once. On a real server, which takes its time,
    calls that change nothing are not counted: the moment between a look and a change is the one that matters."""

    def __init__(self, output: Output, at: int, then: Callable[[], None]) -> None:
        assert isinstance(output, (S3Output, StreamOutput))
        self._store, self.calls, self._at, self._then = output.files.store, 0, at, then
        output.files.store = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found) or (isinstance(self._store, S3Store) and name not in CHANGES):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if number == self._at:
                self._then()
            return found(*arguments, **named)

        return call


def every_order(place: Place, once: Callable[[Place, int], int], step: int) -> None:
    """Do `once(place, at)` in places of their own until there are no more calls before which it could come in."""
    at = tried = 0
    while at < once(tried_place := Place(f"{place.location}-{at}"), at):
        if tried_place.location.startswith("memory://"):
            tried_place.clear()
        at, tried = at + step, tried + 1
    assert tried > 3, "nearly nothing was tried"


class TakeOver:
    """What a newer run does while an older one stands still: all of the merge, or first its shards."""

    def __init__(self, place: Place, plan: MergePlan, *, fresh: bool, until: str) -> None:
        self._place, self._plan, self._fresh, self._until = place, plan, fresh, until
        self._rest: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        output = started(self._place, self._plan, fresh=self._fresh)
        shards = write_shards(output, self._plan)
        self._rest = lambda: write_rest(output, self._plan, shards)
        if self._until == "done":
            self.end()

    def end(self) -> None:
        self._rest()
        self._rest = lambda: None


@pytest.mark.soak_on("moto-the same plan")
@pytest.mark.soak_on("moto-another plan-done")
@pytest.mark.parametrize("until", ["done", "shards"])
@pytest.mark.parametrize("other_plan", [True, False], ids=["another plan", "the same plan"])
def test_taken_over_while_the_old_run_stands_still(
    store_place: Place, plans: tuple[MergePlan, MergePlan], tmp_path: Path, other_plan: bool, until: str
) -> None:
    """The old driver stands still before any of its calls, and goes on when a newer run has done its merge or a part of
    it."""
    old, new = plans if other_plan else (plans[0], plans[0])
    one, two = shard_of(old, Owner.expert(0)), shard_of(old, Owner.expert(1))

    def once(place: Place, at: int) -> int:
        first = started(place, old)
        first.complete(one, do_shard(first, old, one))

        take_over = TakeOver(place, new, fresh=other_plan, until=until)
        calls = Interrupted(first, at, take_over)
        is_over = calls.calls
        with contextlib.suppress(RaymoeError):
            first.complete(two, do_shard(first, old, two))
            first.write_small("config.json", b'{"old": true}')
            is_over = calls.calls
        if calls.calls > at:
            assert is_over <= at + 1, "it did not notice"
            if is_over > at:  # its last call of these: the next step looks first
                with pytest.raises(RaymoeError):
                    first.write_index(b"{}")
            first.release()
            take_over.end()
            check_is_alone(place, new, tmp_path)
        return calls.calls

    every_order(store_place, once, 2 if store_place.location.startswith("s3://") else 1)


@pytest.mark.soak_on("moto")
@pytest.mark.parametrize("other_plan", [True, False], ids=["another plan", "the same plan"])
def test_old_run_completes_a_shard_while_the_new_one_is_at_work(
    tried: tuple[Place, int | None], plans: tuple[MergePlan, MergePlan], tmp_path: Path, other_plan: bool
) -> None:
    """Its last calls come in before any of the newer run's. That one ends well, or with an error, and never wrong."""
    old, new = plans if other_plan else (plans[0], plans[0])
    one = shard_of(old, Owner.expert(0))
    failed = []

    def once(place: Place, at: int) -> int:
        first = started(place, old)
        done = do_shard(first, old, one)

        def go_on() -> None:
            with contextlib.suppress(RaymoeError):
                first.complete(one, done)
                first.write_small("config.json", b'{"old": true}')
            first.release()

        second = open_output(Location.parse(place.location), OPTIONS)
        calls = Interrupted(second, at, go_on)
        try:
            second.begin(new.digest, {}, fresh=other_plan)
            finish(second, new)
        except RaymoeError as error:
            failed.append((at, error))
            second.release()
            finish(started(place, new), new)
        if calls.calls > at:
            check_is_alone(place, new, tmp_path)
        return calls.calls

    place, step = tried
    every_order(place, once, step or 6)
    if other_plan:
        assert failed == []


@pytest.mark.soak_on("moto-smaller shards")
@pytest.mark.soak_on("moto-the same plan")
@pytest.mark.soak_on("moto-another plan-done")
@pytest.mark.parametrize("until", ["done", "shards"])
@pytest.mark.parametrize("other", ["another plan", "smaller shards", "the same plan"])
def test_a_run_that_begins_late(
    store_place: Place, plans: tuple[MergePlan, MergePlan], small: MergePlan, tmp_path: Path, other: str, until: str
) -> None:
    """It has looked at an empty output and stands still before any call of its beginning, while another run does its
    merge or a part of it. Neither has --overwrite: one of them is refused, and the other one's merge is whole."""
    plan, new = plans[0], {"another plan": plans[1], "smaller shards": small, "the same plan": plans[0]}[other]
    at, more = 0, True
    while more:
        place = Place(f"{store_place.location}-{at}")
        late, other_run = (
            open_output(Location.parse(place.location), OPTIONS),
            TakeOver(place, new, fresh=False, until=until),
        )
        assert late.problems(digest=plan.digest, output_bytes=0, overwrite=False) == []

        def come_in(other_run: TakeOver = other_run) -> None:
            with contextlib.suppress(ProblemReport):  # where the late run has just claimed the output
                other_run()

        calls = Interrupted(late, at, come_in)
        try:
            late.begin(plan.digest, {}, fresh=False)
            at, more = at + 1, calls.calls > at
            finish(late, plan)
        except RaymoeError:
            at += 1
            late.release()
            other_run.end()
            check_is_alone(place, new, tmp_path)
        else:
            check_is_alone(place, plan, tmp_path)
    assert at > 1


def test_a_run_that_goes_on_late(
    store_place: Place, plans: tuple[MergePlan, MergePlan], small: MergePlan, tmp_path: Path
) -> None:
    """Its unfinished merge is discarded by another plan's, with --overwrite, which ends before the late claim."""
    for at in range(1 if store_place.location.startswith("s3://") else 5):  # on a server before the claim alone
        place = Place(f"{store_place.location}-{at}")
        started(place, plans[0])
        late = open_output(Location.parse(place.location), OPTIONS)
        Interrupted(late, at, TakeOver(place, small, fresh=True, until="done"))
        with pytest.raises(ProblemReport, match="the output holds a finished merge"):
            late.begin(plans[0].digest, {}, fresh=False)
        check_is_alone(place, small, tmp_path)


def command(place: Place, plan: MergePlan, *, overwrite: bool = False) -> None:
    """What `raymoe merge` does with an output, but for Ray. Raises what it raises."""
    settings = RuntimeSettings(verbosity=-1, overwrite=overwrite, storage=OPTIONS)
    output, sources = open_output(Location.parse(place.location), OPTIONS), SourceFiles(plan, None)
    if problems := output_problems(plan, output, settings):
        raise ProblemReport(problems)
    try:
        if _begin(plan, output, settings, sources) is None:
            shards = write_shards(output, plan)
            shards += [output.write_small(s.name, Path(s.file.location).read_bytes()) for s in plan.side_files]
            write_rest(output, plan, shards)
        else:
            output.clean_up()
    finally:
        output.release()


def test_record_of_another_plan_names_the_remedy(store_place: Place, plans: tuple[MergePlan, MergePlan]) -> None:
    output, (plan, other) = started(store_place, plans[0]), plans
    shards = write_shards(output, plan)
    store_place.put(RECORD_NAME, record_of(other, []))
    with pytest.raises(MergeFailed, match=r"a merge of another plan has ended here.*--overwrite"):
        write_rest(output, plan, shards)
    output.release()
    with pytest.raises(ProblemReport, match=r"(?s)a merge of another plan has ended here.*--overwrite"):
        command(store_place, plan)
    command(store_place, plan, overwrite=True)
    assert json.loads(store_place.files()[RECORD_NAME])["plan_digest"] == plan.digest


def test_index_of_another_plan_names_the_remedy(store_place: Place, plans: tuple[MergePlan, MergePlan]) -> None:
    output, (plan, _) = started(store_place, plans[0]), plans
    shards = write_shards(output, plan)
    store_place.put(INDEX_NAME, b'{"weight_map": {}}')
    with pytest.raises(MergeFailed, match=r"index.json: this file belongs to another model.*--overwrite"):
        write_rest(output, plan, shards)
    assert store_place.files()[INDEX_NAME] == b'{"weight_map": {}}' and RECORD_NAME not in store_place.files()
    output.release()
    with pytest.raises(ProblemReport, match=r"(?s)files of another model are beside .*index.json.*--overwrite"):
        command(store_place, plan)
    command(store_place, plan, overwrite=True)
    assert json.loads(store_place.files()[INDEX_NAME]) == plan.index


@pytest.mark.soak_on("moto-before the index")
@pytest.mark.soak_on("moto-before the record-chat_templates/old.jinja")
@pytest.mark.soak_on("moto-before the record-vocab.json")
@pytest.mark.parametrize("name", ["chat_templates/old.jinja", "model-00001-of-00009.safetensors", "vocab.json"])
@pytest.mark.parametrize("is_late", [False, True], ids=["before the index", "before the record"])
def test_a_file_of_another_model_ends_the_merge(
    place: Place, plans: tuple[MergePlan, MergePlan], name: str, is_late: bool
) -> None:
    """Such as a template of an older run, whose plan has one. It is named, and so is a remedy, which works."""
    output, plan = started(place, plans[0]), plans[0]
    records = [*write_shards(output, plan), output.write_small("config.json", json.dumps(plan.config).encode())]
    if is_late:
        records.append(output.write_index(json.dumps(plan.index).encode()))
    place.put(name, b"old")
    place.put("notes.txt", b"mine")
    with pytest.raises(MergeFailed, match=rf"{name}: this file belongs to another model.*--overwrite"):
        output.end(record_of(plan, records)) if is_late else output.write_index(json.dumps(plan.index).encode())
    assert RECORD_NAME not in place.files()
    output.release()
    with pytest.raises(ProblemReport, match=rf"(?s)files of another model are beside .*{name}.*--overwrite"):
        command(place, plan)
    command(place, plan, overwrite=True)
    there = place.files()
    assert RECORD_NAME in there and name not in there and there["notes.txt"] == b"mine"


def test_two_runs_of_one_merge_end_at_once(store_place: Place, plans: tuple[MergePlan, MergePlan]) -> None:
    """The later run's claim comes between the record of the older one and its last look. Both find the merge done."""
    plan = plans[0]
    older, later = started(store_place, plan), open_output(Location.parse(store_place.location), OPTIONS)
    assert isinstance(older, StoreOutput) and isinstance(later, StoreOutput)
    shards, settings = write_shards(older, plan), RuntimeSettings(verbosity=-1, storage=OPTIONS)
    store, claims = later._store, list[Any]()

    class Late:
        """The later run's store, whose claim is held back until the older run has written its record."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def put(self, url: str, *arguments: Any, **named: Any) -> Any:
            if not url.endswith("/plan.json") or claims:
                return store.put(url, *arguments, **named)
            real = older._store.put

            def record_and_claim(place: str, *content: Any, **options: Any) -> Any:
                info = real(place, *content, **options)
                if place.endswith(RECORD_NAME):
                    claims.append(store.put(url, *arguments, **named))
                return info

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(older._store, "put", record_and_claim)
                write_rest(older, plan, shards)
            return claims[0]

    later.files.store = Late()  # type: ignore[assignment]
    finished = _begin(plan, later, settings, SourceFiles(plan, None))
    assert claims and finished is not None and finished.digest == plan.digest
    later.clean_up()
    later.release()
    assert RECORD_NAME in store_place.files()
    assert not [name for name in store_place.files() if name.startswith(".raymoe")]


def test_replaced_shard_is_seen_before_done_is_said(
    store_place: Place, plans: tuple[MergePlan, MergePlan], tmp_path: Path
) -> None:
    """By a request of an older run that was under way for long: of the same name and size, with other bytes."""
    plan, shard = plans[0], shard_of(plans[0], Owner.expert(0))
    other = expected(plans[1], tmp_path)[shard.file_name]

    def replace() -> None:
        store_place.put(shard.file_name, other)

    output = started(store_place, plan)
    records = [output.complete(each, do_shard(output, plan, each)) for each in plan.shards]
    replace()
    with pytest.raises(MergeFailed, match=rf"{shard.file_name}: this file was replaced or removed"):
        output.write_index(json.dumps(plan.index).encode())
    output.release()

    output = started(store_place, plan)
    records = [output.complete(each, do_shard(output, plan, each)) for each in plan.shards]
    records.append(output.write_index(json.dumps(plan.index).encode()))
    replace()
    with pytest.raises(MergeFailed, match=rf"{shard.file_name}: this file was replaced or removed"):
        output.end(record_of(plan, records))
    assert RECORD_NAME not in store_place.files()
    output.release()

    finish(started(store_place, plan), plan)
    check_is_alone(store_place, plan, tmp_path)


# --- a folder: every call of the operating system


@pytest.mark.parametrize("until", ["done", "shards"])
@pytest.mark.parametrize("name", ["open", "fsync", "replace", "unlink"])
def test_folder_is_taken_over_at_any_call_of_a_writer(
    plans: tuple[MergePlan, MergePlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, until: str
) -> None:
    """The driver was killed, its actor lives on, and stands still before one call while the newer run is at work."""
    old, new = plans
    shard, at, more = shard_of(old, Owner.expert(0)), 0, True
    while more:
        place = Place(str(tmp_path / f"out-{at}"))
        first = started(place, old)
        actor = LocalOutput(Path(place.location), first.run)
        killed_driver(first)
        calls, real, take_over = 0, getattr(os, name), TakeOver(place, new, fresh=True, until=until)

        def call(
            *arguments: Any, real: Any = real, place: Place = place, at: int = at, then: Any = take_over, **named: Any
        ) -> Any:
            nonlocal calls
            if str(arguments[0]).startswith(place.location) or name == "fsync":
                calls += 1
                if calls - 1 == at:
                    monkeypatch.undo()
                    then()
            return real(*arguments, **named)

        monkeypatch.setattr(os, name, call)
        with contextlib.suppress(MergeFailed):
            do_shard(actor, old, shard)
        monkeypatch.undo()
        more = calls > at
        if more:
            take_over.end()
            check_is_alone(place, new, tmp_path)
        at += 1
    assert at > 1


def test_new_run_fences_before_it_removes(
    plans: tuple[MergePlan, MergePlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it removes the old merge's files, an actor of that can't bring one back."""
    old, new = plans
    place = Place(str(tmp_path / "out"))
    first = started(place, old)
    actor = LocalOutput(Path(place.location), first.run)
    one, two = shard_of(old, Owner.expert(0)), shard_of(old, Owner.expert(1))
    actor.complete(one, do_shard(actor, old, one))
    killed_driver(first)
    real, tried = os.unlink, []

    def unlink(path: Any, **named: Any) -> None:
        if str(path).endswith(one.file_name) and not tried:
            tried.append(path)
            with pytest.raises(MergeFailed, match="has taken over"):
                do_shard(actor, old, two)
        real(path, **named)

    monkeypatch.setattr(os, "unlink", unlink)
    second = started(place, new, fresh=True)
    assert tried
    assert sorted(os.listdir(place.location)) == [".raymoe"]
    finish(second, new)
    check_is_alone(place, new, tmp_path)


# --- after the end


@pytest.mark.soak_on("moto")
def test_killed_while_the_journal_is_removed(place: Place, plans: tuple[MergePlan, MergePlan], tmp_path: Path) -> None:
    """What is left after any number of removals: the merge is complete, and the same command removes the rest."""
    plan = plans[0]
    for at in range(40):
        here = Place(f"{place.location}-{at}")
        output = started(here, plan)
        records = [output.complete(shard, do_shard(output, plan, shard)) for shard in plan.shards]
        records.append(output.write_small("config.json", json.dumps(plan.config).encode()))
        records.append(output.write_index(json.dumps(plan.index).encode()))
        is_over = end_or_die(output, record_of(plan, records), at)
        killed_driver(output)
        if RECORD_NAME in here.files():
            again = open_output(Location.parse(here.location), OPTIONS)
            assert again.problems(digest=plan.digest, output_bytes=0, overwrite=False) == []
            assert find_complete_merge(plan, again) is not None and find_complete_merge(plans[1], again) is None
            assert again.problems(digest=plans[1].digest, output_bytes=0, overwrite=False) != []
            again.clean_up()
            check_is_alone(here, plan, tmp_path)
        if is_over:
            break
    assert is_over and at > 3


class Died(BaseException):
    """Nothing catches it, as nothing runs any more after SIGKILL."""


def end_or_die(output: Output, record: bytes, at: int) -> bool:
    """End a merge, and die before removal number `at`. Whether it came to its end."""
    left = at

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Died
            return real(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        if isinstance(output, LocalOutput):
            for name in ("unlink", "rmdir", "rename"):
                patch.setattr(os, name, dying(getattr(os, name)))
        else:
            assert isinstance(output, (S3Output, StreamOutput))
            for name in ("delete", "delete_all"):
                patch.setattr(output._store, name, dying(getattr(output._store, name)))
        try:
            output.end(record)
        except Died:
            return False
    return True


@pytest.mark.parametrize("name", ["result.json", "run-1.json"])
def test_the_result_of_a_run_that_failed_is_not_in_the_way(
    place: Place, plans: tuple[MergePlan, MergePlan], name: str
) -> None:
    """`--result OUT/result.json` of a run that was refused: the mended command does not need --overwrite."""
    filesystem, path = place.open()
    filesystem.makedirs(path, exist_ok=True)
    filesystem.pipe_file(f"{path}/{name}", b'{"exit_reason": "refused", "raymoe_version": "1"}')
    output = open_output(Location.parse(place.location), OPTIONS)
    assert output.problems(digest=plans[0].digest, output_bytes=0, overwrite=False) == []
    output.lock()
    output.begin(plans[0].digest, {}, fresh=False)
    output.release()
    filesystem.rm(f"{path}/.raymoe", recursive=True)
    filesystem.pipe_file(f"{path}/{name}", b'{"exit_reason": "mine"}')
    (problem,) = open_output(Location.parse(place.location), OPTIONS).problems(
        digest=plans[0].digest, output_bytes=0, overwrite=False
    )
    assert "not empty" in problem.what


def test_finished_merge_that_lacks_a_file(place: Place, plans: tuple[MergePlan, MergePlan]) -> None:
    """It is not complete, and not begun again without --overwrite: the user may have the file elsewhere."""
    plan = plans[0]
    finish(started(place, plan), plan)
    filesystem, path = place.open()
    filesystem.rm_file(f"{path}/{plan.shards[0].file_name}")
    filesystem.pipe_file(f"{path}/{plan.shards[1].file_name}", b"short")
    output = open_output(Location.parse(place.location), OPTIONS)
    (problem,) = output.problems(digest=plan.digest, output_bytes=0, overwrite=False)
    assert f"{plan.shards[0].file_name} is missing" in problem.what
    assert f"{plan.shards[1].file_name} has 5 bytes, and had {plan.shards[1].nbytes:,}" in problem.what
    assert problem.remedy is not None and "--overwrite" in problem.remedy
    assert output.problems(digest=plan.digest, output_bytes=0, overwrite=True) == []


# --- journals of an older raymoe


OLD_JOURNAL: Mapping[str, Any] = {
    "plan.json": {"digest": "DIGEST", "run": "0123456789abcdef", "sources": {}},
    "done/model-00001-of-00004.safetensors.json": {
        "name": "model-00001-of-00004.safetensors",
        "size": 3,
        "checksum": "xxh3-128:00",
    },
}


def test_journal_of_an_older_raymoe(place: Place, plans: tuple[MergePlan, MergePlan], tmp_path: Path) -> None:
    """It is refused, whatever its digest says, and --overwrite begins again."""
    plan = plans[0]
    filesystem, path = place.open()
    for name, content in OLD_JOURNAL.items():
        filesystem.makedirs(f"{path}/.raymoe/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{path}/.raymoe/{name}", json.dumps(content).replace("DIGEST", plan.digest).encode())
    output = open_output(Location.parse(place.location), OPTIONS)
    (problem,) = output.problems(digest=plan.digest, output_bytes=0, overwrite=False)
    assert "an unfinished merge of another version of raymoe" in problem.what
    assert output.digest() is None
    assert output.problems(digest=plan.digest, output_bytes=0, overwrite=True) == []
    finish(started(place, plan, fresh=True), plan)
    check_is_alone(place, plan, tmp_path)


def test_interrupted_while_it_removes_the_old_merge(
    tried: tuple[Place, int | None], plans: tuple[MergePlan, MergePlan], tmp_path: Path
) -> None:
    """The next run of the same command, with --overwrite or without, removes the rest first."""
    old, new = plans

    def once(place: Place, at: int) -> int:
        finish(started(place, old), old)
        second = open_output(Location.parse(place.location), OPTIONS)

        def die() -> None:
            raise Died

        calls = Interrupted(second, at, die)
        try:
            second.begin(new.digest, {}, fresh=True)
        except Died:
            pass
        else:
            return calls.calls
        again = open_output(Location.parse(place.location), OPTIONS)
        has_begun = not again.problems(digest=new.digest, output_bytes=0, overwrite=False)
        again.begin(new.digest, {}, fresh=not has_begun)
        finish(again, new)
        check_is_alone(place, new, tmp_path)
        return calls.calls

    place, step = tried
    every_order(place, once, step or 3)
