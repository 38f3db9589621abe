"""An evaluation as a picture: success, broken texts and dose in nats, beside random artifacts of equal size."""

import io
from collections.abc import Callable
from typing import Any, Literal

from vectors.evaluate.report import ArmView, EvaluationReport
from vectors.extras import extra

STEERED, RANDOM, BASE = "#1f6fb4", "#8a8a8a", "#222222"
WIDTH, HEIGHT, DPI = 3.9, 3.3, 130


def draw(report: EvaluationReport, format: Literal["png", "svg"]) -> bytes:
    """The picture as a file: a panel for each grader's successes, one for broken texts, one for KL."""
    # It takes seconds to load, which the start of a server need not wait for.
    with extra("plots"):
        from matplotlib.figure import Figure

    panels: list[tuple[str, Callable[[ArmView], float]]] = [
        (f"success: {grader['kind']}", _success(n)) for n, grader in enumerate(report.graders)]
    panels += [("broken texts", lambda arm: arm.graded[0].broken.share), ("KL, nats a token", lambda arm: arm.kl)]
    if report.controls:
        panels.append(("success on prompts\nthat should not change",
                       lambda arm: 0.0 if arm.controls is None else arm.controls.success.share))
    if report.tasks:
        panels.append(("unrelated questions\nanswered rightly",
                       lambda arm: 0.0 if arm.tasks is None else arm.tasks.share))
    figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), layout="constrained", dpi=DPI)
    for axes, (title, of) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, report, of)
        axes.set(title=title, xlabel="dose (times the spec's strengths)")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if not title.startswith("KL"):
            axes.set_ylim(-0.03, 1.03)
    figure.axes[0].legend(fontsize=8, frameon=False)
    out = io.BytesIO()
    # Without a date the same report gives the same bytes.
    figure.savefig(out, format=format, metadata={"Date": None} if format == "svg" else {"Software": None})
    return out.getvalue()


def _success(grader: int) -> Callable[[ArmView], float]:
    return lambda arm: arm.graded[grader].success.share


def _panel(axes: Any, report: EvaluationReport, of: Callable[[ArmView], float]) -> None:
    results = sorted(report.results, key=lambda one: one.steered.dose)
    doses = [one.steered.dose for one in results]
    axes.axhline(of(report.untouched), color=BASE, linestyle=":", linewidth=1, label="untouched")
    if report.draws:
        for dose, one in zip(doses, results, strict=True):
            values = sorted(of(arm) for arm in one.random)
            axes.scatter([dose] * len(values), values, color=RANDOM, s=12, alpha=0.6,
                         label="random, equal size" if dose == doses[0] else None)
    axes.plot(doses, [of(one.steered) for one in results], color=STEERED, marker="o", markersize=5, linewidth=1.4,
              label="spec")
