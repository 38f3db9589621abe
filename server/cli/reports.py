"""Reports of extractions as tables."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

LONGEST = 60


def rendered(report: Mapping[str, Any]) -> RenderableType:
    """Of any method: figures, each beside its controls, and what to be wary of."""
    parts: list[RenderableType] = [contrastive(report) if "constant_layers" in report else general(report)]
    parts += [f"[bold yellow]warning[/bold yellow] {escape(warning)}" for warning in report.get("warnings", [])]
    return Group(*parts)


def contrastive(report: Mapping[str, Any]) -> Table:
    """Held-out scores per layer beside those of the controls."""
    table = Table("layer", "dev AUC", "test AUC", "pair accuracy", "separation", "norm", "random AUC (max)",
                  "percentile", title=f"{report['method']} at {report['site']}, {report['pairs']['test']} test pairs",
                  box=None)
    for layer, scores in report["layers"].items():
        chosen = int(layer) == report["best_layer"]
        random = scores["control"]["covariance"]
        table.add_row(f"{layer}{' *' if chosen else ''}", f"{scores['dev']['auc']:.3f}", f"{scores['test']['auc']:.3f}",
                      f"{scores['test']['pair_accuracy']:.3f}", f"{scores['test']['separation']:.2f}",
                      f"{scores['norm']:.3g}", f"{random['max_auc']:.3f}", f"{random['percentile']:.0f}",
                      style="bold" if chosen else "")
    shuffled = report["shuffled_labels"]
    table.caption = (f"* best on dev. Labels shuffled: AUC {shuffled['mean_auc']:.3f} on average, at most "
                     f"{shuffled['max_auc']:.3f}; percentile {shuffled['percentile']:.0f}")
    return table


def general(report: Mapping[str, Any]) -> Table:
    """Single figures first, then each that was measured against draws of a control."""
    table = Table("measured", "ours", "control, mean", "control, range", "percentile", title=str(report["method"]),
                  box=None)
    controlled = []
    for path, value in _figures(report):
        if isinstance(value, Mapping):
            controlled.append((path, value))
        elif path not in ("method", "warnings"):
            table.add_row(path, _short(value), "", "", "")
    for path, value in controlled:
        table.add_row(path, _short(value["found"]), _short(value["mean"]), f"{_short(value['min'])} to "
                      f"{_short(value['max'])} ({value['draws']})", f"{value['percentile']:.0f}", style="bold")
    return table


def _figures(report: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, single value or standing among draws), in order; tables of candidates are left out."""
    for name, value in report.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            if {"found", "draws", "percentile"} <= value.keys():
                yield where, value
            elif name != "dev":
                yield from _figures(value, where)
        elif not isinstance(value, list) or not any(isinstance(one, (list, Mapping)) for one in value):
            yield where, value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")
