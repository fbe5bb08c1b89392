# SPDX-License-Identifier: Apache-2.0
"""`surg-perception doctor`: what is wrong with the live graph and this machine, and the command that mends it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from surg_perception import __version__

if TYPE_CHECKING:
    from surg_perception.diagnosis.findings import Finding
    from surg_perception.diagnosis.snapshot import Graph, Process, Snapshot

LIMIT_S = 60.0
"""The most that looking at the graph takes beside the listening, on a slow machine."""
SIGNS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "bold red")}


class GraphUnseen(RuntimeError):
    """The graph could not be looked at; the text is the middleware's, or Python's."""


def add_parser(verbs: Any) -> None:
    """Add the verb `doctor` to the command line."""
    entry = verbs.add_parser(
        "doctor",
        help="find out why nothing comes out: topics, QoS, DDS, stamps, models, engines; with the fix for each",
        description="Looks at the running pipeline, at the image topic for a moment, and at this machine. Changes "
        "nothing. Exit status 0: no errors (there may be warnings), 1: errors found, 2: ROS 2 could not be looked at.",
    )
    entry.add_argument(
        "--namespace", default="", help="of the pipeline (default: surg_perception and whatever else is found)"
    )
    entry.add_argument("--image", default="", metavar="TOPIC", help="the camera's topic, where no node reads it yet")
    entry.add_argument(
        "--seconds", type=_seconds, default=3.0, help="how long to listen, 0.5 to 60 (default: %(default)g)"
    )
    entry.add_argument("--json", action="store_true", help="findings as JSON, for CI and bug reports")
    entry.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.5 <= value <= 60.0:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.5 to 60")
    return value


def run(options: argparse.Namespace) -> int:
    """Look, print the findings. Returns the exit status."""
    from surg_perception.diagnosis.findings import examine

    namespace = f"/{options.namespace.strip('/')}" if options.namespace else ""
    snapshot = look(namespace, options.image, options.seconds)
    findings = examine(snapshot)
    status = 2 if snapshot.graph is None else 1 if any(f.level == "error" for f in findings) else 0
    if options.json:
        show_json(findings, snapshot, status)
    else:
        show(findings)
    return status


def look(namespace: str, image: str, seconds: float) -> Snapshot:
    """The graph first, then the models and engines that its nodes ask for; without ROS 2, those of the defaults."""
    from surg_perception.diagnosis.machine import answers, engines, machine, phase_model
    from surg_perception.diagnosis.snapshot import Snapshot
    from surg_perception.nodes.parameter_table import PHASE, VQA

    here = machine()
    graph, fault = None, ""
    try:
        graph = look_at_graph(namespace, image, seconds, here.processes)
    except GraphUnseen as error:
        fault = str(error)
    nodes = graph.nodes if graph else ()
    phases = [node for node in nodes if node.kind == "phase"]
    # An active node has loaded its model, with its own environment and perhaps on another machine.
    waiting = [node.parameters for node in phases if node.state != "active"] or ([] if phases else [{}])
    asked = {**PHASE.defaults, **(waiting[0] if waiting else phases[0].parameters)}
    names = sorted({str({**PHASE.defaults, **one}["model.path"]) for one in waiting})
    models = tuple(map(phase_model, names))
    trial = bool(waiting) and asked["runtime.backend"] != "triton" and not any(model.fault for model in models)
    model, backend, precision = (str(asked[name]) for name in ("model.path", "runtime.backend", "runtime.precision"))
    vqa = [node.parameters for node in nodes if node.kind == "vqa"] or [{}]
    answerers = sorted({str({**VQA.defaults, **one}["model.path"]) for one in vqa})
    complete = dataclasses.replace(
        here,
        models=models,
        engines=engines(model, backend, precision, trial),
        answers=tuple(map(answers, answerers)),
    )
    return Snapshot(complete, graph, fault, namespace, image)


def look_at_graph(namespace: str, image: str, seconds: float, processes: tuple[Process, ...]) -> Graph:
    """What `nodes.doctor.look` gives, in a process of its own: a middleware may hang, end the process, or print.

    Raises:
        GraphUnseen: with the reason.
    """
    asked = pickle.dumps((namespace, image, seconds, processes))
    command = [sys.executable, "-m", "surg_perception.nodes.doctor"]
    limit_s = 2 * seconds + LIMIT_S  # it listens again where something was discovered only meanwhile
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise GraphUnseen(f"the middleware did not let go within {limit_s:.0f} s") from None
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        lines = [line for line in said.splitlines() if "error" in line.lower()] or [f"exit status {done.returncode}"]
        raise GraphUnseen(" ".join(lines[-1].split())[:400])
    if said:
        print(said, file=sys.stderr)
    graph: Graph = pickle.loads(done.stdout)  # our own child's
    return graph


def show(findings: list[Finding]) -> None:
    """For people: what is wrong last, where the eye is, with what to paste."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    order = {"ok": 0, "warning": 1, "error": 2}
    for finding in sorted(findings, key=lambda f: order[f.level]):
        sign, style = SIGNS[finding.level]
        console.print(Text.assemble((f"{sign} ", style), finding.text, (f"  [{finding.check}]", "dim")))
        if finding.why:
            console.print(Text(f"    {finding.why}", "dim"))
        if finding.fix:
            console.print(Text.assemble(("    fix: ", "dim"), (finding.fix, "cyan")))
    counts = {level: sum(f.level == level for f in findings) for level in SIGNS}
    console.print(f"{counts['error']} errors, {counts['warning']} warnings, {counts['ok']} fine")


def show_json(findings: list[Finding], snapshot: Snapshot, status: int) -> None:
    """For programs."""
    graph = snapshot.graph
    content = {
        "version": __version__,
        "status": status,
        "domain": graph.domain if graph else None,
        "rmw": graph.rmw if graph else None,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
    print()
