"""The model card: metadata that the Hub takes, and that state nothing the sources do not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import raymoe
from raymoe.config import ExpertConfig, make_config
from raymoe.gate_modes.layer_values import LayerScores
from raymoe.object_store.options import StorageOptions
from raymoe.report.merge_description import MergeDescription
from raymoe.report.model_card import _config_section, _expert_row, _license_text, model_card, without_local_paths
from raymoe.report.source_metadata import License, source_cards
from raymoe.routers.heldout_report import RouterSummary
from raymoe.sources.hub import HubOptions
from tests.pico import REPOSITORY, copy_model, merge_config, save_lora
from tests.sources.hub_server import HubServer

APACHE = "---\nlicense: apache-2.0\nlanguage: en\n---\n\n# A model\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as server:
        yield server


@pytest.fixture
def models(zoo: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """models(name, readme, **files) is a copy of a pico model with these texts beside it."""

    def model(name: str, readme: str | None = APACHE, **files: str) -> Path:
        folder = copy_model(zoo("llama", seed=len(name)), tmp_path / name)
        for file, text in {"README.md": readme, **files}.items():
            if text is not None:
                (folder / file.replace("_txt", ".txt")).write_text(text)
        return folder

    return model


def card_of(config: dict[str, Any], hub: HubOptions, summary: RouterSummary | None = None) -> ModelCard:
    """The card of a config's merge, as the Hub's library reads it."""
    plan = raymoe.plan(config, hub=hub, allow_all_same=True)
    checked = make_config(config, allow_all_same=True)
    text = model_card(plan, checked, summary, source_cards(plan, hub, StorageOptions()))
    card = ModelCard(text)
    assert card.content == text  # its metadata survive being read and written
    return card


def local(*folders: Path, **options: Any) -> dict[str, Any]:
    return merge_config(folders[0], folders[1:], mode="cheap_embed", **options)


def test_models_of_the_hub(hub: HubServer, models: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("base", "law", "code"):
        hub.add(f"org/{name}", models(name))
    adapter = save_lora(tmp_path / "poems", tmp_path / "base", ("gate_proj",))
    (adapter / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\nbase_model: org/elder\n---\n")
    hub.add("org/poems", adapter)
    experts = ["org/law", "org/code@main", "org/base+org/poems"]
    config = merge_config(Path("org/base"), experts, mode="cheap_embed")
    options = HubOptions(cache_dir=str(tmp_path / "cache"), endpoint=hub.url)
    card = card_of(config, options)
    assert card.data.to_dict() == {
        "base_model": ["org/base", "org/law", "org/code", "org/poems"],
        "base_model_relation": "merge",
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "moe", "frankenmoe", "raymoe", "mixtral"],
    }
    assert "## License" not in card.text
    assert "`org/base+org/poems`" in card.text


def test_local_models_and_what_they_were_made_from(models: Callable[..., Path]) -> None:
    made = "---\nbase_model: {}\nlicense: mit\n---\n"
    folders = [
        models("base", made.format("meta/llama")),
        models("law", made.format("[meta/llama, org/other]")),
        models("code", made.format("./somewhere/model")),
        models("poem", made.format("model-without-owner")),
    ]
    data = card_of(local(*folders), HubOptions()).data.to_dict()
    assert data["base_model"] == ["meta/llama", "org/other"]
    assert data["license"] == "mit" and "language" not in data


@pytest.mark.parametrize(
    ("readme", "said"),
    [
        ("---\nlicense: llama3\n---\n", "llama3"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "nothing that could be read"),
        ("---\nlicense: other\nlicense_name: custom\nlicense_link: LICENSE\n---\n", "`custom` (other)"),
        ("---\nlicense: other\n---\n", "nothing that could be read"),
        ("---\nlicense: The Apache Licence\nlanguage: English\n---\n", "nothing that could be read"),
        ("---\n: [broken\n---\n", "nothing that could be read"),
        ("---\n- a list\n---\n", "nothing that could be read"),
        ("---\nlicense: mit\nmodel-index: [{results: [{source: https://x}]}]\n---\n", "mit"),
        ("---\nlicense: mit\nx: " + "[" * 3000 + "]" * 3000 + "\n---\n", "nothing that could be read"),
        ("---\r\nlicense: mit\r\nself: 1\r\n3: 4\r\n---\r\n", "mit"),
        ("---\nlicense: mit\nmade: 2024-13-45\n---\n", "mit"),
        ("# No metadata\n\nlicense: mit\n", "nothing that could be read"),
        (None, "nothing that could be read"),
    ],
)
def test_no_licence_where_they_do_not_agree(models: Callable[..., Path], readme: str | None, said: str) -> None:
    card = card_of(local(models("base"), models("law"), models("other", readme)), HubOptions())
    assert not {"license", "license_name", "license_link", "language"} & card.data.to_dict().keys()
    assert "The source models do not all state the same license" in card.text
    assert "- `law`: apache-2.0" in card.text and f"- `other`: {said}" in card.text


def test_one_licence_of_their_own(models: Callable[..., Path]) -> None:
    readme = "---\nlicense: other\nlicense_name: llama9\nlicense_link: https://example.org/licence\n---\n"
    data = card_of(local(models("base", readme), models("law", readme), models("code", readme)), HubOptions()).data
    assert (data.license, data.license_name, data.license_link) == ("other", "llama9", "https://example.org/licence")


def test_licence_files_of_well_known_text(models: Callable[..., Path]) -> None:
    apache = (REPOSITORY / "LICENSE").read_text()
    folders = [models("base"), models("law", None, LICENSE=apache), models("code", "# Bare\n", LICENSE_txt=apache)]
    assert card_of(local(*folders), HubOptions()).data.license == "apache-2.0"
    (folders[1] / "LICENSE").write_text(apache.replace("Version 2.0, January 2004", "Version 2.1"))
    assert card_of(local(*folders), HubOptions()).data.license is None
    # What a card states counts, whatever lies beside it.
    (folders[1] / "LICENSE").write_text(apache)
    (folders[1] / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert card_of(local(*folders), HubOptions()).data.license is None


def test_a_hub_that_is_gone_after_the_plan(hub: HubServer, models: Callable[..., Path], tmp_path: Path) -> None:
    """What can't be read is not stated; a merge does not fail for its card."""
    hub.add("org/base", models("base"))
    config = merge_config(Path("org/base"), ["org/base", "org/base"], mode="random")
    options = HubOptions(cache_dir=str(tmp_path / "cache"), endpoint=hub.url)
    plan = raymoe.plan(config, hub=options, allow_all_same=True)
    hub.repos.clear()
    sources = source_cards(plan, options, StorageOptions())
    assert [(source.label, source.hub_id, source.license) for source in sources] == [("org/base", "org/base", None)]
    checked = make_config(config, allow_all_same=True)
    data = ModelCard(model_card(plan, checked, None, sources)).data
    assert data.base_model == ["org/base"] and data.license is None


def test_prompts_that_look_like_markdown(models: Callable[..., Path]) -> None:
    config = local(models("base"), models("law"), models("code"))
    config["experts"][0]["positive_prompts"] = ["a | b\n`c` ``d``", "```\n# no heading\n```", "x" * 500]
    card = card_of(config, HubOptions())
    rows = [line for line in card.text.splitlines() if line.startswith("| 0")]
    assert len(rows) == 1 and len(rows[0]) < 400
    assert "``` a \\| b `c` ``d`` ```" in rows[0]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 5  # four cells
    block = re.search(r"^(`{4,})yaml\n(.*?)^\1$", card.text, re.DOTALL | re.MULTILINE)
    assert block is not None
    assert yaml.safe_load(block[2])["experts"][0]["positive_prompts"] == config["experts"][0]["positive_prompts"]


def test_the_config_in_the_card_is_the_one_that_was_merged(models: Callable[..., Path]) -> None:
    """False, 0 and null are said where they are not the default; how a store is reached is nobody else's business."""
    config = local(models("base"), models("law"), models("code")) | {"chat_template": True}
    config["experts"][0] |= {"chat_template": False, "residual_scale": 0, "noise_scale": 0}
    config["experts"][1]["positive_prompts"] = {"file": "prompts.jsonl", "limit": None}
    config["storage"] = {"endpoint": "http://minio.internal:9000", "profile": "admin"}
    checked = make_config(config)
    text = "\n".join(_config_section(checked, None))
    assert "minio.internal" not in text and "storage" not in text
    said = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert make_config(said) == checked.model_copy(update={"storage": StorageOptions()})
    assert said.keys() == {"base_model", "experts", "gate_mode", "experts_per_token", "chat_template"}
    assert "dtype: null" not in text and "negative_prompts" not in text


def test_routing_figures(models: Callable[..., Path]) -> None:
    config = local(models("base"), models("law"), models("code"))
    layers = {
        0: LayerScores(accuracy_by_expert=(0.5, 0.7), load=(0.4, 0.6)),
        1: LayerScores(accuracy_by_expert=(0.9, 0.9), load=(0.5, 0.5)),
    }
    text = card_of(config, HubOptions(), RouterSummary(experts=2, layers=layers)).text
    assert [line.split(" | ")[-2:] for line in text.splitlines() if re.match(r"\| [01] ", line)] == [
        ["70%", "45% |"],
        ["80%", "55% |"],
    ]
    assert "75% of tokens are routed to their expert first (chance: 50%); in the weakest layer (0), 60%" in text
    assert "find it" not in card_of(config, HubOptions()).text


def test_how_to_load_it(zoo: Callable[..., Path]) -> None:
    config = merge_config(zoo("qwen3"), [zoo("qwen3", seed=1), zoo("qwen3", seed=2)], mode="random")
    text = card_of(config, HubOptions()).text
    assert 'from_pretrained("<this folder>", dtype="auto")' in text
    assert "With transformers 4.57 or later:" in text
    assert 'vllm serve "<this folder>"' in text and "raymoe gguf FOLDER model.gguf --type q8_0" in text
    assert "model.generate(**prompt, max_new_tokens=40)" in text
    assert "made from a seed: gate mode `random`" in text
    assert json.dumps(None) not in text
    config = merge_config(zoo("llama"), [zoo("llama", seed=1), zoo("llama", seed=2)], mode="random")
    deepseek = card_of(config | {"architecture": "deepseek"}, HubOptions()).text
    assert "trust_remote_code=True" in deepseek and "deepseek-ai/deepseek-moe-16b-base" in deepseek
    config = merge_config(
        zoo("qwen2"), [zoo("qwen2", seed=n) for n in (1, 2, 3)], mode="random", shared=zoo("qwen2", seed=1)
    )
    assert "raymoe gguf" not in card_of(config, HubOptions()).text
    assert "raymoe gguf" in card_of(config | {"experts_per_token": 3}, HubOptions()).text
    config = merge_config(zoo("cohere2"), [zoo("cohere2"), zoo("cohere2", seed=1)], mode="random")
    assert "raymoe gguf" in card_of(config, HubOptions()).text
    config = merge_config(
        zoo("cohere2"), [zoo("cohere2"), zoo("cohere2", seed=1)], mode="random", shared=zoo("cohere2")
    )
    assert "raymoe gguf" not in card_of(config, HubOptions()).text


_HOSTILE = "x\n\n# Heading\n\n<script>alert(1)</script> [click](https://evil.example) |\n\n```\nfence \u202e\x1b[31m"


def test_text_of_others_is_no_markdown(models: Callable[..., Path], tmp_path: Path) -> None:
    """Licences, names of folders, prompts and the config of a card: all of it in code spans or in a fenced block."""
    title = json.dumps(_HOSTILE)
    said = f'---\nlicense: other\nlicense_name: {title}\nlicense_link: "https://evil.example/`)\\n- item"\n---\n'
    hostile = "e`<img src=x onerror=alert(1)>`|\\| [a](https://evil.example)"
    folders = [models("base"), models("e1", said), models(hostile)]
    config = merge_config(folders[0], folders[1:], mode="cheap_embed")
    config["experts"][0]["positive_prompts"] = [_HOSTILE, "a \\|", "`"]
    card = str(card_of(config, HubOptions()))
    body, _, made = card.partition("---\n\n#")[2].partition("## How it was made")
    # What Markdown does not touch: code spans, whose fences are as long as no run of backticks in them.
    left = re.sub(r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)", "", re.sub(r"```python.*?```", "", body, flags=re.DOTALL))
    for part in ("Heading", "<script>", "<img", "](", "evil", "\x1b", "\u202e"):
        assert part not in left
    assert "\u202e" not in card and "\x1b" not in card
    assert "evil.example/`" not in card
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    # A cell ends at a '|' that no odd number of backslashes is before.
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {len(re.findall(r"\|", rows[0]))}
    fence, _, rest = made.partition("yaml\n")
    shown = yaml.safe_load(rest.partition(fence.strip().splitlines()[-1])[0])
    assert shown["experts"][0]["positive_prompts"] == config["experts"][0]["positive_prompts"]


def test_an_empty_prompt_opens_no_code_span() -> None:
    expert = ExpertConfig(source_model="org/model")
    for empty in ("", " \n"):
        row = _expert_row("0", expert, [empty, "`` <img src=x>"])
        assert row == "| 0 | `org/model` | 2 | -<br>``` `` <img src=x> ``` |"


def test_licences_that_are_addresses() -> None:
    assert _license_text(License(name="www.evil.com")) == "`www.evil.com`"
    assert _license_text(License(name="other", title="www.evil.com")) == "`www.evil.com` (other)"
    assert _license_text(License(name="apache-2.0")) == "apache-2.0"


def test_licences_that_are_only_names(models: Callable[..., Path]) -> None:
    said = "---\nlicense: other\nlicense_name: my-licence\nlicense_link: https://example.org/l?v=1#top\n---\n"
    folders = [models(name, said) for name in ("base", "a", "bc")]
    card = card_of(local(*folders), HubOptions())
    assert card.data.license_name == "my-licence" and card.data.license_link == "https://example.org/l?v=1#top"


def test_titles_name_the_experts(models: Callable[..., Path]) -> None:
    base = models("base")

    def title(*names: str) -> str:
        config = merge_config(base, [models(name) for name in names], mode="random")
        return next(line for line in card_of(config, HubOptions()).text.splitlines() if line.startswith("# "))

    assert title("law", "code") == "# Mixtral mixture of `law` and `code`"
    assert (
        title("a", "ab", "abc", "abcd", "abcde", "abcdef") == "# Mixtral mixture of `a`, `ab`, `abc`, `abcd` and 2 more"
    )


def test_experts_that_are_all_the_same_give_the_title_no_names(models: Callable[..., Path]) -> None:
    law = models("law")
    config = local(models("base"), law, law)
    assert "\n# Mixtral mixture of 2 experts\n" in card_of(config, HubOptions()).text


def test_no_paths_of_this_machine(models: Callable[..., Path], tmp_path: Path) -> None:
    """Names are told apart, and what is on the Hub or in a bucket is named as it is."""
    base, law = models("base"), models("law")
    for folder in ("one", "two"):
        copy_model(law, tmp_path / folder / "same")
    config = local(base, tmp_path / "one/same", tmp_path / "two/same")
    adapter = save_lora(tmp_path / "poems", base, ("gate_proj",))
    config["experts"].append({"source_model": f"{base}+{adapter}"})
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    config["experts"][0]["positive_prompts"] = {"file": str(tmp_path / "prompts.txt")}
    config["experts"][2]["positive_prompts"] = ["a poem"]
    text = card_of(config, HubOptions()).text
    assert str(tmp_path) not in text and tmp_path.name not in text
    said = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert said["base_model"] == "base"
    assert [expert["source_model"] for expert in said["experts"]] == ["same", "same-2", "base+poems"]
    assert said["experts"][0]["positive_prompts"]["file"] == "prompts.txt"
    experts = [{"source_model": "s3://b/e"}, {"source_model": "./x"}]
    named = make_config({"base_model": "org/base@main", "experts": experts, "gate_mode": "random"})
    public = without_local_paths(named)
    assert [str(ref) for ref in public.models] == ["org/base@main", "s3://b/e", "x"]


@pytest.mark.parametrize("form", ["jinja", "json", None])
def test_the_snippet_uses_the_chat_template(models: Callable[..., Path], form: str | None) -> None:
    base = models("base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    if form == "jinja":
        (base / "chat_template.jinja").write_text(template)
    (base / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"chat_template": template} if form == "json" else {}))
    )
    config = make_config(local(base, models("law"), models("code")))
    card = MergeDescription(plan=raymoe.plan(config), config=config, hub=HubOptions()).card(None)
    assert card is not None and "model.generate(**prompt" in card
    assert ("tokenizer.apply_chat_template(" in card) == (form is not None)
    assert ("Once upon a time" in card) == (form is None)
