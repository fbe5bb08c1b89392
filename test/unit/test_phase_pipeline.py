# SPDX-License-Identifier: Apache-2.0
"""From message to phase: states, the filter's isolation from bad frames, blank screens, stage times."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.stream.image_decode import ImageError, decode_compressed, encode_image, encode_jpeg
from surg_perception.stream.phase_pipeline import (
    ModelOutputError,
    PhasePipeline,
    PhaseSettings,
    PhaseState,
    is_blank,
)
from surg_perception.stream.stage_clock import FrameTimes, StageClock
from surg_perception.stream.temporal_filter import FilterSettings
from surg_perception.stream.temporal_head import TemporalConfig, TemporalHead

UNFILTERED = FilterSettings(time_constant_s=0.0, switch_margin=0.0, hold_s=0.0)
S = 1_000_000_000


class MeanColourBackend:
    """Scores seven classes by the mean colour of the frame it is given, so that each frame counts."""

    def __init__(self, head=True, sharpness=0.2):
        self.head = head
        self.sharpness = sharpness
        self.frames = []

    def infer(self, frame):
        assert frame.shape == (224, 224, 3)
        assert frame.dtype == np.uint8
        assert frame.flags.c_contiguous
        self.frames.append(frame.copy())
        latent = np.full((192, 4, 4), frame.mean() / 255, np.float32)
        distance = np.abs(frame.mean() - np.arange(7) * 36) * self.sharpness
        scores = np.exp(-distance)
        return (scores / scores.sum()).astype(np.float32) if self.head else None, latent


def scene(phase, seed=0, height=120, width=160):
    """A textured picture whose mean level is that of a phase of MeanColourBackend."""
    noise = np.random.default_rng(seed).normal(0, 1, (height // 8, width // 8, 3))
    noise = cv2.resize(noise - noise.mean(), (width, height), interpolation=cv2.INTER_NEAREST)
    return np.clip(phase * 36 + 25 * noise, 0, 255).astype(np.uint8)


def message(bgr, encoding="rgb8"):
    name, step, data = encode_image(bgr, encoding)
    height, width = bgr.shape[:2]
    return SimpleNamespace(encoding=name, height=height, width=width, step=step, is_bigendian=0, data=data)


def pipeline(backend=None, labels=CHOLEC80_PHASES, **settings):
    settings.setdefault("filter", UNFILTERED)
    return PhasePipeline(backend or MeanColourBackend(), labels, PhaseSettings(**settings))


def test_a_confident_frame_is_ok_and_complete():
    backend = MeanColourBackend()
    bgr = scene(4)
    result = pipeline(backend).process(message(bgr), stamp_ns=1_700_000_000_123_456_789)
    assert result.state is PhaseState.OK
    assert result.stamp_ns == 1_700_000_000_123_456_789
    assert (result.phase_id, result.phase, result.raw_phase_id) == (4, "GallbladderPackaging", 4)
    assert result.confidence == pytest.approx(result.probabilities[4])
    np.testing.assert_allclose(result.smoothed, result.probabilities, atol=1e-6)
    assert result.latent.shape == (192, 4, 4)
    assert list(result.stages_ms) == ["decode", "inference", "filter"]
    assert all(duration_ms >= 0 for duration_ms in result.stages_ms.values())
    expected = cv2.resize(bgr, (224, 224), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(backend.frames[0].astype(int), expected.astype(int), atol=1)


def test_raw_compressed_and_decoded_frames_give_the_same_phase():
    bgr = scene(3)
    one = pipeline()
    jpeg = SimpleNamespace(format="jpeg", data=encode_jpeg(bgr, 98))
    results = [one.process(message(bgr, "bgr8"), 0), one.process(jpeg, S), one.process_frame(bgr, 2 * S)]
    assert [result.phase_id for result in results] == [3, 3, 3]
    np.testing.assert_array_equal(results[0].probabilities, results[2].probabilities)


def test_the_filter_smooths_over_stamps_and_the_raw_phase_stays():
    slow = FilterSettings(time_constant_s=2.0, switch_margin=0.1, hold_s=1.0)
    one = pipeline(filter=slow)
    results = [one.process(message(scene(1 if k < 5 else 5)), k * S // 5) for k in range(40)]
    assert [result.raw_phase_id for result in results] == [1] * 5 + [5] * 35
    phases = [result.phase_id for result in results]
    switch = phases.index(5)
    assert phases == [1] * switch + [5] * (40 - switch)
    assert switch > 5 + 5  # one second of hold at five frames a second, and the smoothing before it
    assert results[6].smoothed[1] > results[6].smoothed[5] > results[5].smoothed[5]
    assert results[6].probabilities[5] > results[6].probabilities[1]
    one.reset()
    assert one.process(message(scene(1)), 9 * S).phase_id == 1


def test_low_confidence_is_uncertain_but_keeps_the_best_guess():
    backend = MeanColourBackend(sharpness=0.01)
    result = pipeline(backend, uncertain_below=0.5).process(message(scene(2)), 0)
    assert result.state is PhaseState.UNCERTAIN
    assert result.phase_id == 2
    assert result.confidence < 0.5
    assert pipeline(backend, uncertain_below=0.05).process(message(scene(2)), 0).state is PhaseState.OK


@pytest.mark.parametrize(
    ("age_s", "state"), [(None, 0), (-3.0, 2), (-0.2, 0), (0.2, 0), (0.5, 0), (0.51, 2), (60.0, 2)]
)
def test_an_old_image_and_one_far_ahead_of_the_clock_are_stale(age_s, state):
    result = pipeline(max_age_s=0.5).process(message(scene(2)), 0, age_s)
    assert result.state == state
    assert result.phase_id == 2


def test_stale_comes_before_every_other_state():
    black = np.zeros((48, 64, 3), np.uint8)
    for one, bgr in (
        (pipeline(), black),
        (pipeline(MeanColourBackend(head=False), ()), scene(2)),
        (pipeline(uncertain_below=1.0), scene(2)),
    ):
        assert one.process(message(bgr), 0, age_s=0.1).state is not PhaseState.STALE
        assert one.process(message(bgr), 0, age_s=9.0).state is PhaseState.STALE


def test_a_model_without_a_phase_head_gives_latents_only():
    for backend in (MeanColourBackend(head=False), MeanColourBackend(head=True)):
        result = pipeline(backend, labels=()).process(message(scene(2)), 0)
        assert result.state is PhaseState.NO_MODEL
        assert (result.phase_id, result.phase, result.raw_phase_id, result.confidence) == (-1, "", -1, 0.0)
        assert result.probabilities.shape == result.smoothed.shape == (0,)
        assert result.latent.shape == (192, 4, 4)


@pytest.mark.parametrize("colour", [(0, 0, 0), (200, 136, 80), (255, 0, 0), (0, 0, 255), (255, 255, 255)])
def test_a_blank_screen_is_no_signal_and_does_not_reach_model_or_filter(colour):
    backend = MeanColourBackend()
    one = pipeline(backend, filter=FilterSettings(time_constant_s=5.0))
    blank = np.empty((120, 160, 3), np.uint8)
    blank[:] = colour
    one.process(message(scene(1)), 0)
    result = one.process(message(blank), S)
    assert result.state is PhaseState.NO_SIGNAL
    assert (result.phase_id, result.phase, result.confidence) == (-1, "", 0.0)
    assert result.latent is None
    assert result.probabilities.size == 0
    assert len(backend.frames) == 1
    after = one.process(message(scene(1, seed=1)), 2 * S)
    without = pipeline(filter=FilterSettings(time_constant_s=5.0))
    without.process(message(scene(1)), 0)
    np.testing.assert_array_equal(after.smoothed, without.process(message(scene(1, seed=1)), 2 * S).smoothed)


def test_a_menu_on_a_flat_screen_is_blank_and_a_white_out_with_a_rim_is_not():
    screen = np.empty((224, 224, 3), np.uint8)
    screen[:] = (196, 136, 80)
    screen[90:140, 90:140] = np.random.default_rng(0).integers(0, 256, (50, 50, 3))
    assert is_blank(screen)
    screen[:80] = np.random.default_rng(1).integers(0, 256, (80, 224, 3))
    assert not is_blank(screen)
    white = np.full((224, 224, 3), 252, np.uint8)
    assert is_blank(white)
    white[:, :10] = 100
    assert not is_blank(white)


def test_blank_screens_among_real_frames(shared_data):
    def blanks(pattern):
        files = sorted(shared_data.glob(pattern))
        assert files
        frames = ((file, decode_compressed(file.read_bytes())) for file in files)
        return [f.name for f, bgr in frames if is_blank(cv2.resize(bgr, (224, 224)))], len(files)

    black_and_blue = [
        "00003-22976-frame-151411.jpg",
        "00006-23107-frame-215232.jpg",
        *(f"00008-23228-frame-{n}.jpg" for n in (139846, 149835, 159824, 169813, 179802, 189791)),
    ]
    found, count = blanks("ood/*.jpg")
    assert count == 160
    assert found == black_and_blue
    assert blanks("cholec80/frames/*/*.jpg") == ([], 3570)


# With a temporal head -------------------------------------------------------------------------------------------


def temporal_head(classes=7, features=192):
    """Random weights, large enough for an opinion of its own."""
    config = TemporalConfig(features, classes, "latent+probabilities", stages=2, layers=3, channels=8)
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 1.5 / np.sqrt(max(s[-1:] or (1,))), s) for name, s in config.tensor_shapes().items()}
    tensors["std"] = np.ones(config.input_width)
    tensors["temperature"] = np.array(1.0)
    return TemporalHead(config, tensors)


def with_head(head=None, **settings):
    settings.setdefault("filter", UNFILTERED)
    return PhasePipeline(MeanColourBackend(), CHOLEC80_PHASES, PhaseSettings(**settings), head or temporal_head())


def test_the_temporal_head_takes_the_place_of_the_smoothing():
    one, head = with_head(filter=FilterSettings(time_constant_s=100.0, switch_margin=0.0, hold_s=0.0)), temporal_head()
    for k, phase in enumerate([1, 1, 4, 4, 2, 2, 5, 0]):
        result = one.process(message(scene(phase, seed=k)), k * S // 2)
        expected = head.step(result.latent, result.probabilities, k / 2)
        assert result.smoothed.tobytes() == expected.tobytes()
        assert result.phase_id == int(expected.argmax())
        assert result.confidence == pytest.approx(float(expected.max()))
        assert result.raw_phase_id == int(result.probabilities.argmax()) == phase
        assert result.decided_by == "temporal_head"
        assert list(result.stages_ms) == ["decode", "inference", "filter"]
    assert one.temporal.steps == head.steps == 4


def test_without_a_temporal_head_the_filter_decides():
    assert pipeline().process(message(scene(2)), 0).decided_by == "filter"
    assert pipeline(labels=()).process(message(scene(2)), 0).decided_by == ""
    assert with_head().process(message(np.zeros((48, 64, 3), np.uint8)), 0).decided_by == ""


class Scripted:
    """A temporal head that says what it is told to."""

    config = TemporalConfig(192, 7)

    def __init__(self, phases):
        self.answers = iter([np.eye(7, dtype=np.float32)[phase] * 0.7 + np.float32(0.3 / 7) for phase in phases])

    def step(self, latent, probabilities, time_s):
        return next(self.answers)


def test_margin_and_hold_still_act_on_the_temporal_head_and_its_probabilities_stay():
    phases = [1, 2, 1, 2, 1, 2, 2, 2, 2, 2, 2]
    hold = FilterSettings(time_constant_s=5.0, switch_margin=0.1, hold_s=0.3)
    one = with_head(Scripted(phases), filter=hold)
    results = [one.process(message(scene(3)), k * S // 10) for k in range(len(phases))]
    assert [int(result.smoothed.argmax()) for result in results] == phases
    assert [result.phase_id for result in results] == [1] * 8 + [2] * 3
    assert results[7].confidence == pytest.approx(0.3 / 7, abs=1e-6)
    assert results[7].state is PhaseState.UNCERTAIN
    assert results[8].confidence == pytest.approx(0.7 + 0.3 / 7, abs=1e-6)


def test_blank_pictures_and_bad_frames_do_not_touch_the_temporal_head():
    disturbed, calm = with_head(), with_head()
    for one in (disturbed, calm):
        for k in range(5):
            one.process(message(scene(k)), k * S)
    disturbed.process(message(np.zeros((48, 64, 3), np.uint8)), 90 * S)
    for bad in bad_messages():
        with pytest.raises(ImageError):
            disturbed.process(bad, 1000 * S)
    good = disturbed.backend
    disturbed.backend = SimpleNamespace(infer=lambda frame: (np.full(7, 1 / 7, "f"), np.full((192, 4, 4), np.nan, "f")))
    with pytest.raises(ModelOutputError, match="latent is not finite"):
        disturbed.process(message(scene(2)), 1000 * S)
    disturbed.backend = good
    results = [one.process(message(scene(4)), 5 * S) for one in (disturbed, calm)]
    assert results[0].smoothed.tobytes() == results[1].smoothed.tobytes()
    assert disturbed.temporal.resets == {"gap": 0, "seek": 0}


def test_reset_forgets_the_temporal_head_too():
    one, fresh = with_head(), with_head()
    for k in range(5):
        one.process(message(scene(k)), k * S)
    kept = one.process(message(scene(1)), 5 * S)
    one.reset()
    result = one.process(message(scene(1)), 6 * S)
    assert result.smoothed.tobytes() == fresh.process(message(scene(1)), 6 * S).smoothed.tobytes()
    assert result.smoothed.tobytes() != kept.smoothed.tobytes()


def test_a_temporal_head_of_another_model_is_refused():
    with pytest.raises(ValueError, match="5 classes, but the model has 7 phases"):
        with_head(temporal_head(classes=5))
    with pytest.raises(ModelOutputError, match=r"192 features.*takes 384 features"):
        with_head(temporal_head(features=384)).process(message(scene(1)), 0)


def bad_messages():
    good = message(scene(1))
    jpeg = bytes(encode_jpeg(scene(1)))
    return [
        SimpleNamespace(**{**vars(good), "step": 3}),
        SimpleNamespace(**{**vars(good), "data": good.data[:100]}),
        SimpleNamespace(**{**vars(good), "encoding": "nonsense"}),
        SimpleNamespace(**{**vars(good), "width": 0}),
        SimpleNamespace(**{**vars(good), "width": 7680, "height": 4320, "step": 23040}),
        SimpleNamespace(format="jpeg", data=jpeg[: len(jpeg) // 2]),
    ]


def test_bad_images_raise_and_leave_no_trace():
    slow = FilterSettings(time_constant_s=5.0)
    disturbed, calm = pipeline(filter=slow), pipeline(filter=slow)
    for one in (disturbed, calm):
        one.process(message(scene(1)), 0)
    for bad in bad_messages():
        with pytest.raises(ImageError):
            disturbed.process(bad, 1000 * S)
    results = [one.process(message(scene(4)), S) for one in (disturbed, calm)]
    np.testing.assert_array_equal(results[0].smoothed, results[1].smoothed)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((np.ones(3, np.float32) / 3, np.zeros((192, 4, 4), np.float32)), r"\(3,\), expected \(7,\)"),
        ((None, np.zeros((192, 4, 4), np.float32)), "None, expected"),
        ((np.full(7, np.nan, np.float32), np.zeros((192, 4, 4), np.float32)), "probabilities are not finite"),
        ((np.ones(7, np.float32) / 7, np.full((192, 4, 4), np.inf, np.float32)), "latent is not finite"),
    ],
)
def test_a_model_that_breaks_its_contract_is_named_and_leaves_no_trace(answer, says):
    slow = FilterSettings(time_constant_s=5.0)
    disturbed, calm = pipeline(filter=slow), pipeline(filter=slow)
    for one in (disturbed, calm):
        one.process(message(scene(1)), 0)
    good = disturbed.backend
    disturbed.backend = SimpleNamespace(infer=lambda frame: answer)
    with pytest.raises(ModelOutputError, match=says):
        disturbed.process(message(scene(2)), S)
    disturbed.backend = good
    results = [one.process(message(scene(4)), 2 * S) for one in (disturbed, calm)]
    np.testing.assert_array_equal(results[0].smoothed, results[1].smoothed)


def test_settings_act_from_the_next_frame_on():
    one = pipeline(filter=FilterSettings(time_constant_s=1000.0))
    one.process(message(scene(1)), 0)
    assert one.process(message(scene(5)), S).phase_id == 1
    one.settings = PhaseSettings(filter=UNFILTERED, uncertain_below=1.0, max_pixels=10)
    with pytest.raises(ImageError, match=r"input\.max_pixels"):
        one.process(message(scene(5)), 2 * S)
    one.settings = PhaseSettings(filter=UNFILTERED, uncertain_below=1.0)
    result = one.process(message(scene(5)), 2 * S)
    assert (result.phase_id, result.state) == (5, PhaseState.UNCERTAIN)


@pytest.mark.parametrize(
    ("name", "value"), [("uncertain_below", 1.1), ("uncertain_below", -0.1), ("max_age_s", 0.0), ("max_pixels", 0)]
)
def test_impossible_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        PhaseSettings(**{name: value})


def test_a_real_clip_gives_one_result_per_frame_with_its_stamp(shared_data):
    from surg_perception.data.frames import open_source

    clip = next((shared_data / "cholec-clips").glob("*.mp4"))
    one = pipeline(filter=FilterSettings())
    with open_source(clip, rate_hz=2.0) as frames:
        stamps = [round(frame.time_s * 1e9) for frame in frames]
        results = [one.process_frame(frame.bgr, round(frame.time_s * 1e9)) for frame in frames]
    assert len(results) == 64
    assert [result.stamp_ns for result in results] == stamps
    assert all(result.state in (PhaseState.OK, PhaseState.UNCERTAIN) for result in results)


# Stage times ----------------------------------------------------------------------------------------------------


def test_laps_book_the_time_between_them(monkeypatch):
    ticks = iter([10.0, 10.004, 10.010, 10.011])
    monkeypatch.setattr("surg_perception.stream.stage_clock.perf_counter", lambda: next(ticks))
    times = FrameTimes()
    times.add("wait", 2.5)
    times.lap("decode")
    times.lap("inference")
    times.lap("decode")
    assert times.times_ms == pytest.approx({"wait": 2.5, "decode": 5.0, "inference": 6.0})


def test_percentiles_are_of_the_last_window_only():
    clock = StageClock(window=100)
    for k in range(1000):
        clock.record({"decode": float(k), "inference": 1.0})
    clock.record({"publish": 3.0})
    percentiles = clock.percentiles_ms((0, 50, 100))
    assert percentiles["decode"] == [900.0, 949.5, 999.0]
    assert percentiles["inference"] == [1.0, 1.0, 1.0]
    assert percentiles["publish"] == [3.0, 3.0, 3.0]
    assert percentiles["total"][2] == 1000.0
    assert StageClock().percentiles_ms() == {}
    with pytest.raises(ValueError, match="window is 0"):
        StageClock(0)


def test_percentiles_can_be_read_while_another_thread_records():
    clock = StageClock(window=50)
    stop = threading.Event()

    def record():
        number = 0
        while not stop.is_set():
            clock.record({f"stage{number % 20}": 1.0, "decode": 2.0})
            number += 1

    thread = threading.Thread(target=record)
    thread.start()
    try:
        for _ in range(300):
            assert set(clock.percentiles_ms().get("decode", [2.0])) == {2.0}
    finally:
        stop.set()
        thread.join()
