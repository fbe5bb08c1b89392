# SPDX-License-Identifier: Apache-2.0
"""Training sequences for the temporal head from label files alone.

Labels of whole surgeries are easier to get than their images, and a handful of surgeries shows few of the orders and
durations of phases that occur. Here the label files of further surgeries (phases and tools per second) are filled
with latents of the training videos: for each stretch of constant phase and tools, a run of frames that had the same,
from one donor video as long as it can serve. In some phases the donor's phase is ignored and only the tools must
agree: which tissue is seen then tells nothing, and the head has to learn from tools and history, which carry over
to a patient whose tissue looks different.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.label_files import DatasetError, phase_labels, read_phase_rows, read_tools
from surg_perception.gsvit.temporal import LatentSequence

_CHANGE_DONOR = 0.1  # at each stretch


@dataclass(frozen=True)
class LabelledSurgery:
    """Labels of a surgery without its images, one entry a step: `phases` int64 [n], `tools` int8 [n, 7]."""

    name: str
    phases: NDArray[np.int64]
    tools: NDArray[np.int8]


def read_surgeries(
    folder: Path, step_s: float, phases: Sequence[str], numbers: Iterable[int] | None = None
) -> list[LabelledSurgery]:
    """The surgeries for which a folder holds Cholec80's `videoNN-phase.txt` and `videoNN-tool.txt`, at 1 fps or 25.

    Args:
        folder: searched with all below it.
        step_s: seconds between the entries.
        phases: names of the phases.
        numbers: which videos NN to take; all unless told.

    Raises:
        DatasetError: no such files, or files that cannot be trusted.
    """
    wanted = None if numbers is None else set(numbers)
    tools_of = {path.name.split("-")[0]: path for path in folder.rglob("video*-tool.txt")}
    surgeries = []
    for path in sorted(folder.rglob("video*-phase.txt")):
        name = path.name.split("-")[0]
        number = re.search(r"\d+", name)
        if name not in tools_of or (wanted is not None and (number is None or int(number[0]) not in wanted)):
            continue
        rows, faults = read_phase_rows(path, rate_hz=25.0)
        labels = phase_labels(rows, faults, phases)
        faults.check(path)
        tools, tool_faults = read_tools(tools_of[name], rate_hz=25.0)
        tool_faults.check(tools_of[name])
        times_s = np.arange(labels.start_s[0], labels.end_s[-1], step_s)
        found, seen = labels.at(times_s), tools.at(times_s)
        known = (found >= 0) & (seen >= 0).all(axis=1)
        surgeries.append(LabelledSurgery(name, found[known], seen[known].astype(np.int8)))
    if not surgeries:
        raise DatasetError(
            f"{folder} holds no pair of videoNN-phase.txt and videoNN-tool.txt"
            + (" with the numbers asked for" if wanted is not None else "")
            + "; expected Cholec80's label files"
        )
    return surgeries


def resequence(
    donors: Sequence[LatentSequence],
    tools: Sequence[NDArray[np.int8]],
    surgeries: Sequence[LabelledSurgery],
    step_s: float,
    rng: np.random.Generator,
    *,
    phase_blind: float = 0.5,
) -> list[LatentSequence]:
    """One sequence of latents for each surgery.

    Args:
        donors: the training videos; all their versions give frames.
        tools: of each donor's frames, [n, 7]; -1 is taken as not seen.
        surgeries: what to fill.
        step_s: seconds between a surgery's entries.
        rng: decides everything random.
        phase_blind: share of the phases whose frames are chosen by tools alone.

    Returns:
        Sequences without probabilities, named after their surgeries.
    """
    latents = [np.concatenate([donor.latents, *donor.versions]) for donor in donors]
    repeats = [len(donor.versions) + 1 for donor in donors]
    pool = np.concatenate(latents)
    phase = np.concatenate([np.tile(donor.phases, times) for donor, times in zip(donors, repeats, strict=True)])
    key = np.concatenate([np.tile(_key(seen), times) for seen, times in zip(tools, repeats, strict=True)])
    video = np.repeat(np.arange(len(donors)), [len(one) for one in latents])

    def candidates(wanted_phase: int, wanted_key: int, donor: int, blind: bool) -> NDArray[np.intp]:
        same_tools, same_video = key == wanted_key, video == donor
        same_phase = np.ones(len(key), bool) if blind else phase == wanted_phase
        for condition in (
            same_phase & same_tools & same_video,
            same_phase & same_tools,
            same_phase & same_video,
            phase == wanted_phase,
        ):
            found = np.flatnonzero(condition & (phase >= 0))
            if len(found):
                return found
        return np.flatnonzero(phase >= 0)

    sequences = []
    for surgery in surgeries:
        wanted = _key(surgery.tools)
        changes = np.flatnonzero(np.diff(wanted) | np.diff(surgery.phases)) + 1
        donor, blind, last = int(rng.integers(len(donors))), False, -1
        chosen = np.empty(len(wanted), np.intp)
        for stretch in np.split(np.arange(len(wanted)), changes):
            now = int(surgery.phases[stretch[0]])
            if now != last:
                blind, last = bool(rng.random() < phase_blind), now
            if rng.random() < _CHANGE_DONOR:
                donor = int(rng.integers(len(donors)))
            found = candidates(now, int(wanted[stretch[0]]), donor, blind)
            chosen[stretch] = found[(rng.integers(len(found)) + np.arange(len(stretch))) % len(found)]
        sequences.append(
            LatentSequence(
                pool[chosen], None, step_s * np.arange(len(wanted), dtype=np.float64), surgery.phases, surgery.name
            )
        )
    return sequences


def _key(tools: NDArray[np.int8]) -> NDArray[np.int64]:
    """Which tools are seen, as one number: int64 [n]."""
    return (np.asarray(tools) > 0) @ (1 << np.arange(tools.shape[1]))
