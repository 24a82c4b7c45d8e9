"""README.md of a merged model: its sources, its routers' accuracy, how to load it, and the Hub's metadata.

Metadata that are not known are left out: `base_model` lists models of the Hub, `license` and `language` are set if all
sources state the same. Local paths are not in the card: only the name of a folder or file is. The same merge gives the
same card.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import yaml

from raymoe._version import __version__
from raymoe.architectures import MOE_ARCHITECTURES, MoeArchitecture, MoeShape
from raymoe.checkpoints.edit_record import Edit
from raymoe.config import ExpertConfig, MergeConfig, PromptFile
from raymoe.config.model_refs import ModelRef, PathRef, expert_suffix, is_local_folder, short_name
from raymoe.engines import ENGINES, OTHERWISE, SAME
from raymoe.engines.table import RUN
from raymoe.formatting import human_count
from raymoe.planning.owner import Owner
from raymoe.planning.plan import MergePlan
from raymoe.report.backbone_lines import backbone_source, unused_lines
from raymoe.report.engine_lines import engine_lines
from raymoe.report.source_metadata import License, SourceCard, common_value
from raymoe.report.start_lines import start_lines
from raymoe.routers.heldout_report import RouterSummary
from raymoe.safe_text import has_unprintable, printable, shorten
from raymoe.sources.hub import is_hub_id

PATH_PLACEHOLDER = "<this folder>"
"""The model's name in the card before it has a name on the Hub."""

# Keys of the config that the card shows even with their default values.
_ALWAYS_SHOWN = ("gate_mode", "experts_per_token")
_EXAMPLES = 2
# Stands for an empty text.
_EMPTY_CELL = "-"
_EXAMPLE_CHARACTERS = 60
_TITLE_NAMES = 4
_TITLE_CHARACTERS = 40


def model_card(
    plan: MergePlan,
    config: MergeConfig,
    summary: RouterSummary | None = None,
    sources: Sequence[SourceCard] = (),
    *,
    has_chat_template: bool = False,
    edit: Edit | None = None,
) -> str:
    """A model card in Hub form. `summary` has the routers' scores on held-out prompts, `sources` the models' metadata.
    With a chat template, the card shows how to use it. `edit`: the merge is an edit of a mixture."""
    architecture = MOE_ARCHITECTURES[plan.architecture]
    config = without_local_paths(config)
    sections = (
        _title_section(plan, config, architecture),
        _experts_section(plan, config, summary),
        _routers_section(config, summary, edit),
        _loading_section(architecture, config, plan, has_chat_template=has_chat_template),
        _license_section(sources),
        _config_section(config, edit),
    )
    lines = [line for section in sections for line in section]
    return f"---\n{card_metadata(plan, sources)}\n---\n\n" + "\n".join(lines) + "\n"


def card_metadata(plan: MergePlan, sources: Sequence[SourceCard]) -> str:
    """The card's front matter, YAML."""
    from huggingface_hub import ModelCardData

    # Models of the Hub are listed by name. A local folder is replaced by the models that it was made from.
    bases = [name for source in sources for name in ((source.hub_id,) if source.hub_id else source.bases)]
    license: License | None = common_value([source.license for source in sources])
    languages: tuple[str, ...] | None = common_value([source.languages for source in sources])
    data = ModelCardData(
        base_model=list(dict.fromkeys(bases)) or None,
        language=list(languages) if languages else None,
        library_name="transformers",
        license=license.name if license else None,
        license_name=license.title if license else None,
        license_link=license.link if license else None,
        pipeline_tag="image-text-to-text" if plan.reads_images else "text-generation",
        tags=list(dict.fromkeys(["merge", "moe", "frankenmoe", "raymoe", plan.architecture])),
        **({"base_model_relation": "merge"} if bases else {}),
    )
    text: str = data.to_yaml()
    return text


def _title_section(plan: MergePlan, config: MergeConfig, architecture: MoeArchitecture) -> Iterator[str]:
    yield f"# {_title(config, architecture)}"
    yield ""
    yield (
        f"{human_count(plan.totals.parameters)} parameters, {human_count(plan.totals.active_parameters)} active "
        f"for a token ({config.experts_per_token * plan.granularity} of {plan.experts} experts). "
        f"{backbone_source(plan, code_span(str(config.base_model)))}; each expert contributes its feed-forward "
        "weights. Nothing was trained."
    )
    yield from start_lines(plan)
    yield ""


def _title(config: MergeConfig, architecture: MoeArchitecture) -> str:
    """The title, with the names of experts if they differ."""
    refs = [expert.source_model for expert in config.experts]
    names = list(dict.fromkeys(map(_short_name, refs)))
    if len(names) < 2:
        return f"{architecture.title} mixture of {len(refs)} experts"
    shown = [code_span(shorten(name, _TITLE_CHARACTERS)) for name in names[:_TITLE_NAMES]]
    last = f"{len(names) - _TITLE_NAMES} more" if len(names) > _TITLE_NAMES else shown.pop()
    return f"{architecture.title} mixture of {', '.join(shown)} and {last}"


def _short_name(ref: ModelRef) -> str:
    model = f"{ref.model.path}{expert_suffix(ref.expert)}"
    return short_name(model, ref.adapter.path if ref.adapter else None)


def _experts_section(plan: MergePlan, config: MergeConfig, summary: RouterSummary | None) -> Iterator[str]:
    """One row per expert; with a summary, also how its prompts are routed."""
    yield "## Experts"
    yield ""
    measured = [" own tokens |", " share of tokens |"] if summary else []
    yield "| expert | model | prompts | for example |" + "".join(measured)
    yield "|---|---|---:|---|" + "---:|" * len(measured)
    prompts = {member.owner: member.positive for member in plan.gates.members}
    for number, expert in enumerate(config.experts):
        row = _expert_row(str(number), expert, prompts.get(Owner.expert(number), ()))
        if summary:
            layers = summary.layers.values()
            right = sum(layer.accuracy_by_expert[number] for layer in layers) / len(layers)
            load = sum(layer.load[number] for layer in layers) / len(layers)
            row += f" {right:.0%} | {load:.0%} |"
        yield row
    for number, expert in enumerate(config.shared_experts):
        owner = Owner.shared(number)
        row = _expert_row(str(owner), expert, prompts.get(owner, ()))
        yield row + " - |" * len(measured)
    yield ""
    for line in (*plan.backbone.notes, *unused_lines(plan.backbone)):
        yield f"- {line[0].upper()}{line[1:]}"
    if plan.backbone.notes or plan.backbone.unused:
        yield ""


def _expert_row(name: str, expert: ExpertConfig, prompts: Sequence[str]) -> str:
    examples = "<br>".join(_code(prompt) for prompt in prompts[:_EXAMPLES])
    return f"| {name} | {code_span(str(expert.source_model))} | {len(prompts) or '-'} | {examples} |"


def _code(text: str) -> str:
    """The beginning of a text as a code span that is safe in a table."""
    line = " ".join(text.split())
    if len(line) > _EXAMPLE_CHARACTERS:
        line = line[:_EXAMPLE_CHARACTERS].rstrip() + " ..."
    return _span(line)


def code_span(text: str) -> str:
    """A whole name as a code span that is safe in a table."""
    return _span(" ".join(text.split()))


def _span(line: str) -> str:
    """An untrusted line as a code span: nothing in it works as Markdown, HTML or the end of a table's cell."""
    if not line:  # two backticks would begin a code span that later text can end
        return _EMPTY_CELL
    # A backslash before '|' would escape the backslash that escapes it.
    line = re.sub(r"\\(?=\|)", r"\\ ", printable(line)).replace("|", "\\|")
    fence = _fence(line, 1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _fence(text: str, at_least: int) -> str:
    """Backticks, one more than the longest run of them in a text."""
    runs = re.findall("`+", text)
    return "`" * max(at_least, 1 + max(map(len, runs), default=0))


def _routers_section(config: MergeConfig, summary: RouterSummary | None, edit: Edit | None) -> Iterator[str]:
    yield "## Routing"
    yield ""
    origin = "prompts" if config.needs_prompts else "a seed"
    if config.keeps_all_rows:
        yield "The router rows are those that the experts had in the mixture that they are from."
    elif config.keep_routers is not None:
        yield (
            "Experts of the mixture that was edited keep their router rows. The others' were made from "
            f"{origin} (gate mode `{config.gate_mode}`), in the scale of those."
        )
    else:
        yield f"The routers were made from {origin}: gate mode `{config.gate_mode}`."
    if summary:
        chance = 1 / summary.experts
        weakest = min(summary.layers, key=lambda number: summary.layers[number].accuracy)
        yield (
            "The table's last columns come from held-out prompts: the share of an expert's own prompt tokens that are "
            "routed to it first, and the share of all experts' tokens, averaged over layers. "
            f"In all, {summary.accuracy:.0%} of tokens are routed to their expert first (chance: {chance:.0%}); in the "
            f"weakest layer ({weakest}), {summary.layers[weakest].accuracy:.0%}."
        )
    yield ""


def _loading_section(
    architecture: MoeArchitecture, config: MergeConfig, plan: MergePlan, *, has_chat_template: bool
) -> Iterator[str]:
    since = architecture.min_transformers_for(plan.text_config.get("layer_types"))
    yield "## Use it"
    yield ""
    trust = "" if since else ", trust_remote_code=True"
    yield f"With transformers {since} or later:" if since else "With transformers, and the model's own code:"
    yield ""
    yield "```python"
    auto_class = "AutoModelForImageTextToText" if plan.reads_images else "AutoModelForCausalLM"
    yield f"from transformers import {auto_class}, AutoTokenizer"
    yield ""
    yield f'model = {auto_class}.from_pretrained("{PATH_PLACEHOLDER}", dtype="auto"{trust})'
    yield f'tokenizer = AutoTokenizer.from_pretrained("{PATH_PLACEHOLDER}")'
    if has_chat_template:
        yield 'messages = [{"role": "user", "content": "What can you do?"}]'
        yield "prompt = tokenizer.apply_chat_template("
        yield '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        yield ")"
    else:
        yield 'prompt = tokenizer("Once upon a time", return_tensors="pt")'
    yield "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))"
    yield "```"
    yield ""
    if plan.reads_images:
        yield "It reads images too: its vision encoder is that of the base, unchanged."
        yield ""
    if architecture.code_repository:
        yield (
            f"Its code is that of {architecture.code_repository} on the Hub, written for transformers 4; it is "
            "downloaded and run."
        )
        yield ""
    yield from _engine_lines(plan)
    shape = MoeShape(
        experts=plan.experts,
        experts_per_token=config.experts_per_token * plan.granularity,
        shared=len(config.shared_experts or ()),
    )
    if architecture.runs_in_llama_cpp(shape):
        yield "For llama.cpp, if it can hold this model: download it, and convert its folder with raymoe:"
        yield "`raymoe gguf FOLDER model.gguf --type q8_0`"
        yield ""


def _engine_lines(plan: MergePlan) -> Iterator[str]:
    """The engines that compute the model as transformers does, with their commands, and those that do not."""
    lines = list(engine_lines(plan))
    for line in lines:
        if line.verdict == SAME and line.found == RUN:
            remark = f" {line.reason[0].upper()}{line.reason[1:]}." if line.reason else ""
            for command in line.commands if ENGINES[line.engine].reads_checkpoints else ():
                text = f"{command.format(model=PATH_PLACEHOLDER)} {line.remedy}".strip()
                yield f"With {line.title} (compared with {line.version}): `{text}`{remark}"
                yield ""
    if wrong := [f"{line.title} {line.version} ({line.reason})" for line in lines if line.verdict == OTHERWISE]:
        yield f"These load it and compute something else: {', '.join(wrong)}."
        yield ""


def _license_section(sources: Sequence[SourceCard]) -> Iterator[str]:
    """The license of each source, if they differ and the metadata can't state one."""
    if not sources or common_value([source.license for source in sources]):
        return
    yield "## License"
    yield ""
    yield "The source models do not all state the same license. They state:"
    yield ""
    for source in sources:
        yield f"- {code_span(source.label)}: {_license_text(source.license)}"
    yield ""


def _license_text(license: License | None) -> str:
    if license is None:
        return "nothing that could be read"
    # Names with a dot may be addresses, which GitHub and the Hub make links of; versions (`apache-2.0`) are not.
    name = code_span(license.name) if re.search(r"\.(?!\d)|\.\d+[a-z]", license.name) else license.name
    return f"{code_span(license.title)} ({name})" if license.title else name


def _public_config(config: MergeConfig) -> dict[str, Any]:
    """The config for others to merge with: without defaults, except those that readers look for, and without the
    endpoint and profile of object stores."""
    public = config.model_dump(mode="json", exclude_defaults=True, exclude={"storage"})
    return {key: public.get(key, value) for key, value in config.to_plain().items() if key in (*public, *_ALWAYS_SHOWN)}


def without_local_paths(config: MergeConfig) -> MergeConfig:
    """The config with names in place of local paths; two folders of the same name get numbers."""
    names: dict[str, str] = {}

    def name(path: str) -> str:
        full = os.path.abspath(os.path.expanduser(path))
        if full not in names:
            plain, taken = os.path.basename(full) or "model", set(names.values())
            numbered = (f"{plain}-{number}" if number > 1 else plain for number in count(1))
            names[full] = next(each for each in numbered if each not in taken)
        return names[full]

    def model(ref: ModelRef) -> ModelRef:
        paths = [replace(each, path=name(each.path)) if _is_local(each) else each for each in ref.paths]
        return replace(ref, model=paths[0], adapter=paths[1] if len(paths) > 1 else None)

    def prompts(value: Any) -> Any:
        is_file = isinstance(value, PromptFile) and value.location.kind.is_local
        return value.model_copy(update={"file": name(value.file)}) if is_file else value

    def expert(each: ExpertConfig) -> ExpertConfig:
        found = {key: prompts(getattr(each, key)) for key in ("positive_prompts", "negative_prompts")}
        return each.model_copy(update={"source_model": model(each.source_model), **found})

    return config.model_copy(
        update={
            "base_model": model(config.base_model),
            "experts": tuple(map(expert, config.experts)),
            "shared_experts": tuple(map(expert, config.shared_experts)),
        }
    )


def _is_local(ref: PathRef) -> bool:
    """Whether it is a folder of this machine or of a node, and not a URL or a possible id of the Hub."""
    return ref.location is None and (is_local_folder(ref.path) or not is_hub_id(ref.path))


def _config_section(config: MergeConfig, edit: Edit | None) -> Iterator[str]:
    plain = _public_config(config)
    yield "## How it was made"
    yield ""
    if edit is not None:
        mixture = edit.mixture if is_hub_id(edit.mixture.partition("@")[0]) else os.path.basename(edit.mixture)
        yield f"An edit of the mixture {code_span(mixture)}: {'; '.join(edit.lines())}."
        yield ""
    yield f"Merged with raymoe {__version__}; `raymoe.json` is the record of it. The config:"
    yield ""
    text = _yaml(plain)
    if has_unprintable(text):  # a reader would not see the actual config
        text = _yaml(plain, allow_unicode=False)
    fence = _fence(text, 3)
    yield f"{fence}yaml"
    yield text
    yield fence


def _yaml(plain: dict[str, Any], *, allow_unicode: bool = True) -> str:
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=allow_unicode, width=110)
    return text.rstrip()
