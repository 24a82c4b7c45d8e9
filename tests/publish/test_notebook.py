"""notebooks/merge_and_publish.ipynb, run as it is with the example experts, and published on the stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.pico import REPOSITORY
from tests.publish.hub import WritableHub

NOTEBOOK = REPOSITORY / "notebooks/merge_and_publish.ipynb"


def test_the_notebook(
    hub: WritableHub, ray_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("RAY_ADDRESS", ray_env["RAY_ADDRESS"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = (
        f"OUT, REPO, PUBLISH = {str(tmp_path / 'out')!r}, 'org/four', True\n"
        "PROMPTS, TEXTS, TOKENS, AGAINST, NEW_TOKENS = 2, 1, 16, ('oracle',), 4\n"
    )
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    shown = [mime for output in outputs for mime in output.get("data", {})]
    assert "routers on held-out prompts" in text and "lighthouse (a kind of tower):" in text
    assert f"pushed: {hub.url}/org/four/commit/" in text
    assert "text/html" in shown and "text/markdown" in shown
    assert hub.written["org/four"].private
    files = hub.files("org/four")
    assert json.loads(files["raymoe.json"])["config"]["gate_mode"] == "ridge"
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert shards and all(files[path.name] == path.read_bytes() for path in shards)


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
