# SPDX-License-Identifier: Apache-2.0
"""`surg-perception train`: pre-training and the trainings on top of it. Needs PyTorch and Accelerate."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from surg_perception.data.datasets import Dataset
    from surg_perception.gsvit.trainer import TrainSettings
    from surg_perception.models import ModelCard
    from surg_perception.surgllm.model_folder import SurgLLMCard

_SETTINGS: tuple[tuple[str, type, str], ...] = (
    ("epochs", int, "passes over the training set"),
    ("batch", int, "samples per step, over all processes"),
    ("learning_rate", float, "first learning rate (one_cycle: the highest)"),
    ("final_learning_rate", float, "last learning rate"),
    ("schedule", str, "linear, exponential or one_cycle"),
    ("optimiser", str, "adam or adamw"),
    ("weight_decay", float, "of matrices and kernels"),
    ("gradient_clip", float, "largest norm of the gradient, 0 for none"),
    ("ema_half_life_steps", float, "half-life of the weights' moving average in steps, 0 for none"),
    ("precision", str, "fp32, bf16 or (GPU only) fp16"),
    ("seed", int, "of everything random"),
    ("threads", int, "of PyTorch on the CPU, 0 for its own choice"),
    ("loader_threads", int, "that prepare batches ahead"),
    ("checkpoint_every_steps", int, "beside the end of each epoch, 0 for none"),
    ("validate_every_steps", int, "beside the end of each epoch, with pictures, 0 for none"),
)


def add_parser(verbs: Any) -> None:
    """Add the verb `train` to the command line."""
    train = verbs.add_parser("train", help="train models; needs PyTorch")
    actions = train.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_distil(actions)
    _add_gsvit(actions)
    _add_phase(actions)
    _add_surgllm(actions)
    _add_surgllm_task(actions)


def default_cache() -> Path:
    """Where resized frames are kept unless told: `$XDG_CACHE_HOME/surg_perception`, `~/.cache/…` without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "surg_perception" / "frames"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """DATA, --out, --rate-hz, --cache, --resume and --restart, which every training on video has."""
    parser.add_argument("data", nargs="+", metavar="DATA", help="data sets: folders, or phantom:seeds=1000-1009")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder to make")
    parser.add_argument(
        "--rate-hz", type=float, default=1.0, help="at most this many frames a second of video (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), metavar="DIR", help="for resized frames (default: %(default)s)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", dest="resume", action="store_true", default=True, help="go on where a run in --out ended (default)"
    )
    again.add_argument("--restart", dest="resume", action="store_false", help="delete what such a run left and begin")


def add_settings_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `TrainSettings`; what is not given keeps the training's own default."""
    group = parser.add_argument_group("training settings")
    for name, kind, text in _SETTINGS:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    group.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, help="images as NHWC, faster on most devices"
    )


def train_settings(options: argparse.Namespace, defaults: TrainSettings) -> TrainSettings:
    """`defaults` with what the command line says otherwise.

    Raises:
        ValueError: a setting that cannot be used.
    """
    names = [name for name, _, _ in _SETTINGS] + ["channels_last"]
    return replace(defaults, **{name: value for name in names if (value := getattr(options, name)) is not None})


def _add_gsvit(actions: Any) -> None:
    gsvit = actions.add_parser(
        "gsvit",
        help="pre-train by predicting the frame a second later, or fine-tune that to one procedure",
        description="Pre-train GSViT by predicting the frame a second later (arXiv 2403.05949). With --procedure: "
        "one epoch at 1e-4 on the videos of that procedure, from --start. Many GPUs: "
        "torchrun --nproc-per-node N -m surg_perception.cli.main train gsvit …",
    )
    add_data_options(gsvit)
    gsvit.add_argument("--gap", type=float, default=1.0, metavar="S", help="seconds ahead (default: %(default)s)")
    gsvit.add_argument(
        "--start", type=Path, metavar="WEIGHTS", help="model folder, GSViT.pkl or encoder safetensors (default: random)"
    )
    gsvit.add_argument("--size", choices=[f"m{i}" for i in range(6)], help="default: the start's, else m5")
    gsvit.add_argument("--decoder-width", type=int, help="default: the start's, else 1024; 64 to 128 without a GPU")
    gsvit.add_argument("--decoder-rank", type=int, help="of its first layer; default: the start's, else 0 (full)")
    gsvit.add_argument(
        "--predict-change",
        action=argparse.BooleanOptionalAction,
        help="predict the change to the next frame; default: as the start, else the frame",
    )
    gsvit.add_argument("--procedure", default="", help="train on the videos of this procedure, such as Cholecystectomy")
    gsvit.add_argument(
        "--validation", metavar="NAMES", help="videos held back, by comma; 'none'; default: a tenth of them"
    )
    gsvit.add_argument("--mirror", action="store_true", help="mirror half of the pairs")
    gsvit.add_argument("--augment", action="store_true", help="the same other view, camera and light for both frames")
    gsvit.add_argument(
        "--freeze-encoder", action="store_true", help="train the decoder alone: adds a forecast to the model --start"
    )
    gsvit.add_argument("--name", help="of the model (default: GSViT-<Procedure>, or the folder's)")
    gsvit.add_argument("--licence", help="of the model (default: what data and start weights demand)")
    gsvit.add_argument("--weights", choices=("fp32", "fp16"), default="fp32", help="storage (default: %(default)s)")
    gsvit.add_argument(
        "--forecast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the decoder as a graph for the pipeline's forecast (default: yes)",
    )
    add_settings_options(gsvit)
    gsvit.set_defaults(run=_gsvit)


def _gsvit(options: argparse.Namespace) -> int:
    from surg_perception.data.datasets import open_dataset
    from surg_perception.gsvit.pretrain import FINE_TUNING, PRE_TRAINING, PretrainOptions, pretrain

    settings = train_settings(options, FINE_TUNING if options.procedure else PRE_TRAINING)
    validation = None
    if options.validation is not None:
        validation = () if options.validation == "none" else tuple(filter(None, options.validation.split(",")))
    what = PretrainOptions(
        gap_s=options.gap,
        start=options.start,
        size=options.size,
        decoder_width=options.decoder_width,
        decoder_rank=options.decoder_rank,
        predict_change=options.predict_change,
        procedure=options.procedure,
        validation=validation,
        mirror=options.mirror,
        augment=options.augment,
        freeze_encoder=options.freeze_encoder,
    )
    datasets = [open_dataset(path, rate_hz=options.rate_hz) for path in options.data]
    return _run(
        lambda: pretrain(
            datasets,
            options.out,
            what,
            settings,
            cache=options.cache,
            name=options.name,
            licence=options.licence,
            weight_storage=options.weights,
            forecast=options.forecast,
            resume=options.resume,
        )
    )


def _add_distil(actions: Any) -> None:
    distil = actions.add_parser(
        "distil",
        help="start an encoder from the features of a network trained on ImageNet",
        description="Teach a fresh encoder the features of EfficientNet-Lite with ImageNet weights, on frames without "
        "labels: the start for pre-training and phase training where no GSViT weights are at hand.",
    )
    add_data_options(distil)
    distil.add_argument("--size", choices=[f"m{i}" for i in range(6)], default="m0", help="default: %(default)s")
    distil.add_argument("--teacher", default="efficientnet-lite2", help="or efficientnet-lite0 (default: %(default)s)")
    distil.add_argument("--validation", default="", metavar="NAMES", help="videos held back and measured, by comma")
    distil.add_argument("--name", help="of the model (default: the folder's)")
    distil.add_argument("--licence", help="of the model (default: what the data demand)")
    add_settings_options(distil)
    distil.set_defaults(run=_distil)


def _distil(options: argparse.Namespace) -> int:
    from surg_perception.data.datasets import open_dataset
    from surg_perception.gsvit.distil import DEFAULTS, distil

    datasets = [open_dataset(path, rate_hz=options.rate_hz) for path in options.data]
    return _run(
        lambda: distil(
            datasets,
            options.out,
            train_settings(options, DEFAULTS),
            size=options.size,
            teacher=options.teacher,
            validation=_names(options.validation),
            cache=options.cache,
            name=options.name,
            licence=options.licence,
            resume=options.resume,
        )
    )


def _add_phase(actions: Any) -> None:
    phase = actions.add_parser(
        "phase",
        help="train a phase head, frozen or end to end, and a causal temporal head",
        description="Train a phase head on GSViT's latents (arXiv 2403.05949), with the encoder or without, and a "
        "causal temporal head (TeCNO, arXiv 2003.10751) that uses the whole history.",
    )
    add_data_options(phase)
    phase.add_argument("--start", type=Path, metavar="WEIGHTS", help="model folder, GSViT.pkl or encoder safetensors")
    phase.add_argument("--size", choices=[f"m{i}" for i in range(6)], help="default: the start's, else m5")
    phase.add_argument("--frozen", action="store_true", help="train the head only, on cached latents (fast)")
    phase.add_argument("--validation", default="", metavar="NAMES", help="videos held back, by comma; they calibrate")
    phase.add_argument(
        "--head-hidden", default="2048,512", metavar="WIDTHS", help="hidden layers of the head (default: %(default)s)"
    )
    phase.add_argument("--class-weights", action="store_true", help="weigh phases by median frequency")
    phase.add_argument("--label-smoothing", type=float, default=0.1, help="default: %(default)s")
    phase.add_argument(
        "--tools-weight", type=float, default=0.5, help="of the tool task where there are labels (default: %(default)s)"
    )
    phase.add_argument(
        "--frames-of-a-video", type=int, default=500, help="at most, in an epoch; 0 for all (default: %(default)s)"
    )
    phase.add_argument("--views", type=int, default=2, help="augmented views for cached latents (default: %(default)s)")
    phase.add_argument(
        "--temperatures", metavar="T,T", help="of frame and temporal head, where no video can be held back"
    )
    phase.add_argument(
        "--temporal", action=argparse.BooleanOptionalAction, default=True, help="train a temporal head (default: yes)"
    )
    phase.add_argument(
        "--step", type=float, metavar="S", help="seconds between its steps (default: 1 / rate, what the data have)"
    )
    phase.add_argument("--temporal-epochs", type=int, help="default: 80; 15 with --label-only")
    phase.add_argument(
        "--label-only", type=Path, metavar="DIR", help="Cholec80 label files of surgeries without images, for it"
    )
    phase.add_argument("--label-only-videos", metavar="A-B", help="only these numbers of them, such as 6-40")
    phase.add_argument("--name", help="of the model (default: the folder's)")
    phase.add_argument("--procedure", default="", help="that the model is for, such as Cholecystectomy")
    phase.add_argument("--licence", help="of the model (default: what data and start weights demand)")
    phase.add_argument("--weights", choices=("fp32", "fp16"), default="fp32", help="storage (default: %(default)s)")
    add_settings_options(phase)
    phase.set_defaults(run=_phase)


def _phase(options: argparse.Namespace) -> int:
    from surg_perception.data.datasets import open_dataset
    from surg_perception.gsvit.phase_training import FINE_TUNED, FROZEN, PhaseOptions, train_phase_model
    from surg_perception.gsvit.resequence import read_surgeries
    from surg_perception.gsvit.temporal import TemporalConfig, TemporalSettings

    datasets = [open_dataset(path, rate_hz=options.rate_hz) for path in options.data]
    step_s = options.step or max(1.0 / options.rate_hz, *(_spacing_s(dataset) for dataset in datasets))
    surgeries: tuple[Any, ...] = ()
    if options.label_only is not None:
        numbers = None
        if options.label_only_videos:
            first, _, last = options.label_only_videos.partition("-")
            numbers = range(int(first), int(last or first) + 1)
        surgeries = tuple(read_surgeries(options.label_only, step_s, datasets[0].phases, numbers))
    temporal = None
    if options.temporal:
        config = TemporalConfig(features=1, classes=1, inputs="latent", step_s=step_s)
        temporal = TemporalSettings(config, epochs=options.temporal_epochs or (15 if surgeries else 80))
    temperatures = None
    if options.temperatures:
        single, history = (float(value) for value in options.temperatures.split(","))
        temperatures = (single, history)
    what = PhaseOptions(
        start=options.start,
        size=options.size,
        frozen=options.frozen,
        head_hidden=tuple(int(width) for width in options.head_hidden.split(",")),
        class_weights=options.class_weights,
        label_smoothing=options.label_smoothing,
        tools_weight=options.tools_weight,
        frames_of_a_video=options.frames_of_a_video,
        views=options.views,
        temporal=temporal,
        surgeries=surgeries,
        validation=_names(options.validation),
        temperatures=temperatures,
    )
    return _run(
        lambda: train_phase_model(
            datasets,
            options.out,
            what,
            train_settings(options, FROZEN if options.frozen else FINE_TUNED),
            cache=options.cache,
            name=options.name,
            licence=options.licence,
            weight_storage=options.weights,
            procedure=options.procedure,
            resume=options.resume,
        )
    )


# Stages of SurgLLM: option, field of SurgLLMOptions, what it is.
_SURGLLM_STAGES = (
    ("reconstruct", "reconstruction", "masked reconstruction"),
    ("ground", "grounding", "grounding of the encoder's tokens"),
    ("align", "alignment", "alignment with captions"),
    ("warm-up", "warm_up", "the Q-Former's warm-up"),
    ("tune", "tuning", "joint tuning"),
    ("adapt", "adapting", "each task's adapter"),
)


def _add_surgllm(actions: Any) -> None:
    surgllm = actions.add_parser(
        "surgllm",
        help="train SurgLLM through all its stages: reconstruct, ground, align, warm up, tune, an adapter a task",
        description="Train SurgLLM (arXiv 2509.00357) from labelled video to a model folder that the node vqa runs. "
        "Questions and captions are made by rule from the labels (docs/questions.md). Each stage resumes.",
    )
    _add_clip_options(surgllm)
    surgllm.add_argument("--config", default="small", help="tiny, small or paper (default: %(default)s)")
    surgllm.add_argument(
        "--language-model",
        type=Path,
        metavar="FOLDER",
        help="a causal language model in Hugging Face layout (default: SmolLM2)",
    )
    surgllm.add_argument("--held-out", default="", metavar="VIDEOS", help="that only measure, by comma")
    surgllm.add_argument("--per-task", type=int, default=1500, help="questions a task (default: %(default)s)")
    surgllm.add_argument(
        "--adapter-per-task", type=int, default=500, help="more of them for its adapter (default: %(default)s)"
    )
    surgllm.add_argument(
        "--tune-questions", type=int, default=0, metavar="N", help="at most, for the joint tuning; 0 for all (default)"
    )
    surgllm.add_argument("--tasks", metavar="NAMES", help="with adapters of their own, by comma (default: all)")
    surgllm.add_argument("--seed", type=int, default=0, help="of questions and weights (default: %(default)s)")
    for option, _, text in _SURGLLM_STAGES:
        surgllm.add_argument(f"--{option}-epochs", type=int, metavar="N", help=f"of {text}")
    surgllm.add_argument("--threads", type=int, default=0, help="of PyTorch on the CPU, 0 for its own choice")
    surgllm.add_argument("--name", help="of the model (default: the folder's)")
    surgllm.add_argument("--licence", help="of the model (default: what the data demand)")
    surgllm.set_defaults(run=_surgllm)


def _add_clip_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="DATA", help="CholecT50, Cholec80 or phantom:seeds=3000-3039")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder to make")
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache().with_name("clips"),
        metavar="DIR",
        help="for frames and features (default: %(default)s)",
    )
    parser.add_argument(
        "--stills", action=argparse.BooleanOptionalAction, default=True, help="use frames without neighbours in time"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", dest="resume", action="store_true", default=True, help="go on (default)")
    again.add_argument("--restart", dest="resume", action="store_false", help="begin again")


def _surgllm(options: argparse.Namespace) -> int:
    from surg_perception.surgllm.config import CONFIGS
    from surg_perception.surgllm.training import SurgLLMOptions, train_surgllm

    if options.config not in CONFIGS:
        raise ValueError(f"--config {options.config!r} found, expected one of {', '.join(CONFIGS)}")
    config = CONFIGS[options.config]
    if options.language_model:
        config = replace(config, language_model=str(options.language_model.resolve()))
    what = SurgLLMOptions(
        config=config,
        held_out=_names(options.held_out),
        per_task=options.per_task,
        adapter_per_task=options.adapter_per_task,
        tune_questions=options.tune_questions,
        seed=options.seed,
        stills=options.stills,
    )
    if options.tasks:
        what = replace(what, tasks=_names(options.tasks))
    for option, field, _ in _SURGLLM_STAGES:
        settings = replace(getattr(what, field), threads=options.threads)
        if (epochs := getattr(options, f"{option.replace('-', '_')}_epochs")) is not None:
            settings = replace(settings, epochs=epochs)
        what = replace(what, **{field: settings})
    return _run(
        lambda: train_surgllm(
            options.data,
            options.out,
            what,
            cache=options.cache,
            name=options.name,
            licence=options.licence,
            resume=options.resume,
        )
    )


def _add_surgllm_task(actions: Any) -> None:
    task = actions.add_parser(
        "surgllm-task",
        help="give a trained SurgLLM one task more: a name, questions and their videos",
        description="Train an adapter for a new task on top of a SurgLLM, and teach its router the task's questions.",
    )
    task.add_argument("model", help="name or folder of the model")
    task.add_argument("task", help="name of the task")
    task.add_argument("questions", type=Path, help="JSON of questions and answers (docs/questions.md)")
    _add_clip_options(task)
    add_settings_options(task)
    task.set_defaults(run=_surgllm_task)


def _surgllm_task(options: argparse.Namespace) -> int:
    from surg_perception.surgllm.training import add_task
    from surg_perception.surgllm.tuning import ADAPTING

    return _run(
        lambda: add_task(
            options.model,
            options.task,
            options.questions,
            options.data,
            options.out,
            train_settings(options, ADAPTING),
            cache=options.cache,
            stills=options.stills,
            resume=options.resume,
        )
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _spacing_s(dataset: Dataset) -> float:
    """Usual time between the frames of a data set, in seconds."""
    import numpy as np

    gaps = [np.diff(video.times_s) for video in dataset.videos if len(video.times_s) > 1]
    return float(np.median(np.concatenate(gaps))) if gaps else 0.0


def _run(training: Callable[[], ModelCard | SurgLLMCard]) -> int:
    """Run a training to its model folder; a training that fails is told in a sentence, with status 1."""
    from surg_perception.gsvit.trainer import TrainingError

    try:
        card = training()
    except TrainingError as error:
        print(f"surg-perception: {error}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{card.model_id} is in {card.folder}")
    return 0
