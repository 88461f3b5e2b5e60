"""The picture: for each scenario and system, when the trainer goes on, when the step is safe, when it is back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.scenarios import TITLES
from bench.system import OURS

_MARKS = {  # Label, marker, colour, distance from the middle of the row.
    "T_block": ("call returned (T_block)", "s", "#9aa5ab", -0.27),
    "T_safe": ("tensors may change (T_safe)", "o", "#1f77b4", -0.09),
    "T_mem": ("safe in memory (T_mem)", "D", "#d62728", 0.09),
    "T_rec": ("read back, fresh process (T_rec)", "^", "#2ca02c", 0.27),
}
_LEAST = 0.01  # What is less is drawn there: a logarithmic axis has no zero.


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [c for c in results["cells"] if c["ranks"] == 1 and not c["one_core"] and "error" not in c]
    scenarios = [s for s in TITLES if any(c["scenario"] == s for c in cells)]
    titles = list(dict.fromkeys(c["title"] for c in cells))
    height = 1.7 + 0.5 * len(titles)  # Inches.
    figure, panels = pyplot.subplots(1, len(scenarios), figsize=(13, height), sharey=True, sharex=True, squeeze=False)
    for axes, scenario in zip(panels[0], scenarios, strict=True):
        axes.axvline(1.0, color="0.3", linewidth=1)
        for cell in cells:
            if cell["scenario"] == scenario:
                _draw_cell(axes, titles.index(cell["title"]), cell)
        axes.set_xscale("log")
        axes.set_title(TITLES[scenario], fontsize=11)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ours = {c["title"] for c in cells if c["system"] in OURS}
    panels[0][0].set_yticks(range(len(titles)), titles)
    for label in panels[0][0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in ours else "normal")
    panels[0][0].set_ylim(len(titles) - 0.5, -0.5)
    handles = [
        pyplot.Line2D([], [], color=color, marker=marker, linestyle="", markersize=8, label=label)
        for label, marker, color, _ in _MARKS.values()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False)
    figure.supxlabel(
        "multiples of one warm single-thread memcpy of the same bytes (median, whiskers min–max; 1 rank)",
        y=0.38 / height,
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.4 / height, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_cell(axes: Any, row: int, cell: dict[str, Any]) -> None:
    axes.axhspan(row - 0.5, row + 0.5, color="0.96" if row % 2 else "1.0", zorder=-1)
    for name, (_, marker, color, offset) in _MARKS.items():
        figure = cell[name]["x"]
        low, middle, high = (max(_LEAST, figure[k]) for k in ("min", "median", "max"))
        axes.errorbar(
            [middle],
            [row + offset],
            xerr=[[middle - low], [high - middle]],
            color=color,
            marker=marker,
            markersize=6,
            capsize=2,
        )
