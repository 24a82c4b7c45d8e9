"""What says how a store is reached: no credentials, and numbers that timers and threads take."""

from __future__ import annotations

from typing import Any

import pytest

from raymoe.config.storage_block import storage_options
from raymoe.errors import ProblemReport
from raymoe.object_store.options import StorageOptions

HUGE = 16**9000


@pytest.mark.parametrize("name", ["region", "profile", "endpoint"])
@pytest.mark.parametrize("value", ["https://user:hidden@host", "s3://AK:hid/den@bucket", "https:/user:hidden@host"])
def test_credentials_are_refused_without_being_repeated(name: str, value: str) -> None:
    with pytest.raises(ProblemReport) as caught:
        StorageOptions(**{name: value})  # type: ignore[arg-type]
    assert f"storage.{name}: " in str(caught.value) and "hid" not in str(caught.value)
    with pytest.raises(ValueError, match=name) as refused:
        storage_options({name: value})
    assert "hid" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_requests": 0}, "0 is not a number from 1 up to 10000"),
        ({"max_requests": HUGE}, "this is not a number from 1 up to 10000"),
        ({"deadline_s": HUGE}, "this is not a time over 0 seconds, up to 1000000000"),
        ({"read_timeout_s": float("inf")}, "inf is not a time over 0 seconds"),
        ({"read_timeout_s": float("nan")}, "nan is not a time over 0 seconds"),
        ({"read_timeout_s": -1}, "-1 is not a time over 0 seconds"),
    ],
)
def test_numbers_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ProblemReport, match=said):
        StorageOptions(**options)


def test_names_are_taken_as_they_are() -> None:
    assert (
        StorageOptions(region="eu-central-1", profile="team@work", endpoint="https://host:9000").profile == "team@work"
    )
