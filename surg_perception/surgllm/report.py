# SPDX-License-Identifier: Apache-2.0
"""What an evaluation of SurgLLM looks like to a reader: report.md, figures, and a page of example clips."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from surg_perception.data.clip_labels import ClipVideo
from surg_perception.stream.ribbon import GRID, QUIET, TEXT
from surg_perception.surgllm.evaluation import BASELINES, Evaluation
from surg_perception.surgllm.questions import Sample
from surg_perception.surgllm.text_metrics import CAPTION_METRICS

NAMES = {
    "routed": "model (routed)",
    "oracle": "model (oracle adapter)",
    "joint": "model (joint adapter)",
    "blank": "video blanked",
    "majority": "majority",
    "majority_type": "majority by type",
}
METRIC_NAMES = {
    "accuracy": "accuracy",
    "within_1_s": "within 1 s",
    "mean_iou": "mean IoU",
    "iou_50": "IoU ≥ 0.5",
    "readable": "readable",
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
RIGHT = 0.5
"""Score from which an answer counts as right among the examples."""

_COLOURS = {"model": "#0072b2", "blank": "#d55e00", "majority": "#8c8c8c"}
_GREEN, _RED = "#00704f", "#b8330b"
_THUMB_PX, _COLUMNS = 200, 8


def write_report(
    evaluation: Evaluation,
    videos: Sequence[ClipVideo],
    out: str | Path,
    *,
    source: str,
    per_task: int = 4,
    seed: int = 0,
) -> Path:
    """Write report.md and pictures/ into a folder, and examples.md with examples/; returns the path of report.md.

    report.md and its figures hold no frame of the data; the examples do, and stay under the data's licence.

    Args:
        evaluation: what came out.
        videos: clips that the samples are about.
        out: folder.
        source: what was evaluated on what, for the title.
        per_task: examples of each task, half of them right where there are enough, drawn by chance; 0 for none.
        seed: of that.
    """
    out = Path(out)
    for folder in ("pictures", "examples"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    plot_scores(out / "pictures" / "tasks.png", evaluation.results)
    plot_router(out / "pictures" / "router.png", evaluation.results["router"])
    for old in (out / "examples").glob("*.png"):
        old.unlink()
    sheets: dict[str, str] = {}
    clips = {video.name: video for video in videos}
    examples = choose_examples(evaluation, per_task, seed) if per_task else {}
    for task, chosen in examples.items():
        name = "".join(letter if letter.isalnum() else "_" for letter in task)
        sheets[task] = f"examples/{len(sheets) + 1}_{name}.png"
        plot_examples(out / sheets[task], evaluation, clips, chosen)
    _write(out / "examples.md", _examples_page(evaluation, sheets, source, per_task, seed))
    _write(out / "report.md", _report(evaluation.results, source))
    return out / "report.md"


def summary_table(results: Mapping[str, Any]) -> Table:
    """Scores by task beside the baselines, for a terminal of 80 columns."""
    table = Table(title=f"{results['model']}: {results['samples']} questions", title_justify="left", box=SIMPLE_HEAD)
    table.padding, table.pad_edge, table.show_edge = (0, 1, 0, 0), False, False
    head, rows = _task_rows(results, interval=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    return table


def choose_examples(evaluation: Evaluation, per_task: int, seed: int) -> dict[str, list[int]]:
    """Indices of samples by task, drawn by chance: right answers, then wrong ones, half of each where there are enough.

    Captions are neither: any are drawn.
    """
    scores = evaluation.scores[evaluation.results["model_condition"]]
    rng = np.random.default_rng(seed)
    chosen: dict[str, list[int]] = {}
    for task in evaluation.results["tasks"]:
        order = [i for i in rng.permutation(len(evaluation.samples)).tolist() if evaluation.samples[i].task == task]
        if all(evaluation.samples[i].kind == "open" for i in order):
            chosen[task] = order[:per_task]
            continue
        right = [i for i in order if scores[i] >= RIGHT]
        wrong = [i for i in order if scores[i] < RIGHT]
        half = min(len(right), max(per_task - per_task // 2, per_task - len(wrong)))
        chosen[task] = right[:half] + wrong[: per_task - half]
    return chosen


def plot_scores(path: str | Path, results: Mapping[str, Any]) -> None:
    """Save a PNG: bars per task of model, blanked video and majority answer with 95 % intervals; CIDEr on its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    model = results["model_condition"]
    shown = {"model": model, "blank": "blank", "majority": "majority"}
    shown = {key: name for key, name in shown.items() if name in results["conditions"]}
    panels = [
        ("percent", 100.0, [task for task, one in results["tasks"].items() if one["metric"] == "score"]),
        ("CIDEr", 1.0, [task for task, one in results["tasks"].items() if one["metric"] == "cider"]),
    ]
    panels = [panel for panel in panels if panel[2]]
    widths = [len(tasks) + 0.6 for _, _, tasks in panels]
    fig = Figure(figsize=(2.2 + 1.35 * sum(widths), 4.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    axes = fig.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    bar = 0.8 / len(shown)
    for ax, (unit, scale, tasks) in zip(axes, panels, strict=True):
        for i, (key, name) in enumerate(shown.items()):
            found = [results["tasks"][task]["scores"][name] for task in tasks]
            means = np.array([scale * one["mean"] for one in found])
            ends = np.array([[scale * one["low"] for one in found], [scale * one["high"] for one in found]])
            at = np.arange(len(tasks)) + (i - (len(shown) - 1) / 2) * bar
            ax.bar(at, means, bar * 0.94, color=_COLOURS[key], label=NAMES[name])
            reach = np.maximum([means - ends[0], ends[1] - means], 0.0)
            ax.errorbar(at, means, reach, fmt="none", ecolor=TEXT, elinewidth=1, capsize=2)
        counts = [results["tasks"][task]["samples"] for task in tasks]
        labels = [f"{task}\nn = {count}" for task, count in zip(tasks, counts, strict=True)]
        ax.set_xticks(range(len(tasks)), labels, fontsize=10, color=TEXT)
        ax.set_ylabel(unit, fontsize=11, color=QUIET)
        ax.set_ylim(0, 100 if scale == 100 else None)
        _quiet(ax)
        ax.grid(axis="y", color=GRID, linewidth=0.6)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=10, labelcolor=TEXT)
    fig.suptitle("Scores by task, with 95 % intervals", x=0.01, ha="left", fontsize=13, fontweight="bold", color=TEXT)
    fig.savefig(path, format="png")


def plot_router(path: str | Path, router: Mapping[str, Any]) -> None:
    """Save a PNG: where the router sent the questions of each task, percent of rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.asarray(router["confusion"], np.float64)
    sizes = counts.sum(axis=1, keepdims=True)
    shares = 100.0 * np.divide(counts, sizes, out=np.zeros_like(counts), where=sizes > 0)
    names = router["tasks"]
    columns = [*names, "joint adapter", "refused"]
    side = 2.4 + 0.72 * len(names)
    fig = Figure(figsize=(side + 2.2, side), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot()
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for i, j in np.ndindex(shares.shape):
        if counts[i, j]:
            text = f"{shares[i, j]:.0f}" if shares[i, j] >= 0.5 else "<1"
            ax.text(j, i, text, ha="center", va="center", fontsize=11, color="white" if shares[i, j] > 55 else TEXT)
    ax.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor", fontsize=10.5)
    labels = [f"{name} ({int(size)})" for name, size in zip(names, sizes[:, 0], strict=True)]
    ax.set_yticks(range(len(names)), labels, fontsize=10.5, color=TEXT)
    _quiet(ax)
    ax.set_xlabel("routed to", fontsize=11, color=QUIET)
    ax.set_ylabel("task of the question", fontsize=11, color=QUIET)
    ax.set_title("Router, percent of questions", loc="left", fontsize=13, fontweight="bold", color=TEXT)
    fig.savefig(path, format="png")


def plot_examples(
    path: str | Path, evaluation: Evaluation, clips: Mapping[str, ClipVideo], chosen: Sequence[int]
) -> None:
    """Save a PNG: for each chosen sample its question, truth and answer above the frames of its window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    strips = [_strip(clips[evaluation.samples[i].video], evaluation.samples[i]) for i in chosen]
    texts = [_example_lines(evaluation, i) for i in chosen]
    width, line = 13.0, 0.21
    heights = [
        line * len(text) + 0.35 + width * strip.shape[0] / strip.shape[1]
        for text, strip in zip(texts, strips, strict=True)
    ]
    total = sum(heights)
    fig = Figure(figsize=(width + 0.3, total), dpi=110, facecolor="white")
    FigureCanvasAgg(fig)
    top = total
    for text, strip, height in zip(texts, strips, heights, strict=True):
        at = top - 0.15
        for words, colour, weight in text:
            fig.text(0.15 / (width + 0.3), at / total, words, va="top", fontsize=11, color=colour, fontweight=weight)
            at -= line
        picture = width * strip.shape[0] / strip.shape[1]
        ax = fig.add_axes((0.15 / (width + 0.3), (at - 0.05 - picture) / total, width / (width + 0.3), picture / total))
        ax.imshow(strip[..., ::-1])
        ax.set_axis_off()
        top -= height
    fig.savefig(path, format="png")


def _example_lines(evaluation: Evaluation, i: int) -> list[tuple[str, str, str]]:
    """(words, colour, weight) of the lines above an example's frames."""
    sample, model = evaluation.samples[i], evaluation.results["model_condition"]
    score = evaluation.scores[model][i]
    if sample.kind == "open":
        verdict, colour = f"CIDEr {score:.2f}", TEXT
    elif sample.kind == "interval" and 0 < score < 1:
        verdict, colour = f"IoU {score:.2f}", _GREEN if score >= RIGHT else _RED
    else:
        verdict, colour = ("right", _GREEN) if score >= RIGHT else ("wrong", _RED)
    found = [
        (f"{sample.question}   [{sample.video}, seconds {sample.start_s} to {sample.end_s - 1}]", TEXT, "bold"),
        (f"truth: {sample.answer}", TEXT, "normal"),
        (f"answer: {evaluation.answers[model][i] or '(nothing)'}   ({verdict})", colour, "normal"),
    ]
    if "blank" in evaluation.answers:
        found.append((f"video blanked: {evaluation.answers['blank'][i] or '(nothing)'}", QUIET, "normal"))
    return [
        (part.replace("$", r"\$"), colour, weight)  # "$" would begin a formula
        for words, colour, weight in found
        for part in textwrap.wrap(
            "".join(letter if letter.isprintable() else "·" for letter in words), 140, subsequent_indent="    "
        )
    ]


def _strip(clip: ClipVideo, sample: Sample) -> NDArray[np.uint8]:
    """Frames of a window with the number of each second, BGR; at most _COLUMNS in a row."""
    thumbs = []
    for second, frame in enumerate(clip.frames(range(sample.start_s, sample.end_s))):
        height = round(_THUMB_PX * frame.shape[0] / frame.shape[1])
        thumb = cv2.resize(frame, (_THUMB_PX, height), interpolation=cv2.INTER_AREA)
        for colour, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):
            cv2.putText(thumb, str(second), (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, colour, thickness, cv2.LINE_AA)
        thumbs.append(cv2.copyMakeBorder(thumb, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255)))
    rows = [thumbs[first : first + _COLUMNS] for first in range(0, len(thumbs), _COLUMNS)]
    white = np.full_like(thumbs[0], 255)
    return np.vstack([np.hstack([*row, *[white] * (_COLUMNS - len(row))]) for row in rows])


def _report(results: Mapping[str, Any], source: str) -> list[str]:
    tasks, router = results["tasks"], results["router"]
    model = results["model_condition"]
    against = [name for name in ("majority", "majority_type", "blank") if name in results["conditions"]]
    lines = [
        f"# SurgLLM: {source}",
        "",
        f"Measured here: {results['samples']} questions about {results['videos']} videos; model {results['model']}. "
        f"Majority answers were chosen from {results['majority_from']}.",
        "",
        *(f"- **{NAMES[name]}**: {text}" for name, text in results["conditions"].items()),
        "",
        "## By task",
        "",
        "Percent right (closed answers exactly, seconds within 1 s) with interval answers at their IoU; for captions "
        "CIDEr. In brackets the 95 % interval. *Beats both*: more than the task's majority answer and than the same "
        "model with the video blanked; *surely* where the 95 % intervals of both differences are above 0; "
        "*not by type*: the majority answer of each type of question is as good or better.",
        "",
        *_table(*_task_rows(results, interval=True)),
        "",
        "![Scores by task](pictures/tasks.png)",
        "",
        "## Differences",
        "",
        f"{NAMES[model]} minus each, paired by question:",
        "",
        *_table(
            ["", *(NAMES[name] for name in against), "interval over"],
            [
                [
                    task,
                    *(_estimate(one["margins"][name], one["metric"], sign="+") for name in against),
                    f"{one['videos']} videos" if one["interval_over"] == "videos" else f"{one['samples']} samples",
                ]
                for task, one in tasks.items()
            ],
        ),
        "",
    ]
    captions = {task: one["kinds"]["open"] for task, one in tasks.items() if "open" in one["kinds"]}
    for task, block in captions.items():
        lines += [
            f"## N-gram metrics: {task}",
            "",
            f"{block['samples']} captions with one reference each. BLEU, METEOR and ROUGE-L in percent, CIDEr 0 to 10.",
            "",
            *_table(
                ["", *(METRIC_NAMES[name] for name in CAPTION_METRICS)],
                [
                    [NAMES[name], *(_metric(metric, values[metric]) for metric in CAPTION_METRICS)]
                    for name, values in block["metrics"].items()
                ],
            ),
            "",
        ]
    rows = [
        [task, kind, str(block["samples"]), METRIC_NAMES[metric]]
        + [_metric(metric, values[metric]) for values in block["metrics"].values()]
        for task, one in tasks.items()
        for kind, block in one["kinds"].items()
        if kind != "open"
        for metric in next(iter(block["metrics"].values()))
    ]
    if rows:
        names = [NAMES[name] for name in results["conditions"]]
        lines += [
            "## By kind of answer",
            "",
            "Percent. *Readable*: a time can be read in the answer where the truth has one.",
            "",
            *_table(["task", "kind", "n", "metric", *names], rows),
            "",
        ]
    ensemble = [name for name in ("routed", "oracle", "joint") if name in results["conditions"]]
    lines += [
        "## Task ensemble",
        "",
        *_table(
            ["", *(NAMES[name] for name in ensemble)],
            [
                [task, *(_estimate(one["scores"][name], one["metric"]) for name in ensemble)]
                for task, one in tasks.items()
            ],
        ),
        "",
        f"The router's best task is the question's for {100 * router['accuracy']:.1f} % of the questions. It was sure "
        f"enough to pick one for {100 * router['picked']:.1f} %"
        + (f", of which {100 * router['picked_accuracy']:.1f} % went right" if router["picked"] else "")
        + f"; {100 * router['refused']:.1f} % were refused as out of scope; the joint adapter answers the rest.",
        "",
        "![Router](pictures/router.png)",
        "",
        "[Examples](examples.md), drawn by chance.",
        "",
        "## How it was measured",
        "",
        f"- {results['machine']['cpu']}, {results['machine']['cores']} cores, {results['machine']['system']}; "
        f"Python {results['machine']['python']}, "
        + ", ".join(f"{name} {version}" for name, version in results["machine"]["versions"].items()),
        f"- samples sha256 {results['samples_sha256']}",
        "- pictures: " + ", ".join(f"{name} {key}" for name, key in results["video_fingerprints"].items()),
    ]
    return lines


def _task_rows(results: Mapping[str, Any], *, interval: bool) -> tuple[list[str], list[list[str]]]:
    names = [results["model_condition"], *(n for n in ("blank", *BASELINES) if n in results["conditions"])]
    rows = []
    for task, one in results["tasks"].items():
        margins = [one["margins"][name] for name in ("majority", "blank") if name in one["margins"]]
        surely = ", surely" if all(margin["low"] > 0 for margin in margins) else ""
        verdict = {None: "–", False: "**no**", True: f"yes{surely}"}[one["beats_both"]]
        if one["beats_both"] and one["margins"]["majority_type"]["mean"] <= 0:
            verdict += " (not by type)"
        label = f"{task} (CIDEr)" if one["metric"] == "cider" else task
        scores = [_estimate(one["scores"][name], one["metric"], interval=interval) for name in names]
        rows.append([label, str(one["samples"]), *scores, verdict])
    return ["task", "n", *(NAMES[name] for name in names), "beats both"], rows


def _examples_page(
    evaluation: Evaluation, sheets: Mapping[str, str], source: str, per_task: int, seed: int
) -> list[str]:
    return [
        f"# Examples: {source}",
        "",
        f"Up to {per_task} questions of each task, drawn by chance (seed {seed}), half of them right where there are "
        "enough. The number in a frame is its second in the window. These pictures are frames of the data and stay "
        "under its licence.",
        "",
        *(line for task, path in sheets.items() for line in (f"## {task}", "", f"![{task}]({path})", "")),
    ]


def _estimate(value: Mapping[str, float], metric: str, *, sign: str = "", interval: bool = True) -> str:
    scale, digits, fewer = (1.0, 2, 2) if metric == "cider" else (100.0, 1, 0)
    mean, low, high = (scale * value[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.{digits}f}" + (f" ({low:.{fewer}f} to {high:.{fewer}f})" if interval else "")


def _metric(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "cider" else f"{100 * value:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _quiet(ax: Any) -> None:
    ax.tick_params(length=0, labelcolor=TEXT)
    ax.set_axisbelow(True)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
