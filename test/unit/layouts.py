# SPDX-License-Identifier: Apache-2.0
"""Tiny data sets in the layouts of the public ones; every picture carries its number."""

from __future__ import annotations

import json
import shutil

import cv2
from video_files import numbered_picture, write_video

from surg_perception.data.labels import AUTOLAPARO_PHASES, CHOLEC80_PHASES, CHOLEC80_TOOLS, M2CAI16_PHASES

RATE_HZ = 25
LENGTH_S = 4
PICTURES = RATE_HZ * LENGTH_S


def phase_of(time_s, phases, length_s=LENGTH_S):
    """The truth: every phase is equally long."""
    return phases[min(int(time_s / length_s * len(phases)), len(phases) - 1)]


def write_table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(map(str, row)) for row in [header, *rows]) + "\n")


def copy_of_video(path, made=[]):  # noqa: B006 one encoded video does for all
    path.parent.mkdir(parents=True, exist_ok=True)
    if not made:
        write_video(path, range(0, 1000 * LENGTH_S, 40))
        made.append(path.read_bytes())
    path.write_bytes(made[0])


def cholec80(root, names=("video01", "video02"), phase_step=1):
    for name in names:
        copy_of_video(root / "videos" / f"{name}.mp4")
        cholec80_labels(root, name, phase_step)
    return root


def cholec80_labels(root, name, phase_step=1, phases=CHOLEC80_PHASES, pictures=PICTURES):
    rows = [(f, phase_of(f / RATE_HZ, phases)) for f in range(0, pictures, phase_step)]
    write_table(root / "phase_annotations" / f"{name}-phase.txt", ("Frame", "Phase"), rows)
    rows = [(f, *(int(k == f // RATE_HZ) for k in range(7))) for f in range(0, pictures, RATE_HZ)]
    write_table(root / "tool_annotations" / f"{name}-tool.txt", ("Frame", *CHOLEC80_TOOLS), rows)


def cholec80_frames(root, name="video01", numbers=range(0, 1000, 100)):
    (root / "frames" / name).mkdir(parents=True)
    (root / "annotation").mkdir(exist_ok=True)
    lines = ["Frame,Phase"]
    for number in numbers:
        cv2.imwrite(str(root / "frames" / name / f"{number}.jpg"), numbered_picture(number))
        phase = CHOLEC80_PHASES.index(phase_of(number / RATE_HZ, CHOLEC80_PHASES, 40))
        lines.append(f"{number}.jpg,{phase}")
    (root / "annotation" / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return root


def cholect50(root, name="VID68", suffix="png", seconds=(0, 1, 2, 5, 9)):
    """Second 2 has no annotation, second 5 has an instrument and no phase of its own; the names are CholecT50's."""
    spelled = [
        "preparation",
        "carlot-triangle-dissection",
        "clipping-and-cutting",
        "gallbladder-dissection",
        "gallbladder-packaging",
        "cleaning-and-coagulation",
        "gallbladder-extraction",
    ]
    folder = root / "videos" / name
    folder.mkdir(parents=True)
    annotations = {}
    for second in seconds:
        cv2.imwrite(str(folder / f"{second:06d}.{suffix}"), numbered_picture(second))
        if second != 2:
            row = [17, second % 6, 1.0, 0.1, 0.1, 0.2, 0.2, 0, 0, 1.0, -1.0, -1.0, -1.0, -1.0, min(second, 6)]
            annotations[str(second)] = [row]
    labels = {"fps": 1, "categories": {"phase": {str(k): n for k, n in enumerate(spelled)}}, "annotations": annotations}
    (root / "labels").mkdir(exist_ok=True)
    (root / "labels" / f"{name}.json").write_text(json.dumps(labels))
    return root


def autolaparo(root, name="01"):
    copy_of_video(root / "videos" / f"{name}.mp4")
    rows = [
        (second + 1, 1 + AUTOLAPARO_PHASES.index(phase_of(second, AUTOLAPARO_PHASES))) for second in range(LENGTH_S)
    ]
    write_table(root / "labels" / f"label_{name}.txt", ("Frame", "Phase"), rows)
    return root


def m2cai(root):
    for name in ("train_dataset/workflow_video_01", "test_dataset/test_workflow_video_02"):
        copy_of_video(root / f"{name}.mp4")
        rows = [(f, phase_of(f / RATE_HZ, M2CAI16_PHASES)) for f in range(PICTURES)]
        write_table(root / f"{name}.txt", ("Frame", "Phase"), rows)
        write_table(root / f"{name}_timestamp.txt", ("Time", "Phase"), [("00:00:00.00", "TrocarPlacement")])
    return root


def videos(root, names=("b_10", "b_9")):
    for name in names:
        copy_of_video(root / f"{name}.mp4")
    return root


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
