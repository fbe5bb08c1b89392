# SPDX-License-Identifier: Apache-2.0
"""Each layout is recognised, and each sampled frame has the label of its own time."""

from __future__ import annotations

import json
import pickle
import re

import layouts
import numpy as np
import pytest
from layouts import LENGTH_S, phase_of
from video_files import number_of, write_video

from surg_perception.data.datasets import DatasetError, Video, open_dataset
from surg_perception.data.frame_readers import NoFrames
from surg_perception.data.labels import AUTOLAPARO_PHASES, CHOLEC80_PHASES, M2CAI16_PHASES
from surg_perception.data.phantom import Phantom


def true_phases(times_s, phases):
    return [phases.index(phase_of(time_s + 1e-6, phases)) for time_s in times_s]


@pytest.mark.parametrize("phase_step", [1, 5])
@pytest.mark.parametrize("rate_hz", [1.0, 5.0, 25.0])
def test_cholec80(tmp_path, phase_step, rate_hz):
    dataset = open_dataset(layouts.cholec80(tmp_path, phase_step=phase_step), rate_hz=rate_hz)
    assert (dataset.kind, dataset.label_set, dataset.phases) == ("cholec80", "cholec80", CHOLEC80_PHASES)
    assert [video.name for video in dataset.videos] == ["video01", "video02"]
    video = dataset.video("video02")
    assert video.procedure == "Cholecystectomy"
    assert video.times_s == pytest.approx(np.arange(LENGTH_S * rate_hz) / rate_hz)
    assert [number_of(bgr) for bgr in video.frames()] == (video.times_s * 25).round().tolist()
    assert [number_of(bgr) for bgr in video.frames([3, 0, 3])] == [round(75 / rate_hz), 0, round(75 / rate_hz)]
    label_times_s = np.floor(video.times_s * 25 / phase_step + 1e-6) * phase_step / 25
    assert video.phases.tolist() == true_phases(label_times_s, CHOLEC80_PHASES)
    assert video.tools.argmax(axis=1).tolist() == np.floor(video.times_s + 1e-6).tolist()
    assert (video.tools.sum(axis=1) == 1).all()


def test_cholec80_labels_alone(tmp_path):
    layouts.cholec80(tmp_path)
    layouts.remove(tmp_path / "videos")
    for root in (tmp_path, tmp_path / "phase_annotations"):
        dataset = open_dataset(root)
        assert dataset.kind == "cholec80"
        assert dataset.videos[0].phases.tolist() == true_phases(range(LENGTH_S), CHOLEC80_PHASES)
        with pytest.raises(DatasetError, match=r"video01 has only labels.*add the videos"):
            next(dataset.videos[0].frames())


def test_cholec80_frames(tmp_path):
    layouts.cholec80_frames(tmp_path, numbers=[0, 100, 200, 300, 1000])
    layouts.cholec80_labels(tmp_path, "video01", pictures=250)
    dataset = open_dataset(tmp_path)
    (video,) = dataset.videos
    assert dataset.kind == "cholec80-frames"
    assert video.times_s.tolist() == [0, 4, 8, 12, 40]
    assert [number_of(bgr) for bgr in video.frames()] == [0, 100, 200, 300, 1000]
    assert video.phases.tolist() == [int(time_s / 40 * 7) if time_s < 40 else 6 for time_s in video.times_s]
    assert video.tools[:, 4].tolist() == [0, 1, 0, -1, -1]  # tool labels end at 10 s
    assert open_dataset(tmp_path, rate_hz=0.1).videos[0].times_s.tolist() == [0, 12, 40]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_cholect50(tmp_path, suffix):
    (video,) = open_dataset(layouts.cholect50(tmp_path, suffix=suffix)).videos
    assert video.times_s.tolist() == [0, 1, 2, 5, 9]
    assert video.phases.tolist() == [0, 1, -1, 5, 6]
    assert video.tools.tolist() == [
        [1, 0, 0, 0, 0, 0, -1],
        [0, 1, 0, 0, 0, 0, -1],
        [-1] * 7,
        [0, 0, 0, 0, 0, 1, -1],
        [0, 0, 0, 1, 0, 0, -1],
    ]
    assert [number_of(bgr) for bgr in video.frames()] == [0, 1, 2, 5, 9]


def test_cholect50_phases_go_by_name_and_not_by_number(tmp_path):
    path = layouts.cholect50(tmp_path) / "labels" / "VID68.json"
    labels = json.loads(path.read_text())
    labels["categories"]["phase"] = {"0": "Gallbladder-Retraction", "1": "Calot_Triangle Dissection"}
    for frame, rows in labels["annotations"].items():
        rows[0][14] = 0 if frame == "0" else 1
    path.write_text(json.dumps(labels))
    assert open_dataset(tmp_path).videos[0].phases.tolist() == [6, 1, -1, 1, 1]


def test_autolaparo_counts_seconds_and_phases_from_one(tmp_path):
    dataset = open_dataset(layouts.autolaparo(tmp_path), rate_hz=2)
    (video,) = dataset.videos
    assert (dataset.kind, dataset.phases, video.procedure) == ("autolaparo", AUTOLAPARO_PHASES, "Hysterectomy")
    assert video.phases.tolist() == np.repeat(true_phases(range(LENGTH_S), AUTOLAPARO_PHASES), 2).tolist()


def test_m2cai(tmp_path):
    dataset = open_dataset(layouts.m2cai(tmp_path), rate_hz=5)
    assert (dataset.kind, dataset.label_set, dataset.phases) == ("m2cai", "m2cai16", M2CAI16_PHASES)
    assert [video.name for video in dataset.videos] == ["test_workflow_video_02", "workflow_video_01"]
    for video in dataset.videos:
        assert video.phases.tolist() == true_phases(video.times_s, M2CAI16_PHASES)


def test_videos_without_labels(tmp_path):
    dataset = open_dataset(layouts.videos(tmp_path))
    assert (dataset.kind, dataset.label_set, dataset.phases) == ("videos", "", ())
    assert [video.name for video in dataset.videos] == ["b_9", "b_10"]
    assert all((video.phases == -1).all() and video.tools is None for video in dataset.videos)
    (alone,) = open_dataset(tmp_path / "b_9.mp4").videos
    assert [number_of(bgr) for bgr in alone.frames()] == [0, 25, 50, 75]


def test_videos_with_one_table_of_intervals(tmp_path):
    layouts.videos(tmp_path)
    (tmp_path / "phases.csv").write_text(
        "phase, video, start_s, end_s\nclosing,b_9.mp4,2.5,4\nopening,b_9.mp4,0,1.5\nclosing,b_10,0,4\n"
    )
    dataset = open_dataset(tmp_path, rate_hz=2)
    assert (dataset.label_set, dataset.phases) == ("own", ("opening", "closing"))
    assert dataset.video("b_9").phases.tolist() == [0, 0, 0, -1, -1, 1, 1, 1]
    assert dataset.video("b_10").phases.tolist() == [1] * 8


def test_videos_with_a_table_each(tmp_path):
    layouts.videos(tmp_path / "films")
    rows = "".join(
        f"{frame},{'clipping-and-cutting' if frame < 30 else 'GallbladderRetraction'}\n" for frame in range(100)
    )
    (tmp_path / "films" / "b_9.csv").write_text("Frame,Phase\n" + rows)
    (tmp_path / "films" / "b_10.csv").write_text("time_s,phase\n0,Preparation\n1,Preparation\n2,ClippingCutting\n")
    dataset = open_dataset(tmp_path / "films")
    assert (dataset.label_set, dataset.phases) == ("cholec80", CHOLEC80_PHASES)
    assert dataset.video("b_9").phases.tolist() == [2, 2, 6, 6]
    assert dataset.video("b_10").phases.tolist() == [0, 0, 2, -1]
    elsewhere = tmp_path / "labels"
    elsewhere.mkdir()
    (elsewhere / "b_9.txt").write_text("Frame\tPhase\n0\t10\n50\t2\n")
    dataset = open_dataset(tmp_path / "films", labels=elsewhere)
    assert dataset.phases == ("2", "10")
    assert dataset.video("b_9").phases.tolist() == [1, 1, 0, 0]


def test_cholec80_with_labels_elsewhere(tmp_path):
    layouts.cholec80(tmp_path / "here")
    layouts.cholec80_labels(tmp_path / "there", "video01", phases=CHOLEC80_PHASES[::-1])
    dataset = open_dataset(tmp_path / "here", labels=tmp_path / "there" / "phase_annotations")
    assert dataset.video("video01").phases[0] == 6
    assert (dataset.video("video02").phases == -1).all()


def test_phantom():
    dataset = open_dataset("phantom:seeds=7-8,duration_s=6,width=96,height=64", rate_hz=2)
    assert [video.name for video in dataset.videos] == ["phantom-7", "phantom-8"]
    phantom = Phantom(96, 64, 2.0, 8, 6.0)
    video = dataset.video("phantom-8")
    assert video.phases.tolist() == [phantom.labels(index).phase for index in range(12)]
    assert np.array_equal(next(video.frames([5])), phantom.frame(5)[0])


def test_no_rate_above_that_of_the_video(tmp_path):
    """30 Hz in milliseconds: 0, 33, 67, … are rounded, and still each picture comes once."""
    write_video(tmp_path / "a.mkv", [round(1000 * k / 30) for k in range(60)], rate=30)
    (video,) = open_dataset(tmp_path, rate_hz=1000).videos
    assert [number_of(bgr) for bgr in video.frames()] == list(range(60))


def test_kind_decides_where_two_layouts_fit(tmp_path):
    layouts.cholec80_frames(tmp_path)
    layouts.cholec80_labels(tmp_path, "video01")
    assert open_dataset(tmp_path).kind == "cholec80-frames"
    assert open_dataset(tmp_path, kind="cholec80").kind == "cholec80"
    with pytest.raises(DatasetError, match="no data set recognised"):
        open_dataset(tmp_path, kind="autolaparo")
    with pytest.raises(DatasetError, match="kind 'cholec81' found, expected one of"):
        open_dataset(tmp_path, kind="cholec81")


def test_what_is_no_data_set_is_told_what_was_looked_for(tmp_path):
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(DatasetError) as error:
        open_dataset(tmp_path)
    text = str(error.value)
    assert "thesis.doc" in text
    for kind in ("cholec80", "cholect50", "autolaparo", "m2cai", "videos"):
        assert f"{kind}: " in text
    with pytest.raises(DatasetError, match="there is no "):
        open_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("phantom:seeds=5-1", "no seed found"),
        ("phantom:seeds=a", "an example is phantom:seeds=1000-1009"),
        ("phantom:seed=3", "option 'seed' found, expected one of seeds"),
    ],
)
def test_a_wrong_phantom_is_refused(spec, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(spec)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("50\tGallbladderDisection", "unknown phase 'GallbladderDisection'.*did you mean 'GallbladderDissection'"),
        ("50\tStenting", "unknown phase 'Stenting'.*another procedure than cholec80"),
        ("50\t7", "unknown phase '7'; expected 0 to 6"),
        ("49\tGallbladderDissection", "49 comes twice; expected numbers that increase"),
        ("12\tGallbladderDissection", "12 comes after 49; expected numbers that increase"),
        ("nan\tGallbladderDissection", "'nan'; expected a whole frame number"),
        ("-50\tGallbladderDissection", "'-50'; expected a whole frame number"),
        ("50", "'50'; expected two columns"),
        ("50\tGallbl\0dder", "a zero byte; expected text"),
    ],
)
def test_wrong_labels_are_refused_with_their_line(tmp_path, wrong, message):
    path = layouts.cholec80(tmp_path) / "phase_annotations" / "video02-phase.txt"
    text = path.read_text()
    assert "\n50\tGallbladderDissection\n" in text
    path.write_text(text.replace("\n50\tGallbladderDissection\n", f"\n{wrong}\n"))
    with pytest.raises(DatasetError, match=rf"video02-phase\.txt, line 52: {message}"):
        open_dataset(tmp_path)


def test_labels_of_another_procedure_are_refused(tmp_path):
    layouts.cholec80(tmp_path)
    layouts.cholec80_labels(tmp_path, "video02", phases=AUTOLAPARO_PHASES)
    with pytest.raises(DatasetError, match=r"labels may be of another procedure than cholec80|did you mean"):
        open_dataset(tmp_path)


def test_two_videos_of_one_name_are_refused(tmp_path):
    layouts.cholec80(tmp_path)
    layouts.copy_of_video(tmp_path / "videos" / "video01.avi")
    with pytest.raises(DatasetError, match=r"video01\.avi and .*video01\.mp4 have the same name"):
        open_dataset(tmp_path)


def test_an_empty_video_is_refused(tmp_path):
    layouts.cholec80(tmp_path)
    (tmp_path / "videos" / "video02.mp4").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"video02\.mp4 cannot be read as a video"):
        open_dataset(tmp_path)


def test_select_keeps_the_order_asked(tmp_path):
    dataset = open_dataset(layouts.cholec80(tmp_path))
    assert [video.name for video in dataset.select(["video02", "video01"]).videos] == ["video02", "video01"]
    with pytest.raises(DatasetError, match="no video 'vide02'; did you mean 'video02'"):
        dataset.select(["vide02"])


def test_a_frame_that_is_not_there(tmp_path):
    (video,) = open_dataset(layouts.autolaparo(tmp_path)).videos
    with pytest.raises(IndexError, match="frame 4 found, expected 0 to 3"):
        video.frames([4])


def test_a_video_survives_pickling(tmp_path):
    """Loaders hand videos to their worker processes."""
    (video,) = open_dataset(layouts.autolaparo(tmp_path)).videos
    again = pickle.loads(pickle.dumps(video))
    assert [number_of(bgr) for bgr in again.frames([2])] == [50]


@pytest.mark.parametrize("times_s", [[], [0.0, 0.0], [1.0, 0.5]])
def test_times_must_increase(times_s):
    with pytest.raises(DatasetError):
        Video("a", "", np.array(times_s), np.zeros(len(times_s), np.int64), None, NoFrames(""))


def test_the_shared_surgeries(shared_data):
    dataset = open_dataset(shared_data / "cholec80")
    assert dataset.kind == "cholec80-frames"
    assert sum(len(video.times_s) for video in dataset.videos) == 3570
    for video in dataset.videos:
        rows = (shared_data / "cholec80" / "annotation" / f"{video.name}.csv").read_text().split()[1:]
        truth = {int(row.split(".")[0]) / 25: int(row.split(",")[1]) for row in rows}
        assert dict(zip(video.times_s.tolist(), video.phases.tolist(), strict=True)) == truth
        assert video.times_s[1] == 4.0
        assert next(video.frames([17])).shape == (250, 250, 3)


def test_the_shared_labels_of_all_eighty(shared_data):
    dataset = open_dataset(shared_data / "cholec80", kind="cholec80")
    assert len(dataset.videos) == 80
    assert sum(len(video.times_s) for video in dataset.videos) == 184_498
    phases = np.concatenate([video.phases for video in dataset.videos])
    assert np.bincount(phases).tolist() == [8574, 74826, 14080, 58433, 7618, 14332, 6635]
    # The same seconds through the 4 s frames: two sources of one truth.
    frames = open_dataset(shared_data / "cholec80").video("video02")
    second = frames.times_s.astype(int)
    assert (dataset.video("video02").phases[second] == frames.phases).mean() > 0.99
    assert (dataset.video("video02").tools[second] == frames.tools).all()


def test_the_shared_triplets(shared_data):
    dataset = open_dataset(shared_data / "cholect50")
    assert sum(len(video.times_s) for video in dataset.videos) == 1082
    for video in dataset.videos:
        content = json.loads((shared_data / "cholect50" / "labels" / f"{video.name}.json").read_text())
        truth = {float(key): rows[0][14] for key, rows in content["annotations"].items() if rows}
        assert {t: p for t, p in zip(video.times_s.tolist(), video.phases.tolist(), strict=True) if p >= 0} == truth


def test_the_shared_clips(shared_data):
    dataset = open_dataset(shared_data / "cholec-clips", rate_hz=25)
    assert len(dataset.videos) == 7
    for video in dataset.videos:
        assert re.fullmatch(r"VID\d\d_\d{4}", video.name)
        assert len(video.times_s) == 800
    video = dataset.videos[0]
    *_, decoded_on = video.frames(range(261))  # beyond the second key frame, at 10 s
    assert np.array_equal(next(video.frames([260])), decoded_on)
