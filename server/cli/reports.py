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
    parts: list[RenderableType] = []
    if report.get("method") != "tune":
        parts.append(contrastive(report) if "constant_layers" in report else general(report))
    if isinstance(report.get("trial"), Mapping) and report["trial"].get("surface"):
        parts.append(trial(report["trial"]))
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


def trial(found: Mapping[str, Any]) -> RenderableType:
    """What the model wrote: untouched, at each strength of the place that was taken, and under random vectors; with one
    text of each."""
    table = Table("strength", "success", "broken", "surprise", title=f"trial: {found['place']}, "
                  f"{found['completions']} completions", box=None)
    default = found["default"]
    for arm in (found["untouched"], *found["surface"]):
        ours = arm["strength"] == default["strength"]
        name = f"{arm['strength']:.3g}{' *' if ours else ''}" if arm["strength"] else "untouched"
        table.add_row(name, f"{arm['success']:.0%}", f"{arm['broken']:.0%}", f"{arm['surprise']:.2f}",
                      style="bold" if ours else "")
    random = found["random"]
    if random["success"]:
        table.add_row(f"{random['draws']} random", f"at most {max(random['success']):.0%}",
                      f"at most {max(random['broken']):.0%}", "")
    band = found["band"]
    table.caption = "* the default. " + ("No strength is both visible and whole." if band is None else
                                         f"Visible and whole from {band['low']:.3g} to {band['high']:.3g}.")
    texts = [f"[bold]{name}[/bold] {escape(arm['sample'][0]['text'].strip())}" for name, arm in
             (("untouched:", found["untouched"]), ("steered:", default)) if arm["sample"]]
    return Group(table, *texts)


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
