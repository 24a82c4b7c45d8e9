"""How much memory can still be taken: the machine's, as far as the control group allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymoe import compute


def test_a_control_group_with_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached pages that nothing uses can be given up: they count as free."""
    monkeypatch.setattr(compute, "_CONTROL_GROUP", str(tmp_path))
    whole = compute.available_bytes("cpu")
    assert whole > 1_000_000
    for name, content in (
        ("memory.max", "1000"),
        ("memory.current", "900"),
        ("memory.stat", "file 9\ninactive_file 50"),
    ):
        (tmp_path / name).write_text(f"{content}\n")
    assert compute.available_bytes("cpu") == 150
    (tmp_path / "memory.current").write_text("2000\n")
    assert compute.available_bytes("cpu") == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert compute.available_bytes("cpu") > 1_000_000
