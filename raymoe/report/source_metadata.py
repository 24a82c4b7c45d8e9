"""Metadata of a merge's source models: license, languages, base models. Nothing is guessed.

Read from the front matter of a model's README.md, be it in a folder, in a bucket or on the Hub (at the commit that was
merged); or, if it has none, from a LICENSE file with a well-known text. Metadata that can't be read are left out: a
card never makes a merge fail.
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
# Sentences that identify a license's text, by the Hub's name of the license. All sentences of a row are required.
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
# No characters that end a link in Markdown, HTML or YAML.
_LINK = re.compile(r"https://[A-Za-z0-9._~:/?#@!$&*+,;=%-]{1,500}")
_TITLE_CHARACTERS = 100
_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}|code|multilingual")


@dataclass(frozen=True, slots=True, kw_only=True)
class License:
    """A license as in the Hub's metadata; `link` and `title` are for `name` `other`."""

    name: str
    title: str | None = None
    link: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCard:
    """One model or adapter. `hub_id` is None for one that is not on the Hub; `bases` are its base models by its card,
    as ids of the Hub. `label` is its name in messages."""

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
    """The value that all share; None if they differ, or one has none."""
    return values[0] if values and values[0] and all(value == values[0] for value in values) else None


def parse_front_matter(card: str) -> dict[str, Any]:
    """The metadata at the head of a model card; empty if there is none, or it is not a YAML mapping."""
    match = _FRONT_MATTER.match(card)
    if match is None:
        return {}
    # huggingface_hub's ModelCard is not used: it parses benchmark results, and fails on malformed ones.
    try:
        content = read_yaml(match[1])
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read_front_matter(folder: Folder) -> dict[str, Any]:
    """The metadata of a folder's model card; empty if there are none that can be read. Raises CheckpointError."""
    return parse_front_matter(_text(folder, CARD_NAME))


def _source_card(location: Location, hub: HubOptions, storage: StorageOptions) -> SourceCard:
    """The card of one folder: a path, `hf://org/name@<commit>` or a URL."""
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
        # A name that is a local folder is not a model of the Hub.
        bases=tuple(name for name in as_strings(metadata.get("base_model")) if is_model_of_hub(name)),
    )


def is_model_of_hub(name: str) -> bool:
    """Whether a card's `base_model` can be a model of the Hub: training tools also write local folders there."""
    return "/" in name and is_hub_id(name) and not is_local_folder(name)


def _text(folder: Folder, name: str) -> str:
    """A small text file of the folder; empty if there is none. Raises CheckpointError."""
    file = folder.find(name)
    if file is None or file.size > MAX_YAML_BYTES:
        return ""
    return folder.read(file).decode("utf-8-sig", errors="replace")


def stated_license(metadata: Mapping[str, Any]) -> License | None:
    """The license in a card's metadata; None if there is none, or several."""
    names = as_strings(metadata.get("license"))
    if len(names) != 1:
        return None  # a list of licenses does not say which one applies to what
    name = names[0].lower()
    if name != "other":
        return License(name=name) if _LICENSE_ID.fullmatch(name) else None
    title, link = metadata.get("license_name"), metadata.get("license_link")
    if not isinstance(title, str) or not title.strip():
        return None
    # A relative link to a file of the source's repository does not work from another repository.
    is_absolute = isinstance(link, str) and _LINK.fullmatch(link)
    shown = printable(" ".join(title.split())[:_TITLE_CHARACTERS])
    return License(name="other", title=shown, link=link if is_absolute else None)


def _languages(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The languages as codes, which the Hub requires; none if one is not a code."""
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
