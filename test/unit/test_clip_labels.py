# SPDX-License-Identifier: Apache-2.0
"""Each second of a clip shows the right frame with that frame's labels, and videos are never split."""

from __future__ import annotations

import json

import cv2
import layouts
import pytest
from video_files import number_of, numbered_picture

from surg_perception.data import phantom as phantom_module
from surg_perception.data.clip_labels import InstrumentState, open_clip_videos, select_groups, split_groups
from surg_perception.data.label_files import DatasetError
from surg_perception.data.labels import CHOLECT50_INSTRUMENTS, CHOLECT50_TARGETS, CHOLECT50_VERBS
from surg_perception.data.phantom import Phantom


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def triplet(instrument, verb, target, box=(0.125, 0.25, 0.25, 0.5), phase=1):
    return [0, instrument, 1.0, *box, verb, target, 1.0, -1.0, -1.0, -1.0, -1.0, phase]


def cholect50(root, seconds, annotations, name="VID01", categories=None):
    folder = root / "videos" / name
    folder.mkdir(parents=True)
    for second in seconds:
        cv2.imwrite(str(folder / f"{second:06d}.png"), numbered_picture(second))
    (root / "labels").mkdir(exist_ok=True)
    content = {"fps": 1, "categories": categories or {}, "annotations": annotations}
    (root / "labels" / f"{name}.json").write_text(json.dumps(content))
    return root


def test_seconds_show_the_newest_frame_until_the_gap_is_too_long(tmp_path):
    seconds = [3, 4, 7, 11, 12, 13, 14]
    annotations = {str(s): [triplet(s % 6, 2, 0)] for s in seconds if s != 4}
    first, second = open_clip_videos(cholect50(tmp_path, seconds, annotations))
    assert (first.name, second.name, first.video) == ("VID01@0003", "VID01@0011", "VID01")
    assert [number_of(frame) for frame in first.frames(range(len(first)))] == [3, 4, 4, 4, 7]
    assert [number_of(frame) for frame in first.frames([4, 0, 0, 3])] == [7, 3, 3, 4]
    assert [number_of(frame) for frame in second.frames(range(len(second)))] == [11, 12, 13, 14]
    assert [second.instruments is None for second in first.seconds] == [False, True, True, True, False]
    phases = [second.phase for second in first.seconds]
    assert phases == ["CalotTriangleDissection", None, None, None, "CalotTriangleDissection"]
    (state,) = first.seconds[4].instruments
    assert state == InstrumentState("bipolar", "dissect", "gallbladder", (0.125, 0.25, 0.25, 0.5))
    with pytest.raises(IndexError, match="second 5 found, expected 0 to 4"):
        next(first.frames([5]))


def test_lone_frames_become_stills(tmp_path):
    seconds = [0, 1, 2, 3, 10, 20, 21]
    root = cholect50(tmp_path, seconds, {str(s): [triplet(0, 2, 0)] for s in seconds})
    moving, still = open_clip_videos(root, stills=True)
    assert (moving.name, moving.hold_s, len(moving)) == ("VID01@0000", 1, 4)
    assert (still.name, still.video, still.hold_s) == ("VID01+stills", "VID01", 4)
    assert [number_of(frame) for frame in still.frames(range(len(still)))] == [10] * 4 + [20] * 4 + [21] * 4
    assert [clip.name for clip in open_clip_videos(root)] == ["VID01@0000", "VID01@0010", "VID01@0020"]
    assert moving.fingerprint() != still.fingerprint()
    assert moving.fingerprint() == open_clip_videos(root)[0].fingerprint()


def test_cholect50_rows(tmp_path):
    rows = [
        triplet(0, 1, 8, (-1, -1, -1, -1)),  # no box
        triplet(2, 9, 14, (-0.1, 0.5, 0.3, 0.7)),  # partly out of the frame
        triplet(2, 9, 14, (-0.1, 0.5, 0.3, 0.7)),  # the same once more
        triplet(2, -1, -1, (0.5, 0.5, 0.125, 0.25)),  # another one, nothing known about what it does
        triplet(-1, -1, -1),  # CholecT50 writes a row without an instrument to give the phase
    ]
    (clip,) = open_clip_videos(cholect50(tmp_path, range(2), {"0": rows, "1": [triplet(-1, -1, -1)]}))
    assert clip.seconds[0].instruments == (
        InstrumentState("grasper", "retract", "liver", None),
        InstrumentState("hook", "null_verb", "null_target", (0.0, 0.5, pytest.approx(0.2), 0.5)),
        InstrumentState("hook", "", "", (0.5, 0.5, 0.125, 0.25)),
    )
    assert clip.seconds[0].instruments[2].centre == pytest.approx((0.5625, 0.625))
    assert clip.seconds[1].instruments == ()  # labelled, and nothing there


def test_names_come_from_the_file_where_it_has_them(tmp_path):
    categories = {"verb": {"0": "cut"}, "target": {"0": "omentum"}}
    (clip,) = open_clip_videos(cholect50(tmp_path / "a", [0], {"0": [triplet(3, 0, 0)]}, categories=categories))
    assert clip.seconds[0].instruments[0].verb == "cut"
    assert clip.seconds[0].instruments[0].target == "omentum"
    root = cholect50(tmp_path / "b", [0], {"0": [triplet(3, 0, 0)]}, categories={"verb": {"0": "sew"}})
    with pytest.raises(DatasetError, match=r"VID01\.json: unknown verb 'sew'"):
        open_clip_videos(root)


def test_phantom_labels_are_those_of_its_frames_and_are_kept(tmp_path, monkeypatch):
    spec = "phantom:seeds=4-5,duration_s=12,width=160,height=96"
    clips = open_clip_videos(spec)
    assert [(clip.name, clip.video, len(clip)) for clip in clips] == [
        ("phantom-4@0000", "phantom-4", 12),
        ("phantom-5@0000", "phantom-5", 12),
    ]
    phantom = Phantom(160, 96, 1.0, 4, 12.0)
    assert any(second.instruments for second in clips[0].seconds)
    for index, second in enumerate(clips[0].seconds):
        frame, truth = phantom.frame(index)
        assert [(i.instrument, i.verb, i.target, i.box) for i in second.instruments] == [
            (CHOLECT50_INSTRUMENTS[i.instrument], CHOLECT50_VERBS[i.verb], CHOLECT50_TARGETS[i.target], i.box)
            for i in truth.instruments
        ]
        if index == 7:
            assert (next(clips[0].frames([7])) == frame).all()

    kept = sorted((tmp_path / "cache" / "surg_perception" / "phantom_labels").iterdir())
    assert len(kept) == 2
    with monkeypatch.context() as patch:
        patch.setattr(phantom_module.Phantom, "labels", None)  # cannot be called: labels must come from the cache
        assert [clip.seconds for clip in open_clip_videos(spec)] == [clip.seconds for clip in clips]
    kept[0].write_text("[[")
    assert [clip.seconds for clip in open_clip_videos(spec)] == [clip.seconds for clip in clips]


def test_phantom_without_a_place_for_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (clip,) = open_clip_videos("phantom:seeds=4,duration_s=4,width=160,height=96")
    assert len(clip) == 4


def test_cholec80_frames_are_stills_with_tools(tmp_path):
    layouts.cholec80_frames(tmp_path, numbers=[0, 100, 200])
    rows = [(f, *(int(k == f // 100 or k == 6) for k in range(7))) for f in range(0, 300, 25)]
    layouts.write_table(tmp_path / "tool_annotations" / "video01-tool.txt", ("Frame", *layouts.CHOLEC80_TOOLS), rows)
    (clip,) = open_clip_videos(tmp_path)
    assert (clip.name, clip.video, clip.hold_s, len(clip)) == ("video01+stills", "video01", 4, 12)
    assert [number_of(frame) for frame in clip.frames([3, 4, 11])] == [0, 100, 200]
    assert clip.seconds[4].instruments == (InstrumentState("bipolar"), InstrumentState("specimen_bag"))
    assert clip.vocabulary[-1] == "specimen_bag"


def test_videos_without_labels_are_refused(tmp_path):
    layouts.copy_of_video(tmp_path / "a.mp4")
    with pytest.raises(DatasetError, match="no phase and no instrument is labelled"):
        open_clip_videos(tmp_path)
    # Unless somebody else has the questions.
    (clip,) = open_clip_videos(tmp_path, labelled=False)
    assert len(clip) > 0


def test_split_by_video(tmp_path):
    for name in ("VID01", "VID02", "VID03"):
        cholect50(tmp_path, [0, 1, 9], {"0": [triplet(0, 0, 0)]}, name=name)
    clips = open_clip_videos(tmp_path)
    rest, held = split_groups(clips, ["VID02"])
    assert [clip.name for clip in held] == ["VID02@0000", "VID02@0009"]
    assert [clip.video for clip in rest] == ["VID01", "VID01", "VID03", "VID03"]
    assert {clip.video for clip in select_groups(clips, ["VID03", "VID01"])} == {"VID01", "VID03"}
    with pytest.raises(DatasetError, match="there is no video 'VID04'; did you mean 'VID0"):
        split_groups(clips, ["VID04"])
    for names in ([], ["VID01", "VID02", "VID03"]):
        with pytest.raises(DatasetError, match="expected at least one on each side"):
            split_groups(clips, names)


def test_real_cholect50(shared_data):
    clips = open_clip_videos(shared_data / "cholect50", stills=True)
    assert {clip.video for clip in clips} == {"VID68", "VID70", "VID73", "VID74"}
    states = [state for clip in clips for second in clip.seconds for state in second.instruments or ()]
    assert all(state.box and state.verb in CHOLECT50_VERBS and state.target in CHOLECT50_TARGETS for state in states)
    content = json.loads((shared_data / "cholect50" / "labels" / "VID74.json").read_text())
    clip = next(clip for clip in clips if clip.video == "VID74" and clip.hold_s == 1 and len(clip) > 20)
    start = int(clip.name.split("@")[1])
    for index, second in enumerate(clip.seconds):
        rows = content["annotations"].get(str(start + index))
        if rows:
            assert [state.instrument for state in second.instruments] == [CHOLECT50_INSTRUMENTS[r[1]] for r in rows]
    assert next(clip.frames([0])).shape == (396, 706, 3)
