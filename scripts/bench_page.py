"""The tables and the plot of docs/benchmarks.md, from the results of scripts/bench.py and scripts/bench_s3.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pages import put_between

PAGE = Path(__file__).resolve().parent.parent / "docs/benchmarks.md"
MARK = "<!-- scripts/bench.py: {} -->"
S3_MARK = "<!-- scripts/bench_s3.py: {} -->"
NAMES = {"raymoe": "raymoe", "mergekit": "mergekit-moe", "raw": "raw copy"}
TABLES = ("times", "phases", "memory", "backbones")
BACKBONE = "backbone: "  # how the names of raymoe's merges with another backbone begin
COLOURS = {"raymoe": "#2563eb", "mergekit": "#d97706", "raw": "#6b7280"}
PHASES = ("plan", "start Ray", "start actors", "gates", "write", "finish", "stop Ray")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 300, 52, 92, 34, 44

Result = dict[str, Any]
Point = tuple[float, float]


def update_page(page: Path, results: Sequence[Result], names: Collection[str] = TABLES) -> None:
    """Put the tables of these names between the page's marks. The plot goes with `times`, beside the page."""
    ordered = sorted(
        results,
        key=lambda r: (r["processors"], r["output_bytes"], r["cache"], r["mode"], r["actors"] or 0, disk_of(r)),
    )
    tables = dict(zip(TABLES, (times_table, phase_table, memory_table, backbone_table), strict=True))
    for name in names:
        put_between(page, MARK.format(name), tables[name](ordered))
    if "times" in names and on_disk(ordered):
        page.with_suffix(".svg").write_text(plot(ordered) + "\n")


def disk_of(result: Result) -> str:
    """The kind of disk that the output was written to: "disk" or "RAM disk"."""
    return str(result.get("disk", "disk"))


def on_disk(results: Sequence[Result]) -> list[Result]:
    """The results whose outputs were written to a disk: memory and phases are told of these only."""
    return [result for result in results if disk_of(result) == "disk"]


def case(result: Result) -> str:
    """A row's first cells: model, mode, page cache, actors."""
    size = f"{result['output_bytes'] / 1e9:.2f} GB"
    actors = result["actors"] or "all"
    return f"| {result['experts']} × {result['shape']} | {size} | {result['mode']} | {result['cache']} | {actors} |"


def times_table(results: Sequence[Result]) -> str:
    """Times of whole processes; on a disk, also until a `sync` after them."""
    columns = ["models", "output", "mode", "page cache", "actors", "to", "raymoe", "mergekit-moe", "raw copy"]
    columns += ["raymoe : mergekit-moe", "writing : raw copy", "until synced: raymoe", "mergekit-moe", "raw copy"]
    columns += ["raymoe : mergekit-moe"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        programs, disk = result["programs"], disk_of(result)
        writing = programs["raymoe"]["phases"]["write"] / programs["raw"]["seconds"]
        *times, ratio = _compared(programs, "seconds")
        cells = [disk, *times, ratio, f"{writing:.2f}"]
        cells += _compared(programs, "synced_seconds") if disk == "disk" else ["-"] * 4
        lines.append(f"{case(result)} {' | '.join(cells)} |")
    return "\n".join(lines)


def _compared(programs: Result, what: str) -> list[str]:
    """Seconds of raymoe, mergekit-moe and the raw copy, and the ratio of the first two; "-" where there is none."""
    seconds = [programs.get(name, {}).get(what) for name in NAMES]
    ratio = f"{seconds[0] / seconds[1]:.2f}" if seconds[0] and seconds[1] else "-"
    return [*(f"{each:.1f} s" if each else "-" for each in seconds), ratio]


def phase_table(results: Sequence[Result]) -> str:
    lines = [
        f"| models | output | mode | page cache | actors | {' | '.join(PHASES)} |",
        "|---" * (5 + len(PHASES)) + "|",
    ]
    for result in on_disk(results):
        found = result["programs"]["raymoe"]["phases"]
        cells = [f"{found[name]:.1f} s" if name in found else "-" for name in PHASES]
        lines.append(f"{case(result)} {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(results: Sequence[Result]) -> str:
    lines = [
        "| models | output | mode | page cache | actors | raymoe | without file pages | mergekit-moe |",
        "|---" * 8 + "|",
    ]
    for result in on_disk(results):
        programs = result["programs"]
        cells = [megabytes(programs["raymoe"]["peak_pss"]), megabytes(programs["raymoe"]["peak_anonymous"])]
        cells.append(megabytes(programs["mergekit"]["peak_pss"]) if "mergekit" in programs else "-")
        lines.append(f"{case(result)} {' | '.join(cells)} |")
    return "\n".join(lines)


def backbone_table(results: Sequence[Result]) -> str:
    """A row for each backbone that was merged besides the base's, compared with it."""
    lines = [
        "| models | output | mode | page cache | actors | backbone | base | this backbone | times base | writing | "
        "memory, base | memory, this backbone | more than base |",
        "|---" * 13 + "|",
    ]
    for result in on_disk(results):
        base = result["programs"]["raymoe"]
        for name, found in result["programs"].items():
            if not name.startswith(BACKBONE):
                continue
            cells = [f"`{name.removeprefix(BACKBONE)}`", f"{base['seconds']:.1f} s", f"{found['seconds']:.1f} s"]
            cells += [f"{found['seconds'] / base['seconds']:.2f}"]
            cells += [" : ".join(f"{each['phases']['write']:.1f} s" for each in (base, found))]
            cells += [megabytes(each["peak_pss"]) for each in (base, found)]
            cells += [megabytes(found["peak_pss"] - base["peak_pss"])]
            lines.append(f"{case(result)} {' | '.join(cells)} |")
    return "\n".join(lines)


def update_s3_tables(page: Path, results: Sequence[Result]) -> None:
    """Put the tables of merges between buckets and of senders between the page's marks."""
    ordered = sorted(results, key=lambda r: (r["processors"], r["output_bytes"], r["cache"], r["mode"]))
    put_between(page, S3_MARK.format("merges"), s3_table(ordered))
    put_between(page, S3_MARK.format("senders"), senders_table(ordered))


def s3_table(results: Sequence[Result]) -> str:
    """Load is the highest load average of a minute that the machine had before one of the runs."""
    lines = [
        "| models | output | mode | page cache | load | raymoe | start Ray | write | download + mergekit-moe + upload "
        "| download | merge | upload | raymoe : all three |",
        "|---" * 13 + "|",
    ]
    for result in results:
        ours, theirs = result["programs"]["raymoe"], result["programs"].get("mergekit")
        cells = [f"{result['experts']} × {result['shape']}", f"{result['output_bytes'] / 1e9:.2f} GB"]
        cells += [result["mode"], result["cache"], f"{max(p['load'] for p in result['programs'].values()):.1f}"]
        cells += [f"{seconds:.1f} s" for seconds in (ours["seconds"], *map(ours["phases"].get, ("start Ray", "write")))]
        if theirs:
            steps = [theirs["phases"][step] for step in ("download", "merge", "upload")]
            cells += [f"{seconds:.1f} s" for seconds in (theirs["seconds"], *steps)]
            cells.append(f"{ours['seconds'] / theirs['seconds']:.2f}")
        else:
            cells += ["-"] * 5
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def senders_table(results: Sequence[Result]) -> str:
    """One set of lines per shape: all entries of a shape have the same senders."""
    lines = [
        "| models | sender | load | sent | CPU-seconds | MiB/s | MiB per CPU-second |",
        "|---" * 7 + "|",
    ]
    for result in {result["shape"]: result for result in results}.values():
        senders = result["senders"]
        for label, found in (
            (f"actors of raymoe, cast to {senders['dtype']}", senders["raymoe"]),
            ("the same, from when they are up", senders["raymoe"]["after_start"]),
            ("boto3, as they are", senders["boto3"]),
        ):
            cells = [f"{result['experts']} × {result['shape']}", label, f"{found['load']:.1f}"]
            cells += [f"{found['bytes'] / 2**20:,.0f} MiB", f"{found['cpu_seconds']:.1f}"]
            cells += [f"{found['mib_per_s']:.0f}", f"{found['mib_per_cpu_s']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def plot(results: Sequence[Result]) -> str:
    """Time against the output's size and, where there are results for it, against the number of actors. On a disk."""
    results = on_disk(results)
    mode = max({r["mode"] for r in results}, key=lambda m: sum(r["mode"] == m for r in results))
    mine = [r for r in results if r["mode"] == mode and r["cache"] == results[0]["cache"]]
    panels = [
        (f"seconds against output ({mode})", "GB written", [r for r in mine if not r["actors"]], _gigabytes),
        (f"seconds against actors ({mode})", "actors", [r for r in mine if r["actors"]], lambda r: float(r["actors"])),
    ]
    panels = [panel for panel in panels if panel[2]]
    root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH * len(panels)} {HEIGHT}")
    root.set("font-family", "sans-serif")
    root.set("font-size", "12")
    ElementTree.SubElement(root, "rect", width="100%", height="100%", fill="#ffffff")
    for number, panel in enumerate(panels):
        group = ElementTree.SubElement(root, "g", transform=f"translate({WIDTH * number} 0)")
        _panel(group, *panel)
    return ElementTree.tostring(root, encoding="unicode")


def _gigabytes(result: Result) -> float:
    return float(result["output_bytes"]) / 1e9


def _panel(
    group: ElementTree.Element, title: str, axis: str, results: Sequence[Result], x_of: Callable[[Result], float]
) -> None:
    curves: dict[str, list[Point]] = {}
    for result in results:
        for name, program in result["programs"].items():
            if name not in NAMES:
                continue
            curves.setdefault(name, []).append((x_of(result), program["seconds"]))
    x_ticks = _ticks(max(x for curve in curves.values() for x, _ in curve))
    y_ticks = _ticks(max(y for curve in curves.values() for _, y in curve))
    x_scale, y_scale = (WIDTH - LEFT - RIGHT) / x_ticks[-1], (HEIGHT - TOP - BOTTOM) / y_ticks[-1]

    def at(point: Point) -> Point:
        return LEFT + point[0] * x_scale, HEIGHT - BOTTOM - point[1] * y_scale

    _text(group, LEFT, 18, title)
    _text(group, WIDTH - RIGHT, HEIGHT - 8, axis, "end")
    for tick in y_ticks:
        x, y = at((0, tick))
        _line(group, x, y, WIDTH - RIGHT, y, "#e5e7eb")
        _text(group, x - 8, y + 4, f"{tick:g}", "end")
    for tick in x_ticks:
        _text(group, at((tick, 0))[0], HEIGHT - BOTTOM + 16, f"{tick:g}", "middle")
    for name, curve in curves.items():
        points = [at(point) for point in sorted(curve)]
        for start, end in itertools.pairwise(points):
            _line(group, *start, *end, COLOURS[name], 2)
        for x, y in points:
            ElementTree.SubElement(group, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3.5", fill=COLOURS[name])
        _text(group, points[-1][0] + 8, points[-1][1] + 4, NAMES[name], fill=COLOURS[name])


def _ticks(largest: float) -> list[float]:
    """From 0 to at least the largest value, in at most six round steps."""
    step = next(s for e in range(-2, 7) for s in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if largest / s <= 6)
    count = int(-(-largest // step))
    return [round(n * step, 6) for n in range(count + 1)]


def _line(group: ElementTree.Element, x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> None:
    ends = {name: f"{value:.1f}" for name, value in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2))}
    ElementTree.SubElement(group, "line", ends, stroke=colour).set("stroke-width", str(width))


def _text(
    group: ElementTree.Element, x: float, y: float, text: str, anchor: str = "start", fill: str = "#111827"
) -> None:
    element = ElementTree.SubElement(group, "text", x=f"{x:.1f}", y=f"{y:.1f}", fill=fill)
    element.set("text-anchor", anchor)
    element.text = text
