"""The kernel's copy of a merge's bytes, for scripts/bench.py: nothing is imported that is not needed to copy.

    python scripts/raw_copy.py COPIES.json OUTPUT

COPIES.json holds for each file its name, its size, and (source, start, end, offset) of each range.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def copy_all(copies: str, output: str) -> None:
    """One thread per file, as many at once as there are processors."""
    os.mkdir(output)
    with open(copies) as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda entry: copy_file(entry, output), json.load(file)))


def copy_file(entry: dict[str, Any], output: str) -> None:
    """Into a file whose room is set aside, and to the disk."""
    target = os.open(os.path.join(output, entry["name"]), os.O_WRONLY | os.O_CREAT, 0o666)
    os.posix_fallocate(target, 0, entry["size"])
    for location, start, end, offset in entry["ranges"]:
        source = os.open(location, os.O_RDONLY)
        while start < end:
            count = copy_some(source, target, start, end - start, offset)
            assert count, f"{location} ends at {start}"
            start, offset = start + count, offset + count
        os.close(source)
    os.fsync(target)
    os.close(target)


def copy_some(source: int, target: int, start: int, count: int, offset: int) -> int:
    """`copy_file_range`; between filesystems of different kinds, which it does not serve, `sendfile`."""
    try:
        return os.copy_file_range(source, target, count, start, offset)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        os.lseek(target, offset, os.SEEK_SET)
        return os.sendfile(target, source, start, count)


if __name__ == "__main__":
    copy_all(*sys.argv[1:])
