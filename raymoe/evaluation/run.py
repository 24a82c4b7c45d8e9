"""`evaluate_merge`: runs one pass over the layers of each model, and computes the results.

gate pass (mode `hidden`)                            router rows to compare with
one pass over the merge                              merged, further numbers of experts per token, oracle and hidden
                                                     share the reading of its layers
one pass over each other model                       base, experts, their average, further models
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raymoe.checkpoints.weight_table import active_parameters
from raymoe.compute import choose_device
from raymoe.evaluation.dataset import data_summary
from raymoe.evaluation.inputs import EvaluationInputs, open_evaluation
from raymoe.evaluation.metrics import (
    MEAN,
    RoutingCounts,
    as_json_losses,
    gap_closed,
    loss_warnings,
    losses,
    own_losses,
    round_values,
)
from raymoe.evaluation.options import EvaluationOptions
from raymoe.evaluation.routing_samples import RoutingSamples
from raymoe.planning.plan import MergePlan, Router
from raymoe.progress_line import ProgressLine, token_layers
from raymoe.routers.prompt_lengths import plan_work
from raymoe.routers.router_matrices import router_rows
from raymoe.storage.source_reader import SourceReader
from raymoe.storage.transform import NUMPY_DTYPES

if TYPE_CHECKING:
    from raymoe.evaluation.passes import Values
    from raymoe.evaluation.scoring import Variant

FORMAT = 1
Float32 = npt.NDArray[np.float32]
Losses = Mapping[str, dict[str, float]]


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
        values = computation.mixture() | computation.models()
    loss = _losses(inputs, values)
    names = ("merged", "base", "average", "oracle", "hidden", "experts", *(f"expert {name}" for name in inputs.names))
    config, rule = inputs.merge.facts.config, inputs.mixture.rule
    assert rule is not None  # it is a mixture
    return {
        "format": FORMAT,
        "model": str(place),
        "plan_digest": inputs.merge.plan_digest,
        "architecture": config["model_type"],
        "gate_mode": inputs.merge.config.gate_mode,
        "prompt_model": inputs.merge.prompt_model,
        "backbone": inputs.merge.config.backbone.method,
        "seed": inputs.merge.options.seed,
        "layers": inputs.mixture.spec.layers,
        **({"moe_layers": rule.moe_layers(inputs.mixture.spec.layers)} if rule.dense_layers else {}),
        "experts_per_token": rule.sources_per_token,
        **({"granularity": rule.granularity} if rule.granularity > 1 else {}),
        **_by_top_k(inputs, options, loss),
        "experts": list(inputs.names),
        "data": data_summary(inputs.texts, inputs.tokens, str(data)),
        "compared": options.models,
        "loss": {name: as_json_losses(loss[name]) if name in loss else None for name in (*names, *options.models)},
        "gap_closed": _gap_closed(loss),
        "routing": computation.counts.shares(),
        "samples": computation.samples.plain(inputs.tokenizer),
        "warnings": [*inputs.warnings, *loss_warnings(loss)],
    }


def _losses(inputs: EvaluationInputs, values: Values) -> Losses:
    """The losses of everything that was computed, and of the experts: each label's own one, by itself."""
    labels = [text.label for text in inputs.texts]
    found = {name: losses(of_texts, labels) for name, of_texts in values.items()}
    owners = {label: f"expert {inputs.names[number]}" for label, number in inputs.label_experts.items()}
    experts = own_losses(found, owners)
    return found if experts is None else found | {"experts": experts}


def _by_top_k(inputs: EvaluationInputs, options: EvaluationOptions, loss: Losses) -> dict[str, Any]:
    """`by_experts_per_token` of eval.json: loss and cost for each number of experts for a token; nothing if none was
    asked for."""
    if not options.experts_per_token:
        return {}
    parts = inputs.merge.config.granularity
    found = [
        {
            "experts_per_token": count,
            "active_parameters": active_parameters(inputs.merge.facts, inputs.mixture, count * parts),
            "loss": as_json_losses(loss[name]),
        }
        for count, name in _top_k_names(inputs, options).items()
    ]
    return {"by_experts_per_token": found}


def _top_k_names(inputs: EvaluationInputs, options: EvaluationOptions) -> dict[int, str]:
    """For each number of experts for a token, ascending, the name of its losses. That of the config is `merged`. As in
    the config, experts are whole FFNs, also if they are cut (`granularity`)."""
    assert inputs.mixture.rule is not None  # it is a mixture
    own = inputs.mixture.rule.sources_per_token
    counts = sorted(int(count) for count in options.experts_per_token)
    return {count: "merged" if count == own else f"experts_per_token={count}" for count in counts}


class _Computation:
    """The passes of one evaluation. `counts` and `samples` are filled by the merge's own routers."""

    def __init__(
        self, inputs: EvaluationInputs, options: EvaluationOptions, reader: SourceReader, progress: ProgressLine
    ) -> None:
        from raymoe.evaluation.passes import Passes

        self._inputs, self._options, self._reader, self._progress = inputs, options, reader, progress
        self._remote_code, self._hub = options.trust_remote_code, options.hub
        self._device = choose_device(options.device)
        self._passes = Passes(inputs.tokens.ids, self._device, reader, progress)
        labels, experts = inputs.labels, len(inputs.names)
        own = [inputs.label_experts[label] for label in labels]
        self._label_numbers = [labels.index(text.label) for text in inputs.texts]
        assert inputs.mixture.rule is not None  # it is a mixture
        self._moe_layers = inputs.mixture.rule.moe_layers(inputs.mixture.spec.layers)
        self.counts = RoutingCounts(labels, own, self._moe_layers, experts)
        skipped = inputs.tokens.skipped
        self.samples = RoutingSamples(inputs.tokens.ids, [text.label for text in inputs.texts], skipped, experts)

    def mixture(self) -> Values:
        """Log-likelihoods of `merged` and of the routings that it is compared with."""
        from raymoe.evaluation.scoring import Variant

        variants = [Variant(name="merged", on_routing=self._on_routing)]
        for count, name in _top_k_names(self._inputs, self._options).items():
            if name != "merged":
                variants.append(Variant(name=name, per_token=count * self._inputs.merge.config.granularity))
        if self._inputs.oracle:
            variants.append(Variant(name="oracle", forced=self._inputs.text_experts))
        if self._inputs.hidden is not None:
            variants.append(self._hidden_variant(self._inputs.hidden))
        return self._passes.run(self._inputs.mixture, variants)

    def models(self) -> Values:
        """Log-likelihoods of the other models: base, experts, their average, further ones."""
        return self._passes.run_all(self._inputs.models)

    def _on_routing(self, layer: int, text: int, experts_TK: npt.NDArray[np.int64], weights_TK: Float32) -> None:
        skipped = self._inputs.tokens.skipped
        self.counts.add(self._label_numbers[text], layer, experts_TK[skipped:], weights_TK[skipped:])
        self.samples.record(text, experts_TK)

    def _hidden_variant(self, plan: MergePlan) -> Variant:
        """The rows of gate mode `hidden`, rounded as they would be in the checkpoint."""
        from raymoe.evaluation.scoring import Variant
        from raymoe.routers.backbone_in_process import merged_locally
        from raymoe.routers.in_process import compute_routers_locally

        gates = plan.gates
        self._progress.stage("routers of gate mode hidden", plan_work(plan, hub=self._hub))
        with merged_locally(
            plan.moments,
            self._reader,
            device=self._device,
            trust_remote_code=self._remote_code,
            layer_done=self._progress.add,
            on_begin=lambda what: self._progress.stage(f"routers of gate mode hidden, {what}"),
        ):
            rows, _ = compute_routers_locally(
                gates,
                self._reader,
                device=self._device,
                trust_remote_code=self._remote_code,
                layer_done=self._progress.add,
                on_begin=lambda what: self._progress.stage(f"routers of gate mode hidden, {what}"),
            )
        mixture = self._inputs.mixture
        first = self._moe_layers[0]
        dtype = NUMPY_DTYPES[mixture.weights[f"model.layers.{first}.{mixture.spec.family.ffn}.router"].entry.dtype]

        def stacked(*, shared: bool) -> Float32:
            repeat = None if shared or mixture.rule is None else mixture.rule.granularity
            layers = [
                router_rows(gates, rows, Router(layer=layer, shared=shared, repeat=repeat))
                for layer in range(gates.layers)
            ]
            return np.stack(layers).astype(dtype).astype(np.float32)

        shared_rows = stacked(shared=True) if gates.shared else None
        return Variant(name="hidden", rows=stacked(shared=False), shared_rows=shared_rows)


def _gap_closed(loss: Losses) -> float | None:
    if not {"merged", "hidden", "oracle"} <= loss.keys():
        return None
    share = gap_closed(loss["merged"][MEAN], loss["hidden"][MEAN], loss["oracle"][MEAN])
    return float(round_values(share)) if share is not None and math.isfinite(share) else None


def _total_work(inputs: EvaluationInputs, options: EvaluationOptions) -> int:
    """The work of all passes, in tokens x layers."""
    from raymoe.evaluation.passes import models_work
    from raymoe.evaluation.scoring import pass_work

    top_k = sum(name != "merged" for name in _top_k_names(inputs, options).values())
    variants = 1 + top_k + inputs.oracle + (inputs.hidden is not None)
    total = pass_work(inputs.mixture, inputs.tokens.ids, variants) + models_work(inputs.models, inputs.tokens.ids)
    return total + (plan_work(inputs.hidden, hub=options.hub) if inputs.hidden is not None else 0)
