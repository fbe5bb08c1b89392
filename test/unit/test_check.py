# SPDX-License-Identifier: Apache-2.0
"""Each fault put into a data set is found, named and explained; a good data set has none."""

from __future__ import annotations

import argparse
import json

import cv2
import layouts
import numpy as np
import pytest
from layouts import PICTURES, RATE_HZ, phase_of, write_table
from video_files import numbered_picture, write_video

from surg_perception.data.check import check_dataset
from surg_perception.data.datasets import DatasetError
from surg_perception.data.labels import AUTOLAPARO_PHASES, CHOLEC80_PHASES


def texts(report, severity):
    return [
        f"{finding.where}: {finding.found}; {finding.expected}; {finding.advice}"
        for finding in report.findings
        if finding.severity == severity
    ]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("make", [layouts.cholec80, layouts.autolaparo, layouts.m2cai, layouts.videos])
def test_a_good_data_set_has_no_fault(tmp_path, make, deep):
    report = check_dataset(make(tmp_path), deep=deep)
    assert texts(report, "error") == texts(report, "warning") == []
    assert report.errors == 0
    for video in report.videos:
        assert (video.frames, video.duration_s, video.rate_hz) == (PICTURES, pytest.approx(4.0), 25)
        assert (video.width, video.height) == (96, 32)


def test_what_is_found_is_counted(tmp_path):
    report = check_dataset(layouts.cholec80(tmp_path))
    assert (report.kind, report.label_set, len(report.videos)) == ("cholec80", "cholec80", 2)
    assert report.hours == pytest.approx(8 / 3600)
    assert sum(report.phases_s.values()) == pytest.approx(8.0)
    truth = [phase_of(frame / RATE_HZ, CHOLEC80_PHASES) for frame in range(PICTURES)]
    for phase, seconds in report.phases_s.items():
        assert seconds == pytest.approx(2 * truth.count(phase) / RATE_HZ)
    # A tool is labelled each second and holds for it: 25 pictures in each of two videos.
    assert list(report.tools.values()) == [50, 50, 50, 50, 0, 0, 0]
    assert report.to_dict()["frames"] == 2 * PICTURES


def test_frame_folders_are_counted_too(tmp_path):
    layouts.cholec80_frames(tmp_path / "a")
    layouts.cholect50(tmp_path / "b")
    report = check_dataset(tmp_path / "a", deep=True)
    assert texts(report, "error") == texts(report, "warning") == []
    assert (report.videos[0].frames, report.videos[0].duration_s, report.videos[0].rate_hz) == (10, 40.0, 0.25)
    report = check_dataset(tmp_path / "b", deep=True)
    assert texts(report, "error") == texts(report, "warning") == []
    assert "1 of 5 pictures have no label" in texts(report, "note")[0]
    assert report.videos[0].labelled == 0.8
    assert "SpecimenBag" not in report.tools


def test_phantom():
    report = check_dataset("phantom:seeds=3-3,duration_s=8,width=96,height=64")
    assert report.findings == ()
    assert sum(report.phases_s.values()) == 8


def _shorter(root):
    layouts.cholec80_labels(root, "video02", pictures=40)
    layouts.cholec80_labels(root, "video01", pictures=PICTURES)


def _longer(root):
    layouts.cholec80_labels(root, "video02", pictures=200)


def _other_rate(root):
    rows = [(second, phase_of(second, CHOLEC80_PHASES)) for second in range(4)]
    write_table(root / "phase_annotations" / "video02-phase.txt", ("Frame", "Phase"), rows)


def _misspelled(root):
    path = root / "phase_annotations" / "video02-phase.txt"
    path.write_text(path.read_text().replace("ClippingCutting", "ClipingCuting"))


def _other_procedure(root):
    layouts.cholec80_labels(root, "video02", phases=AUTOLAPARO_PHASES[1:])


def _backwards(root):
    path = root / "phase_annotations" / "video02-phase.txt"
    lines = path.read_text().splitlines()
    lines[20], lines[30] = lines[30], lines[20]
    path.write_text("\n".join(lines))


def _garbage(root):
    path = root / "phase_annotations" / "video02-phase.txt"
    path.write_bytes(path.read_bytes().replace(b"\n7\t", b"\nNaN\t").replace(b"\n9\tPrep", b"\n9\t\xff\xfe"))


def _empty_labels(root):
    (root / "phase_annotations" / "video02-phase.txt").write_text("")


def _tools_out_of_range(root):
    path = root / "tool_annotations" / "video02-tool.txt"
    path.write_text(path.read_text().replace("25\t0\t1", "25\t0\t3"))


def _empty_video(root):
    (root / "videos" / "video02.mp4").write_bytes(b"")


def _cut_video(root):
    layouts.remove(root / "videos" / "video02.mp4")
    whole = write_video(root / "whole.mkv", range(0, 8000, 40))
    (root / "videos" / "video02.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    whole.unlink()


def _same_name(root):
    layouts.copy_of_video(root / "videos" / "video02.avi")


ERRORS = {
    _shorter: (r"video02-phase.txt: labels end at 1.6 s, 2.4 s before the video; labels up to 4.0 s",),
    _longer: (r"video02-phase.txt: labels end at 8.0 s, 4.0 s after the video; labels up to 4.0 s",),
    _misspelled: ("video02-phase.txt:31: unknown phase 'ClipingCuting' (14 lines)", "did you mean 'ClippingCutting'?"),
    _other_procedure: ("unknown phase 'Suturing'", "of another procedure than cholec80"),
    _backwards: ("video02-phase.txt:22: 20 comes after 29 (10 lines)", "sort the file"),
    _garbage: ("video02-phase.txt:9: 'NaN'; a whole frame number", "video02-phase.txt:11: byte 0xff, which is no text"),
    _empty_labels: ("video02-phase.txt: no labels; rows of frame number and phase",),
    _tools_out_of_range: ("video02-tool.txt:3: '25\\t0\\t3\\t0", "a frame number and 7 times 0 or 1"),
    _empty_video: ("video02.mp4: cannot be read as a video",),
    _cut_video: ("video02.mkv: its pictures end at", "8.0 s, as its header says", "the file is cut"),
    _same_name: ("video02.mp4: the same name as", "one file per video"),
}


@pytest.mark.parametrize("fault", ERRORS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(tmp_path, fault):
    fault(layouts.cholec80(tmp_path))
    report = check_dataset(tmp_path)
    found = "\n".join(texts(report, "error"))
    for part in ERRORS[fault]:
        assert part in found
    assert "video01" not in found
    assert report.errors >= 1


def test_seconds_taken_for_frames_are_recognised(tmp_path):
    """Labels at 1 fps, numbered 0, 1, 2, …, for a video of 100 s."""
    layouts.cholec80_frames(tmp_path, numbers=range(0, 2500, 100))
    layouts.remove(tmp_path / "annotation")
    rows = [(second, phase_of(second, CHOLEC80_PHASES, 100)) for second in range(100)]
    write_table(tmp_path / "phase_annotations" / "video01-phase.txt", ("Frame", "Phase"), rows)
    (error,) = texts(check_dataset(tmp_path), "error")
    assert "labels end at 4.0 s" in error
    assert "multiply them by 25" in error


def test_what_is_missing_is_a_warning(tmp_path):
    layouts.cholec80(tmp_path)
    layouts.cholec80_labels(tmp_path, "video07")
    layouts.remove(tmp_path / "phase_annotations" / "video01-phase.txt")
    report = check_dataset(tmp_path)
    warnings = "\n".join(texts(report, "warning"))
    assert "video01.mp4: no phase labels" in warnings
    assert "video07-phase.txt: labels without a video" in warnings
    assert "video07-tool.txt: labels without a video" in warnings
    assert report.errors == 0


def test_holes_in_labels_are_a_warning(tmp_path):
    path = layouts.cholec80(tmp_path) / "phase_annotations" / "video01-phase.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:30] + lines[50:]))
    (warning,) = texts(check_dataset(tmp_path), "warning")
    assert "no label for 0.8 s in between, first at 1.2 s" in warning


def test_an_unusual_order_is_a_note(tmp_path):
    rows = [(frame, CHOLEC80_PHASES[[0, 1, 5, 3][frame // 25]]) for frame in range(PICTURES)]
    layouts.cholec80(tmp_path)
    write_table(tmp_path / "phase_annotations" / "video02-phase.txt", ("Frame", "Phase"), rows)
    report = check_dataset(tmp_path)
    notes = "\n".join(texts(report, "note"))
    assert "video02: CalotTriangleDissection is followed by CleaningCoagulation at 2.0 s (2 such jumps)" in notes
    assert "video01" not in notes
    assert report.errors == 0


@pytest.mark.parametrize("deep", [False, True])
def test_damage_inside_a_video_needs_a_deep_look(tmp_path, deep):
    path = layouts.cholec80(tmp_path) / "videos" / "video02.mp4"
    layouts.remove(path)
    write_video(path, range(0, 4000, 40), size=(192, 128))
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + len(content) // 4
    content[start : start + 300] = np.random.default_rng(0).bytes(300)
    path.write_bytes(content)
    errors = texts(check_dataset(tmp_path, deep=deep), "error")
    if deep:
        assert len(errors) == 1
        assert "video02.mp4: " in errors[0]
        assert "cannot be decoded, the first after" in errors[0]


def test_a_damaged_image_is_found(tmp_path):
    layouts.cholec80_frames(tmp_path, numbers=range(0, 10000, 100))
    image = tmp_path / "frames" / "video01" / "5100.jpg"
    image.write_bytes(image.read_bytes()[:-20])
    assert check_dataset(tmp_path).errors == 0  # it is not among the few
    (error,) = texts(check_dataset(tmp_path, deep=True), "error")
    assert "5100.jpg cannot be read: " in error


def test_sizes_that_differ_are_said(tmp_path):
    layouts.cholec80_frames(tmp_path)
    cv2.imwrite(str(tmp_path / "frames" / "video01" / "300.jpg"), numbered_picture(3, 60, 40))
    layouts.cholec80_frames(tmp_path / "b", name="video02")
    (tmp_path / "b" / "frames" / "video02").rename(tmp_path / "frames" / "video02")
    for image in (tmp_path / "frames" / "video02").iterdir():
        cv2.imwrite(str(image), numbered_picture(3, 60, 40))
    report = check_dataset(tmp_path)
    assert "video01: pictures of 60x40, 96x32; one size in a video" in "\n".join(texts(report, "warning"))
    assert "2 resolutions: mostly 96x32; video02 60x40" in "\n".join(texts(report, "note"))


def test_pictures_and_labels_that_do_not_belong_together(tmp_path):
    layouts.cholec80_frames(tmp_path)
    layouts.remove(tmp_path / "frames" / "video01" / "500.jpg")
    cv2.imwrite(str(tmp_path / "frames" / "video01" / "550.jpg"), numbered_picture(3))
    cv2.imwrite(str(tmp_path / "frames" / "video01" / "title.jpg"), numbered_picture(3))
    warnings = "\n".join(texts(check_dataset(tmp_path), "warning"))
    assert "1 of 10 pictures have no label" in warnings
    assert "1 of 10 labels have no picture" in warnings
    assert "1 images without a number as their name, such as title.jpg" in warnings


def test_faults_of_triplet_labels(tmp_path):
    path = layouts.cholect50(tmp_path) / "labels" / "VID68.json"
    labels = json.loads(path.read_text())
    labels["annotations"]["5"][0][14] = float("nan")
    labels["categories"]["phase"]["6"] = "gallbladder-extracton"
    path.write_text(json.dumps(labels))
    errors = "\n".join(texts(check_dataset(tmp_path), "error"))
    assert "frame 5: a row of 15; 15 finite numbers" in errors
    assert "unknown phase 'gallbladder-extracton' under categories" in errors
    path.write_text("{")
    assert "VID68.json:1: no readable JSON" in texts(check_dataset(tmp_path), "error")[0]


def test_faults_of_intervals(tmp_path):
    layouts.videos(tmp_path)
    rows = ["b_9,0,2,a", "b_9,1.5,3,b", "b_10,3,3,a", "b_10,0,inf,a", "b_10,0,9,a", "b_11,0,1,a", "b_9,3,4,"]
    (tmp_path / "phases.csv").write_text("video,start_s,end_s,phase\n" + "\n".join(rows))
    report = check_dataset(tmp_path)
    errors = "\n".join(texts(report, "error"))
    assert "phases.csv:3: b_9: 1.5 to 3 s begins before 2 s" in errors
    assert "phases.csv:4: interval 3 to 3 s; 0 <= start_s < end_s" in errors
    assert "phases.csv:5: 'inf'; a time in seconds" in errors
    assert "phases.csv: b_10: a phase ends at 9.0 s; 4.0 s at most" in errors
    assert "phases.csv:8: an empty cell" in errors
    assert "phases.csv:7: labels of 'b_11'" in texts(report, "warning")[0]
    (tmp_path / "phases.csv").write_text("film,start_s,end_s,phase\n")
    assert "add video" in texts(check_dataset(tmp_path), "error")[0]


def test_a_slip_among_known_phases_is_a_warning(tmp_path):
    layouts.videos(tmp_path)
    rows = ["b_9,0,2,Preparation", "b_9,2,4,ClippingCutting", "b_10,0,4,Preparatoin"]
    (tmp_path / "phases.csv").write_text("video,start_s,end_s,phase\n" + "\n".join(rows))
    (warning,) = texts(check_dataset(tmp_path), "warning")
    assert "phase 'Preparatoin', while others are those of cholec80" in warning
    assert "did you mean 'Preparation'?" in warning


def test_progress_is_told(tmp_path):
    told = []
    check_dataset(layouts.autolaparo(tmp_path), deep=True, progress=lambda *step: told.append(step))
    assert told == [("01", 25, 100), ("01", 50, 100), ("01", 75, 100), ("01", 100, 100)]


def run(*arguments):
    from surg_perception.cli.data import add_parser

    top = argparse.ArgumentParser()
    add_parser(top.add_subparsers())
    options = top.parse_args(["data", "check", *map(str, arguments)])
    return options.run(options)


def test_the_command(tmp_path, capsys):
    layouts.cholec80(tmp_path / "data")
    assert run(tmp_path / "data") == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    _misspelled(tmp_path / "data")
    assert run(tmp_path / "data", "--deep", "--json", tmp_path / "report.json") == 1
    shown = capsys.readouterr().out
    assert "video02-phase.txt:31: unknown phase 'ClipingCuting'" in shown
    assert "1 error, 0 warnings (every picture decoded)" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["errors"] == 1
    assert report["findings"][0]["severity"] == "error"
    assert report["videos"][0]["phases_s"]["Preparation"] == pytest.approx(0.6)
    with pytest.raises(DatasetError, match="no data set recognised"):
        run(tmp_path)


def test_the_shared_data_has_no_errors(shared_data):
    expected = {"cholec80": 3570, "cholect50": 1082, "clips-1080p": 250}
    for name, frames in expected.items():
        report = check_dataset(shared_data / name)
        assert report.errors == 0
        assert sum(video.frames for video in report.videos) == frames
