# SPDX-License-Identifier: Apache-2.0
"""The cache holds exactly the frames of the source as it is now, whoever else writes it and whatever goes wrong."""

from __future__ import annotations

import multiprocessing
import os

import layouts
import numpy as np
import pytest
from video_files import number_of, write_video

from surg_perception.data import frame_cache
from surg_perception.data.datasets import DatasetError, open_dataset
from surg_perception.data.frame_cache import cached_frames
from surg_perception.stream.image_decode import resize_to_model_input


@pytest.fixture
def video(tmp_path):
    return open_dataset(layouts.autolaparo(tmp_path / "data"), rate_hz=5).videos[0]


def test_frames_are_bit_equal_to_decoding_them(video, tmp_path):
    steps = []
    frames = cached_frames(video, tmp_path / "cache", 48, lambda done, total: steps.append((done, total)))
    assert isinstance(frames, np.memmap)
    assert not frames.flags.writeable
    assert np.array_equal(frames, np.stack([resize_to_model_input(bgr, 48) for bgr in video.frames()]))
    assert steps == [(done, 20) for done in range(1, 21)]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_second_time_nothing_is_decoded(video, tmp_path, monkeypatch):
    first = np.array(cached_frames(video, tmp_path, 32))
    monkeypatch.setattr(type(video.reader), "read", lambda *args: pytest.fail("decoded again"))
    assert np.array_equal(cached_frames(video, tmp_path, 32), first)


def test_another_size_rate_or_source_is_another_cache(video, tmp_path):
    cache = tmp_path / "cache"
    cached_frames(video, cache, 32)
    assert cached_frames(video, cache, 16).shape == (20, 16, 16, 3)
    (slower,) = open_dataset(tmp_path / "data", rate_hz=2).videos
    assert cached_frames(slower, cache, 32).shape == (8, 32, 32, 3)

    write_video(video.reader.path, range(0, 4000, 40), numbers=list(range(500, 600)))
    (changed,) = open_dataset(tmp_path / "data", rate_hz=5).videos
    assert [number_of(bgr) for bgr in cached_frames(changed, cache, 96)][:3] == [500, 505, 510]


@pytest.mark.parametrize("change", ["content", "time"])
def test_a_changed_image_is_noticed(tmp_path, change):
    layouts.cholec80_frames(tmp_path / "data")
    (video,) = open_dataset(tmp_path / "data").videos
    cached_frames(video, tmp_path / "cache", 96)
    image = tmp_path / "data" / "frames" / "video01" / "300.jpg"
    if change == "content":
        image.write_bytes((tmp_path / "data" / "frames" / "video01" / "900.jpg").read_bytes())
    else:
        os.utime(image, (1, 1))
    (video,) = open_dataset(tmp_path / "data").videos
    assert number_of(cached_frames(video, tmp_path / "cache", 96)[3]) == (900 if change == "content" else 300)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def _write(root, cache, barrier, written):
    (video,) = open_dataset(root, rate_hz=25).videos
    barrier.wait()
    frames = cached_frames(video, cache, 96, lambda done, total: written.put(os.getpid()))
    written.put([number_of(bgr) for bgr in frames])


def test_writers_at_the_same_time_write_once_and_all_read_the_same(video, tmp_path):
    processes = multiprocessing.get_context("fork")
    barrier, written = processes.Barrier(3), processes.Queue()
    workers = [
        processes.Process(target=_write, args=(tmp_path / "data", tmp_path / "cache", barrier, written))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    said = [written.get(timeout=120) for _ in range(100 + 3)]
    for worker in workers:
        worker.join(60)
    assert [numbers for numbers in said if isinstance(numbers, list)] == [list(range(100))] * 3
    assert len({pid for pid in said if isinstance(pid, int)}) == 1
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".npy"]


def test_a_killed_writer_leaves_nothing_in_the_way(video, tmp_path):
    cached_frames(video, tmp_path / "cache", 32)
    (final,) = (tmp_path / "cache").iterdir()
    whole = final.read_bytes()
    final.with_suffix(".partial").write_bytes(whole[:1000])
    final.unlink()
    cached_frames(video, tmp_path / "cache", 32)
    assert final.read_bytes() == whole
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [final.name]


def test_a_full_disk_is_an_error_that_says_so(video, tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frame_cache.os, "fsync", full)
    with pytest.raises(DatasetError, match=r"No space left on device; they take 0\.1 MB: make room"):
        cached_frames(video, tmp_path / "cache", 32)
    assert not list((tmp_path / "cache").iterdir())


def test_a_source_that_breaks_off_leaves_no_cache(tmp_path):
    layouts.cholec80_frames(tmp_path / "data")
    (video,) = open_dataset(tmp_path / "data").videos
    image = tmp_path / "data" / "frames" / "video01" / "700.jpg"
    image.write_bytes(image.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"700\.jpg cannot be read"):
        cached_frames(video, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
