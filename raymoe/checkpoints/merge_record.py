"""`raymoe.json`: the record of a finished merge. It suffices to check every byte of the merge, and to repeat the merge.

    merge_record (at the end of a merge) --> raymoe.json --read_record--> MergeRecord

No times and no host names: the same merge gives the same record.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from raymoe._version import __version__
from raymoe.checkpoints.edit_record import Edit
from raymoe.checkpoints.open_checkpoint import read_object
from raymoe.config import MergeConfig
from raymoe.config.model_refs import parse_model_ref, short_name
from raymoe.errors import Problem, ProblemReport
from raymoe.formatting import short_list
from raymoe.object_store.location import Location, LocationKind
from raymoe.object_store.options import StorageOptions
from raymoe.planning.owner import BASE, CONFIG_KEYS, Owner, OwnerKind
from raymoe.planning.plan import GatePrompts, MergeOptions, MergePlan
from raymoe.routers.heldout_report import RouterSummary
from raymoe.safe_text import json_text
from raymoe.sources.folder_protocol import Folder, is_inside
from raymoe.sources.local_folder import has_changed, recorded_sample
from raymoe.storage.checksums import xxh3_checksum
from raymoe.storage.file_names import CARD_NAME, RECORD_NAME, FileRecord

RECORD_FORMAT = 1
EXTRACTED = "extracted"
"""The record's key with the expert that a dense model was taken out of a mixture as; records of merges lack it."""
# Environment variables with the S3 endpoint, and with the profile that signs requests.
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_IDENTITY_VARIABLES = ("AWS_PROFILE", "AWS_ACCESS_KEY_ID")
# Keys of the config's `storage` that are not published: an address, perhaps of an inner network, and a name in ~/.aws.
_USER_KEYS = ("endpoint", "profile")
_MISSING = "there is no raymoe.json, the record of a finished merge"
_T = TypeVar("_T")


def merge_record(
    plan: MergePlan,
    config: MergeConfig,
    files: Sequence[FileRecord],
    summary: RouterSummary | None,
    edit: Edit | None = None,
) -> dict[str, Any]:
    """The record's content. `options` are the settings besides the config that determine the output's bytes."""
    return {
        **_identity(plan),
        "architecture": plan.architecture,
        "dtype": plan.dtype,
        "parameters": plan.totals.parameters,
        "active_parameters": plan.totals.active_parameters,
        "config": config.to_plain(),
        **({"edit": edit.plain()} if edit is not None else {}),
        "prompt_files": prompt_records(plan, config),
        "routers": summary.plain() if summary else None,
        # Written only for strict merges, so that records of other merges do not change.
        "options": {key: value for key, value in plan.options.to_record().items() if key != "strict" or value},
        **_sources_and_files(plan, files),
    }


def extraction_record(plan: MergePlan, files: Sequence[FileRecord]) -> dict[str, Any]:
    """The record of an expert that was taken out of a mixture, as a dense model. It is no record of a merge."""
    return {
        **_identity(plan),
        EXTRACTED: plan.sources[0].label,
        "dtype": plan.dtype,
        "parameters": plan.totals.parameters,
        **_sources_and_files(plan, files),
    }


def _identity(plan: MergePlan) -> dict[str, Any]:
    return {"format": RECORD_FORMAT, "raymoe_version": __version__, "plan_digest": plan.digest}


def _sources_and_files(plan: MergePlan, files: Sequence[FileRecord]) -> dict[str, Any]:
    samples = {
        file.location: sample
        for source in plan.sources
        for file in source.files
        if not has_changed(file) and (sample := recorded_sample(file)) is not None
    }
    return {
        "sources": [
            {"owner": str(s.owner), "model": s.label, "revision": s.revision, "adapter": s.adapter}
            for s in plan.sources
        ],
        # The state of local weight files: `refusals` compares it, so that a model that has changed is noticed.
        **({"local_files": dict(sorted(samples.items()))} if samples else {}),
        "files": {record.name: {"size": record.size, "checksum": record.checksum} for record in files},
    }


def prompt_records(plan: MergePlan, config: MergeConfig) -> list[dict[str, Any]]:
    """Each file of prompts in `config`, and what was drawn from it: number of texts, SHA-256 of their JSON list."""
    drawn: dict[tuple[object, ...], GatePrompts] = {
        (CONFIG_KEYS[prompts.owner.kind], prompts.owner.index): prompts for prompts in plan.gates.members
    }
    of_backbone = {prompts.owner: prompts.positive for prompts in plan.moments.experts} if plan.moments else {}
    records = []
    for (experts, number, key), file in config.prompt_files.items():
        prompts = drawn[experts, number]
        texts = (
            prompts.positive or of_backbone.get(prompts.owner, ()) if key == "positive_prompts" else prompts.negative
        )
        digest = hashlib.sha256(json.dumps(texts, separators=(",", ":")).encode()).hexdigest()
        place = file.absolute_name
        records.append({"owner": str(prompts.owner), "key": key, "file": place, "count": len(texts), "sha256": digest})
    return records


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSource:
    """A source of a finished merge: `model` is `PATH` or `PATH+ADAPTER`. `owner` is None if this version does not know
    the record's word for it."""

    owner: Owner | None
    model: str
    adapter: str | None

    @property
    def is_expert(self) -> bool:
        return self.owner is not None and self.owner.kind is OwnerKind.EXPERT


def expert_names(sources: Sequence[RecordedSource]) -> tuple[str, ...]:
    """Display names of a record's experts, by their models."""
    return tuple(short_name(source.model, source.adapter) for source in sources if source.is_expert)


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """A record that was read: its location `where`, its `content` as in the file, and the fields that raymoe uses.

    The lists have been checked. Config and options are parsed when they are needed, so that records with unknown ones
    can still be published and displayed.
    """

    where: str
    content: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    sources: tuple[RecordedSource, ...]
    prompt_files: tuple[Mapping[str, Any], ...]

    @property
    def plan_digest(self) -> str:
        return str(self.content.get("plan_digest"))

    @cached_property
    def expert_names(self) -> tuple[str, ...]:
        """Display names of the experts. One that an edit has kept has the name that it had in the mixture before."""
        names = list(expert_names(self.sources))
        edit = self.content.get("edit")
        edited = edit.get("experts") if isinstance(edit, Mapping) else None
        for number, expert in enumerate(edited if isinstance(edited, list) else ()):
            name = expert.get("name") if isinstance(expert, Mapping) else None
            if isinstance(name, str) and number < len(names):
                names[number] = name
        return tuple(names)

    @cached_property
    def config(self) -> MergeConfig:
        """The config, with resolved names of models and prompt files. Raises ProblemReport."""
        return self._parsed(lambda: MergeConfig.from_plain(_recorded_config(self.content)))

    @cached_property
    def options(self) -> MergeOptions:
        """Raises ProblemReport."""
        return self._parsed(lambda: MergeOptions.from_record(self.content["options"]))

    @property
    def extracted(self) -> str | None:
        """The expert of a mixture that was written as a dense model; None for a merge."""
        found = self.content.get(EXTRACTED)
        return found if isinstance(found, str) else None

    def _parsed(self, parse: Callable[[], _T]) -> _T:
        if self.extracted is not None:
            what = f"this is an expert that `raymoe extract` took out of a mixture ({self.extracted}), and no merge"
            raise ProblemReport([Problem(where=self.where, what=what, remedy="name a folder that a merge wrote")])
        try:
            return parse()
        except KeyError as error:
            raise unreadable_record(self.where, f"it has no {error.args[0]}") from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise unreadable_record(self.where, f"{type(error).__name__}: {str(error).splitlines()[0]}") from error

    def to_publish(self, repo: str, card: str | None) -> bytes:
        """The file's bytes to publish to `repo`, with size and checksum of the published card.

        The config's endpoint and profile for object stores are left out. Other users set their own.
        """
        files = dict(self.content["files"])
        if card is not None:
            content = card.encode()
            files[CARD_NAME] = {"size": len(content), "checksum": xxh3_checksum([content])}
        published = {**self.content, "published_as": repo, "files": files}
        config = self.content.get("config")
        if isinstance(config, Mapping) and isinstance(config.get("storage"), Mapping):
            storage = {key: value for key, value in config["storage"].items() if key not in _USER_KEYS}
            published["config"] = {**config, "storage": storage}
        return f"{json_text(published)}\n".encode()


def read_record(folder: Folder) -> MergeRecord:
    """Read the record of a finished merge. Raises ProblemReport if there is none, or it is not what raymoe writes."""
    content = read_object(folder, RECORD_NAME, _MISSING, "name the output of `raymoe merge`, and let it finish")
    where = f"{folder.label}/{RECORD_NAME}"
    if (fault := _find_fault(content)) is not None:
        raise unreadable_record(where, fault)
    files, sources = content.get("files", {}), content.get("sources", [])
    return MergeRecord(
        where=where,
        content=content,
        files={
            name: FileRecord(name=name, size=each["size"], checksum=each["checksum"]) for name, each in files.items()
        },
        sources=tuple(
            RecordedSource(owner=Owner.parse(s["owner"]), model=s["model"], adapter=s.get("adapter")) for s in sources
        ),
        prompt_files=tuple(content.get("prompt_files", [])),
    )


def _find_fault(content: Mapping[str, Any]) -> str | None:
    """What is wrong with a record's lists; None if they are valid."""
    files, sources, prompts = content.get("files", {}), content.get("sources", []), content.get("prompt_files", [])
    if not isinstance(files, Mapping) or not all(is_inside(name) and _is_file(file) for name, file in files.items()):
        return "it names no files with their sizes and checksums"
    if not isinstance(prompts, list) or not all(map(_is_prompt_file, prompts)):
        return "its prompt_files are not a list of objects with their files and counts"
    if not isinstance(sources, list) or not all(map(_is_source, sources)):
        return "its sources are not a list of objects with an owner and a model"
    return None


def unreadable_record(where: str, why: str) -> ProblemReport:
    """The error for a record at `where` that raymoe can't have written."""
    remedy = "put back the record that the merge wrote, or merge again with --overwrite"
    return ProblemReport([Problem(where=where, what=f"this record can't be read: {why}", remedy=remedy)])


def _is_file(file: object) -> bool:
    return isinstance(file, Mapping) and type(file.get("size")) is int and isinstance(file.get("checksum"), str)


def _is_source(source: object) -> bool:
    if not isinstance(source, Mapping) or not isinstance(source.get("adapter"), str | None):
        return False
    return all(isinstance(source.get(key), str) for key in ("owner", "model"))


def _is_prompt_file(file: object) -> bool:
    if not isinstance(file, Mapping) or not isinstance(file.get("count"), int):
        return False
    return all(isinstance(file.get(key), str) for key in ("owner", "key", "file", "sha256"))


def _recorded_config(record: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded config, with resolved names of models and prompt files: absolute paths, Hub commits."""
    config = dict(record["config"])
    models = {source["owner"]: source["model"] for source in record["sources"]}
    config["base_model"] = models[str(BASE)]
    members: dict[str, dict[str, Any]] = {}
    for kind, key in CONFIG_KEYS.items():
        config[key] = [dict(expert) for expert in config.get(key) or ()]
        members |= {str(Owner(kind, number)): expert for number, expert in enumerate(config[key])}
    kept = config.get("keep_routers")
    for owner, expert in members.items():
        if kept is not None and parse_model_ref(expert["source_model"]).model == parse_model_ref(kept).model:
            config["keep_routers"] = _mixture_of(models[owner])
        expert["source_model"] = models[owner]
    for file in record.get("prompt_files", ()):
        expert = members[file["owner"]]
        expert[file["key"]] = {**expert[file["key"]], "file": file["file"]}
    return config


def _mixture_of(label: str) -> dict[str, Any]:
    """The mixture of an expert that is named so in a record."""
    mixture = parse_model_ref(label).model
    return {"model": {"path": mixture.path, "revision": mixture.revision}}


def with_own_storage(
    config: MergeConfig, own: StorageOptions, folder: str, *, trusts_record: bool = False
) -> MergeConfig:
    """The recorded config with the user's S3 settings: those of `own`, else of the environment, else of the record if
    the user trusts it.

    Raises ProblemReport before any request is sent, if only the record gives the endpoint or the profile.
    """
    recorded = config.storage
    if trusts_record or not (recorded.endpoint or recorded.profile):
        return config
    storage = replace(recorded, endpoint=own.endpoint, profile=own.profile)
    needed = [place.text for place in _named_locations(config) if place.kind is LocationKind.S3]
    names_endpoint = not recorded.endpoint or own.endpoint or any(map(os.environ.get, _ENDPOINT_VARIABLES))
    names_identity = not recorded.profile or own.profile or any(map(os.environ.get, _IDENTITY_VARIABLES))
    if needed and not (names_endpoint and names_identity):
        address = f"at {recorded.endpoint}" if recorded.endpoint else ""
        identity = f"with the profile {recorded.profile!r} of this user" if recorded.profile else ""
        what = (
            f"the record says that {short_list(needed, most=2)} is reached "
            f"{' '.join(filter(None, (address, identity)))}; "
            "requests signed with your credentials would be sent there"
        )
        variables = [
            *([] if names_endpoint else ["AWS_ENDPOINT_URL_S3"]),
            *([] if names_identity else ["AWS_PROFILE"]),
        ]
        remedy = f"set {' and '.join(variables)} yourself, or give --trust-record if you trust that address"
        raise ProblemReport([Problem(where=f"{folder}/{RECORD_NAME}", what=what, remedy=remedy)])
    return config.model_copy(update={"storage": storage})


def _named_locations(config: MergeConfig) -> Iterator[Location]:
    """The locations that a config names: URLs of models and adapters, and prompt files."""
    yield from (path.location for ref in config.models for path in ref.paths if path.location is not None)
    yield from (file.location for file in config.prompt_files.values())
