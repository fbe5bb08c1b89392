# SPDX-License-Identifier: Apache-2.0
"""The command `surg-perception`. Each verb imports what it needs when it runs, so `--help` needs nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from surg_perception import __version__

if TYPE_CHECKING:
    from surg_perception.models import ModelCard
    from surg_perception.surgllm.model_folder import SurgLLMCard


def _demo(options: argparse.Namespace) -> int:
    from surg_perception.cli import demo

    return demo.run(options.video, options.out)


def _models_list(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from surg_perception.models import list_models
    from surg_perception.surgllm.model_folder import list_surgllm

    table = Table("model", "network", "phases", "licence", "intended use")
    for card in list_models():
        table.add_row(
            card.model_id,
            f"{card.network.architecture}-{card.network.size}",
            str(len(card.labels.names)),
            card.licence,
            card.intended_use,
        )
    for answerer in list_surgllm():
        table.add_row(answerer.model_id, "SurgLLM", "questions", answerer.licence, answerer.intended_use)
    Console().print(table)
    return 0


def _find_any(name_or_path: str) -> ModelCard | SurgLLMCard:
    """The card of a model of either kind."""
    from surg_perception.models import OtherModel, find_model
    from surg_perception.surgllm.model_folder import find_surgllm

    try:
        return find_model(name_or_path)
    except OtherModel:
        return find_surgllm(name_or_path)


def _models_show(options: argparse.Namespace) -> int:
    card = _find_any(options.model)
    print(f"# {card.folder}\n{card.to_yaml()}", end="")
    return 0


def _models_verify(options: argparse.Namespace) -> int:
    card = _find_any(options.model)
    card.verify()
    print(f"{card.model_id}: every file has the sha256 of its card")
    return 0


def _models_import(options: argparse.Namespace) -> int:
    from surg_perception.gsvit import import_released

    card = import_released(options.checkpoint, options.out, name=options.name or options.out.resolve().name)
    print(f"{card.model_id} is in {options.out}: latent features only, since a released checkpoint has no phase head")
    print(f"run it: ros2 launch surg_perception pipeline.launch.py model:={options.out.resolve()}")
    return 0


def _models_fetch(options: argparse.Namespace) -> int:
    from surg_perception.surgllm.base_models import fetch

    for name in options.name:
        print(f"{name}: {fetch(name, options.into, lambda line: print(line, flush=True))}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="surg-perception",
        description="Surgical phase, next-frame latent features and answers to questions for ROS 2.",
    )
    top.add_argument("--version", action="version", version=f"surg_perception {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="run the pipeline on the phantom or a video, then show figures and pictures")
    demo.add_argument("--video", metavar="FILE", help="your own video instead of the phantom")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="where pictures go (default: %(default)s)")
    demo.set_defaults(run=_demo)

    from surg_perception.cli import ask, build_engine, data, doctor, evaluate, export, record, replay, train

    ask.add_parser(verbs)
    record.add_parser(verbs)
    doctor.add_parser(verbs)
    data.add_parser(verbs)
    train.add_parser(verbs)
    evaluate.add_parser(verbs)
    export.add_parser(verbs)
    build_engine.add_parser(verbs)
    replay.add_parser(verbs)

    models = verbs.add_parser("models", help="list, show, verify, import and fetch models")
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the models found on this machine").set_defaults(run=_models_list)
    for action, text, run in (
        ("show", "a model's card", _models_show),
        ("verify", "check a model's files against its card", _models_verify),
    ):
        entry = actions.add_parser(action, help=text)
        entry.add_argument("model", help="name or folder")
        entry.set_defaults(run=run)
    entry = actions.add_parser(
        "import",
        help="turn a released GSViT.pkl (or its safetensors twin) into a model folder; needs PyTorch",
    )
    entry.add_argument("checkpoint", type=Path)
    entry.add_argument("out", type=Path, help="folder to make")
    entry.add_argument("--name", help="model name (default: the folder's)")
    entry.set_defaults(run=_models_import)
    entry = actions.add_parser(
        "fetch", help="download a pre-trained model that questions need: smollm2-135m-instruct, all-minilm-l6-v2"
    )
    entry.add_argument("name", nargs="+")
    entry.add_argument("--into", type=Path, metavar="FOLDER", help="default: the user's cache, where it is looked for")
    entry.set_defaults(run=_models_fetch)
    return top


def main() -> None:
    """Entry point. Exit status 0: done, 1: the run failed, 2: the input cannot be used."""
    try:
        options = parser().parse_args()
        status = options.run(options)
    except (ValueError, OSError, ImportError) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        # No rosdep keys: on a robot they are not there unless pip installed them.
        fix = "; bags need two packages: pip install rosbags mcap" if missing in ("rosbags", "mcap") else ""
        print(f"surg-perception: {error}{fix}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
