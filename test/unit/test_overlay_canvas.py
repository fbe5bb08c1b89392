# SPDX-License-Identifier: Apache-2.0
"""The overlay: what is drawn where, that nothing else is touched, and a history that stays small."""

from __future__ import annotations

import itertools
import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.stream import overlay_canvas
from surg_perception.stream.overlay_canvas import (
    STATE_BADGES,
    TRACK_BGR,
    OverlayCanvas,
    OverlayInfo,
    RibbonHistory,
    shorten,
)
from surg_perception.stream.phase_palette import (
    PHASE_COLOURS_RGB,
    UNKNOWN_COLOUR_RGB,
    clock,
    phase_colour_rgb,
    readable_name,
    tick_step_s,
)
from surg_perception.stream.phase_pipeline import PhaseState

SIZES = [(320, 240), (640, 480), (854, 480), (1920, 1080), (3840, 2160), (240, 1080), (3000, 240), (1080, 1920)]
TINY = [(1, 1), (3, 200), (200, 3), (40, 40), (100, 60), (160, 120)]
NAN = math.nan


def info(stamp_s: float = 0.0, phase_id: int = 3, state: int = PhaseState.OK, **kwargs) -> OverlayInfo:
    values = {
        "phase": "GallbladderDissection",
        "confidence": 0.87,
        "probabilities": (0.01, 0.02, 0.03, 0.87, 0.03, 0.02, 0.02),
        "latency_ms": 12.3,
        "rate_hz": 25.0,
        "backend": "openvino:CPU:bf16",
        "model_id": "gsvit-m0@3fa9c1d2e4b5",
    }
    return OverlayInfo(stamp_s, phase_id=phase_id, state=state, **(values | kwargs))


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def texts(canvas: OverlayCanvas) -> list[str]:
    return [box[4] for box in canvas.text_boxes]


def bgr(phase_id: int) -> tuple[int, int, int]:
    return phase_colour_rgb(phase_id)[::-1]


def ribbon_place(width: int, height: int) -> tuple[int, int, int, int]:
    """x, y, w, h of the ribbon, found on a picture whose whole minute is phase 0."""
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    for t in range(61):
        canvas.history.add(float(t), 0, PhaseState.OK)
    drawn = canvas.draw(np.zeros((height, width, 3), np.uint8), info(60.0, 0))
    is_phase = (drawn == bgr(0)).all(axis=2)
    rows = np.flatnonzero(is_phase.sum(axis=1) > 0.9 * width)
    columns = np.flatnonzero(is_phase[rows].all(axis=0))
    return columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1


def assert_texts_apart(canvas: OverlayCanvas, width: int, height: int) -> None:
    for x, y, w, h, text in canvas.text_boxes:
        assert min(x, y, width - x - w, height - y - h) >= 0, f"{text!r} leaves the picture"
    for (ax, ay, aw, ah, a), (bx, by, bw, bh, b) in itertools.combinations(canvas.text_boxes, 2):
        apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
        assert apart, f"{a!r} and {b!r} overlap in {width}x{height}"


# Drawing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_header_and_footer_change_and_the_picture_between_stays(width: int, height: int) -> None:
    original = picture(width, height)
    kept = original.copy()
    drawn = OverlayCanvas(CHOLEC80_PHASES).draw(original, info())
    assert drawn.shape == original.shape
    assert drawn.dtype == np.uint8
    assert drawn.flags.c_contiguous
    assert not np.shares_memory(drawn, original)
    np.testing.assert_array_equal(original, kept)
    changed = (drawn != original).any(axis=(1, 2))
    assert changed[0]
    assert changed[-1]
    assert not changed[height // 4 : height * 13 // 20].any()
    untouched = np.flatnonzero(~changed)
    assert len(untouched) >= 0.55 * height
    assert np.diff(untouched).max() == 1, "the untouched picture must be one band"


@pytest.mark.parametrize(("width", "height"), SIZES + TINY)
@pytest.mark.parametrize("state", [*PhaseState, 9])
def test_every_state_at_every_size(width: int, height: int, state: int) -> None:
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    unknown = info(0.0, -1, state, phase="", confidence=NAN, latency_ms=NAN, rate_hz=NAN, probabilities=())
    for i in (unknown, info(100.0, 3, state), info(4000.0, 6, state)):
        assert canvas.draw(picture(width, height), i).shape == (height, width, 3)
        assert_texts_apart(canvas, width, height)
        assert canvas.no_signal_frame(width, height, i).shape == (height, width, 3)
        assert_texts_apart(canvas, width, height)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 1500),
    height=st.integers(1, 1200),
    labels=st.lists(st.text(max_size=60), max_size=24),
    phase_id=st.integers(-1, 30),
    elapsed_s=st.floats(0, 40000),
    words=st.text(max_size=80),
    number=st.floats(),
)
def test_text_never_overlaps_whatever_is_shown(width, height, labels, phase_id, elapsed_s, words, number) -> None:
    canvas = OverlayCanvas(labels)
    canvas.history.add(0.0, 0, PhaseState.OK)
    shown = info(
        elapsed_s, phase_id, phase=words, backend=words, model_id=words, confidence=number, latency_ms=number,
        rate_hz=number, probabilities=[number] * len(labels),
    )  # fmt: skip
    canvas.draw(np.zeros((height, width, 3), np.uint8), shown)
    assert_texts_apart(canvas, width, height)


def test_what_is_known_is_written() -> None:
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    canvas.draw(picture(1920, 1080), info())
    written = texts(canvas)
    for expected in ("Gallbladder dissection", "87 %", "OK", "12.3 ms", "25.0 fps", "openvino:CPU:bf16"):
        assert expected in written
    assert "gsvit-m0@3fa9c1d2e4b5" in written
    assert {readable_name(label) for label in CHOLEC80_PHASES} <= set(written)


@pytest.mark.parametrize(
    ("labels", "phase_id", "phase", "state", "expected"),
    [
        (CHOLEC80_PHASES, -1, "", PhaseState.OK, "Phase unknown"),
        (CHOLEC80_PHASES, 9, "ArgonCoagulation", PhaseState.OK, "Argon coagulation"),
        ((), 2, "", PhaseState.OK, "Phase 2"),
        ((), -1, "", PhaseState.NO_MODEL, "No phase model"),
    ],
)
def test_title_of_phases_outside_the_labels(labels, phase_id, phase, state, expected) -> None:
    canvas = OverlayCanvas(labels)
    canvas.draw(picture(854, 480), info(0.0, phase_id, state, phase=phase))
    assert texts(canvas)[1] == expected


@pytest.mark.parametrize("state", list(PhaseState))
def test_badge_has_the_colour_and_the_name_of_the_state(state: PhaseState) -> None:
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    drawn = canvas.draw(np.zeros((480, 854, 3), np.uint8), info(0.0, state=state, confidence=NAN))
    x, y, _, h, name = canvas.text_boxes[0]
    assert name == state.name.replace("_", " ")
    np.testing.assert_array_equal(drawn[y + h // 2, x - 2], STATE_BADGES[state][1])
    others = [colour for s, (_, colour) in STATE_BADGES.items() if s != state and s < PhaseState.OUT_OF_BODY]
    header = {tuple(pixel) for pixel in drawn[:60].reshape(-1, 3).tolist()}
    assert not header & (set(others) - {STATE_BADGES[state][1]})


def test_confidence_bar_is_as_long_as_the_confidence() -> None:
    def bar_px(confidence: float) -> int:
        canvas = OverlayCanvas(CHOLEC80_PHASES)
        drawn = canvas.draw(np.zeros((1080, 1920, 3), np.uint8), info(confidence=confidence))
        return int((drawn[:90, :500] == STATE_BADGES[PhaseState.OK][1]).all(axis=2).any(axis=0).sum())

    whole = bar_px(1.0)
    assert whole > 100
    assert bar_px(0.5) == pytest.approx(whole / 2, abs=6)
    assert bar_px(7.0) == pytest.approx(whole, abs=1)
    assert bar_px(NAN) == bar_px(0.0) == 0


def test_legend_meters_follow_the_probabilities() -> None:
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    low = canvas.draw(np.zeros((1080, 1920, 3), np.uint8), info(probabilities=(0.1,) + (0.15,) * 6))
    high = canvas.draw(np.zeros((1080, 1920, 3), np.uint8), info(probabilities=(0.9,) + (0.15,) * 6))

    def of_phase_0(drawn: np.ndarray) -> int:
        return int((drawn[-22:] == bgr(0)).all(axis=2).sum())

    assert of_phase_0(high) > 5 * of_phase_0(low) > 0


@pytest.mark.parametrize("shape", [(480, 640), (480, 640, 4), (0, 640, 3), (480, 0, 3)])
def test_not_a_bgr_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
        OverlayCanvas(CHOLEC80_PHASES).draw(np.zeros(shape, np.uint8), info())


def test_float_picture_and_bad_frame_size_are_refused() -> None:
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    with pytest.raises(ValueError, match="float64"):
        canvas.draw(np.zeros((8, 8, 3)), info())
    with pytest.raises(ValueError, match="0x480"):
        canvas.no_signal_frame(0, 480, info())
    with pytest.raises(ValueError, match="stamp_s is nan"):
        canvas.draw(picture(64, 64), info(NAN))


def test_non_contiguous_pictures_are_drawn_like_their_copies() -> None:
    whole = picture(900, 500)
    view = whole[10:490, 20:874]
    drawn_view = OverlayCanvas(CHOLEC80_PHASES).draw(view, info())
    drawn_copy = OverlayCanvas(CHOLEC80_PHASES).draw(view.copy(), info())
    np.testing.assert_array_equal(drawn_view, drawn_copy)
    assert drawn_view.flags.c_contiguous


def test_long_names_are_shortened_and_stay_distinct() -> None:
    labels = [
        f"{part}GallbladderDissectionFromTheLiverBedWithMonopolarHookAndSuction"
        for part in ("First", "Second", "Third")
    ]
    canvas = OverlayCanvas(labels)
    canvas.draw(picture(480, 360), info(0.0, 1))
    assert readable_name(labels[1]) not in texts(canvas)[:2]
    legend = [t for t in texts(canvas) if t.startswith(("First", "Second", "Third")) and t != texts(canvas)[1]]
    assert len(set(legend)) == 3


def test_more_labels_than_colours() -> None:
    labels = [*CHOLEC80_PHASES, *(f"Second{label}" for label in CHOLEC80_PHASES)]
    canvas = OverlayCanvas(labels)
    drawn = canvas.draw(np.zeros((1080, 1920, 3), np.uint8), info(0.0, 13))
    for phase_id in range(14):
        assert (drawn[-90:] == bgr(phase_id)).all(axis=2).any(), f"no legend of phase {phase_id}"


def test_without_pillow_opencv_letters_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay_canvas, "_dejavu_files", lambda: None)
    for width, height in SIZES:
        canvas = OverlayCanvas(CHOLEC80_PHASES)
        assert canvas.typeface.name == "Hershey"
        drawn = canvas.draw(np.zeros((height, width, 3), np.uint8), info())
        assert_texts_apart(canvas, width, height)
        x, y, w, h, _ = canvas.text_boxes[1]
        assert drawn[y : y + h, x : x + w].max() > 200, "the title must be legible"


def test_text_with_control_characters_and_other_scripts_is_drawn() -> None:
    for words in ("line\nbreak\ttab", "\x85\x00\ud800", "胆囊解剖", "تشريح", "e\u0301 \U0001f600"):
        canvas = OverlayCanvas([words])
        canvas.draw(picture(854, 480), info(0.0, 0, phase=words, backend=words, model_id=words))
        assert len(canvas.text_boxes) > 8


def test_text_is_legible_on_white_and_on_black() -> None:
    for level in (0, 255):
        canvas = OverlayCanvas(CHOLEC80_PHASES)
        drawn = canvas.draw(np.full((480, 854, 3), level, np.uint8), info())
        x, y, w, h, _ = canvas.text_boxes[1]
        title = cv2.cvtColor(drawn[y : y + h, x : x + w], cv2.COLOR_BGR2GRAY)
        assert int(title.max()) - int(np.median(title)) > 140


def test_real_video_keeps_its_middle(shared_data) -> None:
    clip = sorted((shared_data / "cholec-clips").glob("*.mp4"))[0]
    video = cv2.VideoCapture(str(clip))
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    for i in range(25):
        ok, frame = video.read()
        assert ok
        drawn = canvas.draw(frame, info(i / 25))
        np.testing.assert_array_equal(drawn[60:380], frame[60:380])
        assert (drawn[:40] != frame[:40]).any()


# No signal ----------------------------------------------------------------------------------------------------


def test_no_signal_frame_says_so_and_since_when() -> None:
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    for t in range(10):
        canvas.draw(picture(854, 480), info(float(t)))
    silent = info(74.0, -1, PhaseState.OK, confidence=NAN)
    drawn = canvas.no_signal_frame(854, 480, silent)
    assert texts(canvas).count("NO SIGNAL") == 2
    assert "Last picture 01:05 ago" in texts(canvas)
    assert "12.3 ms" not in texts(canvas), "a latency of long ago must not be shown"
    middle = drawn[60:380]
    assert middle.mean() < 60
    assert middle.max() > 200
    canvas.draw(picture(854, 480), info(75.0))
    assert [s.start_s for s in canvas.history.segments] == [0.0, 75.0]


def test_no_signal_before_the_first_picture() -> None:
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    canvas.no_signal_frame(640, 480, OverlayInfo(1e9))
    assert len(canvas.history) == 0
    assert not [t for t in texts(canvas) if t.startswith("Last picture")]
    canvas.draw(picture(640, 480), info(5.0))
    assert canvas.history.elapsed_s == 0.0


# The ribbon on the picture ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(320, 240), (854, 480), (1920, 1080)])
def test_ribbon_has_each_phase_where_it_happened(width: int, height: int) -> None:
    x0, y0, w, h = ribbon_place(width, height)
    assert x0 >= 0
    assert y0 + h <= height
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    plan = [(0, 100, 0, PhaseState.OK), (100, 200, 1, PhaseState.OK), (200, 300, 2, PhaseState.UNCERTAIN)]
    plan += [(300, 350, -1, PhaseState.NO_SIGNAL), (350, 375, -1, PhaseState.OK), (375, 400, 6, PhaseState.OK)]
    for start, end, phase_id, state in plan:
        for t in range(start, end):
            canvas.history.add(float(t), phase_id, state)
    drawn = canvas.draw(np.zeros((height, width, 3), np.uint8), info(400.0, 6))
    ribbon = drawn[y0 : y0 + h, x0 : x0 + w]

    def column(t: float) -> set[tuple[int, ...]]:
        return {tuple(pixel) for pixel in ribbon[:, int(w * t / 400)].tolist()}

    assert column(50) == {bgr(0)}
    assert column(150) == {bgr(1)}
    hatched = {tuple(p) for p in ribbon[:, int(w * 0.52) : int(w * 0.73)].reshape(-1, 3).tolist()}
    assert bgr(2) in hatched
    assert len(hatched) == 2
    assert all(sum(colour) < sum(bgr(2)) for colour in hatched - {bgr(2)}), "uncertain stretches are dimmed"
    assert column(325) == {TRACK_BGR}
    assert column(362) == {UNKNOWN_COLOUR_RGB[::-1]}
    assert column(390) == {bgr(6)}


def test_first_minute_grows_from_the_left() -> None:
    x0, y0, w, h = ribbon_place(854, 480)
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    for t in range(31):
        drawn = canvas.draw(np.zeros((480, 854, 3), np.uint8), info(100.0 + t, 4))
    row = drawn[y0 + h // 2, x0 : x0 + w]
    assert (row[: int(w * 0.48)] == bgr(4)).all()
    assert (row[int(w * 0.52) :] == TRACK_BGR).all()
    assert "00:30" in texts(canvas)


def test_ribbon_is_never_older_than_a_pixel() -> None:
    x0, y0, w, h = ribbon_place(640, 480)
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    for t in range(2000):
        phase_id = 0 if t < 1000 else 1
        drawn = canvas.draw(np.zeros((480, 640, 3), np.uint8), info(float(t), phase_id)) if t % 50 == 0 else None
        canvas.history.add(float(t), phase_id, PhaseState.OK)
        if drawn is not None and t > 1000:
            row = drawn[y0 + h // 2, x0 : x0 + w]
            assert int((row == bgr(0)).all(axis=1).sum()) == pytest.approx(w * 1000 / t, abs=4)


def test_time_axis_has_clock_labels() -> None:
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    for t in range(0, 5400, 2):
        canvas.history.add(float(t), 1, PhaseState.OK)
    canvas.draw(picture(1920, 1080), info(5400.0, 1))
    assert {"00:00", "1:00:00", "1:30:00"} <= set(texts(canvas))


# History ------------------------------------------------------------------------------------------------------


def test_equal_samples_merge_and_runs_touch() -> None:
    history = RibbonHistory()
    for t, phase_id in ((0.0, 0), (1.0, 0), (2.0, 0), (3.0, 1), (4.0, 1)):
        history.add(t, phase_id, PhaseState.OK)
    assert [(s.start_s, s.end_s, s.phase_id, s.sure) for s in history.segments] == [
        (0.0, 3.0, 0, True),
        (3.0, 4.0, 1, True),
    ]


@pytest.mark.parametrize("state", [PhaseState.UNCERTAIN, PhaseState.STALE])
def test_unsure_samples_are_runs_of_their_own(state: PhaseState) -> None:
    history = RibbonHistory()
    for t, s in ((0.0, PhaseState.OK), (1.0, state), (2.0, state), (3.0, PhaseState.OK)):
        history.add(t, 2, s)
    assert [(s.start_s, s.end_s, s.sure) for s in history.segments] == [(0, 1, True), (1, 3, False), (3, 3, True)]


@pytest.mark.parametrize("state", [PhaseState.NO_SIGNAL, PhaseState.NO_MODEL, PhaseState.FAULT])
def test_no_signal_and_long_silence_leave_gaps(state: PhaseState) -> None:
    history = RibbonHistory(max_gap_s=3.0)
    for t, s in ((0, 0), (1, 0), (2, state), (3, 0), (4, 0), (8, 0), (9, 0)):
        history.add(float(t), 1, s)
    assert [(s.start_s, s.end_s) for s in history.segments] == [(0, 1), (3, 4), (8, 9)]
    ids, _ = history.sample(9, 9.0)
    assert ids.tolist() == [1, -2, -2, 1, -2, -2, -2, -2, 1]


def test_stamps_that_jump_start_a_new_procedure() -> None:
    history = RibbonHistory()
    for t in (100.0, 101.0, 100.5):
        history.add(t, 0, PhaseState.OK)
    assert history.elapsed_s == 1.0, "a late sample is ignored"
    history.add(10.0, 1, PhaseState.OK)
    assert [s.phase_id for s in history.segments] == [1]
    history.add(1.7e9, 2, PhaseState.OK)
    assert (history.start_s, [s.phase_id for s in history.segments]) == (1.7e9, [2])
    with pytest.raises(ValueError, match="finite"):
        history.add(math.inf, 0, PhaseState.OK)


def test_ribbon_is_drawn_anew_after_a_restart() -> None:
    x0, y0, _, h = ribbon_place(854, 480)
    canvas = OverlayCanvas(CHOLEC80_PHASES)
    black = np.zeros((480, 854, 3), np.uint8)
    for stamp_s, phase_id in ((1000.0, 0), (1002.0, 0), (0.0, 5), (2.0, 5)):
        drawn = canvas.draw(black, info(stamp_s, phase_id))
    assert (drawn[y0 + h // 2, x0] == bgr(5)).all()
    drawn = canvas.draw(black, info(0.5, -1, PhaseState.NO_SIGNAL))
    assert (drawn[y0 + h // 2, x0 + 10] == TRACK_BGR).all(), "nothing is known of the new procedure yet"


def test_memory_stays_bounded_over_ten_hours_of_flicker() -> None:
    history = RibbonHistory(max_segments=512)
    bytes_before = history.nbytes
    rng = np.random.default_rng(0)
    most = 0
    for i, flicker in enumerate(rng.random(36_000).tolist()):
        main = i // 6000
        history.add(float(i), main if flicker < 0.7 else 6, PhaseState.OK)
        most = max(most, len(history))
    assert most <= 512
    assert history.nbytes == bytes_before
    segments = history.segments
    assert all(s.start_s <= s.end_s for s in segments)
    assert all(a.end_s <= b.start_s + 1e-6 for a, b in itertools.pairwise(segments))
    assert segments[0].start_s == 0.0
    assert segments[-1].end_s == pytest.approx(35_999.0)
    ids, _ = history.sample(60, history.elapsed_s)
    assert ids.tolist() == [i // 10 for i in range(60)], "what filled most of each ten minutes is kept"


def test_gaps_survive_decimation() -> None:
    history = RibbonHistory(max_segments=64)
    for i in range(4000):
        if not 1000 <= i < 2000:
            history.add(float(i), i % 2, PhaseState.OK)
    ids, _ = history.sample(40, history.elapsed_s)
    assert {s.phase_id for s in history.segments} == {0, 1}
    assert set(ids[11:19].tolist()) == {-2}
    assert -2 not in ids[:9].tolist() + ids[21:].tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.integers(-1, 9), st.sampled_from(list(PhaseState))), min_size=1, max_size=150
    )
)
def test_history_is_always_in_order_and_within_bounds(samples) -> None:
    history = RibbonHistory(max_segments=16)
    t = 0.0
    for step_s, phase_id, state in samples:
        t += step_s
        history.add(t, phase_id, state)
    assert len(history) <= 16
    for a, b in itertools.pairwise(history.segments):
        assert a.start_s <= a.end_s <= b.start_s + 1e-6
    ids, sure = history.sample(50, max(1.0, history.elapsed_s))
    assert ids.shape == sure.shape == (50,)
    assert set(ids.tolist()) <= {-2, *(s.phase_id for s in history.segments)}


@pytest.mark.parametrize("kwargs", [{"max_gap_s": 0.0}, {"max_gap_s": NAN}, {"max_segments": 3}])
def test_history_refuses_bad_bounds(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="expected a gap above 0"):
        RibbonHistory(**kwargs)


# Names, colours, clock ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("CalotTriangleDissection", "Calot triangle dissection"),
        ("carlot-triangle-dissection", "Carlot triangle dissection"),
        ("cystic_plate", "Cystic plate"),
        ("ICGInjection", "ICG injection"),
        ("Calot triangle dissection", "Calot triangle dissection"),
        ("", ""),
    ],
)
def test_readable_names(label: str, expected: str) -> None:
    assert readable_name(label) == expected


def test_shorten_keeps_as_much_as_fits() -> None:
    name = "Gallbladder dissection"
    assert shorten(name, lambda t: len(t) <= 30) == name
    assert shorten(name, lambda t: len(t) <= 16) == "Gallbl. dissect."
    assert shorten(name, lambda t: len(t) <= 5) == "Gall…"
    assert shorten(name, lambda t: False) == ""
    assert shorten("", lambda t: False) == ""


def test_colours_are_distinct_and_fixed() -> None:
    assert len(set(PHASE_COLOURS_RGB)) == len(PHASE_COLOURS_RGB) >= 7
    assert [phase_colour_rgb(i) for i in range(7)] == list(PHASE_COLOURS_RGB)
    assert len({phase_colour_rgb(i) for i in range(21)}) == 21
    assert phase_colour_rgb(-1) == UNKNOWN_COLOUR_RGB
    assert all(0 <= c <= 255 for i in range(200) for c in phase_colour_rgb(i))


def test_clock_and_ticks() -> None:
    assert [clock(s) for s in (-5, 0, 59.9, 65, 3599, 3600, 36_061)] == [
        "00:00", "00:00", "00:59", "01:05", "59:59", "1:00:00", "10:01:01",
    ]  # fmt: skip
    assert [tick_step_s(s, 6) for s in (1, 60, 61, 1200, 36_000, 1e6)] == [1, 10, 15, 300, 7200, 172_800]
