"""How messages write numbers and long lists, in one place."""

from __future__ import annotations

from collections.abc import Sequence


def human_bytes(count: float) -> str:
    """1536 -> '1.5 kB'. Decimal units, as disks and object stores count."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.2f} TB"


def human_count(count: int) -> str:
    """24_153_690_112 -> '24.15B', as parameter counts are quoted."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return str(count)


def human_rate(per_second: float) -> str:
    """0.0123 -> '0.012', 3.14 -> '3.1', 1234.5 -> '1,234': two digits, or whole numbers."""
    return f"{per_second:.2g}" if per_second < 10 else f"{per_second:,.0f}"


def human_time(seconds: float) -> str:
    """45 -> '45 s', 600 -> '10 min', 5400 -> '1 h 30 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def number_ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)


def short_list(names: Sequence[str], most: int = 4, separator: str = ", ") -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def plural(noun: str, count: int) -> str:
    """'difference', 2 -> 'differences'."""
    return noun if count == 1 else f"{noun}s"


_UNITS = {"": 1, "b": 10**9, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}
_UNITS |= {"t": 10**12, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str) -> int:
    """Bytes of '5B' or '5G' (both 5e9: `B` is mergekit's 'billion'), '500M', '2GiB', '1000000'. Raises ValueError."""
    stripped = text.strip().lower()
    digits = stripped.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = stripped[len(digits) :].strip()
    if unit not in _UNITS:
        raise ValueError(f"{text!r} is no size: write a number and K, M, B (or G), T, or KiB, MiB, GiB, TiB")
    try:
        size = int(float(digits) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no size: write a number and a unit, such as 5B or 500M") from None
    if size <= 0:
        raise ValueError(f"{text!r} is no size: it must be more than zero")
    return size
