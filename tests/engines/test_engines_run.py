"""One merge in each engine, in the environment that `make engines` makes: its row in rows.csv is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raymoe.engines import judge
from tests.engines.cases import CASES, Case, make_merge
from tests.pico import REPOSITORY, load_dense, logits_of, token_ids

pytestmark = [pytest.mark.soak, pytest.mark.engines]

ENVIRONMENTS = Path(os.environ.get("VENV") or sys.prefix)


@pytest.mark.parametrize("engine", ["vllm", "mlx"])
def test_a_merge_runs_as_its_row_says(engine: str, tmp_path: Path) -> None:
    python = ENVIRONMENTS / f"engine-{engine}/bin/python"
    if not python.is_file():
        pytest.skip(f"{python} is not there: `make engines` makes it")
    case: Case = next(each for each in CASES if each.architecture == "mixtral" and each.features == ("renormalize",))
    assert judge(engine, case.architecture, case.features).status == "same"
    make_merge(case, tmp_path)
    merged, ids = tmp_path / "merged", token_ids(24)
    job = {"name": str(case), "folder": str(merged), "tokens": ids[0].tolist(), "dtype": "float32", "options": {}}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    command = [python, REPOSITORY / "scripts/engine_program.py", engine, tmp_path / "jobs.json"]
    subprocess.run(command, check=True, timeout=600, cwd=tmp_path)
    assert (merged / f"{engine}.npy").is_file(), (merged / f"{engine}.error").read_text()
    logits = logits_of(load_dense(merged), ids)[0].numpy()
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    assert np.abs(np.load(merged / f"{engine}.npy") - expected).max() < 2e-3
