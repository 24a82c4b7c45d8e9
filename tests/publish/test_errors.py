"""What a push says of errors that are no answers of the Hub: of Xet storage, of the disk."""

from __future__ import annotations

import errno

import pytest

from raymoe.publish.errors import PushFailed, translate_upload_errors
from tests.sources.test_hub_errors import FULL, UNREACHABLE


def told(error: Exception) -> str:
    with pytest.raises(PushFailed) as caught, translate_upload_errors("push to org/name", lambda: "nothing was sent"):
        raise error
    return str(caught.value)


def test_xet_is_told_by_what_it_says_and_not_by_its_url() -> None:
    said = told(UNREACHABLE)
    assert "the upload to Xet storage failed (Task error: File reconstruction error: CAS Client Error" in said
    assert "HF_HUB_DISABLE_XET=1" in said


def test_a_full_disk_under_a_folder_that_is_called_xet() -> None:
    assert "push to org/name: /data/xet/blob: No space left on device; nothing was sent" in told(FULL)


def test_an_error_of_the_disk_without_a_file() -> None:
    assert "push to org/name: No space left on device; nothing was sent" in told(
        OSError(errno.ENOSPC, "No space left on device")
    )
    assert "push to org/name: short read; nothing was sent" in told(OSError("short read"))
