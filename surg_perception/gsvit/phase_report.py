# SPDX-License-Identifier: Apache-2.0
"""What an evaluation looks like to a reader: metrics.json, report.md and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from surg_perception.gsvit.phase_evaluation import VARIANTS, Evaluation
from surg_perception.gsvit.phase_labels_io import video_number
from surg_perception.gsvit.phase_metrics import MODES, PHASE_METRICS, VideoPhases
from surg_perception.stream.phase_palette import phase_colour_rgb, readable_name
from surg_perception.stream.ribbon import GRID, QUIET, TEXT, plot_ribbons

MODE_NAMES = {
    "strict": "strict",
    "relaxed_official": "official relaxed",
    "relaxed_corrected": "corrected relaxed",
}
COLUMNS = ("accuracy", *PHASE_METRICS)

# Table of the GSViT paper (arXiv 2403.05949): accuracy, precision, recall as (mean, sd).
PAPER_ROWS: tuple[tuple[str, str, tuple[tuple[float, float], ...]], ...] = (
    ("PhaseNet", "one frame", ((78.8, 4.7), (71.3, 15.6), (76.6, 16.6))),
    ("EndoNet", "one frame", ((81.7, 4.2), (73.7, 16.1), (79.6, 7.9))),
    ("TeCNO", "all frames so far", ((88.6, 7.8), (86.5, 7.0), (87.6, 6.7))),
    ("LoViT", "100 + 500 frames", ((92.4, 6.3), (89.9, 6.1), (90.6, 4.4))),
    ("GSViT", "one frame", ((86.3, 5.9), (82.5, 7.1), (84.7, 5.3))),
)
USUAL_TEST_SET = frozenset(range(41, 81))
_VIDEOS_PER_PICTURE = 10
_BAR = "#0072b2"
_GAP = "#d55e00"


def write_report(evaluation: Evaluation, out: str | Path) -> Path:
    """Write metrics.json, report.md and pictures/ into a folder; returns the path of report.md.

    metrics.json is strict JSON: what is not defined is null.
    """
    out = Path(out)
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    metrics = evaluation.metrics
    for old in pictures.glob("ribbons_*.png"):
        old.unlink()
    ribbons = []
    for number, part in enumerate(_parts(evaluation.videos), 1):
        ribbons.append(pictures / f"ribbons_{number}.png")
        _plot_video_ribbons(ribbons[-1], part, evaluation.phases)
    plot_confusion(pictures / "confusion.png", metrics["confusion"], evaluation.phases)
    if metrics["calibration"]:
        plot_reliability(pictures / "reliability.png", metrics["calibration"])
    _write(out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    report = out / "report.md"
    _write(report, "\n".join(_report(evaluation, [path.relative_to(out).as_posix() for path in ribbons])) + "\n")
    return report


def summary_table(evaluation: Evaluation) -> Table:
    """The few figures that fit a terminal of 80 columns: mean ± standard deviation in percent."""
    metrics = evaluation.metrics
    table = Table(title=f"{evaluation.source}: {_scope(metrics)}, percent", title_justify="left", box=SIMPLE_HEAD)
    table.padding, table.pad_edge, table.show_edge = (0, 1, 0, 0), False, False
    table.add_column("", no_wrap=True)
    columns = [name for name in COLUMNS if name != "f1"]
    for name in columns:
        table.add_column(_heading(name), justify="right", no_wrap=True)
    for mode in MODES:
        if metrics[mode]:
            table.add_row(MODE_NAMES[mode], *(_mean_std(metrics[mode][name]) for name in columns))
    return table


def warnings(metrics: Mapping[str, Any], videos: Sequence[VideoPhases]) -> list[str]:
    """Why these figures must not stand beside published ones, and what else a reader should know."""
    found = []
    numbers = {video_number(video.name) for video in videos}
    if metrics["label_set"] == "cholec80" and not (numbers == USUAL_TEST_SET and len(videos) == len(USUAL_TEST_SET)):
        found.append(
            f"**Not the usual test set.** Published Cholec80 figures are of videos 41 to 80; here {len(videos)} "
            f"{'video was' if len(videos) == 1 else 'videos were'} evaluated. Do not compare them as equals."
        )
    sparse = [v for v in videos if not math.isclose(v.step_s, 1.0, rel_tol=0.02)]
    if metrics["label_set"] == "cholec80" and sparse:
        found.append(
            f"**Not at 1 fps.** {len(sparse)} of {len(videos)} videos have another usual step between samples "
            f"({', '.join(sorted({f'{v.step_s:g} s' for v in sparse}))}) and were evaluated on their samples as they "
            "are; the relaxed window is the whole samples in 10 s."
        )
    if metrics["relaxed_official"] is None:
        found.append(f"No relaxed figures: the official rules know only cholecystectomy, not {metrics['label_set']!r}.")
    if absent := metrics["phases_absent_from_truth"]:
        found.append(
            f"Absent from the truth of every video: {_list(absent)}. The official script's Jaccard and recall are NaN "
            "then (–); the strict and corrected ones are means over the other phases."
        )
    if never := metrics["phases_never_predicted"]:
        found.append(
            f"Never predicted: {_list(never)}. Their precision is 0/0 and left out of the mean, as the script does, "
            "so the mean precision is better than it deserves; recall, Jaccard and F1 are not."
        )
    return found + [f"{video.name}: {note}" for video in videos for note in video.notes]


def plot_confusion(path: str | Path, matrix: Any, phases: Sequence[str]) -> None:
    """Save a PNG: shares of each true phase (rows sum to 100 %) by predicted phase; grey rows have no sample."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.asarray(matrix, np.float64)
    sizes = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, sizes, out=np.full_like(counts, np.nan), where=sizes > 0)
    side = 2.6 + 0.8 * len(phases)
    fig = Figure(figsize=(side + 1.2, side), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot()
    ax.set_facecolor("#eeeeee")
    ax.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    for i, j in np.ndindex(shares.shape):
        if counts[i, j]:
            share = 100.0 * shares[i, j]
            text = f"{share:.0f}" if share >= 0.5 else "<1"
            ax.text(j, i, text, ha="center", va="center", fontsize=12, color="white" if share > 55 else TEXT)
    names = [readable_name(phase) for phase in phases]
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=10.5, color=TEXT)
    ax.set_yticks(
        range(len(names)),
        [f"{name}\n{int(size):,} samples" for name, size in zip(names, sizes[:, 0], strict=True)],
        fontsize=10.5,
        color=TEXT,
    )
    for phase in range(len(names)):
        for x, y, width, height in ((phase - 0.5, len(names) - 0.5, 1, 0.09), (-0.59, phase - 0.5, 0.09, 1)):
            ax.add_patch(_box(x, y, width, height, phase))
    ax.tick_params(length=0, pad=8)
    ax.set_xlabel("predicted", fontsize=11.5, color=QUIET)
    ax.set_ylabel("true", fontsize=11.5, color=QUIET)
    ax.set_title(
        "Where the samples of each true phase went, percent", loc="left", fontsize=13, fontweight="bold", color=TEXT
    )
    for spine in ax.spines.values():
        spine.set_visible(False)
    fig.savefig(path, format="png")


def plot_reliability(path: str | Path, calibration: Mapping[str, Any]) -> None:
    """Save a PNG: accuracy over confidence with the diagonal of perfect calibration, and how many samples there are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    bins = [one for one in calibration["bins"] if one["count"]]
    total = sum(one["count"] for one in bins)
    fig = Figure(figsize=(6.4, 7.0), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = calibration["bins"][0]["upper"] * 0.92
    middles = [(one["lower"] + one["upper"]) / 2 for one in bins]
    upper.bar(middles, [one["accuracy"] for one in bins], width, color=_BAR, alpha=0.85)
    upper.plot(
        [one["confidence"] for one in bins],
        [one["accuracy"] for one in bins],
        *("o",),
        color=_GAP,
        markersize=5,
        clip_on=False,
        label="at the bin's mean confidence",
    )
    upper.plot([0, 1], [0, 1], color=TEXT, linewidth=1.2, linestyle="--", label="perfectly calibrated")
    upper.set_ylim(0, 1)
    upper.set_ylabel("share of predictions that are right", fontsize=11, color=TEXT)
    upper.legend(loc="upper left", frameon=False, fontsize=10, labelcolor=TEXT)
    upper.set_title(
        f"Calibration: ECE {calibration['ece']:.3f} on {total:,} samples",
        loc="left",
        fontsize=13,
        fontweight="bold",
        color=TEXT,
    )
    lower.bar(middles, [one["count"] / total for one in bins], width, color=QUIET, alpha=0.8)
    lower.set_ylabel("samples", fontsize=11, color=TEXT)
    lower.set_xlabel("confidence", fontsize=11, color=TEXT)
    lower.set_xlim(0, 1)
    for ax in (upper, lower):
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.tick_params(length=0, labelsize=10, labelcolor=TEXT)
        ax.set_axisbelow(True)
        ax.grid(color=GRID, linewidth=0.6)
        for spine in ax.spines.values():
            spine.set_visible(False)
    fig.savefig(path, format="png")


def _box(x: float, y: float, width: float, height: float, phase: int) -> Any:
    from matplotlib.patches import Rectangle

    red, green, blue = (channel / 255 for channel in phase_colour_rgb(phase))
    return Rectangle((x, y), width, height, color=(red, green, blue), clip_on=False, linewidth=0)


def _parts(videos: Sequence[VideoPhases]) -> Iterator[Sequence[VideoPhases]]:
    count = math.ceil(len(videos) / _VIDEOS_PER_PICTURE)
    size = math.ceil(len(videos) / count)
    for start in range(0, len(videos), size):
        yield videos[start : start + size]


def _plot_video_ribbons(path: Path, videos: Sequence[VideoPhases], phases: Sequence[str]) -> None:
    rows: list[tuple[str, Any, Any]] = []
    for video in videos:
        if rows:
            rows.append(("", [], []))
        rows += [
            (f"{video.name}  truth", video.times_s, video.truth),
            ("prediction", video.times_s, video.prediction),
        ]
    plot_ribbons(path, rows, phases, title="Truth and prediction")


def _report(evaluation: Evaluation, ribbons: Sequence[str]) -> list[str]:
    metrics, phases = evaluation.metrics, evaluation.phases
    blocks = {mode: metrics[mode] for mode in MODES if metrics[mode]}
    lines = [
        f"# Phase recognition: {evaluation.source}",
        "",
        f"Measured here on {_scope(metrics)}. Percent, mean ± standard deviation (N-1): accuracy over videos; the rest "
        "over phases, each phase's value being its mean over the videos that have it.",
        "",
        *(f"- {note}" for note in [*warnings(metrics, evaluation.videos), *metrics["notes"]]),
        "",
        *_table(
            ["", *map(_heading, COLUMNS)],
            [[MODE_NAMES[mode], *(_mean_std(block[name]) for name in COLUMNS)] for mode, block in blocks.items()],
        ),
        "",
        "*Strict* counts a sample as right where the phase is right. *Official relaxed* forgives transitions "
        "within 10 s as the MATLAB script of published tables does, its bug included (early transitions are forgiven "
        "at the wrong end of the segment). *Corrected relaxed* forgives them where they are.",
        "",
        "## Beside published figures",
        "",
        *_paper_table(metrics, blocks),
        "",
        "Quoted rows are as printed in that table, mean ± sd over test videos. They were not measured here.",
        "",
    ]
    segmental = metrics["segmental"]
    lines += [
        "## Segments",
        "",
        "Edit score and F1 of segments at an overlap of 10, 25 and 50 % (MS-TCN, arXiv 1903.01945), strict. "
        "Pooled: hits of all videos counted together, as MS-TCN does.",
        "",
        *_table(
            ["", "edit", "F1@10", "F1@25", "F1@50"],
            [
                ["mean ± sd over videos", *(_mean_std(value) for value in segmental.values())],
                ["pooled", "", *(f"{value['pooled']:.1f}" for value in segmental.values() if "pooled" in value)],
            ],
        ),
        "",
        "## By phase",
        "",
        *_phase_table(blocks, phases),
        "",
        "## Pictures",
        "",
        *(f"![Truth and prediction over time]({path})\n" for path in ribbons),
        "![Confusion matrix](pictures/confusion.png)",
        "",
    ]
    if metrics["calibration"]:
        lines += [
            f"Expected calibration error (15 bins): {metrics['calibration']['ece']:.4f}.",
            "",
            "![Reliability diagram](pictures/reliability.png)",
            "",
        ]
    lines += ["## By video", "", *_video_table(metrics, blocks)]
    if metrics.get("variants"):
        rows = [
            [f"{name}: {VARIANTS[name]}", *(_mean_std(one["strict"][column]) for column in COLUMNS), _ece(one)]
            for name, one in {"published": metrics, **metrics["variants"]}.items()
        ]
        lines += ["", "## Before the filter", "", *_table(["strict", *map(_heading, COLUMNS), "ECE"], rows)]
    return lines


def _paper_table(metrics: Mapping[str, Any], blocks: Mapping[str, Any]) -> list[str]:
    columns = ("accuracy", "precision", "recall")
    rows = [
        [
            f"**{MODE_NAMES[mode]}**",
            *(_mean_std(block[name]) for name in columns),
            f"**measured here**, {_scope(metrics)}",
        ]
        for mode, block in blocks.items()
    ]
    strict = blocks["strict"]
    rows.append(
        [
            "**strict, sd over videos**",
            _mean_std(strict["accuracy"]),
            *(_mean_std(strict["over_videos"][name]) for name in columns[1:]),
            "**measured here**, mean over its phases per video, then over videos",
        ]
    )
    rows += [
        [
            f"{name} ({sees})",
            *(f"{mean:.1f} ± {sd:.1f}" for mean, sd in values),
            "quoted from the GSViT paper (arXiv 2403.05949), Cholec80 videos 41 to 80",
        ]
        for name, sees, values in PAPER_ROWS
    ]
    return _table(["", *map(_heading, columns), "where from"], rows)


def _phase_table(blocks: Mapping[str, Any], phases: Sequence[str]) -> list[str]:
    modes = [mode for mode in ("strict", "relaxed_official") if mode in blocks]
    head = ["", *(f"{_heading(name)}, {MODE_NAMES[mode]}" for mode in modes for name in PHASE_METRICS)]
    rows = [
        [
            readable_name(phase),
            *(_mean_std(blocks[mode]["per_phase"][name][phase]) for mode in modes for name in PHASE_METRICS),
        ]
        for phase in phases
    ]
    return _table(head, rows)


def _video_table(metrics: Mapping[str, Any], blocks: Mapping[str, Any]) -> list[str]:
    head = [
        "video",
        "samples",
        *(f"accuracy, {MODE_NAMES[mode]}" for mode in blocks),
        *("Jaccard, strict", "F1, strict", "edit", "F1@10", "F1@25", "F1@50"),
    ]
    rows = []
    for name, one in metrics["per_video"].items():
        strict = blocks["strict"]["per_video"][name]
        rows.append(
            [
                name,
                f"{one['samples']:,}",
                *(_number(block["per_video"][name]["accuracy"]) for block in blocks.values()),
                *(_number(value) for value in (strict["jaccard"], strict["f1"])),
                *(_number(one[key]) for key in ("edit", "f1@10", "f1@25", "f1@50")),
            ]
        )
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    numeric = [all(not row[i] or row[i][0] in "0123456789–" for row in rows) for i in range(len(head))]
    align = ["---:" if right else "---" for right in numeric]
    return [f"| {' | '.join(cells)} |" for cells in (head, align, *rows)]


def _heading(name: str) -> str:
    return {"jaccard": "Jaccard", "f1": "F1"}.get(name, name)


def _scope(metrics: Mapping[str, Any]) -> str:
    count = metrics["videos"]
    return f"{count} video{'s' if count > 1 else ''}, {metrics['samples']:,} samples"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _mean_std(value: Mapping[str, float | None]) -> str:
    return "–" if value["mean"] is None else f"{_number(value['mean'])} ± {_number(value['std'])}"


def _ece(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['calibration']['ece']:.4f}" if metrics["calibration"] else "–"


def _list(phases: Sequence[str]) -> str:
    return ", ".join(map(readable_name, phases))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, "utf-8")
    partial.replace(path)
