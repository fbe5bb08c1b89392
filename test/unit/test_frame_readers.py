# SPDX-License-Identifier: Apache-2.0
"""The frame asked for is the frame given, however the video is coded and in whatever order frames are asked for."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from video_files import number_of, numbered_picture, write_video

from surg_perception.data import frame_readers
from surg_perception.data.frame_readers import ImageFiles, PhantomFrames, VideoFrames, video_facts
from surg_perception.data.label_files import DatasetError
from surg_perception.data.video_writer import VideoWriter

STEADY_MS = list(range(0, 16000, 40))
VARIABLE_MS = [0, *np.cumsum(np.random.default_rng(1).choice([10, 20, 40, 40, 300, 900], 150)).tolist()]
OPEN_GOP = "open-gop=1:keyint=25:bframes=3"
VIDEOS = {
    "b_frames.mp4": (STEADY_MS, {}),
    "open_gop.mp4": (STEADY_MS, {"x264-params": OPEN_GOP + ":b-pyramid=normal"}),
    "hevc_open_gop.mp4": (STEADY_MS, {"codec": "libx265", "x265-params": OPEN_GOP + ":log-level=none"}),
    "late_start.ts": (STEADY_MS, {}),
    "mpeg2.ts": (STEADY_MS, {"codec": "mpeg2video", "bf": "2", "g": "15"}),
    "no_presentation_times.avi": (STEADY_MS, {"codec": "mpeg4", "bf": "2", "g": "30"}),
    "variable.mkv": (VARIABLE_MS, {}),
    "variable.mp4": (VARIABLE_MS, {}),
}


@pytest.fixture(scope="module", params=VIDEOS)
def video(request, tmp_path_factory):
    """Path and the true times of its pictures in seconds."""
    times_ms, options = VIDEOS[request.param]
    path = tmp_path_factory.mktemp("video") / request.param
    return write_video(path, times_ms, **options), np.array(times_ms) / 1000


def on_display(true_s, times_s):
    return (np.searchsorted(true_s, times_s + 0.0005, side="right") - 1).tolist()


def test_every_frame_in_order(video):
    path, true_s = video
    # Between two pictures, so that rounding of a stamp in a container cannot decide.
    times_s = true_s + 0.004
    numbers = [number_of(bgr) for bgr in VideoFrames(path, times_s).read(range(len(times_s)))]
    assert numbers == list(range(len(true_s)))


@pytest.mark.parametrize("ahead_s", [10.0, 0.2])
def test_any_frame_in_any_order_after_seeking(video, ahead_s, monkeypatch):
    monkeypatch.setattr(frame_readers, "_SEEK_AHEAD_S", ahead_s)
    path, true_s = video
    times_s = np.random.default_rng(2).uniform(0, true_s[-1], 60)
    times_s = times_s[np.abs(times_s[:, None] - true_s).min(axis=1) > 0.002]
    numbers = [number_of(bgr) for bgr in VideoFrames(path, times_s).read(range(len(times_s)))]
    assert numbers == on_display(true_s, times_s)


def test_a_frame_is_bit_equal_after_seeking_and_after_decoding_on(video):
    path, true_s = video
    frames = VideoFrames(path, true_s + 0.004)
    middle = len(true_s) // 2 + 7
    *_, decoded_on = frames.read(range(middle + 1))
    (sought,) = frames.read([middle])
    *_, sought_back = frames.read([len(true_s) - 1, middle])
    assert np.array_equal(decoded_on, sought)
    assert np.array_equal(decoded_on, sought_back)


def test_facts_are_counted_from_the_first_picture(video):
    path, true_s = video
    facts = video_facts(path)
    assert (facts.width, facts.height) == (96, 32)
    if len(true_s) == len(STEADY_MS):
        assert facts.duration_s == pytest.approx(16.0)
        assert facts.rate_hz == 25
    else:
        assert true_s[-1] < facts.duration_s < true_s[-1] + 1.0


def test_a_video_written_in_fragments_can_be_sought(tmp_path):
    writer = VideoWriter(tmp_path / "fragments.mp4")
    for number in range(300):
        writer.write(numbered_picture(number), number / 20)
    writer.close()
    frames = VideoFrames(tmp_path / "fragments.mp4", np.arange(300) / 20 + 0.01)
    assert [number_of(bgr) for bgr in frames.read([280, 3, 150, 299, 0])] == [280, 3, 150, 299, 0]
    assert video_facts(tmp_path / "fragments.mp4").duration_s == pytest.approx(15.0, abs=0.06)


@pytest.mark.parametrize("content", [b"", b"no video at all", None])
def test_what_is_no_video_is_said(tmp_path, content):
    path = tmp_path / "video01.mp4"
    if content is None:
        write_video(path, STEADY_MS)
        path.write_bytes(path.read_bytes()[:5000])  # its index is at the end
    else:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"video01\.mp4 cannot be read as a video.*get the file again"):
        video_facts(path)


def test_a_cut_video_is_as_long_as_what_is_left(tmp_path):
    whole = write_video(tmp_path / "whole.mkv", STEADY_MS)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    facts = video_facts(cut)
    assert facts.declared_s == pytest.approx(16.0, abs=0.1)
    assert 4 < facts.duration_s < 12
    with pytest.raises(DatasetError, match="no frame can be decoded after"):
        list(VideoFrames(cut, np.array([0.0, 15.0])).read([0, 1]))


def test_images_are_read_whole_or_not_at_all(tmp_path):
    for number in range(2):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), numbered_picture(number))
    cut = tmp_path / "2.jpg"
    cut.write_bytes((tmp_path / "1.jpg").read_bytes()[:-20])
    frames = ImageFiles(tuple(tmp_path / f"{number}.jpg" for number in range(3)))
    assert [number_of(bgr) for bgr in frames.read([1, 0])] == [1, 0]
    with pytest.raises(DatasetError, match=r"2\.jpg cannot be read: .*end-of-image"):
        list(frames.read([2]))


def test_phantom_frames_are_those_of_the_phantom():
    frames = PhantomFrames(5, 4.0, 96, 64, 2.0)
    (read,) = frames.read([3])
    assert np.array_equal(read, frames.phantom.frame(3)[0])
    assert frames.fingerprint() != PhantomFrames(6, 4.0, 96, 64, 2.0).fingerprint()
