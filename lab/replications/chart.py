"""Small charts of the same look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

OURS, CONTROL, PLAIN, SECOND, THIRD = "#1b6ca8", "#b0b0b0", "#303030", "#d1761f", "#4c9a52"


def bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float]], colours: Sequence[str]) -> None:
    """Grouped bars, one colour a series."""
    width = 0.8 / len(series)
    for n, ((label, values), colour) in enumerate(zip(series.items(), colours, strict=True)):
        axes.bar([x + (n + 0.5) * width - 0.4 for x in range(len(groups))], values, width, label=label, color=colour)
    axes.set_xticks(range(len(groups)), groups, rotation=35, ha="right", fontsize=8)
    tidy(axes)


def spread(axes: Axes, at: Sequence[float], standings: Sequence[Mapping[str, Any]], label: str) -> None:
    """The range and mean of a control's draws."""
    axes.vlines(at, [s["min"] for s in standings], [s["max"] for s in standings], color=CONTROL, linewidth=6,
                alpha=0.7, label=f"{label}, range")
    axes.plot(at, [s["mean"] for s in standings], "_", color=PLAIN, markersize=10, label=f"{label}, mean")


def tidy(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    if title:
        axes.set_title(title, fontsize=10)
    if x:
        axes.set_xlabel(x, fontsize=9)
    if y:
        axes.set_ylabel(y, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)
