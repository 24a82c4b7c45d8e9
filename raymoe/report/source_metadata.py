"""What the models of a merge say of themselves: licence, languages, what they were made from. Nothing is guessed.

Read from the front matter of a model's README.md, be it in a folder, in a bucket or on the Hub (at the commit that was
merged); where it has none, from a LICENSE file whose text is a well-known one. What can't be read is not stated: a card
is no reason for a merge to fail.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from raymoe.config.model_refs import PathRef, is_local_folder, short_name
from raymoe.errors import CheckpointError
from raymoe.object_store.location import Location
from raymoe.object_store.options import StorageOptions
from raymoe.planning.plan import MergePlan
from raymoe.safe_text import printable
from raymoe.sources.bucket_folder import open_object_folder
from raymoe.sources.folder_protocol import Folder
from raymoe.sources.hub import HubOptions, is_hub_id, open_hub_folder, parse_location
from raymoe.sources.local_folder import LocalFolder
from raymoe.storage.file_names import CARD_NAME
from raymoe.untrusted_files import MAX_YAML_BYTES, read_yaml

_AT_ONCE = 8
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# Sentences that a licence's text has and no other's, by the Hub's name of the licence. All of a row have to be there.
_LICENSE_TEXTS = {
    "apache-2.0": ("Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"),
    "mit": (
        "Permission is hereby granted, free of charge, to any person obtaining a copy",
        "The above copyright notice and this permission notice shall be included in all",
        'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND',
    ),
}
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Nothing that ends a link in Markdown, in HTML or in YAML.
_LINK = re.compile(r"https://[A-Za-z0-9._~:/?#@!$&*+,;=%-]{1,500}")
_TITLE_CHARACTERS = 100
_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}|code|multilingual")


@dataclass(frozen=True, slots=True, kw_only=True)
class License:
    """A licence as the Hub's metadata have it; `link` and `title` go with `name` `other`."""

    name: str
    title: str | None = None
    link: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCard:
    """One model or adapter. `hub_id` is None for one that is not on the Hub; `bases` are what its card says that it was
    made from, as ids of the Hub. `label` is what people call it."""

    label: str
    hub_id: str | None = None
    license: License | None = None
    languages: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()


def source_cards(plan: MergePlan, hub: HubOptions, storage: StorageOptions) -> tuple[SourceCard, ...]:
    """The cards of all models and adapters of a merge, each once, in the plan's order."""
    files = [file for source in plan.sources for file in source.files]
    folders = list(dict.fromkeys(Location(file.location.rpartition("/")[0], file.kind) for file in files))
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return tuple(pool.map(lambda folder: _source_card(folder, hub, storage), folders))


def common_value(values: list[Any]) -> Any:
    """The one value that all have; None where they differ, or one has none."""
    return values[0] if values and values[0] and all(value == values[0] for value in values) else None


def parse_front_matter(card: str) -> dict[str, Any]:
    """The metadata at the head of a model card; empty for a card without, or with what is no YAML mapping."""
    match = _FRONT_MATTER.match(card)
    if match is None:
        return {}
    # Not by huggingface_hub's ModelCard, which goes through results of benchmarks and fails where one is odd.
    try:
        content = read_yaml(match[1])
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read_front_matter(folder: Folder) -> dict[str, Any]:
    """The metadata of a folder's model card; empty where it says nothing that can be read. Raises CheckpointError."""
    return parse_front_matter(_text(folder, CARD_NAME))


def _source_card(location: Location, hub: HubOptions, storage: StorageOptions) -> SourceCard:
    """The card of what lies in one folder: a path, `hf://org/name@<commit>` or a URL."""
    on_hub = parse_location(f"{location}/{CARD_NAME}")
    label = on_hub.repo if on_hub else short_name(location.text, None)
    try:
        folder: Folder
        if on_hub:
            folder = open_hub_folder(PathRef(path=on_hub.repo, revision=on_hub.commit), hub)
        elif location.kind.is_object:
            folder = open_object_folder(location.text, "model", storage)
        else:
            folder = LocalFolder(location.text)
        metadata = read_front_matter(folder)
        license = stated_license(metadata) if "license" in metadata else _recognize_license(folder)
    except CheckpointError:
        metadata, license = {}, None
    return SourceCard(
        label=label,
        hub_id=on_hub.repo if on_hub else None,
        license=license,
        languages=_languages(metadata),
        # A folder that is meant by the name here is no model of the Hub.
        bases=tuple(name for name in as_strings(metadata.get("base_model")) if is_model_of_hub(name)),
    )


def is_model_of_hub(name: str) -> bool:
    """Whether a card's `base_model` can be one of the Hub: trainers also write the folder that they were given."""
    return "/" in name and is_hub_id(name) and not is_local_folder(name)


def _text(folder: Folder, name: str) -> str:
    """A small text file of the folder; empty if there is none. Raises CheckpointError."""
    file = folder.find(name)
    if file is None or file.size > MAX_YAML_BYTES:
        return ""
    return folder.read(file).decode("utf-8-sig", errors="replace")


def stated_license(metadata: Mapping[str, Any]) -> License | None:
    """The one licence that a card's metadata name; None where they name none, or several."""
    names = as_strings(metadata.get("license"))
    if len(names) != 1:
        return None  # a list of licences says nothing of which applies to what
    name = names[0].lower()
    if name != "other":
        return License(name=name) if _LICENSE_ID.fullmatch(name) else None
    title, link = metadata.get("license_name"), metadata.get("license_link")
    if not isinstance(title, str) or not title.strip():
        return None
    # A link to a file of the source's own repository leads nowhere from another one.
    is_absolute = isinstance(link, str) and _LINK.fullmatch(link)
    shown = printable(" ".join(title.split())[:_TITLE_CHARACTERS])
    return License(name="other", title=shown, link=link if is_absolute else None)


def _languages(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The languages as codes, which is all that the Hub takes; none where one is no code."""
    codes = as_strings(metadata.get("language"))
    return codes if all(_LANGUAGE_CODE.fullmatch(code) for code in codes) else ()


def _recognize_license(folder: Folder) -> License | None:
    for name in _LICENSE_FILES:
        text = " ".join(_text(folder, name).split())
        for license, sentences in _LICENSE_TEXTS.items():
            if text and all(sentence in text for sentence in sentences):
                return License(name=license)
    return None


def as_strings(value: Any) -> tuple[str, ...]:
    """A metadata value that is a text or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return tuple(each.strip() for each in values if isinstance(each, str) and each.strip())
