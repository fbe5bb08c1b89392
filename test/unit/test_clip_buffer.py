# SPDX-License-Identifier: Apache-2.0
"""The clip buffer samples by stamps, encodes only what is new, forgets in time, and finds windows."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surg_perception.stream.clip_buffer import ClipBuffer, NoFrames, WindowOutside
from surg_perception.stream.image_decode import ImageError, resize_to_model_input

S = 10**9
START_NS = 1_000 * S


def image(level: int) -> SimpleNamespace:
    """A raw image message of one grey level."""
    return SimpleNamespace(encoding="mono8", height=6, width=8, step=8, is_bigendian=0, data=bytes([level]) * 48)


class Encoder:
    """Features that say what was encoded: the grey level of each frame, and how often it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, frames: np.ndarray) -> tuple[int, ...]:
        assert frames.shape[1:] == (4, 4, 3)
        assert frames.dtype == np.uint8
        self.calls.append(tuple(int(frame[0, 0, 0]) for frame in frames))
        return self.calls[-1]


def buffer(**changes: Any) -> tuple[ClipBuffer[Any], Encoder]:
    encoder = Encoder()
    return ClipBuffer(encoder, **{"size": 4, **changes}), encoder


def fill(clip: ClipBuffer[Any], seconds: Iterable[float], levels: Iterable[int] | None = None) -> list[bool]:
    """Offer frames at these seconds after START_NS, level = the number of the frame, and encode after each."""
    kept = []
    for i, (second, level) in enumerate(zip(seconds, levels or range(1000), strict=False)):
        kept.append(clip.offer(image(level), START_NS + round(second * S), arrived_s=float(i)))
        while clip.encode_next():
            pass
    return kept


def stamps(*seconds: float) -> tuple[int, ...]:
    return tuple(START_NS + round(second * S) for second in seconds)


# Sampling ---------------------------------------------------------------------------------------------------------


def test_a_fast_stream_is_sampled_on_a_grid_of_its_stamps_and_only_kept_frames_are_decoded() -> None:
    clip, encoder = buffer()
    seconds = [i / 25 for i in range(101)]
    kept = fill(clip, seconds, range(101))
    times = [second for second, taken in zip(seconds, kept, strict=True) if taken]
    assert times[0] == 0.0
    assert np.diff(times[1:]) == pytest.approx(1.0)
    assert len(times) == 5
    assert clip.frames == 5
    assert [levels[-1] for levels in encoder.calls] == [round(second * 25) for second in times]
    broken = image(0)
    broken.data = b""
    assert not clip.offer(broken, START_NS + round(4.3 * S)), "not due, so not looked at"
    with pytest.raises(ImageError):
        clip.offer(broken, START_NS + 5 * S)
    assert clip.offer(image(7), START_NS + 5 * S + 1), "the tick is still to be had"


def test_frames_of_the_sampling_rate_itself_are_all_kept_though_stamps_jitter() -> None:
    clip, _ = buffer()
    jitter = np.random.default_rng(0).uniform(-0.045, 0.045, 40)
    assert all(fill(clip, [0.05, *(i + 0.05 + jitter[i] for i in range(1, 40))]))


def test_the_rate_is_a_parameter() -> None:
    clip, _ = buffer(rate_hz=2.0)
    fill(clip, [i / 10 for i in range(31)])
    assert clip.frames == 7
    window = clip.window(*clip.span(1.5))
    assert [(start, end) for start, end, _ in window.segments][-1][1] - window.segments[0][0] == window.frames / 2.0


def test_frames_are_resized_as_the_models_input_is() -> None:
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (30, 40, 3), np.uint8)
    seen: list[np.ndarray] = []
    clip: ClipBuffer[Any] = ClipBuffer(lambda frames: seen.append(frames) or 0, size=12)
    message = SimpleNamespace(encoding="bgr8", height=30, width=40, step=120, is_bigendian=0, data=picture.tobytes())
    clip.offer(message, START_NS)
    clip.encode_next()
    assert np.array_equal(seen[0][0], resize_to_model_input(picture, 12))


# Segments and encoding --------------------------------------------------------------------------------------------


def test_each_frame_costs_one_encoding_and_asking_none() -> None:
    clip, encoder = buffer()
    fill(clip, range(10))
    assert encoder.calls == [(0,), (0, 1), (0, 1, 2)] + [tuple(range(i - 3, i + 1)) for i in range(3, 10)]
    window = clip.window(*clip.span(8.0))
    assert window.segments == ((0.0, 4.0, (2, 3, 4, 5)), (4.0, 8.0, (6, 7, 8, 9)))
    assert (window.first_ns, window.last_ns, window.frames) == (*stamps(2, 9), 8)
    assert clip.window(*clip.span(10.0)).segments[0] == (0.0, 2.0, (0, 1))
    assert len(encoder.calls) == 10


def test_frames_that_came_while_nothing_was_encoded_are_caught_up_newest_first() -> None:
    clip, encoder = buffer()
    for i in range(7):
        clip.offer(image(i), START_NS + i * S)
    assert clip.encode_next()
    assert clip.window(*clip.span(4.0)).segments == ((0.0, 4.0, (3, 4, 5, 6)),)
    assert [clip.encode_next() for _ in range(7)] == [True] * 6 + [False]
    assert encoder.calls[1:3] == [(2, 3, 4, 5), (1, 2, 3, 4)]
    assert clip.window(*clip.span(7.0)).frames == 7


def test_a_window_ends_with_the_newest_encoded_frame() -> None:
    clip, _ = buffer()
    fill(clip, range(6))
    clip.offer(image(6), START_NS + 6 * S)
    window = clip.window(*clip.span(3.0))
    assert window.segments == ((0.0, 4.0, (2, 3, 4, 5)),)
    assert window.last_ns == stamps(5)[0]


def test_an_encoder_that_fails_is_not_called_again_for_the_same_frames() -> None:
    calls = []

    def encode(frames: np.ndarray) -> int:
        calls.append(len(frames))
        if len(frames) == 2:
            raise RuntimeError("out of memory")
        return len(frames)

    clip: ClipBuffer[int] = ClipBuffer(encode, size=4)
    clip.offer(image(0), START_NS)
    assert clip.encode_next()
    clip.offer(image(1), START_NS + S)
    with pytest.raises(RuntimeError, match="out of memory"):
        clip.encode_next()
    assert not clip.encode_next()
    assert clip.window(*clip.span(8.0)).segments == ((0.0, 1.0, 1),), "the features of the earlier frame stay"
    clip.offer(image(2), START_NS + 2 * S)
    assert clip.encode_next()
    assert clip.window(*clip.span(8.0)).frames == 3
    assert calls == [1, 2, 3]


def test_frames_may_come_while_a_segment_is_being_encoded() -> None:
    inside, go = threading.Event(), threading.Event()

    def encode(frames: np.ndarray) -> int:
        inside.set()
        assert go.wait(10)
        return len(frames)

    clip: ClipBuffer[int] = ClipBuffer(encode, size=4)
    clip.offer(image(0), START_NS)
    worker = threading.Thread(target=clip.encode_next)
    worker.start()
    assert inside.wait(10)
    assert clip.offer(image(1), START_NS + S), "offering does not wait for the encoder"
    assert clip.frames == 2
    go.set()
    worker.join(10)
    assert clip.window(*clip.span(8.0)).frames == 1
    assert clip.encode_next()
    assert clip.window(*clip.span(8.0)).frames == 2


# Breaks in the stream ---------------------------------------------------------------------------------------------


def test_no_segment_crosses_a_gap_and_times_show_it() -> None:
    clip, encoder = buffer()
    fill(clip, [0, 1, 20, 21, 22])
    assert encoder.calls[-1] == (2, 3, 4)
    assert clip.window(*clip.span(30.0)).segments == ((0.0, 2.0, (0, 1)), (20.0, 23.0, (2, 3, 4)))
    assert clip.window(*clip.span(10.0)).segments == ((0.0, 3.0, (2, 3, 4)),)


def test_a_pause_of_up_to_two_and_a_half_periods_is_no_gap() -> None:
    clip, encoder = buffer()
    fill(clip, [0, 2, 4.5])
    assert encoder.calls[-1] == (0, 1, 2)


def test_a_recording_that_loops_clears_the_buffer() -> None:
    clip, encoder = buffer()
    fill(clip, [0, 1, 2, 3, 4, 5])
    assert fill(clip, [0, 0.5, 1], levels=[50, 51, 52]) == [True, False, True]
    assert clip.frames == 2
    assert encoder.calls[-1] == (50, 52)
    assert clip.span(60.0) == stamps(0, 1)
    with pytest.raises(WindowOutside):
        clip.span(start_ns=stamps(2)[0], end_ns=stamps(5)[0])


def test_frames_in_the_wrong_order_are_left_out() -> None:
    clip, _ = buffer()
    assert fill(clip, [0, 1, 2, 3, 1.5, 2.9, 4]) == [True, True, True, True, False, False, True]
    assert clip.frames == 5


# Age --------------------------------------------------------------------------------------------------------------


def test_frames_are_dropped_before_they_are_too_old() -> None:
    clip, _ = buffer(length_s=8.0)
    for second in range(40):
        fill(clip, [second])
        first_ns, last_ns = clip.span(1000.0)
        assert last_ns - first_ns < 8 * S
        assert clip.frames <= 8
    assert clip.frames == 8
    assert clip.window(*clip.span(1000.0)).segments[0][2] == (0, 0, 0, 0)


def test_a_stream_that_stopped_is_forgotten() -> None:
    clip, _ = buffer(length_s=8.0)
    fill(clip, range(6))  # arrived at 0, 1, … 5 s of the steady clock
    clip.expire(7.9)
    assert clip.frames == 6
    clip.expire(8.0)
    assert clip.frames == 5
    window = clip.window(*clip.span(8.0))
    assert window.segments == ((0.0, 4.0, (2, 3, 4, 5)),), "the segment (0, 1) has lost a frame"
    assert (window.first_ns, window.frames) == (stamps(2)[0], 4)
    clip.expire(11.0)
    with pytest.raises(NoFrames):
        clip.window(*clip.span(8.0))
    clip.expire(13.0)
    assert (clip.frames, clip.newest_ns) == (0, None)
    with pytest.raises(NoFrames):
        clip.span(8.0)


def test_a_buffer_shorter_than_a_segment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"buffer.length_s"):
        buffer(length_s=3.9)
    with pytest.raises(ValueError, match=r"at 0\.5 Hz"):
        buffer(length_s=7.0, rate_hz=0.5)


# Windows ----------------------------------------------------------------------------------------------------------


def test_windows_by_stamps_use_whole_segments_and_say_so() -> None:
    clip, _ = buffer()
    fill(clip, range(20))
    assert clip.span(start_ns=stamps(5.5)[0], end_ns=stamps(9.2)[0]) == stamps(6, 9)
    window = clip.window(*stamps(5, 9))
    assert window.segments == ((0.0, 4.0, (2, 3, 4, 5)), (4.0, 8.0, (6, 7, 8, 9)))
    assert (window.first_ns, window.last_ns) == stamps(2, 9)
    one = clip.window(*stamps(4, 4))
    assert one.segments == ((0.0, 4.0, (1, 2, 3, 4)),)


def test_seconds_back_count_frames_up_to_the_newest() -> None:
    clip, _ = buffer()
    fill(clip, range(12))
    assert clip.span(4.0) == stamps(8, 11)
    assert clip.span(5.0) == stamps(7, 11)
    assert clip.span(0.01) == stamps(11, 11)
    assert clip.span(float("inf")) == stamps(0, 11)


def test_only_the_newest_segments_that_the_model_takes_are_used() -> None:
    clip, _ = buffer(max_segments=2)
    fill(clip, range(14))
    window = clip.window(*clip.span(60.0))
    assert window.segments == ((0.0, 4.0, (6, 7, 8, 9)), (4.0, 8.0, (10, 11, 12, 13)))
    assert (window.first_ns, window.last_ns, window.frames) == (*stamps(6, 13), 8)


def test_errors_say_what_is_there() -> None:
    clip, _ = buffer()
    with pytest.raises(NoFrames):
        clip.span(8.0)
    clip.offer(image(0), START_NS)
    with pytest.raises(NoFrames):
        clip.window(*clip.span(8.0))  # a frame, but not encoded yet
    fill(clip, [1, 2])
    for start_s, end_s in ((-10, -1), (3, 90), (2, 1), (0.1, 0.9)):
        start_ns, end_ns = stamps(start_s, end_s)
        with pytest.raises(WindowOutside, match=r"holds 3, stamped 1000.000 to 1002.000"):
            clip.span(start_ns=start_ns, end_ns=end_ns)
        with pytest.raises(WindowOutside):
            clip.window(start_ns, end_ns)
    for seconds in (0.0, -3.0, float("nan")):
        with pytest.raises(WindowOutside, match=r"more than 0"):
            clip.span(seconds)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(st.sampled_from([0.04, 0.3, 1.0, 2.4, 2.6, 9.0, 70.0, -0.5, -2.0, -3.0, -40.0]), max_size=80))
def test_whatever_the_stamps_do_segments_stay_ordered_whole_and_young(steps: list[float]) -> None:
    clip, encoder = buffer(length_s=16.0)
    offered: dict[int, int] = {}
    second = 500.0
    for level, step in enumerate(steps):
        second += step
        if fill(clip, [second], levels=[level % 256]) == [True]:
            offered[level % 256] = START_NS + round(second * S)
        if clip.frames == 0:
            continue
        window = clip.window(*clip.span(1e6))
        assert clip.frames - 3 <= window.frames <= clip.frames
        assert window.frames == sum(len(levels) for *_, levels in window.segments)
        assert window.first_ns == offered[window.segments[0][2][0]]
        assert 0 <= window.last_ns - window.first_ns < 16 * S
        times = [time for start, end, _ in window.segments for time in (start, end)]
        assert times[0] == 0.0
        assert times == sorted(times)
        frames = [level for *_, levels in window.segments for level in levels]
        assert [offered[level] for level in frames] == sorted(offered[level] for level in frames)
        for start, end, levels in window.segments:
            assert 1 <= len(levels) <= 4
            assert end - start >= len(levels)
            assert np.all(np.diff([offered[level] for level in levels]) <= 2.5 * S)
    assert all(len(call) <= 4 for call in encoder.calls)


def test_it_imports_no_pytorch() -> None:
    import subprocess

    code = "import surg_perception.stream.clip_buffer, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
