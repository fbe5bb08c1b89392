# SPDX-License-Identifier: Apache-2.0
"""A whole replay from names and files: what the command and the pytest fixture both call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surg_perception.data.bags import BagReader
from surg_perception.nodes.parameter_table import PHASE, VQA
from surg_perception.replay.golden import Comparison, Golden, plot
from surg_perception.replay.parameters import check_assignments, node_values
from surg_perception.replay.questions import QuestionReplay, read_plan
from surg_perception.replay.session import PhaseReplay, Replayed, replay
from surg_perception.runtime.backend import default_threads

RESULTS = ("bag", "results.jsonl", "phases.png", "differences.txt", "launch.log")


class ReplayFailed(ValueError):
    """The bag can be read, but nothing in it is of use."""


@dataclass
class Outcome:
    """What a replay came to.

    Attributes:
        out: folder of the results.
        comparison: with the golden file; None where there was nothing to compare.
        updated: the golden file was written.
        notes: what is good to know and no failure.
    """

    out: Path
    replayed: Replayed
    comparison: Comparison | None
    updated: bool
    notes: list[str]

    @property
    def status(self) -> int:
        """Exit status: 0, 1 where something differs from the golden file, 130 where it was interrupted."""
        if self.replayed.interrupted:
            return 130
        return 1 if self.comparison is not None and self.comparison.differences else 0


def run_replay(
    bag: Path,
    out: Path,
    *,
    topic: str = "",
    model: str = "",
    backend: str = "",
    precision: str = "",
    vqa_model: str = "",
    params: Sequence[Path] = (),
    assignments: Sequence[str] = (),
    questions: Path | None = None,
    golden: Path | None = None,
    update: bool = False,
    force: bool = False,
    namespace: str = "surg_perception",
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Replay a bag offline and write bag, results.jsonl and phases.png into out; docs/replay.md.

    Args:
        topic: of the images, where the bag has several.
        model, backend, precision, vqa_model: "" as the parameters say.
        params, assignments: as ROS's --params-file and -p.
        questions: YAML file of questions.
        golden: file to compare with, or to write where `update` is set.
        force: replace the results of a former replay in out.
        say: told what takes long, and "" when images are taken.
        progress: told images taken and the bag's number of images, 0 where that is unknown.
        stop: asked before every image; True ends there.

    Raises:
        ValueError, OSError, BackendUnavailable: input that cannot be used, and why.
    """
    if update and golden is None:
        raise ValueError("--update writes the golden file: name it with --golden FILE")
    values, vqa_values = _parameters(namespace, params, assignments, model, backend, precision, vqa_model)
    plan = read_plan(questions) if questions is not None else []
    expected = expected_of(golden, update)
    with BagReader(bag, topic) as reader:
        say("loading the model")
        phases = PhaseReplay(values, say)
        try:
            asked, vqa_model_id = None, ""
            if plan:
                say("loading the model for questions")
                assistant = _assistant(vqa_values)
                asked, vqa_model_id = QuestionReplay(plan, assistant, vqa_values), assistant.model_id
            prepare(out, bag, force)
            say("")
            replayed = replay(
                reader,
                phases,
                out,
                namespace=namespace,
                questions=asked,
                vqa_model_id=vqa_model_id,
                progress=lambda done: progress(done, reader.count or 0),
                stop=stop,
            )
        finally:
            phases.close()
    if not replayed.interrupted and all(frame.error for frame in replayed.frames):
        reason = f": {replayed.frames[0].error}" if replayed.frames else ""
        raise ReplayFailed(f"none of the {len(replayed.frames)} images of {replayed.topic} has a phase{reason}")
    return conclude(replayed, out, golden, expected, update)


def conclude(
    replayed: Replayed, out: Path, golden: Path | None = None, expected: Golden | None = None, update: bool = False
) -> Outcome:
    """Compare a replay with the golden file, or write that; then differences.txt and the picture of the phases.

    Args:
        golden, expected: the golden file and what it holds, as `expected_of` gives it.
        update: write it, with its tolerances, instead.

    Raises:
        GoldenError: it is of another bag.
    """
    notes = [note for note in replayed.notes if "was asked for" in note]
    comparison, updated = None, False
    if replayed.frames and not replayed.interrupted and golden is not None:
        if update:
            Golden.of(replayed, expected.tolerances if expected else None).write(golden)
            updated = True
        elif expected is not None:
            comparison = expected.compare(replayed)
            notes += comparison.notes
            lines = [comparison.summary, *comparison.notes, *map(str, comparison.differences)]
            (out / "differences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if replayed.frames and replayed.labels:
        try:
            plot(out / "phases.png", replayed, expected if comparison else None, comparison)
        except ImportError as error:
            notes.append(f"no picture of the phases: {error}")
    return Outcome(out, replayed, comparison, updated, notes)


def _parameters(
    namespace: str,
    params: Sequence[Path],
    assignments: Sequence[str],
    model: str,
    backend: str,
    precision: str,
    vqa_model: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of the nodes `phase` and `vqa`; what the command names goes before the files, as in the launch file."""
    check_assignments(assignments, (PHASE, VQA))
    named = {
        "phase:model.path": model,
        "phase:runtime.backend": backend,
        "phase:runtime.precision": precision,
        "vqa:model.path": vqa_model,
    }
    # A model's name is not to be read as YAML: "1e3" is one.
    given = [f"{name}:='{value.replace(chr(39), chr(39) * 2)}'" for name, value in named.items() if value]
    # `model.path` is a parameter of both nodes: bare, it is the phase node's.
    bare = [f"phase:{text}" if text.startswith("model.path:=") else text for text in assignments]
    values, vqa_values = (node_values(table, namespace, params, [*bare, *given]) for table in (PHASE, VQA))
    return values, vqa_values


def _assistant(values: dict[str, Any]) -> Any:
    """The model that answers; imports PyTorch. Its number of threads is fixed, so that sums are made in one order."""
    from surg_perception.surgllm.model_folder import find_surgllm

    folder = find_surgllm(values["model.path"]).folder
    from surg_perception.surgllm.answering import Assistant

    return Assistant.load(folder, threads=values["runtime.threads"] or default_threads())


def expected_of(golden: Path | None, update: bool = False) -> Golden | None:
    """What a golden file holds; None without one, or where it is still to be written.

    Raises:
        ValueError: it is not there, or cannot be read.
    """
    if golden is None:
        return None
    if golden.exists():
        return Golden.read(golden)
    if update:
        return None
    raise ValueError(f"there is no golden file {golden}: write it with --update, look at it, and keep it with the test")


def prepare(out: Path, bag: Path, force: bool = False) -> None:
    """Make the folder for the results, without those of a former replay in it.

    Raises:
        ValueError: there is something in it, and force does not allow to replace it; or that is the bag itself.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected a folder for the results")
    there = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if there and not force:
        raise ValueError(
            f"{out} is not empty ({', '.join(there[:3])}): name another --out, or --force to replace results"
        )
    input_bag = bag.expanduser().resolve()
    results = [out / name for name in RESULTS if name in there]
    for result in results:
        if result.resolve() in (input_bag, *input_bag.parents):
            raise ValueError(f"{result} is the bag to be replayed, and would be replaced: name another --out")
    for result in results:
        _remove(result)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)


def _remove(result: Path) -> None:
    if result.is_dir() and not result.is_symlink():
        # Only what a bag is made of: a folder of the same name with anything else in it is somebody's own.
        for file in result.iterdir():
            if file.suffix != ".mcap" and file.name not in ("metadata.yaml", ".metadata.yaml.part"):
                raise ValueError(f"{result} holds {file.name}, which no replay wrote: name another --out")
        for file in result.iterdir():
            file.unlink()
        result.rmdir()
    else:
        result.unlink()
