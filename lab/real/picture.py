"""One picture of all claims: successes untouched, steered, and under random artifacts."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from lab.real.page import Document

OURS, CONTROL, PLAIN = "#1b6ca8", "#b0b0b0", "#303030"


def drawn(results: Sequence[Document]) -> Figure:
    tests = [(f"{result['claim']}: {test['measured']}", test) for result in results for test in result["tests"]]
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(tests)), layout="constrained")
    axes = figure.subplots()
    for y, (_, test) in enumerate(reversed(tests)):
        draws = test["random"].get("success", ())
        if draws:
            axes.hlines(y, min(draws), max(draws), color=CONTROL, linewidth=9, label="20 random artifacts, range")
        axes.plot(test["untouched"]["success"], y, "o", color=PLAIN, fillstyle="none", markersize=9,
                  label="untouched")
        axes.plot(test["ours"]["success"], y, "o", color=OURS, markersize=9, label="steered")
    axes.set_yticks(range(len(tests)), [name for name, _ in reversed(tests)], fontsize=9)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.6, len(tests) - 0.4)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    figure.suptitle("SmolLM2-135M-Instruct: share of whole answers that are as is meant", fontsize=10)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure
