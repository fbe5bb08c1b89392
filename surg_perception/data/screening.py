# SPDX-License-Identifier: Apache-2.0
"""Which parts of a video are no view into the body: title cards and slides, out of the body, blank screens.

Plain picture statistics with fixed bounds, so that a person can see why something was left out. The bounds and the
counts behind them are in docs/gensurgery.md. What looks like tissue and is none (a face, raw meat) is not found.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from surg_perception.data.video_survey import FrameStatistics, Survey

_TISSUE_SHARE = 0.25
_MIXED_TISSUE_SHARE, _MIXED_COOL_SHARE = 0.48, 0.30
_BLANK_LIT, _BLANK_FLAT, _NO_EDGES = 0.05, 0.97, 0.002
_TEXT_SMOOTH, _TEXT_EDGES = 0.70, 0.03
_SPARSE_SMOOTH = 0.85
_STILL_LEVELS, _STILL_S = 0.7, 3.0
_LEAST_S = 2.0
_LEAST_KEPT_SHARE = 0.3


class View(IntEnum):
    """What a frame shows."""

    IN_BODY = 0
    BLANK = 1
    TITLE_CARD = 2
    OUT_OF_BODY = 3

    @property
    def words(self) -> str:
        """For people: "title card"."""
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Segment:
    """A part of a video that is to be left out.

    Attributes:
        start_s, end_s: seconds; None, None for the whole video.
        reason: what it shows most of the time.
        score: share of its frames that were judged so, 0..1.
    """

    start_s: float | None
    end_s: float | None
    reason: str
    score: float


def views(survey: Survey) -> NDArray[np.int8]:
    """int8 [n], a `View` for each sampled frame, each judged by itself save that a still picture is a title card.

    - blank: nothing lit, or one colour without an edge.
    - title card: large smooth areas with strong edges (text on a background), or no change for 3 s.
    - out of body: less than a quarter of the lit picture has the colour of tissue; or less than a half, and a third
      is bluish (drapes, the room, the white inside of a trocar).
    """
    return _judged(survey.statistics, _still(survey))


def view(statistics: FrameStatistics) -> View:
    """What one picture shows, judged as `views` does, without the pictures around it."""
    return View(int(_judged(np.array([statistics], np.float32), np.zeros(1, np.bool_))[0]))


def _judged(statistics: NDArray[np.float32], still: NDArray[np.bool_]) -> NDArray[np.int8]:
    lit, tissue, cool, flat, smooth, edges = statistics[:, :6].T
    found = np.full(len(statistics), View.IN_BODY, np.int8)
    found[(tissue < _TISSUE_SHARE) | ((tissue < _MIXED_TISSUE_SHARE) & (cool >= _MIXED_COOL_SHARE))] = View.OUT_OF_BODY
    text = (smooth >= _TEXT_SMOOTH) & (edges >= _TEXT_EDGES)
    sparse = (smooth >= _SPARSE_SMOOTH) & (edges >= _NO_EDGES)
    found[text | sparse | still] = View.TITLE_CARD
    found[((lit < _BLANK_LIT) | (flat >= _BLANK_FLAT)) & (edges < _NO_EDGES)] = View.BLANK
    return found


def screen(survey: Survey) -> list[Segment]:
    """Parts to leave out, in order; one Segment without times where less than 30 % of the video would remain.

    A part lasts at least 2 s, and less than 2 s of in-body view between two of them is taken into them.
    """
    found = views(survey)
    times_s, end_s = survey.times_s, survey.duration_s
    middles = (times_s[1:] + times_s[:-1]) / 2
    borders = np.concatenate([[0.0], middles, [end_s]])
    bad = found != View.IN_BODY
    for value in (False, True):
        for first, last in _runs(bad == value):
            inner = first > 0 and last < len(bad)
            if borders[last] - borders[first] < _LEAST_S and (inner or value):
                bad[first:last] = not value
    segments = []
    for first, last in _runs(bad):
        inside = found[first:last]
        counts = np.bincount(inside, minlength=len(View))
        counts[View.IN_BODY] = 0
        segments.append(
            Segment(
                float(borders[first]),
                float(borders[last]),
                View(int(counts.argmax())).words,
                float((inside != View.IN_BODY).mean()),
            )
        )
    dropped_s = sum((s.end_s or 0.0) - (s.start_s or 0.0) for s in segments)
    if segments and end_s - dropped_s < _LEAST_KEPT_SHARE * end_s:
        most = max(segments, key=lambda s: (s.end_s or 0.0) - (s.start_s or 0.0)).reason
        return [Segment(None, None, f"non-surgical: mostly {most}", float((found != View.IN_BODY).mean()))]
    return segments


def _still(survey: Survey) -> NDArray[np.bool_]:
    """bool [n]: in a run of frames that do not change for 3 s."""
    still = np.nan_to_num(survey.column("change"), nan=np.inf) < _STILL_LEVELS
    found = np.zeros(len(still), np.bool_)
    for first, last in _runs(still):
        if survey.times_s[last - 1] - survey.times_s[first - 1] >= _STILL_S:
            found[first - 1 : last] = True
    return found


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(first, one past the last) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
