"""The input of a conversion: an existing checkpoint, or the merge that a config describes, without writing it first.

Both are presented as tensors with a function that gives their bytes. The tensors of a merge are computed from its
plan's parts on demand, in the order of the GGUF file; only the routers are computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from raymoe.architectures import DenseSpec
from raymoe.checkpoints.open_checkpoint import open_checkpoint
from raymoe.checkpoints.weight_table import CheckpointModel, RoutingRule, dense_model, mixture_model
from raymoe.compute import choose_device
from raymoe.config import config_warnings, load_config, storage_note
from raymoe.config.model_refs import ModelRef, PathRef
from raymoe.console import say
from raymoe.errors import Problem, ProblemReport
from raymoe.export.gguf.choose_target import UNCHANGED_REMEDY
from raymoe.export.gguf.llama_cpp_archs import DENSE, MIXTURES, NOT_CONVERTED
from raymoe.export.gguf.mixture_checks import ReadChunks, check_mixture
from raymoe.export.gguf.options import GgufOptions
from raymoe.object_store.location import Location, LocationKind
from raymoe.planning import MergePlan
from raymoe.planning.plan import Shard
from raymoe.planning.plan_merge import plan_merge
from raymoe.progress_line import ProgressLine, token_layers
from raymoe.report.model_card import card_metadata
from raymoe.report.source_metadata import read_front_matter, source_cards
from raymoe.sources.facts import CheckpointIndex, ModelFacts, SourceFile, TensorEntry
from raymoe.sources.resolve import fetch_side_files, resolve_model
from raymoe.sources.unwrap import unwrap
from raymoe.storage.file_names import RECORD_NAME
from raymoe.storage.locations import Inputs, input_paths
from raymoe.storage.shard_stream import RouterBytes, shard_range
from raymoe.storage.source_reader import SourceReader


@dataclass(frozen=True, slots=True, kw_only=True)
class InputModel:
    """`weights` are by dense name; those of a MoE block are under `mlp.` of the layer (see
    `checkpoints/weight_table.py`).

    `rule` is None for a dense model. `card` holds the metadata of its model card. `files` are the tokenizer's by their
    names in the folder. `inputs` are the files that are read. `prepare` computes tensors that are in no file; call it
    before `chunks`. Call `check_unchanged` at the end: it raises CheckpointError if a source has changed.
    """

    label: str
    spec: DenseSpec
    rule: RoutingRule | None
    config: Mapping[str, Any]
    card: Mapping[str, Any]
    weights: Mapping[str, TensorEntry]
    files: Mapping[str, Path]
    warnings: tuple[str, ...]
    chunks: ReadChunks
    prepare: Callable[[], None]
    check_unchanged: Callable[[], None]
    inputs: Inputs = field(default_factory=Inputs)


@contextmanager
def open_model(source: str | Path, options: GgufOptions) -> Iterator[InputModel]:
    """A checkpoint in a folder or at a URL, or a config (.yaml) of a merge. Raises ProblemReport with what is wrong."""
    path = Path(source).expanduser()
    # A file is a config, unless it belongs to a checkpoint.
    is_config = path.suffix.lower() in (".yaml", ".yml") or (path.is_file() and not _is_of_a_checkpoint(path))
    is_local = LocationKind.of(str(source)).is_local
    if is_local and is_config and not path.is_dir():
        with _open_planned(path, options) as model:
            yield model
        return
    if is_local and path.is_file():
        remedy = "name the folder of a checkpoint, or the config of a merge"
        raise ProblemReport([Problem(where=str(source), what="this file is not a config", remedy=remedy)])
    if options.config_options:
        what, remedy = "has no effect on a checkpoint", "leave it out, or name the config of a merge"
        raise ProblemReport([Problem(where=", ".join(options.config_options), what=what, remedy=remedy)])
    card = read_front_matter(open_checkpoint(source, options.storage))
    facts = resolve_model(ModelRef(model=PathRef(path=Location.parse(source).text)), options.hub, options.storage)
    with SourceReader(options.hub, options.storage) as reader:
        yield _model(
            facts,
            options,
            card=card,
            chunks=lambda entry: reader.chunks(entry.file, entry.start, entry.end),
            prepare=lambda: None,
            inputs=_files((*facts.index.files, *(side.file for side in facts.side_files))),
            check_unchanged=reader.check_unchanged,
        )


def _files(files: Iterable[SourceFile]) -> Inputs:
    return Inputs(files=tuple(("a file of the model", file.location) for file in files))


def _is_of_a_checkpoint(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name in ("config.json", RECORD_NAME)


@contextmanager
def _open_planned(config: Path, options: GgufOptions) -> Iterator[InputModel]:
    checked = load_config(config, allow_all_same=options.allow_all_same)
    if not options.quiet and (note := storage_note(checked.storage)):
        say(f"note: {note}")
    plan = plan_merge(checked, options.merge, hub=options.hub, allow_all_same=True)
    options = replace(options, storage=checked.storage)
    with SourceReader(options.hub, options.storage) as reader, closing(_PlannedParts(plan, reader, options)) as parts:
        facts = _planned_facts(plan, config, config_warnings(checked))
        card = yaml.safe_load(card_metadata(plan, source_cards(plan, options.hub, options.storage)))
        models = _files(file for source in plan.sources for file in source.files)
        yield _model(
            facts,
            options,
            card=card,
            chunks=parts.chunks,
            prepare=parts.prepare,
            inputs=input_paths(checked, config, models),
            check_unchanged=reader.check_unchanged,
        )


class _PlannedParts:
    """The tensors of a merge, computed from its sources one by one."""

    def __init__(self, plan: MergePlan, reader: SourceReader, options: GgufOptions) -> None:
        self._plan, self._reader, self._options = plan, reader, options
        self._shards: dict[str, Shard] = {shard.file_name: shard for shard in plan.shards}
        self._router: RouterBytes | None = None
        self._open = ExitStack()  # what is merged before the rest is computed

    def close(self) -> None:
        """Remove what `prepare` has computed."""
        self._open.close()

    def prepare(self) -> None:
        """Compute the routers, and matrices of the backbone that prompts decide, in this process. Torch is set up as in
        a merge: the values are the same, bit for bit."""
        from raymoe.compute import limit_threads
        from raymoe.routers.backbone_in_process import merged_locally
        from raymoe.routers.in_process import compute_routers_locally
        from raymoe.routers.prompt_lengths import plan_work
        from raymoe.routers.router_matrices import router_bytes

        limit_threads()
        work = plan_work(self._plan, hub=self._options.hub)
        with ProgressLine(token_layers, total=work, quiet=self._options.quiet) as progress:
            progress.stage("computing the routers", work)
            reading: dict[str, Any] = {
                "device": choose_device(self._options.device),
                "trust_remote_code": self._options.trust_remote_code,
                "layer_done": progress.add,
                "on_begin": progress.stage,
            }
            self._open.enter_context(merged_locally(self._plan.moments, self._reader, **reading))
            rows, _ = compute_routers_locally(self._plan.gates, self._reader, **reading)
        self._router = router_bytes(self._plan.gates, rows, self._reader)
        self._reader.release()

    def chunks(self, entry: TensorEntry) -> Iterator[memoryview]:
        shard = self._shards[entry.file.name]
        return shard_range(shard, entry.start, entry.end, self._reader, self._router)


def _planned_facts(plan: MergePlan, config: Path, warnings: Sequence[str]) -> ModelFacts:
    """The checkpoint that the merge would write: same names, dtypes and shapes, but without files."""
    tensors = {}
    for shard in plan.shards:
        file = SourceFile(location=f"{config}/{shard.file_name}", size=shard.nbytes)
        for whole, group in groupby(shard.parts, key=lambda part: part.tensor):
            parts = list(group)
            tensors[whole.name] = TensorEntry(
                name=whole.name,
                dtype=parts[0].dtype,
                shape=whole.shape,
                file=file,
                start=parts[0].start,
                end=parts[-1].end,
            )
    label, index = f"the merge of {config}", CheckpointIndex(files=(), tensors=tensors)
    text = unwrap(label, plan.config, index)
    return ModelFacts(
        label=label,
        revision=None,
        config=text.config,
        index=text.index,
        side_files=plan.gates.tokenizer_files,
        warnings=(*warnings, *plan.warnings),
    )


def _model(
    facts: ModelFacts,
    options: GgufOptions,
    *,
    card: Mapping[str, Any],
    chunks: ReadChunks,
    prepare: Callable[[], None],
    inputs: Inputs,
    check_unchanged: Callable[[], None],
) -> InputModel:
    found = _weight_table(facts)
    if found.rule is not None:
        check_mixture(facts, found, chunks)
    return InputModel(
        label=facts.label,
        spec=found.spec,
        rule=found.rule,
        config=facts.config,
        card=card,
        weights={name: ref.entry for name, ref in found.weights.items()},
        files=fetch_side_files(facts, options.hub, options.storage),
        warnings=facts.warnings,
        chunks=chunks,
        prepare=prepare,
        inputs=inputs,
        check_unchanged=check_unchanged,
    )


def _weight_table(facts: ModelFacts) -> CheckpointModel:
    """The model as a table of weights by role. Raises ProblemReport if raymoe can't convert it."""
    model_type = facts.config.get("model_type")
    if model_type in DENSE:
        return dense_model(facts, "checkpoint")
    if model_type not in MIXTURES:
        why = NOT_CONVERTED.get(str(model_type), "which raymoe can't convert")
        remedy = f"convert a mixture ({', '.join(MIXTURES)}) or a dense model ({', '.join(DENSE)})"
        if model_type not in NOT_CONVERTED:
            remedy += "; for others there is llama.cpp's own convert_hf_to_gguf.py"
        what = f"model_type is {model_type!r}, {why}"
        raise ProblemReport([Problem(where=f"{facts.label}/config.json", what=what, remedy=remedy)])
    try:
        return mixture_model(facts)
    except ProblemReport as report:
        # The remedies there are not about conversions.
        raise ProblemReport([replace(p, remedy=UNCHANGED_REMEDY) for p in report.problems]) from None
