"""`raymoe archs`, docs/families.md, the tests' pairs and the tables of the code are of one mind."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers

from raymoe.architectures import FAMILIES, MOE_ARCHITECTURES
from raymoe.architectures.support_matrix import support_matrix, supported_pairs
from raymoe.architectures.unsupported_families import UNSUPPORTED
from raymoe.architectures.wrappers import MIXTURE_WRAPPERS, WRAPPERS
from raymoe.export.gguf.llama_cpp_archs import MIXTURES, NOT_CONVERTED
from raymoe.report.support_table import print_support_matrix
from tests.architectures.pairs import PAIRS
from tests.pico import REPOSITORY

PAGE = REPOSITORY / "docs/families.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "scripts"))  # as for a script that is run
    spec = importlib.util.spec_from_file_location("family_table", REPOSITORY / "scripts/family_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_names_exactly_the_pairs_of_the_code(script: ModuleType) -> None:
    page = PAGE.read_text()
    remedy = "run scripts/family_table.py"
    assert script.pairs_of_page(page) == [(pair.family, pair.host) for pair in supported_pairs()], remedy
    assert script.wrapped_of_page(page) == list(WRAPPERS), remedy
    assert script.refused_of_page(page) == [name for family in UNSUPPORTED for name in family.model_types], remedy
    assert page.split(script.MARK.format("engines"))[1].strip() == script.engines_table(), remedy


def test_every_pair_of_the_code_is_tested() -> None:
    assert {(pair.family, pair.host) for pair in PAIRS} == {(pair.family, pair.host) for pair in supported_pairs()}
    with_shared = {(pair.family, pair.host) for pair in PAIRS if pair.shared}
    assert {host for _, host in with_shared} == {host.name for host in MOE_ARCHITECTURES.values() if host.shared}


def test_a_family_is_held_or_refused_and_not_both() -> None:
    refused = [name for family in UNSUPPORTED for name in family.model_types]
    assert len(refused) == len(set(refused))
    assert not set(refused) & {*FAMILIES, *WRAPPERS}
    # These are refused by the number of experts in their config.json: test_refusals.py, test_gemma4.py.
    merges = {host.model_type for host in MOE_ARCHITECTURES.values()} - {"granitemoehybrid", "gemma4_text"}
    assert merges <= set(refused), "a merge is no source of experts"
    assert {host.dense_family for host in MOE_ARCHITECTURES.values()} <= FAMILIES.keys()
    assert all(set(host.accepts) <= FAMILIES.keys() for host in MOE_ARCHITECTURES.values())


def test_every_architecture_is_converted_to_gguf_or_has_a_reason() -> None:
    types = {host.model_type for host in MOE_ARCHITECTURES.values()}
    assert types | {mixture.text_type for mixture in MIXTURE_WRAPPERS.values()} == {*MIXTURES, *NOT_CONVERTED}


# Types that transformers has from 5.24 on, one version after the oldest that these tests run with.
SINCE_5_24 = {
    *(
        "apertus1p5",
        "apertus1p5_text",
        "dory",
        "exaone",
        "hy_v4_vl",
        "inkling2_loop",
        "inkling2_loop_text",
        "lara_mini",
    ),
    *("omniasr", "sarvam_mla", "sarvam_moe"),
}


def test_every_named_type_is_one_that_transformers_knows() -> None:
    refused = {name for family in UNSUPPORTED for name in family.model_types} - {"deepseek"}
    unknown = {*FAMILIES, *WRAPPERS, *refused} - set(transformers.CONFIG_MAPPING)
    assert unknown in (set(), SINCE_5_24)


def test_a_type_that_no_table_knows_is_listed() -> None:
    """`make lint` runs the script on the installed transformers."""
    lists = runpy.run_path(str(REPOSITORY / "scripts/list_model_types.py"))
    of_transformers = lists["model_types"](lists["auto_classes"]())
    assert {"llama", "gpt2", "qwen3_5", "blip-2", "qwen2_audio"} <= of_transformers.keys()
    assert [name for name in of_transformers if not lists["what_raymoe_says"](name)] == []
    assert lists["what_raymoe_says"]("llama") == lists["what_raymoe_says"]("llava") == "merged"
    assert lists["what_raymoe_says"]("a_type_of_tomorrow") == ""
    with pytest.raises(SystemExit, match="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
        lists["model_types"]("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {}")


def _names_of_rows(page: Path, heading: str) -> set[str]:
    """What the first cells of the table below a heading list, as `_plain` writes it."""
    table = page.read_text(encoding="utf-8").partition(f"\n## {heading}")[2].partition("\n|---")[2].partition("\n\n")[0]
    first_cells = (line.strip("|").split("|")[0] for line in table.splitlines()[1:])
    return {_plain(item) for cell in first_cells for item in cell.split(", ")}


def _plain(name: str) -> str:
    """Without spaces, hyphens and what is in brackets: Qwen2-MoE is the Qwen2Moe of transformers."""
    return re.sub(r"\(.*?\)|\W|_", "", name.removesuffix("ForCausalLM")).lower()


@pytest.mark.parametrize(("page", "heading"), [("gguf", "What it is written as")])
def test_tables_written_by_hand_have_a_row_for_every_architecture(page: str, heading: str) -> None:
    """docs/gguf.md says what is refused, too."""
    found = _names_of_rows(REPOSITORY / f"docs/{page}.md", heading)
    assert [h.title for h in MOE_ARCHITECTURES.values() if not {_plain(h.title), _plain(h.class_name)} & found] == []


def test_every_pair_was_loaded_with_several_transformers() -> None:
    """The table of scripts/check_loading.py."""
    table = PAGE.read_text(encoding="utf-8").split("<!-- table: scripts/check_loading.py -->")[1]
    rows = set(re.findall(r"^\| (\w+) in (\w+) \|", table, flags=re.MULTILINE))
    expected = {(p.family, p.host) for p in PAIRS if not MOE_ARCHITECTURES[p.host].code_repository}
    assert rows == expected, "run scripts/check_loading.py --page"


def test_the_table_is_of_measured_rows(script: ModuleType, tmp_path: Path) -> None:
    measured = {str(pair): script.Measured() for pair in PAIRS}
    for found in measured.values():
        found.add(script.COPIES, 2e-6)
        found.add(script.COPIES, 1e-6)
        found.add(script.FORCED, 3e-6)
    mark = script.MARK.format("exact")
    (tmp_path / "page.md").write_text(f"a\n{mark}{mark}\nb")
    script.put_between(tmp_path / "page.md", mark, script.exact_table(measured))
    page = (tmp_path / "page.md").read_text()
    assert script.pairs_of_page(page) == script.pairs_of_code()
    row = next(cells for cells in script.rows_of(page, "exact") if cells[1] == "`granite`")
    assert row[5:7] == ["2 tests, 2.0e-06", "1 test, 3.0e-06"]
    with pytest.raises(SystemExit, match="no test of"):
        script.exact_table({name: found for name, found in measured.items() if "phi3" not in name})


def test_archs_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_support_matrix(as_json=False)
    text = capsys.readouterr().out
    for pair in supported_pairs():
        assert pair.family_title in text and pair.host in text
    for family in UNSUPPORTED:
        assert family.title in text and family.reason in text
    assert all(host.note in text for host in MOE_ARCHITECTURES.values())
    assert text.count(MOE_ARCHITECTURES["glm4_moe"].note) == 1
    print_support_matrix(as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(support_matrix()))


@pytest.mark.processes
def test_archs_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from raymoe.cli import app\n"
        "result = CliRunner().invoke(app, ['archs', '--json'])\n"
        "assert result.exit_code == 0, result.output\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
