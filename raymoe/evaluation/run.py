"""`evaluate_merge`: runs one pass over the layers of each model, and computes the results.

gate pass (mode `hidden`)                            router rows to compare with
one pass over the merge                              merged, oracle and hidden share the reading of its layers
one pass over the base, one over each expert
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raymoe.checkpoints.weight_table import CheckpointModel
from raymoe.compute import choose_device
from raymoe.evaluation.inputs import EvaluationInputs, open_evaluation
from raymoe.evaluation.metrics import MEAN, RoutingCounts, gap_closed, losses, round_values
from raymoe.evaluation.options import EvaluationOptions
from raymoe.evaluation.routing_samples import RoutingSamples
from raymoe.planning.plan import GatePlan, Router
from raymoe.progress_line import ProgressLine, token_layers
from raymoe.routers.prompt_lengths import reading_work
from raymoe.routers.router_matrices import router_rows
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import NUMPY_DTYPES

if TYPE_CHECKING:
    from raymoe.evaluation.scoring import Variant

FORMAT = 1
Float32 = npt.NDArray[np.float32]
Values = dict[str, list[Float32]]


def evaluate_merge(place: str | Path, data: str | Path, options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate the merge at `place` on a file of labeled texts; the result is what eval.json holds.

    Raises ProblemReport, before anything is computed, with everything that is wrong with the merge, the texts, the
    sources to compare with and the options.
    """
    inputs = open_evaluation(place, data, options)
    with (
        SourceReader(options.hub, inputs.merge.config.storage) as reader,
        ProgressLine(token_layers, total=_total_work(inputs, options), quiet=options.quiet) as progress,
    ):
        computation = _Computation(inputs, options, reader, progress)
        values = computation.mixture() | computation.dense()
    labels = [text.label for text in inputs.texts]
    names = ("merged", "base", "oracle", "hidden", *(f"expert {name}" for name in inputs.names))
    loss = {name: losses(values[name], labels) if name in values else None for name in names}
    warnings = [*inputs.warnings, *_number_warnings(loss)]
    config, rule = inputs.merge.facts.config, inputs.mixture.rule
    assert rule is not None  # it is a mixture
    return {
        "format": FORMAT,
        "model": str(place),
        "plan_digest": inputs.merge.plan_digest,
        "architecture": config["model_type"],
        "gate_mode": inputs.merge.config.gate_mode,
        "prompt_model": inputs.merge.prompt_model,
        "seed": inputs.merge.options.seed,
        "layers": inputs.mixture.spec.layers,
        "experts_per_token": rule.per_token,
        "experts": list(inputs.names),
        "data": _data_summary(inputs, str(data)),
        "loss": {name: each and _as_json_losses(each) for name, each in loss.items()},
        "gap_closed": _gap_closed(loss),
        "routing": computation.counts.shares(),
        "samples": computation.samples.plain(inputs.tokenizer),
        "warnings": warnings,
    }


class _Computation:
    """The passes of one evaluation. `counts` and `samples` are filled by the merge's own routers."""

    def __init__(
        self, inputs: EvaluationInputs, options: EvaluationOptions, reader: SourceReader, progress: ProgressLine
    ) -> None:
        self._inputs, self._reader, self._progress = inputs, reader, progress
        self._remote_code, self._hub = options.trust_remote_code, options.hub
        self._device = choose_device(options.device)
        labels, experts = inputs.labels, len(inputs.names)
        own = [inputs.label_experts[label] for label in labels]
        self._label_numbers = [labels.index(text.label) for text in inputs.texts]
        self.counts = RoutingCounts(labels, own, inputs.mixture.spec.layers, experts)
        skipped = inputs.tokens.skipped
        self.samples = RoutingSamples(inputs.tokens.ids, [text.label for text in inputs.texts], skipped, experts)

    def mixture(self) -> Values:
        """Log-likelihoods of `merged` and of the routings that it is compared with."""
        from raymoe.evaluation.scoring import Variant

        variants = [Variant(name="merged", on_routing=self._on_routing)]
        if self._inputs.oracle:
            variants.append(Variant(name="oracle", forced=[text.expert for text in self._inputs.texts]))
        if self._inputs.gates is not None:
            variants.append(self._hidden_variant(self._inputs.gates))
        return self._pass(self._inputs.mixture, variants)

    def dense(self) -> Values:
        """Log-likelihoods of the base and of each expert. Equal models are run once."""
        from raymoe.evaluation.scoring import Variant

        by_label = {
            label: self._pass(model, [Variant(name=name)])[name]
            for label, (name, model) in _distinct_models(self._inputs).items()
        }
        return {name: by_label[model.label] for name, model in self._inputs.dense.items()}

    def _pass(self, model: CheckpointModel, variants: list[Variant]) -> Values:
        from raymoe.evaluation.scoring import log_likelihoods, pass_work

        ids = self._inputs.tokens.ids
        self._progress.stage(", ".join(each.name for each in variants), pass_work(model, ids, len(variants)))
        return log_likelihoods(model, ids, variants, self._reader, self._device, work_done=self._progress.add)

    def _on_routing(self, layer: int, text: int, experts_TK: npt.NDArray[np.int64], weights_TK: Float32) -> None:
        skipped = self._inputs.tokens.skipped
        self.counts.add(self._label_numbers[text], layer, experts_TK[skipped:], weights_TK[skipped:])
        self.samples.record(text, experts_TK)

    def _hidden_variant(self, gates: GatePlan) -> Variant:
        """The rows of gate mode `hidden`, rounded as they would be in the checkpoint."""
        from raymoe.evaluation.scoring import Variant
        from raymoe.routers.in_process import compute_routers_locally

        self._progress.stage("gates of mode hidden", reading_work(gates, hub=self._hub))
        rows, _ = compute_routers_locally(
            gates,
            self._reader,
            device=self._device,
            trust_remote_code=self._remote_code,
            layer_done=self._progress.add,
            on_begin=lambda what: self._progress.stage(f"gates of mode hidden, {what}"),
        )
        mixture = self._inputs.mixture
        dtype = NUMPY_DTYPES[mixture.weights[f"model.layers.0.{mixture.spec.family.ffn}.router"].entry.dtype]

        def stacked(*, shared: bool) -> Float32:
            layers = [router_rows(gates, rows, Router(layer=layer, shared=shared)) for layer in range(gates.layers)]
            return np.stack(layers).astype(dtype).astype(np.float32)

        shared_rows = stacked(shared=True) if gates.shared else None
        return Variant(name="hidden", rows=stacked(shared=False), shared_rows=shared_rows)


def _as_json_losses(loss: Mapping[str, float]) -> dict[str, float | None]:
    """Losses as JSON values: infinity and NaN become null."""
    return {label: round_values(value) if math.isfinite(value) else None for label, value in loss.items()}


def _number_warnings(loss: Mapping[str, dict[str, float] | None]) -> list[str]:
    return [
        f"the loss of {name} on {', '.join(broken)} is not a finite number: its weights or its arithmetic overflow"
        for name, each in loss.items()
        if each and (broken := [label for label, value in each.items() if not math.isfinite(value) and label != MEAN])
    ]


def _gap_closed(loss: Mapping[str, dict[str, float] | None]) -> float | None:
    merged, hidden, oracle = loss["merged"], loss["hidden"], loss["oracle"]
    if merged is None or hidden is None or oracle is None:
        return None
    share = gap_closed(merged[MEAN], hidden[MEAN], oracle[MEAN])
    return float(round_values(share)) if share is not None and math.isfinite(share) else None


def _data_summary(inputs: EvaluationInputs, file: str) -> dict[str, Any]:
    """Facts about the texts; only predicted tokens count."""
    per_label: dict[str, dict[str, int]] = {}
    for text, ids in zip(inputs.texts, inputs.tokens.ids, strict=True):
        label = per_label.setdefault(text.label, {"expert": text.expert, "texts": 0, "tokens": 0})
        label["texts"] += 1
        label["tokens"] += len(ids) - 1
    tokens = sum(label["tokens"] for label in per_label.values())
    return {"file": file, "texts": len(inputs.texts), "tokens": tokens, "per_label": per_label}


def _total_work(inputs: EvaluationInputs, options: EvaluationOptions) -> int:
    """The work of all passes, in tokens x layers."""
    from raymoe.evaluation.scoring import pass_work

    variants = 1 + inputs.oracle + (inputs.gates is not None)
    total = pass_work(inputs.mixture, inputs.tokens.ids, variants)
    total += sum(pass_work(model, inputs.tokens.ids, 1) for _, model in _distinct_models(inputs).values())
    return total + (reading_work(inputs.gates, hub=options.hub) if inputs.gates is not None else 0)


def _distinct_models(inputs: EvaluationInputs) -> dict[str, tuple[str, CheckpointModel]]:
    """The distinct dense models by label, with the first of their names: equal models are run once."""
    found: dict[str, tuple[str, CheckpointModel]] = {}
    for name, model in inputs.dense.items():
        found.setdefault(model.label, (name, model))
    return found
