# SPDX-License-Identifier: Apache-2.0
"""The ribbon plot: a PNG with the right colours in the right places, without touching matplotlib's global state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.stream.phase_palette import UNKNOWN_COLOUR_RGB, phase_colour_rgb
from surg_perception.stream.ribbon import plot_ribbons

ONE = [("truth", [0.0, 1.0, 2.0], [0, 1, 2])]


def read_rgb(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    assert picture is not None, "not a readable PNG"
    return picture[..., ::-1]


def ribbons(picture: np.ndarray, colours: list[tuple[int, int, int]]) -> list[np.ndarray]:
    """The middle line of each ribbon (a block of rows coloured over a third of the width), left end to right end."""
    coloured = np.zeros(picture.shape[:2], bool)
    for colour in colours:
        coloured |= (picture == colour).all(axis=2)
    busy = coloured.sum(axis=1) > picture.shape[1] / 3
    edges = np.flatnonzero(np.diff(np.concatenate([[False], busy, [False]]).astype(int)))
    lines = []
    for top, bottom in edges.reshape(-1, 2):
        line = (top + bottom) // 2
        columns = np.flatnonzero(coloured[line])
        lines.append(picture[line, columns[0] : columns[-1] + 1])
    return lines


def test_every_row_shows_its_phases_at_their_times(tmp_path: Path) -> None:
    times_s = np.arange(0.0, 700.0)
    truth = (times_s // 100).astype(int)
    unknown = truth.copy()
    unknown[300:400] = -1
    late = np.repeat(np.arange(7), 100)[np.maximum(0, np.arange(700) - 50)]
    path = tmp_path / "ribbon.png"
    rows = [("truth", times_s, truth), ("prediction, raw", times_s, unknown), ("prediction", times_s, late)]
    plot_ribbons(path, rows, CHOLEC80_PHASES, confidence=(times_s, np.full(700, 0.8)), title="Phantom")
    picture = read_rgb(path)
    colours = [phase_colour_rgb(i) for i in range(7)]
    lines = ribbons(picture, [*colours, UNKNOWN_COLOUR_RGB])
    assert len(lines) == 3
    for line, expected in zip(lines, ([0, 3, 6], [0, -1, 6], [0, 3, 6]), strict=True):
        for t, phase_id in zip((50, 360, 690), expected, strict=True):
            assert tuple(line[int(len(line) * t / 700)].tolist()) == phase_colour_rgb(phase_id)
    at_120 = [tuple(line[int(len(line) * 120 / 700)].tolist()) for line in lines]
    assert at_120 == [colours[1], colours[1], colours[0]], "the filtered row lags by 50 s"


def test_legend_has_every_phase_also_those_that_never_came(tmp_path: Path) -> None:
    plot_ribbons(tmp_path / "r.png", ONE, CHOLEC80_PHASES)
    picture = read_rgb(tmp_path / "r.png")
    for phase_id in range(7):
        assert (picture == phase_colour_rgb(phase_id)).all(axis=2).sum() > 50
    assert not (picture == UNKNOWN_COLOUR_RGB).all(axis=2).sum() > 50
    plot_ribbons(tmp_path / "u.png", [("p", [0.0, 1.0], [0, -1])], CHOLEC80_PHASES)
    assert (read_rgb(tmp_path / "u.png") == UNKNOWN_COLOUR_RGB).all(axis=2).sum() > 50


def test_gaps_stay_empty(tmp_path: Path) -> None:
    times_s = np.concatenate([np.arange(0.0, 40.0), np.arange(60.0, 100.0)])
    plot_ribbons(tmp_path / "gap.png", [("p", times_s, np.zeros(80, int))], CHOLEC80_PHASES)
    (line,) = ribbons(read_rgb(tmp_path / "gap.png"), [phase_colour_rgb(0)])
    filled = (line == phase_colour_rgb(0)).all(axis=1)
    assert filled.mean() == pytest.approx(0.8, abs=0.02)
    assert not filled[int(0.43 * len(line)) : int(0.58 * len(line))].any()
    plot_ribbons(tmp_path / "no_gap.png", [("p", times_s, np.zeros(80, int))], CHOLEC80_PHASES, max_gap_s=30.0)
    (line,) = ribbons(read_rgb(tmp_path / "no_gap.png"), [phase_colour_rgb(0)])
    assert (line == phase_colour_rgb(0)).all()


def test_confidence_adds_a_curve_below(tmp_path: Path) -> None:
    plot_ribbons(tmp_path / "without.png", ONE, CHOLEC80_PHASES)
    plot_ribbons(tmp_path / "with.png", ONE, CHOLEC80_PHASES, confidence=([0.0, 1.0, 2.0], [0.2, 0.9, np.nan]))
    without, with_curve = read_rgb(tmp_path / "without.png"), read_rgb(tmp_path / "with.png")
    assert with_curve.shape[0] > without.shape[0] + 100
    line_colour = (0x57, 0x60, 0x6A)
    assert (with_curve == line_colour).all(axis=2).sum() > 200
    assert (without == line_colour).all(axis=2).sum() == 0


def test_eighty_rows(tmp_path: Path) -> None:
    rows = [(f"video{i:02d}", np.arange(600.0 + 10 * i), np.arange(600 + 10 * i) // 200 % 7) for i in range(80)]
    plot_ribbons(tmp_path / "many.png", rows, CHOLEC80_PHASES)
    picture = read_rgb(tmp_path / "many.png")
    assert len(ribbons(picture, [phase_colour_rgb(i) for i in range(7)])) == 80
    assert picture.shape[0] < 3000


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([("raw", [0.0, 1.0], [0])], "row 'raw': times"),
        ([("raw", [1.0, 0.0], [0, 0])], "row 'raw': times must be finite and ascend"),
        ([("raw", [0.0, float("nan")], [0, 0])], "row 'raw': times must be finite and ascend"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, rows, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_ribbons(tmp_path / "x.png", rows, CHOLEC80_PHASES)
    assert not (tmp_path / "x.png").exists()


def test_empty_rows_single_samples_and_no_labels(tmp_path: Path) -> None:
    plot_ribbons(tmp_path / "a.png", [("none", [], []), ("one", [3.0], [9])], [])
    assert read_rgb(tmp_path / "a.png").size


def test_matplotlib_is_imported_late_and_left_as_it_was(tmp_path: Path) -> None:
    code = f"""
import sys
import surg_perception.stream.ribbon as ribbon
assert "matplotlib" not in sys.modules, "matplotlib must be imported when a plot is asked for"
import matplotlib
settings = lambda: {{k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}}
before = settings()
ribbon.plot_ribbons({str(tmp_path / "x.png")!r}, [("t", [0.0, 1.0], [0, 1])], ["a", "b"])
assert "matplotlib.pyplot" not in sys.modules
assert settings() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
