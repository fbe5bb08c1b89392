# SPDX-License-Identifier: Apache-2.0
"""`surg-perception evaluate`: how good a model or saved predictions are. No PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(verbs: Any) -> None:
    """Add the verb `evaluate` to the command line."""
    evaluate = verbs.add_parser("evaluate", help="measure how good a model or saved predictions are")
    actions = evaluate.add_subparsers(dest="action", required=True, metavar="ACTION")
    phase = actions.add_parser(
        "phase",
        help="surgical phases: strict and relaxed metrics, segments, calibration, pictures",
        description="Evaluate a model on a data set (--model, --data; --labels where they lie elsewhere), or saved "
        "predictions against labels (--labels, --predictions). Writes metrics.json, report.md and pictures into --out.",
    )
    phase.add_argument("--model", metavar="MODEL", help="name or folder of a model to run")
    phase.add_argument("--data", metavar="PATH", help="data set to run it on, or phantom:seeds=3000-3003")
    phase.add_argument("--labels", type=Path, metavar="DIR", help="label files, such as video41-phase.txt")
    phase.add_argument("--predictions", type=Path, metavar="DIR", help="predictions in the same format")
    phase.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    phase.add_argument("--videos", nargs="+", metavar="NAME", help="only these, as video41 or 41 (default: all)")
    phase.add_argument(
        "--rate-hz",
        type=float,
        metavar="HZ",
        help="evaluate at most this many samples a second (default: 1; M2CAI16 predictions: all)",
    )
    files = phase.add_argument_group("label and prediction files (with --labels, --predictions)")
    files.add_argument("--label-set", default="cholec80", help="cholec80, m2cai16 or autolaparo (default: %(default)s)")
    files.add_argument(
        "--first-phase", type=int, choices=(0, 1), help="number of the first phase (default: told from the files)"
    )
    files.add_argument(
        "--frame-column",
        choices=("auto", "frames", "seconds"),
        default="auto",
        help="what it counts: frames at 25 fps or seconds (default: told from the files)",
    )
    engine = phase.add_argument_group("running a model (with --model, --data)")
    engine.add_argument("--backend", default="auto", help="openvino, onnxruntime or torch (default: %(default)s)")
    engine.add_argument("--precision", default="fp32", help="fp32 or bf16 (default: %(default)s)")
    engine.add_argument("--device", help="CPU, CUDA or GPU (default: the best one)")
    engine.add_argument("--threads", type=int, help="on the CPU (default: the cores, at most four)")
    engine.add_argument("--cache", type=Path, metavar="DIR", help="keep resized frames there for the next time")
    phase.set_defaults(run=_phase)


def _phase(options: argparse.Namespace) -> int:
    from rich.console import Console

    from surg_perception.gsvit.phase_report import summary_table, warnings, write_report

    saved = options.predictions is not None
    needed, unfit = (("labels",), ("model", "data")) if saved else (("model", "data"), ())
    if missing := [f"--{name}" for name in needed if getattr(options, name) is None]:
        raise ValueError(f"{' and '.join(missing)} missing: give --model and --data, or --labels and --predictions")
    if extra := [f"--{name}" for name in unfit if getattr(options, name) is not None]:
        raise ValueError(f"{' and '.join(extra)} given beside --predictions: evaluate a model or predictions, not both")
    console = Console()
    evaluation = _saved(options) if saved else _run(options, console)
    report = write_report(evaluation, options.out)
    console.print(summary_table(evaluation))
    for note in [*warnings(evaluation.metrics, evaluation.videos), *evaluation.metrics["notes"]]:
        console.print(f"- {note.replace('**', '')}", style="yellow", markup=False, highlight=False)
    console.print(f"{report} (and metrics.json, pictures/ beside it)", markup=False, highlight=False)
    return 0


def _saved(options: argparse.Namespace) -> Any:
    from surg_perception.gsvit.phase_evaluation import evaluate_folders

    return evaluate_folders(
        options.labels,
        options.predictions,
        label_set=options.label_set,
        videos=options.videos,
        first_number=options.first_phase,
        frame_unit=options.frame_column,
        rate_hz=options.rate_hz,
    )


def _run(options: argparse.Namespace, console: Any) -> Any:
    from surg_perception.data.datasets import open_dataset
    from surg_perception.gsvit.phase_evaluation import evaluate_model
    from surg_perception.gsvit.phase_labels_io import match_video

    dataset = open_dataset(options.data, rate_hz=options.rate_hz or 1.0, labels=options.labels)
    if options.videos:
        names = [video.name for video in dataset.videos]
        dataset = dataset.select(match_video(video, names, options.data) for video in options.videos)
    return evaluate_model(
        options.model,
        dataset,
        options.out,
        backend=options.backend,
        precision=options.precision,
        device=options.device,
        threads=options.threads,
        cache=options.cache,
        console=console,
    )
