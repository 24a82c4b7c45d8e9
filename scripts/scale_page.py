"""The tables of docs/scale.md, from the results of scripts/bench_scale.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pages import put_between

PAGE = Path(__file__).resolve().parent.parent / "docs/scale.md"
MARK = "<!-- scripts/bench_scale.py: {} -->"
PHASES = ("plan", "start of Ray", "start of actors", "shards", "end")
_CLI_PART = 8 << 20  # of a download or an upload by the AWS CLI, as it is configured by default
_LINK_BYTES_S = 1.25e9  # 10 Gbit/s
_COPIES_PER_S = 3500  # S3 takes this many writes a second below a prefix
_FAR_NODES, _FAR_BYTES = 10, 10e12
Entry = dict[str, Any]


def update_page(entries: Sequence[Entry], page: Path = PAGE) -> None:
    """Put the tables between the page's marks."""
    ordered = sorted(entries, key=lambda e: (e["output_bytes"], e["pace"], str(e["set"]), e["nodes"]))
    for name, table in TABLES.items():
        put_between(page, MARK.format(name), table(ordered))


def entry_lines(entry: Entry) -> Iterator[str]:
    """What a run prints of an entry."""
    for name, table in TABLES.items():
        if name != "extrapolation" and (name != "killed" or "killed" in entry):
            yield from (f"{name}:", table([entry]), "")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _case(entry: Entry) -> list[object]:
    """A row's first cells."""
    settings = ", ".join(f"{key}: {value}" for key, value in entry["set"].items()) or "-"
    if entry["pace"] != 1:
        settings += f" (delays x{entry['pace']:g})"
    return [entry["shape"], f"{entry['output_bytes'] / 1e9:,.0f} GB", entry["nodes"], settings]


_CASE = ("shape", "output", "nodes", "storage settings")


def phase_table(entries: Sequence[Entry]) -> str:
    rows = [
        [*_case(each), *(f"{each['phases'][name]:.1f}" for name in PHASES), f"{each['seconds']:.1f}"]
        for each in entries
    ]
    return _table([*_CASE, *(f"{name}, s" for name in PHASES), "all, s"], rows)


def copy_table(entries: Sequence[Entry]) -> str:
    head = [*_CASE, "copies", "in flight: mean", "most", "shards, s", "ideal, s", "times ideal", "times one node"]
    rows = [
        [
            *_case(each),
            f"{each['copies']:,}",
            f"{each['mean_copies_in_flight']:.1f}",
            each["most_copies_in_flight"],
            f"{each['phases']['shards']:.1f}",
            f"{each['ideal_shards_s']:.1f}",
            f"{each['times_ideal']:.2f}" if each["times_ideal"] is not None else "-",
            f"{each['phases']['shards'] / one['phases']['shards']:.2f}"
            if (one := _on_one_node(each, entries))
            else "-",
        ]
        for each in entries
    ]
    return _table([*head, "bound by"], [[*row, bound(each)] for row, each in zip(rows, entries)])


def bound(entry: Entry) -> str:
    """What the shards phase waits for, by what was measured in it."""
    processors = entry["processors"]
    if sum(processors.values()) > 0.9 * entry["machine_processors"]:
        return "this machine's processors"
    if processors.get("driver", 0) > 0.8:
        return "the driver's processor"
    if entry["mean_copies_in_flight"] > 0.75 * entry["most_copies_in_flight"]:
        return "copies in flight"
    return "requests between copies"


def request_table(entries: Sequence[Entry]) -> str:
    """Requests by operation and kind of object, per shard; and all per GB."""
    kinds = sorted({kind for each in entries for kind in each["by_object"]})
    rows: list[list[object]] = [
        [kind, *(f"{each['by_object'].get(kind, 0) / each['audit']['shards']:.2f}" for each in entries)]
        for kind in kinds
    ]
    rows.append(["**all, per shard**", *(f"{each['requests'] / each['audit']['shards']:.1f}" for each in entries)])
    rows.append(["**all, per GB**", *(f"{each['requests_per_gb']:.2f}" for each in entries)])
    rows.append(["**all**", *(f"{each['requests']:,}" for each in entries)])
    rows.append(["most in a second", *(f"{each['most_requests_a_second']:.0f}" for each in entries)])
    return _table(
        ["requests", *(f"{each['shape']}, {each['nodes']} nodes, {_case(each)[3]}" for each in entries)], rows
    )


def memory_table(entries: Sequence[Entry]) -> str:
    head = [*_CASE, "tensors read", "written", "shards", "driver", "an actor, at most", "processors: driver", "actors"]
    rows = [
        [
            *_case(each),
            f"{each['source_tensors']:,}",
            f"{each['output_tensors']:,}",
            each["audit"]["shards"],
            f"{each['driver_bytes'] / 1e6:.0f} MB",
            f"{max(each['actor_bytes'], default=0) / 1e6:.0f} MB",
            *(f"{each['processors'].get(name, math.nan):.2f}" for name in ("driver", "actors")),
        ]
        for each in entries
    ]
    return _table(head, rows)


def killed_table(entries: Sequence[Entry]) -> str:
    head = [
        *_CASE,
        "killed at",
        "first new copy, s",
        "copies repeated",
        "requests repeated",
        "resumed run, s",
        "driver",
    ]
    rows = []
    for each in entries:
        if killed := each.get("killed"):
            repeated = f"{killed['copies_repeated']} of {each['copies']:,}"
            row = [f"{killed['killed_at']:.0%}", f"{killed['first_copy_s']:.1f}", repeated]
            row += [f"{killed['requests_repeated']:.1%}", f"{killed['seconds']:.1f}"]
            rows.append([*_case(each), *row, f"{killed['driver_bytes'] / 1e6:.0f} MB"])
    return _table(head, rows)


def today_table(entries: Sequence[Entry]) -> str:
    """Download, mergekit-moe, upload: counted, not run. One line per shape."""
    head = ["shape", "way", "requests", "through the machine", "disk", "seconds at 10 Gbit/s"]
    rows: list[list[object]] = []
    for shape, each in {entry["shape"]: entry for entry in entries}.items():
        shards = each["audit"]["shards"]
        down = sum(math.ceil(size / _CLI_PART) + 1 for size in each["source_file_sizes"]) * each["experts"]
        up = math.ceil(each["output_bytes"] / _CLI_PART) + 2 * shards
        moved = each["source_bytes"] + each["output_bytes"]
        size = f"{moved / 1e9:,.0f} GB"
        rows.append([shape, "download, mergekit-moe, upload", f"{down + up:,}", size, size, _at_link(moved)])
        through = each["bytes"].get("read", 0) + each["bytes"].get("sent", 0) + each["bytes"].get("put", 0)
        rows.append([shape, "raymoe", f"{each['requests']:,}", f"{through / 1e9:,.1f} GB", "0 GB", _at_link(through)])
    return _table(head, rows)


def _at_link(nbytes: float) -> str:
    return f"{nbytes / _LINK_BYTES_S:,.0f}"


def extrapolation_table(entries: Sequence[Entry]) -> str:
    """To 10 nodes and 10 TB, from each pair of runs on one node and on more.

    The shards phase takes a + b / nodes seconds per byte, where a is what more nodes do not shorten.
    """
    head = ["from", "nodes", "a, s per TB", "b, s per TB", "shards phase of 10 TB on 10 nodes, s", "copies a second"]
    rows: list[list[object]] = []
    for each in entries:
        one = _on_one_node(each, entries)
        if one is None:
            continue
        first, second = one["phases"]["shards"], each["phases"]["shards"]
        shrinks = (first - second) / (1 - 1 / each["nodes"])
        per_tb = 1e12 / each["output_bytes"]
        copies = each["copies"] / each["output_bytes"] * _FAR_BYTES
        seconds = (first - shrinks + shrinks / _FAR_NODES) * _FAR_BYTES / each["output_bytes"]
        seconds = max(seconds, copies / _COPIES_PER_S)
        name = f"{each['shape']} ({_case(each)[3]})"
        cells = [f"{(first - shrinks) * per_tb:.1f}", f"{shrinks * per_tb:.1f}", f"{seconds:.0f}"]
        rows.append([name, f"1 and {each['nodes']}", *cells, f"{copies / seconds:.0f}"])
    return _table(head, rows)


def _on_one_node(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The run under the same conditions on one node, of a run on several."""
    same = ("shape", "pace", "set", "cpus_per_node", "shard_size")
    found = (one for one in entries if one["nodes"] == 1 and all(one[name] == entry[name] for name in same))
    return next(found, None) if entry["nodes"] > 1 else None


TABLES: dict[str, Callable[[Sequence[Entry]], str]] = {
    "phases": phase_table,
    "copies": copy_table,
    "requests": request_table,
    "memory": memory_table,
    "killed": killed_table,
    "extrapolation": extrapolation_table,
    "today": today_table,
}
