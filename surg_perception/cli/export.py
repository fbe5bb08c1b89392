# SPDX-License-Identifier: Apache-2.0
"""`surg-perception export`: a model's graph as ONNX, in int8, or put into a model server's repository."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(verbs: Any) -> None:
    """Add the verb `export` to the command line."""
    export = verbs.add_parser("export", help="write a model for another program: ONNX, a model server's repository")
    actions = export.add_subparsers(dest="action", required=True, metavar="ACTION")
    onnx = actions.add_parser("onnx", help="make the ONNX graph of a model folder that has weights only; needs PyTorch")
    onnx.add_argument("model", help="name or folder")
    onnx.set_defaults(run=_onnx)
    int8 = actions.add_parser(
        "int8",
        help="make a model whose graph computes in int8, calibrated on your frames, where it agrees with fp32",
        description="Writes a model folder whose graph computes in int8 (Q/DQ nodes, for ONNX Runtime, OpenVINO and "
        "TensorRT). Half of the frames give the ranges of values, the other half decides: as many layers are "
        "quantised as agree with fp32. Exit status 1: none does. Takes minutes.",
    )
    int8.add_argument("model", help="name or folder, or an ONNX file")
    int8.add_argument("--frames", required=True, metavar="PATH", help="video or folder of images; 64 of it are taken")
    int8.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new model's folder, named as it is")
    int8.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU (default: cores, at most four)")
    int8.set_defaults(run=_int8)
    triton = actions.add_parser(
        "triton",
        help="put a model into a repository for Triton or OpenVINO Model Server",
        description="Put a model's graph into a model repository for Triton and OpenVINO Model Server, whose README.md "
        "says how to start them. Other models and versions in it stay.",
    )
    triton.add_argument("model", help="name or folder, or an ONNX file")
    triton.add_argument("--out", type=Path, required=True, metavar="REPO", help="the repository, made where missing")
    triton.add_argument(
        "--instances", type=int, default=1, help="copies that Triton runs side by side (default: %(default)s)"
    )
    triton.set_defaults(run=_triton)


def _onnx(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from surg_perception.models import ModelFile, find_model

    card = find_model(options.model)
    if card.graph is not None:
        raise ValueError(f"{card.model_id} has a graph already, {card.graph_path}; nothing was written")
    card.verify("weights")

    from surg_perception.gsvit import load_gsvit
    from surg_perception.runtime.export import export_onnx

    graph = export_onnx(load_gsvit(card.folder), card.folder / "model.onnx", phases=card.labels.names)
    card = replace(card, graph=ModelFile.of(graph))
    card.write()
    print(f"{graph} is the graph of {card.model_id}")
    return 0


def _int8(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from surg_perception.cli.build_engine import frames_of
    from surg_perception.models import find_model
    from surg_perception.runtime import BackendUnavailable, PrecisionRefused, default_threads
    from surg_perception.runtime.quantise import quantise

    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("frames", total=1.0)
        try:
            made = quantise(
                find_model(options.model),
                frames_of(options.frames),
                options.out,
                options.threads or default_threads(),
                lambda done, what: progress.update(task, completed=done, description=what),
            )
        except PrecisionRefused as error:
            console.print(str(error), markup=False, highlight=False)
            return 1
        except BackendUnavailable as error:
            raise ValueError(str(error)) from error
    lines = [f"{made.card.model_id} computes {made.in_int8} of {made.layers} layers in int8: {made.card.folder}"]
    lines += [f"{name} on frames that it was not calibrated on: {found}" for name, found in made.agreements.items()]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _triton(options: argparse.Namespace) -> int:
    from surg_perception.models import find_model
    from surg_perception.runtime.model_repository import write_repository

    card = find_model(options.model)
    version = write_repository(card, options.out, instances=options.instances)
    print(f"{card.model_id} is in {version}; how to start a server on it: {options.out / 'README.md'}")
    print("rooms: runtime.backend: triton, runtime.server_url: grpc://<server>:8001, with this same model folder")
    return 0
