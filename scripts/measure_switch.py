"""How fast a thread copies a file beside one that computes in Python, by the interpreter's switch interval.

    python scripts/measure_switch.py FILE          # a file of some hundred megabytes, in the page cache

The copy is what an actor does with a shard (storage/file_writer.py): read, checksum, write, in pieces of 256 KiB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import xxhash

PIECE = 256 << 10
INTERVALS = (0.005, 0.001, 0.0002)


def run(source: Path, interval: float, seconds: float) -> tuple[float, float]:
    """Bytes copied per second, and turns of the computing thread per second."""
    sys.setswitchinterval(interval)
    ended, turns = threading.Event(), [0]

    def compute() -> None:
        while not ended.is_set():
            sum(range(1000))
            turns[0] += 1

    computing = threading.Thread(target=compute)
    computing.start()
    began, done, size = time.perf_counter(), 0, source.stat().st_size
    with source.open("rb", buffering=0) as file, tempfile.TemporaryFile(buffering=0) as out:
        checksum, buffer = xxhash.xxh3_128(), memoryview(bytearray(PIECE))
        while time.perf_counter() - began < seconds:
            count = os.preadv(file.fileno(), [buffer], done % (size - PIECE))
            checksum.update(buffer[:count])
            os.pwrite(out.fileno(), buffer[:count], done % (256 << 20))
            done += count
    took = time.perf_counter() - began
    ended.set()
    computing.join()
    return done / took, turns[0] / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    found: dict[float, list[tuple[float, float]]] = {interval: [] for interval in INTERVALS}
    for _ in range(arguments.rounds):
        for interval in INTERVALS:
            found[interval].append(run(arguments.file, interval, arguments.seconds))
    for interval, runs in found.items():
        copied, turns = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"{interval * 1000:g} ms: {copied / 1e6:.0f} MB/s copied, {turns:.0f} turns a second computed")


if __name__ == "__main__":
    main()
