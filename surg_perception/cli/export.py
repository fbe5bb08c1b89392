# SPDX-License-Identifier: Apache-2.0
"""`surg-perception export`: a model's graph as ONNX, or put into a model server's repository."""

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


def _triton(options: argparse.Namespace) -> int:
    from surg_perception.models import find_model
    from surg_perception.runtime.model_repository import write_repository

    card = find_model(options.model)
    version = write_repository(card, options.out, instances=options.instances)
    print(f"{card.model_id} is in {version}; how to start a server on it: {options.out / 'README.md'}")
    print("rooms: runtime.backend: triton, runtime.server_url: grpc://<server>:8001, with this same model folder")
    return 0
