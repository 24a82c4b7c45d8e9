"""Linux system calls that Python does not wrap: preallocation, writeback, shared extents.

They make writing faster and change no bytes. Each returns whether it worked, and none is required: on other systems and
filesystems, writing continues without them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys

# These errors mean that the file is too large for the disk, the quota or the process limit, however it is written.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), from linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 1 | 2 | 4  # WAIT_BEFORE, WRITE, WAIT_AFTER
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP)
_PUNCH_HOLE = 0x02 | 0x01  # with FALLOC_FL_KEEP_SIZE, from linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def allocate(descriptor: int, size: int) -> bool:
    """Preallocate `size` bytes, in few large extents. Raises OSError if there is no room for them.

    `os.posix_fallocate` is not used: if a filesystem does not support it, the C library writes a byte into every block.
    """
    fallocate = getattr(_libc, "fallocate", None)
    if fallocate is None or not size:
        return False
    while fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in _NO_ROOM:
            raise OSError(code, os.strerror(code))
        if code != errno.EINTR:
            return False
    return True


def start_writeback(descriptor: int, start: int, size: int) -> bool:
    """Make the kernel start to write these bytes to the disk, without waiting for it."""
    call = getattr(_libc, "sync_file_range", None)
    if call is None:
        return False
    done = call(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
    return bool(done == 0)


def wait_for_writeback(descriptor: int, start: int, size: int) -> bool:
    """Make the kernel write these bytes to the disk, and wait until it has. Raises OSError if a write fails.

    This does not replace `fsync`: it writes neither metadata nor the disk's own cache. Linux reports a failed write
    once per open file, here or in `fsync`, so an error that is ignored here is lost.
    """
    if not start_writeback(descriptor, start, 1):  # not supported, or forbidden in this container
        return False
    call = getattr(_libc, "sync_file_range", None)
    assert call is not None
    flags = ctypes.c_uint(_SYNC_FILE_RANGE_WRITE_AND_WAIT)
    if call(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_CALL:
        return False
    raise OSError(code, os.strerror(code))


def clone_range(source: int, start: int, size: int, target: int, offset: int) -> bool:
    """Make `target` share `size` bytes of `source` without a copy. All three numbers are multiples of the block size.

    False if the filesystem can't (ext4), or if the files are on different filesystems.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, start, size, offset))
    except OSError:
        return False
    return True


def free_range(descriptor: int, start: int, size: int) -> bool:
    """Return the disk space of these bytes to the filesystem; the file keeps its size."""
    fallocate = getattr(_libc, "fallocate", None)
    if fallocate is None:
        return False
    return bool(fallocate(descriptor, _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(size)) == 0)
