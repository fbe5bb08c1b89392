# SPDX-License-Identifier: Apache-2.0
"""`surg-perception evaluate`: how good a model or saved predictions are. PyTorch for `surgllm` alone."""

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
    engine.add_argument(
        "--backend", default="auto", help="tensorrt, openvino, onnxruntime or torch (default: %(default)s)"
    )
    engine.add_argument(
        "--precision",
        default="fp32",
        help="fp32, bf16; fp32-w8, bf16-w8: the head's weights in int8, with openvino; fp16, fp16-mixed: with tensorrt "
        "(default: %(default)s)",
    )
    engine.add_argument("--device", help="CPU, CUDA or GPU (default: the best one)")
    engine.add_argument("--threads", type=int, help="on the CPU (default: the cores, at most four)")
    engine.add_argument("--cache", type=Path, metavar="DIR", help="keep resized frames there for the next time")
    phase.set_defaults(run=_phase)
    _add_surgllm(actions)


def _add_surgllm(actions: Any) -> None:
    surgllm = actions.add_parser(
        "surgllm",
        help="answers to questions: accuracy, times, n-gram metrics, beside majority answers and a blanked video",
        description="Ask a model questions about labelled video. Writes results.json, report.md, examples.md and their "
        "pictures into --out; examples hold frames of the data. A run that was interrupted goes on.",
    )
    surgllm.add_argument("model", metavar="MODEL", help="name or folder of a SurgLLM")
    surgllm.add_argument("data", metavar="DATA", help="labelled data set, or phantom:seeds=3000-3003,duration_s=120")
    surgllm.add_argument("--questions", type=Path, metavar="FILE", help="questions (JSON) instead of ones made by rule")
    surgllm.add_argument(
        "--per-task", type=int, default=100, metavar="N", help="questions made of each task (default: %(default)s)"
    )
    surgllm.add_argument("--videos", nargs="+", metavar="NAME", help="only these, as VID79 or 79 (default: all)")
    surgllm.add_argument(
        "--stills", action="store_true", help="also frames without neighbours in time, each as a still"
    )
    surgllm.add_argument(
        "--train",
        metavar="PATH",
        help="data set or questions (JSON) that majority answers are chosen from, without the evaluated videos "
        "(default: the evaluated questions)",
    )
    surgllm.add_argument("--out", type=Path, default=Path("out/surgllm"), metavar="DIR", help="default: %(default)s")
    surgllm.add_argument(
        "--conditions",
        default="routed,oracle,joint,blank",
        metavar="LIST",
        help="of routed, oracle, joint and blank, by commas (default: all)",
    )
    surgllm.add_argument("--seed", type=int, default=0, help="of questions, intervals, examples (default: %(default)s)")
    surgllm.add_argument("--examples", type=int, default=4, metavar="N", help="of each task (default: %(default)s)")
    surgllm.add_argument("--batch", type=int, default=8, metavar="N", help="questions at once (default: %(default)s)")
    surgllm.add_argument("--threads", type=int, default=0, metavar="N", help="on the CPU (default: PyTorch's choice)")
    surgllm.set_defaults(run=_surgllm)


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


def _surgllm(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from surg_perception.data.clip_labels import open_clip_videos
    from surg_perception.gsvit.phase_labels_io import match_video
    from surg_perception.surgllm.answering import Assistant
    from surg_perception.surgllm.evaluation import evaluate
    from surg_perception.surgllm.questions import make_samples, read_samples
    from surg_perception.surgllm.report import summary_table, write_report

    every = clips = open_clip_videos(options.data, stills=options.stills)
    if options.videos:
        groups = list(dict.fromkeys(clip.video for clip in every))
        chosen = {match_video(name, groups, options.data) for name in options.videos}
        clips = [clip for clip in every if clip.video in chosen]
    if options.questions is None:
        samples = make_samples(clips, options.seed, options.per_task)
    else:
        names = {clip.name for clip in clips}
        samples = [one for one in read_samples(options.questions, videos=every) if one.video in names]
    evaluated = {sample.group for sample in samples}
    if options.train is None:
        train = []
    elif Path(options.train).is_file() and Path(options.train).suffix == ".json":
        train = read_samples(options.train)
    else:
        others = open_clip_videos(options.train, stills=options.stills)
        others = [clip for clip in others if clip.video not in evaluated]
        if not others:
            raise ValueError(f"--train {options.train} has no video beside the evaluated ones, expected others")
        train = make_samples(others, options.seed, options.per_task)
    assistant = Assistant.load(options.model, threads=options.threads)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("")
        evaluation = evaluate(
            assistant,
            samples,
            clips,
            out=options.out,
            train=train,
            conditions=[name.strip() for name in options.conditions.split(",")],
            batch=options.batch,
            seed=options.seed,
            progress=lambda done, total: bar.update(shown, completed=done, total=total),
        )
    source = f"{assistant.model_id} on {options.data}"
    report = write_report(evaluation, clips, options.out, source=source, per_task=options.examples, seed=options.seed)
    console.print(summary_table(evaluation.results))
    console.print(f"{report} (and results.json, examples.md beside it)", markup=False, highlight=False)
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
