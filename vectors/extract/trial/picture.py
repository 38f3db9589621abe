"""The surface of a trial as a picture: success and broken texts against strength, by place, with the band."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any, Literal

from vectors.extras import extra

OURS, BROKEN, GREY = "#1b6ca8", "#c0392b", "#888888"


def draw(trial: Mapping[str, Any], title: str, format: Literal["png", "svg"]) -> bytes:
    """trial: as the card has it, with a surface."""
    # It takes seconds to load, which the start of a server need not wait for.
    with extra("plots"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    scouted, chosen = figure.subplots(1, 2, sharey=True)
    for row in trial["scouted"]:
        scouted.plot([arm["share"] for arm in row["arms"]], [arm["success"] for arm in row["arms"]], marker="o",
                     markersize=3, label=row["place"])
    scouted.set(xscale="log", xlabel="step, as a share of the activation's length", ylabel="share of the texts",
                title="places that were tried", ylim=(-0.03, 1.03))
    scouted.legend(fontsize=7)
    strengths = [arm["strength"] for arm in trial["surface"]]
    chosen.plot(strengths, [arm["success"] for arm in trial["surface"]], marker="o", color=OURS, label="success")
    chosen.plot(strengths, [arm["broken"] for arm in trial["surface"]], marker="x", color=BROKEN, label="broken")
    for axis in (scouted, chosen):
        axis.axhline(trial["untouched"]["success"], color=GREY, linestyle=":")
    if trial["random"]["success"]:
        chosen.axhspan(min(trial["random"]["success"]), max(trial["random"]["success"]), color=GREY, alpha=0.2,
                       label=f"success of {trial['random']['draws']} random vectors")
    if trial["band"] is not None:
        chosen.axvspan(trial["band"]["low"], trial["band"]["high"], color=OURS, alpha=0.08, label="band")
    chosen.axvline(trial["default"]["strength"], color=OURS, linestyle="--", label="default")
    chosen.set(xlabel="strength (raw)", title=trial["place"])
    chosen.legend(fontsize=7)
    figure.suptitle(title)
    out = BytesIO()
    # Without a date the same card gives the same bytes.
    figure.savefig(out, format=format, dpi=110,
                   metadata={"Date": None} if format == "svg" else {"Software": None})
    return out.getvalue()
