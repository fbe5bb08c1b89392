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
    from surg_perception.gsvit.trainer import TrainSettings

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
    _add_gsvit(actions)


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
    from surg_perception.gsvit.trainer import TrainingError

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
    )
    datasets = [open_dataset(path, rate_hz=options.rate_hz) for path in options.data]
    try:
        card = pretrain(
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
    except TrainingError as error:
        print(f"surg-perception: {error}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{card.model_id} is in {options.out}")
    return 0
