# SPDX-License-Identifier: Apache-2.0
"""Phases over time as coloured ribbons in a PNG: truth above predictions, one row each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from surg_perception.stream.phase_palette import clock, phase_colour_rgb, readable_name, tick_step_s

Row = tuple[str, npt.ArrayLike, npt.ArrayLike]

WIDTH_IN = 11.0
TEXT = "#24292f"
QUIET = "#6e7781"
GRID = "#d8dee4"
MARK = "#cf222e"


def plot_ribbons(
    path: str | Path,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    confidence: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    title: str = "",
    max_gap_s: float | None = None,
    marks: tuple[str, Sequence[tuple[float, float]]] | None = None,
    dpi: int = 150,
) -> None:
    """Save a PNG: one ribbon per row, the confidence below if given, a time axis, a legend of the phases.

    path: where to write; its folder must exist.
    rows: (title, times_s [N], phase_ids [N]) from top to bottom, e.g. truth, prediction raw, prediction
        filtered; times ascend, in seconds from the start of the procedure; a phase (-1: unknown, grey) holds
        until the next time, the last for a usual step. Rows may differ in length and rate; 1 to about 80.
    labels: phase names in the order of phase_ids; all are in the legend.
    confidence: (times_s [M], values [M] in 0..1, NaN: none).
    max_gap_s: steps longer than this stay empty; default five times the row's median step.
    marks: (title, (start_s, end_s) of each) of a red row below the ribbons, such as where two of them differ; a mark
        is wide enough to be seen.
    Raises ValueError naming the row that does not fit; ImportError where matplotlib is missing.
    """
    if not rows:
        raise ValueError("no rows to plot, expected at least one (title, times_s, phase_ids)")
    runs = [_runs(*row, max_gap_s) for row in rows]
    curve = None if confidence is None else _series("confidence", *confidence, np.float64)
    ends_s = [row_runs[-1][1] for row_runs in runs if row_runs]
    if curve is not None and len(curve[0]):
        ends_s.append(float(curve[0][-1]))
    span_s = max([*ends_s, 1e-3])

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    titles = [row[0] for row in rows] + ([marks[0]] if marks is not None else [])
    row_in = min(0.42, max(0.17, 5.0 / len(titles)))
    columns = min(4, max(1, len(labels)))
    heights_in = [
        row_in * len(titles),
        1.0 if curve is not None else 0.0,
        0.1 + 0.24 * math.ceil(len(labels) / columns),
    ]
    fig = Figure(figsize=(WIDTH_IN, sum(heights_in) + 0.6 + 0.35 * bool(title)), dpi=dpi, layout="constrained")
    FigureCanvasAgg(fig)
    fig.set_facecolor("white")
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=TEXT)
    panels = [h for h in heights_in if h]
    grid = fig.add_gridspec(len(panels), 1, height_ratios=panels)

    ax = fig.add_subplot(grid[0])
    for i, row_runs in enumerate(runs):
        ax.add_collection(
            PolyCollection(
                [[(a, i - 0.36), (b, i - 0.36), (b, i + 0.36), (a, i + 0.36)] for a, b, _ in row_runs],
                facecolors=[_colour(phase_id) for _, _, phase_id in row_runs],
                linewidths=0,
                antialiaseds=False,
            )
        )
    if marks is not None:
        for start_s, end_s in marks[1]:
            width_s = max(end_s - start_s, span_s / 400)
            ax.add_patch(Rectangle((start_s, len(rows) - 0.2), width_s, 0.4, color=MARK, linewidth=0))
    ax.set_ylim(len(titles) - 0.5, -0.5)
    ax.set_yticks(range(len(titles)), titles, fontsize=10.5 if row_in > 0.25 else 7.5, color=TEXT)
    time_axes = [ax]
    if curve is not None:
        below = fig.add_subplot(grid[1], sharex=ax)
        below.fill_between(curve[0], curve[1], color="#57606a", alpha=0.18, linewidth=0)
        below.plot(curve[0], curve[1], color="#57606a", linewidth=1.0)
        below.set_ylim(0.0, 1.0)
        below.set_yticks([0.0, 0.5, 1.0], ["", "50 %", "100 %"], fontsize=9, color=QUIET)
        below.set_ylabel("confidence", fontsize=9.5, color=TEXT)
        below.grid(axis="y", color=GRID, linewidth=0.6)
        time_axes.append(below)

    step_s = tick_step_s(span_s, 12)
    ticks_s = np.arange(0.0, span_s + 1e-9, step_s)
    for one in time_axes:
        one.set_xlim(0.0, span_s)
        one.set_axisbelow(True)
        one.grid(axis="x", color=GRID, linewidth=0.6)
        one.tick_params(length=0, labelbottom=one is time_axes[-1])
        for spine in one.spines.values():
            spine.set_visible(False)
    time_axes[-1].set_xticks(ticks_s, [clock(t) for t in ticks_s], fontsize=9, color=QUIET)

    patches = [Patch(color=_colour(i), label=readable_name(label)) for i, label in enumerate(labels)]
    if any(phase_id < 0 for row_runs in runs for _, _, phase_id in row_runs):
        patches.append(Patch(color=_colour(-1), label="Unknown"))
    names = fig.add_subplot(grid[-1])
    names.set_axis_off()
    names.legend(
        handles=patches,
        loc="center",
        ncol=columns,
        frameon=False,
        fontsize=9.5,
        labelcolor=TEXT,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=2.0,
    )
    fig.savefig(path, format="png", dpi=dpi)


def _colour(phase_id: int) -> tuple[float, float, float]:
    red, green, blue = phase_colour_rgb(phase_id)
    return red / 255, green / 255, blue / 255


def _series(
    title: str, times_s: npt.ArrayLike, values: npt.ArrayLike, dtype: type
) -> tuple[npt.NDArray[np.float64], npt.NDArray]:
    t, v = np.asarray(times_s, np.float64), np.asarray(values)
    if t.ndim != 1 or t.shape != v.shape:
        raise ValueError(f"row {title!r}: times {t.shape} and values {v.shape}, expected two lists of one length")
    if not np.isfinite(t).all() or (np.diff(t) < 0).any():
        raise ValueError(f"row {title!r}: times must be finite and ascend")
    return t, v.astype(dtype)


def _runs(
    title: str, times_s: npt.ArrayLike, phase_ids: npt.ArrayLike, max_gap_s: float | None
) -> list[tuple[float, float, int]]:
    """Stretches (start_s, end_s, phase_id) of equal phase without a gap."""
    t, ids = _series(title, times_s, phase_ids, np.int64)
    if not len(t):
        return []
    steps_s = np.diff(t)
    usual_s = float(np.median(steps_s)) if len(steps_s) else 1.0
    longest_s = 5.0 * usual_s if max_gap_s is None else max_gap_s
    gap = steps_s > longest_s
    ends_s = np.append(np.where(gap, t[:-1] + usual_s, t[1:]), t[-1] + usual_s)
    first = np.flatnonzero(np.concatenate([[True], gap | (np.diff(ids) != 0)]))
    last = np.append(first[1:], len(t)) - 1
    return list(zip(t[first].tolist(), ends_s[last].tolist(), ids[first].tolist(), strict=True))
