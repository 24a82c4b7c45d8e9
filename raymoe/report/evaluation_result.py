"""What `raymoe.evaluate` returns: the content of eval.json, which is displayed as a small table in a notebook."""

from __future__ import annotations

from typing import Any

from raymoe.formatting import plural
from raymoe.html_repr import html_table
from raymoe.report.eval_numbers import MEAN, is_dense, loss_rows, read_labels, read_loss


class Evaluation(dict[str, Any]):
    """The content of eval.json as a dict: losses on texts, for a merge with its routing, or under `tasks` the scores
    on tasks."""

    def __repr__(self) -> str:
        if "tasks" in self:
            count = len(self["tasks"])
            return f"Evaluation({self.get('model')!r}, {count} {plural('task', count)})"
        facts = [repr(self["model"]), f"{self['data']['texts']:,} texts"]
        facts.append(f"loss {_loss(read_loss(self, 'model' if is_dense(self) else 'merged', MEAN))}")
        if not is_dense(self):
            facts.append(f"own expert first for {self['routing']['first_accuracy_mean']:.0%} of tokens")
        return f"Evaluation({', '.join(facts)})"

    def _repr_html_(self) -> str:
        title = f"Evaluation of {self.get('model')}"
        if "tasks" in self:
            scores = [
                (task, metric, f"{score['value']:.4g}")
                for task, result in self["tasks"].items()
                for metric, score in result["metrics"].items()
            ]
            return html_table(title, scores, head=("task", "metric", "value"))
        labels = [MEAN, *read_labels(self)]
        rows: list[tuple[str, ...]] = [
            (f"loss, {model}", *(_loss(read_loss(self, model, label)) for label in labels)) for model in loss_rows(self)
        ]
        if not is_dense(self):
            rows.append(("own expert is the first choice", f"{self['routing']['first_accuracy_mean']:.1%}"))
            rows.append(("own expert among the chosen", f"{self['routing']['chosen_accuracy_mean']:.1%}"))
        rows += [("warning", warning) for warning in self.get("warnings") or ()]
        return html_table(title, rows, head=("", *labels))


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
