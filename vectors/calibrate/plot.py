"""A calibration as a picture: dose, wanted behaviour and cost, each beside the placebo floor."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from vectors.calibration import Floor, Outcome, Setting, Spread
from vectors.extras import extra

UP, DOWN, PLACEBO, BASE = "#1f6fb4", "#c8531f", "#8a8a8a", "#222222"
WIDTH, HEIGHT, DPI = 4.1, 3.5, 130


def draw(setting: Setting, title: str, format: Literal["png", "svg"]) -> bytes:
    """The picture as a file. Every panel has the band of the random artifacts, where they were drawn.

    Raises:
        ExtraMissing: matplotlib is not installed.
    """
    # It takes seconds to load, which the start of a server need not wait for.
    with extra("plots"):
        from matplotlib.figure import Figure

    panels: list[Callable[[Any, Setting], None]] = [_dose]
    if setting.base.target is not None:
        panels.append(partial(_against_dose, field="target", label="target score", title="Behaviour"))
    panels += [partial(_against_dose, field="perplexity", label="perplexity under base", title="Surprise"),
               partial(_against_dose, field="repetition", label="repeated 3-grams", title="Degeneration")]
    # A figure of its own, not pyplot's: that keeps every figure and belongs to one thread.
    figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), layout="constrained", dpi=DPI)
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axes, setting)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    layers = ", ".join(map(str, setting.layers))
    floor = f"; grey: {setting.draws} random artifacts (median, range)" if setting.floor else ""
    figure.suptitle(f"{title} on {setting.model_id}, {setting.op} at {'/'.join(setting.sites)} {layers}{floor}",
                    fontsize=10)
    figure.axes[0].legend(fontsize=8, frameon=False)
    out = io.BytesIO()
    # Without a date the same card gives the same bytes.
    figure.savefig(out, format=format, metadata={"Date": None} if format == "svg" else {"Software": None})
    return out.getvalue()


def _sides(setting: Setting) -> list[tuple[str, str, str, Sequence[Outcome]]]:
    found: list[tuple[str, str, str, Sequence[Outcome]]] = [("positive strength", UP, "o", setting.up)]
    if setting.down:
        found.append(("negative strength", DOWN, "s", setting.down))
    return found


def _dose(axes: Any, setting: Setting) -> None:
    for name, color, marker, side in _sides(setting):
        axes.errorbar([p.strength for p in side], [p.kl for p in side], [p.kl_error for p in side], color=color,
                      marker=marker, markersize=4, linewidth=1.4, label=name)
    _band(axes, setting.floor, [f.strength for f in setting.floor], lambda f: f.kl)
    axes.set_xscale("log")
    shown = [p.strength for p in setting.up][::2]
    axes.set_xticks(shown, [f"{strength:.3g}" for strength in shown])
    axes.set_xticks([], minor=True)
    axes.set(yscale="log", xlabel="strength (raw)", ylabel="KL per token (nats)", title="Dose")


def _against_dose(axes: Any, setting: Setting, field: Literal["target", "perplexity", "repetition"], label: str,
                  title: str) -> None:
    """One measure over the dose that each strength came to, beside the random artifacts and the untouched model."""
    for _, color, marker, side in _sides(setting):
        axes.plot([p.kl for p in side], [getattr(p, field) for p in side], color=color, marker=marker, markersize=4,
                  linewidth=1.4)
    _band(axes, setting.floor, [f.kl.median for f in setting.floor], lambda f: getattr(f, field))
    axes.axhline(getattr(setting.base, field), color=BASE, linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="KL per token (nats)", ylabel=label, title=f"{title} (dotted: untouched)")
    if field == "perplexity":
        axes.set_yscale("log")
    elif field == "repetition":
        axes.set_ylim(bottom=0)


def _band(axes: Any, floor: Sequence[Floor], x: Sequence[float], of: Callable[[Floor], Spread | None]) -> None:
    spreads = [spread for spread in map(of, floor) if spread is not None]
    if not spreads:
        return
    axes.fill_between(x, [s.low for s in spreads], [s.high for s in spreads], color=PLACEBO, alpha=0.25, linewidth=0)
    axes.plot(x, [s.median for s in spreads], color=PLACEBO, linewidth=1.2, linestyle="--", label="random (placebo)")
