"""What the helpers of these tests promise."""

from __future__ import annotations

import os

from tests.object_store.servers import environment


def test_what_was_there_comes_back() -> None:
    """Also where one environment is in another that sets the same variables, as a file's fixture and a test's do."""
    with environment({"AWS_REGION": "outer", "AWS_PROFILE": "outer"}):
        with environment({"AWS_REGION": "inner"}):
            assert (os.environ["AWS_REGION"], os.environ.get("AWS_PROFILE")) == ("inner", None)
        assert (os.environ["AWS_REGION"], os.environ.get("AWS_PROFILE")) == ("outer", "outer")
