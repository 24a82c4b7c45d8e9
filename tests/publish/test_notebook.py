"""notebooks/merge_and_publish.ipynb, its cells run in this process with models of a megabyte, and published on the
stand-in.

`make soak` runs it as it is: in a kernel, on Ray, with the example experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.pico import REPOSITORY, merge_config
from tests.publish.hub import WritableHub

NOTEBOOK = REPOSITORY / "notebooks/merge_and_publish.ipynb"
KINDS = ("go", "metamath", "spanish", "dictionary")


def notebook_for(out: Path, config: dict[str, Any] | None = None) -> Any:
    """The notebook with parameters of a short run, and with other models than its own if a config is given."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", ())}
    cells["parameters"].source = (
        f"OUT, REPO, PUBLISH = {str(out)!r}, 'org/four', True\n"
        "PROMPTS, TEXTS, TOKENS, AGAINST, NEW_TOKENS = 2, 1, 16, ('oracle',), 4\n"
    )
    if config is not None:
        cells["config"].source = f"CONFIG = {config!r}"
    return notebook


def check_published(hub: WritableHub, text: str, shown: list[str], out: Path) -> None:
    """`text`: what the notebook prints; `shown`: the types of what it shows."""
    assert "routers on held-out prompts" in text and "lighthouse (a kind of tower):" in text
    assert f"pushed: {hub.url}/org/four/commit/" in text
    assert "text/html" in shown and "text/markdown" in shown
    assert hub.written["org/four"].private
    files = hub.files("org/four")
    assert json.loads(files["raymoe.json"])["config"]["gate_mode"] == "ridge"
    shards = list(out.glob("*.safetensors"))
    assert shards and all(files[path.name] == path.read_bytes() for path in shards)


@pytest.mark.engines
def test_the_notebook(
    hub: WritableHub,
    zoo: Callable[..., Path],
    without_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    for seed, kind in enumerate(KINDS, 1):  # experts are told from each other by their names
        (tmp_path / kind).symlink_to(zoo("llama", seed=seed))
    config = merge_config(zoo("llama"), [tmp_path / kind for kind in KINDS], mode="ridge", experts_per_token=2)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(NOTEBOOK.parent)
    InteractiveShell.clear_instance()
    shell, text, shown = InteractiveShell.instance(), "", list[str]()
    try:
        for cell in notebook_for(tmp_path / "out", config).cells:
            if cell.cell_type == "code":
                with capture_output() as captured:
                    done = shell.run_cell(cell.source)
                done.raise_error()
                text += captured.stdout
                shown += shell.display_formatter.format(done.result)[0] if done.result is not None else ()
    finally:
        InteractiveShell.clear_instance()
    check_published(hub, text, shown, tmp_path / "out")


@pytest.mark.soak
def test_the_notebook_as_it_is(
    hub: WritableHub, ray_env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("RAY_ADDRESS", ray_env["RAY_ADDRESS"])
    notebook = notebook_for(tmp_path / "out")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    check_published(hub, text, [mime for output in outputs for mime in output.get("data", {})], tmp_path / "out")


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
