# SPDX-License-Identifier: Apache-2.0
"""Frames come with true times, in order, once; what cannot be read is skipped, counted and said."""

from __future__ import annotations

import itertools
import struct
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from surg_perception.data import frames as frames_module
from surg_perception.data.frames import SourceError, open_source

TIME_BASE = Fraction(1, 1000)


def level_picture(number, width=64, height=48):
    """A picture whose grey level tells its number (up to 50), with a mark in the top left corner."""
    bgr = np.full((height, width, 3), 20 + 4 * number, np.uint8)
    bgr[:8, :16] = 255
    return bgr


def number_of(frame):
    level = float(frame.bgr[frame.bgr.shape[0] // 2 :, :, 1].mean())
    return round((level - 18.5) / 4)  # a video loses up to two levels


def write_video(path, times_ms, codec="libx264", audio_only=False, **options):
    with av.open(str(path), "w") as container:
        if audio_only:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            return path
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = TIME_BASE
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(level_picture(number), format="bgr24")
            frame.pts, frame.time_base = time_ms, TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_folder(folder, names, sizes=None):
    folder.mkdir()
    for number, name in enumerate(names):
        width, height = sizes[number] if sizes else (64, 48)
        cv2.imwrite(str(folder / name), level_picture(number, width, height))
    return folder


def times(frames):
    return [frame.time_s for frame in frames]


def numbers(frames):
    return [number_of(frame) for frame in frames]


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """25 frames in a second."""
    return write_video(tmp_path_factory.mktemp("video") / "steady.mp4", range(0, 1000, 40))


@pytest.fixture(scope="module")
def variable(tmp_path_factory):
    """Variable frame rate: dense, a pause of a second, dense again."""
    path = tmp_path_factory.mktemp("video") / "variable.mkv"
    return write_video(path, [0, 40, 80, 1080, 1090, 1200, 1300])


@pytest.fixture
def said(monkeypatch):
    """Lines of warning."""
    lines: list[str] = []
    monkeypatch.setattr(frames_module._LOG, "warning", lambda text, *args: lines.append(text % args))
    return lines


# Video ----------------------------------------------------------------------------------------------------------


def test_a_video_gives_every_frame_once_with_its_stamp(steady):
    with open_source(steady) as source:
        frames = list(source)
    assert numbers(frames) == list(range(25))
    assert [frame.index for frame in frames] == list(range(25))
    assert times(frames) == pytest.approx([k / 25 for k in range(25)])
    assert (source.length, source.rate_hz, source.width, source.height) == (25, 25.0, 64, 48)
    assert source.skipped == 0
    for frame in frames:
        assert frame.bgr.shape == (48, 64, 3)
        assert frame.bgr.dtype == np.uint8
        assert frame.bgr.flags.c_contiguous
        assert frame.labels is None


def test_stamps_of_variable_rate_video_are_the_containers_own(variable):
    frames = list(open_source(variable))
    assert times(frames) == pytest.approx([0, 0.04, 0.08, 1.08, 1.09, 1.2, 1.3])
    assert numbers(frames) == list(range(7))


def test_stamps_count_from_the_first_frame(tmp_path):
    late = write_video(tmp_path / "late.mkv", [5000, 5040, 5100])
    assert times(open_source(late)) == pytest.approx([0, 0.04, 0.1])


def test_resampling_takes_the_last_frame_shown_by_then(variable):
    frames = list(open_source(variable, rate_hz=5.0))
    assert times(frames) == pytest.approx([k / 5 for k in range(len(frames))])
    assert numbers(frames)[:7] == [0, 2, 2, 2, 2, 2, 5]
    assert len(frames) == 7
    assert [frame.index for frame in frames] == list(range(7))


@pytest.mark.parametrize(("rate_hz", "expected"), [(1.0, [0]), (5.0, [0, 5, 10, 15, 20]), (12.5, range(0, 25, 2))])
def test_resampling_to_a_divisor_drops_frames_evenly(steady, rate_hz, expected):
    source = open_source(steady, rate_hz=rate_hz)
    assert numbers(source) == list(expected)
    assert source.rate_hz == rate_hz
    assert source.length is None


def test_resampling_to_a_multiple_repeats_frames(steady):
    frames = list(open_source(steady, rate_hz=50.0))
    assert numbers(frames) == [k // 2 for k in range(50)]
    assert times(frames) == pytest.approx([k / 50 for k in range(50)])


@pytest.mark.parametrize("rate_hz", [None, 10.0])
def test_iterations_are_independent_and_equal(steady, rate_hz):
    source = open_source(steady, rate_hz=rate_hz)
    first, second = list(source), list(source)
    assert times(first) == times(second)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.bgr, other.bgr)
    a, b = iter(source), iter(source)
    next(a)
    assert (next(a).index, next(b).index) == (1, 0)


@pytest.mark.parametrize("rate_hz", [None, 10.0])
def test_a_loop_goes_on_in_index_and_time(steady, rate_hz):
    source = open_source(steady, rate_hz=rate_hz, loop=True)
    per_pass = 25 if rate_hz is None else 10
    frames = list(itertools.islice(source, 3 * per_pass))
    assert [frame.index for frame in frames] == list(range(3 * per_pass))
    assert times(frames) == pytest.approx([k / (rate_hz or 25) for k in range(3 * per_pass)])
    assert numbers(frames[:per_pass]) == numbers(frames[per_pass : 2 * per_pass])
    assert source.length is None


def test_a_rotation_mark_is_ignored(steady, tmp_path):
    data = bytearray(steady.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    with av.open(str(turned)) as container:
        assert abs(next(container.decode(video=0)).rotation) == 90
    frame = next(iter(open_source(turned)))
    assert frame.bgr.shape == (48, 64, 3)
    assert frame.bgr[:6, :14].min() > 200


def damage(path, positions):
    """Overwrite the payload of these packets with zeros."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for position in positions:
        start = data.index(packets[position])
        data[start : start + len(packets[position])] = bytes(len(packets[position]))
    path.write_bytes(data)


def test_corrupt_packets_are_skipped_counted_and_logged(tmp_path, said):
    path = write_video(tmp_path / "damaged.mkv", range(0, 1000, 40), codec="mjpeg", strict="unofficial")
    damage(path, (5, 6, 20))
    source = open_source(path)
    frames = list(source)
    intact = [k for k in range(25) if k not in (5, 6, 20)]
    assert numbers(frames) == intact
    assert times(frames) == pytest.approx([k / 25 for k in intact])
    assert source.skipped == 3
    assert sum(f"{path}: packet skipped" in line for line in said) == 3


def test_a_video_cut_short_gives_what_is_left(tmp_path):
    path = write_video(tmp_path / "cut.mkv", range(0, 2000, 40), g="5", bf="0")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    found = numbers(open_source(path))
    assert 5 < len(found) < 50
    assert found == list(range(len(found)))


def test_close_ends_an_iteration(steady):
    source = open_source(steady, loop=True)
    seen = 0
    for _ in itertools.islice(source, 60):
        seen += 1
        if seen == 30:
            source.close()
    assert seen == 30
    assert list(source) == []


# Folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_natural_order_at_the_rate(tmp_path):
    folder = write_folder(tmp_path / "f", ["1.png", "2.png", "10.png", "10b.PNG", "a1.png", "a²2.png"])
    (folder / "notes.txt").write_text("no image")
    source = open_source(folder, rate_hz=4.0)
    frames = list(source)
    assert numbers(frames) == [0, 1, 2, 3, 4, 5]
    assert times(frames) == [0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert (source.length, source.rate_hz, source.width, source.height) == (6, 4.0, 64, 48)
    assert times(open_source(folder)) == [0, 1, 2, 3, 4, 5]


def test_times_can_come_from_the_names(tmp_path):
    folder = write_folder(tmp_path / "f", ["0100.png", "0200.png", "1000.png"])
    assert times(open_source(folder, name_rate_hz=25.0)) == [4.0, 8.0, 40.0]
    frames = list(open_source(folder, name_rate_hz=25.0, rate_hz=0.5))
    assert times(frames) == [4.0 + 2 * k for k in range(20)]
    assert numbers(frames) == [0] * 2 + [1] * 16 + [2] * 2


@pytest.mark.parametrize("name_rate_hz", [None, 10.0])
def test_a_folder_loops_in_time(tmp_path, name_rate_hz):
    folder = write_folder(tmp_path / "f", ["7.png", "8.png", "9.png"])
    source = open_source(folder, loop=True, rate_hz=10.0, name_rate_hz=name_rate_hz)
    frames = list(itertools.islice(source, 8))
    start_s = 0.7 if name_rate_hz else 0.0
    assert times(frames) == pytest.approx([start_s + k / 10 for k in range(8)])
    assert numbers(frames) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_mixed_sizes_stay_unless_a_size_is_asked(tmp_path):
    folder = write_folder(tmp_path / "f", ["1.png", "2.png"], sizes=[(64, 48), (30, 40)])
    assert [frame.bgr.shape for frame in open_source(folder)] == [(48, 64, 3), (40, 30, 3)]
    assert [f.bgr.shape for f in open_source(folder, width=32, height=20)] == [(20, 32, 3)] * 2
    assert [f.bgr.shape for f in open_source(folder, width=32)] == [(24, 32, 3), (43, 32, 3)]
    assert [f.bgr.shape for f in open_source(folder, height=80)] == [(80, 107, 3), (80, 60, 3)]


def test_unreadable_files_are_skipped_counted_and_logged(tmp_path, said):
    folder = write_folder(tmp_path / "f", ["1.jpg", "2.jpg", "3.jpg", "4.jpg"])
    whole = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(whole[: len(whole) - 10])
    (folder / "1.jpg").write_bytes(b"")
    source = open_source(folder, rate_hz=1.0)
    frames = list(source)
    assert numbers(frames) == [1, 3]
    assert times(frames) == [1.0, 3.0]
    assert [frame.index for frame in frames] == [0, 1]
    assert source.skipped == 2
    assert any("3.jpg skipped: JPEG of" in line for line in said)


def test_a_folder_is_read_lazily(tmp_path):
    folder = write_folder(tmp_path / "f", ["1.png", "2.png", "3.png"])
    frames = iter(open_source(folder))
    next(frames)
    cv2.imwrite(str(folder / "2.png"), level_picture(40))
    assert number_of(next(frames)) == 40


# Phantom --------------------------------------------------------------------------------------------------------


def test_the_phantom_comes_with_labels():
    from surg_perception.data.phantom import Phantom

    source = open_source("phantom:seed=3,duration_s=2", width=160, height=96, rate_hz=5.0, duration_s=99.0)
    frames = list(source)
    phantom = Phantom(width=160, height=96, rate_hz=5.0, seed=3, duration_s=2.0)
    assert len(frames) == source.length == len(phantom) == 10
    assert times(frames) == pytest.approx([k / 5 for k in range(10)])
    for k in (0, 4, 9):
        bgr, labels = phantom.frame(k)
        np.testing.assert_array_equal(frames[k].bgr, bgr)
        assert frames[k].labels == labels


def test_the_phantom_loops_with_stamps_that_go_on():
    source = open_source("phantom", width=160, height=96, rate_hz=4.0, duration_s=1.0, seed=5, loop=True)
    frames = list(itertools.islice(source, 9))
    assert times(frames) == pytest.approx([k / 4 for k in range(9)])
    np.testing.assert_array_equal(frames[0].bgr, frames[8].bgr)
    assert source.length is None


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("/no/such/video.mp4", {}, r"no such source: '/no/such/video.mp4' is neither .* \(looked for /no/such"),
        ("phantoms", {}, "no such source: 'phantoms'"),
        ("phantom:size=3", {}, "no option 'size'; known: seed"),
        ("phantom:seed=x", {}, "seed is 'x'"),
        ("phantom:duration_s=-1", {}, "duration_s"),
        ("phantom", {"rate_hz": 0.0}, "rate_hz is 0.0"),
        ("phantom", {"rate_hz": float("nan")}, "rate_hz is nan"),
        (".", {"name_rate_hz": -1.0}, "name_rate_hz is -1.0"),
    ],
)
def test_each_wrong_source_is_named(spec, options, says):
    with pytest.raises(SourceError, match=says):
        open_source(spec, **options)


def test_a_file_that_is_no_video_is_named(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    with pytest.raises(SourceError, match=r"text\.mp4 cannot be read as a video"):
        open_source(text)
    sound = write_video(tmp_path / "sound.mp4", [], audio_only=True)
    with pytest.raises(SourceError, match=r"sound\.mp4 has no video stream \(streams: audio\)"):
        open_source(sound)


def test_a_source_without_any_frame_fails_when_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty: no images found; looked for \*\.jpg"):
        open_source(tmp_path / "empty")
    folder = write_folder(tmp_path / "f", ["1.png", "2.png"])
    for file in folder.iterdir():
        file.write_bytes(b"rubbish")
    for loop in (False, True):
        with pytest.raises(SourceError, match=r"no readable frame \(2 skipped\)"):
            open_source(folder, loop=loop)
    path = write_video(tmp_path / "damaged.mkv", [0, 40], codec="mjpeg", strict="unofficial")
    damage(path, (0, 1))
    with pytest.raises(SourceError, match=r"no readable frame \(2 skipped\)"):
        open_source(path)


def test_names_without_or_with_equal_numbers_are_named(tmp_path):
    with pytest.raises(SourceError, match=r"one\.png.*no number"):
        open_source(write_folder(tmp_path / "a", ["1.png", "one.png"]), name_rate_hz=1.0)
    with pytest.raises(SourceError, match=r"a_5\.png and b_5\.png have the same number"):
        open_source(write_folder(tmp_path / "b", ["a_5.png", "b_5.png"]), name_rate_hz=1.0)


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_size_must_be_positive(steady, side):
    with pytest.raises(SourceError, match=f"{side} is 0"):
        open_source(steady, **{side: 0})


# Real video -----------------------------------------------------------------------------------------------------


def test_a_real_clip_is_read_as_opencv_reads_it(shared_data):
    clip = shared_data / "cholec-clips" / "VID18_0166.mp4"
    source = open_source(clip)
    assert (source.length, source.rate_hz, source.width, source.height) == (800, 25.0, 854, 480)
    capture = cv2.VideoCapture(str(clip))
    for frame in itertools.islice(source, 40):
        read, expected = capture.read()
        assert read
        np.testing.assert_array_equal(frame.bgr, expected)
        assert frame.time_s == pytest.approx(frame.index / 25)


def test_a_real_full_hd_clip_can_be_shrunk(shared_data):
    clip = next((shared_data / "clips-1080p").glob("*.mp4"))
    source = open_source(clip, width=640, height=360, rate_hz=2.0)
    frames = list(itertools.islice(source, 5))
    assert {frame.bgr.shape for frame in frames} == {(360, 640, 3)}
    assert times(frames) == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_real_folders_have_their_times_in_their_names(shared_data):
    cholec80 = open_source(shared_data / "cholec80" / "frames" / "video01", name_rate_hz=25.0)
    assert cholec80.length == 434
    assert times(itertools.islice(cholec80, 3)) == [0.0, 4.0, 8.0]
    cholect50 = open_source(shared_data / "cholect50" / "videos" / "VID68", name_rate_hz=1.0)
    assert cholect50.length == 266
    assert times(itertools.islice(cholect50, 3)) == [16.0, 23.0, 33.0]
