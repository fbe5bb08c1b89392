# SPDX-License-Identifier: Apache-2.0
"""Duplicates and screening on videos made here from the phantom, and on real surgery where it is at hand."""

import argparse
import json
import math
import socket
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from surg_perception.cli import manifest as commands
from surg_perception.data import manifest_passes
from surg_perception.data.decisions import Decision, read_decisions
from surg_perception.data.duplicates import duplicate_groups, find_duplicates, propose_drops
from surg_perception.data.gensurgery import Manifest, ManifestRow, kept_videos, open_manifest, write_manifest
from surg_perception.data.label_files import DatasetError
from surg_perception.data.manifest_passes import drop_duplicates, screen_videos
from surg_perception.data.phantom import Phantom
from surg_perception.data.screening import View, screen, views
from surg_perception.data.video_survey import (
    FrameStatistics,
    cached_survey,
    clock,
    content_box,
    survey_frames,
    survey_video,
)

RATE_HZ = 5
SIZE = (192, 108)
FONT = cv2.FONT_HERSHEY_SIMPLEX


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an address was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def phantom(seed):
    patient = Phantom(*SIZE, rate_hz=RATE_HZ, seed=seed, duration_s=24)
    return [patient.frame(index)[0] for index in range(len(patient))]


@pytest.fixture(scope="module")
def surgeries():
    return {name: phantom(seed) for name, seed in (("one", 3), ("two", 8))}


def encode(path, frames, rate_hz=RATE_HZ, crf=20):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(rate_hz), options={"crf": str(crf), "preset": "veryfast"}
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="bgr24")))
        container.mux(stream.encode(None))
    return path


def scaled(frames, size):
    return [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]


def barred(frames, top=0, side=0):
    return [cv2.copyMakeBorder(frame, top, top, side, side, cv2.BORDER_CONSTANT) for frame in frames]


def with_logo(frames):
    marked = [frame.copy() for frame in frames]
    for frame in marked:
        height, width = frame.shape[:2]
        cv2.rectangle(frame, (width - 34, 4), (width - 4, 14), (255, 255, 255), -1)
        cv2.putText(frame, "LOGO", (width - 32, height // 10 + 3), FONT, 0.3, (160, 30, 0), 1)
    return marked


def title(text="Laparoscopic surgery", ground=(120, 50, 10), ink=(255, 255, 255), size=SIZE, scale=0.45):
    card = np.full((size[1], size[0], 3), ground, np.uint8)
    for line, words in enumerate(text.split("\n")):
        cv2.putText(
            card, words, (int(0.06 * size[0]), int(size[1] * (0.4 + 0.25 * line))), FONT, scale, ink, 1, cv2.LINE_AA
        )
    return card


def noise(seed, count, size=SIZE):
    """Pictures of nothing: grey blocks that change, lit as no tissue is."""
    random = np.random.default_rng(seed)
    return [
        cv2.cvtColor(cv2.resize(random.integers(60, 200, (9, 16), np.uint8), size), cv2.COLOR_GRAY2BGR)
        for _ in range(count)
    ]


# -- duplicates ------------------------------------------------------------------------------------------------------


COPIES = {
    "scaled down, strongly compressed": (lambda f: scaled(f, (128, 72)), 34, 0, 120),
    "letterbox": (lambda f: barred(f, top=20), 26, 0, 120),
    "pillarbox and scaled up": (lambda f: barred(scaled(f, (256, 144)), side=32), 26, 0, 120),
    "stretched to 4:3": (lambda f: scaled(f, (160, 120)), 26, 0, 120),
    "logo": (with_logo, 24, 0, 120),
    "brighter": (lambda f: [cv2.convertScaleAbs(x, alpha=1.15, beta=10) for x in f], 24, 0, 120),
    "start and end cut": (lambda f: f, 24, 31, 93),
    "all at once": (lambda f: barred(with_logo(scaled(f, (160, 90))), top=16), 30, 27, 101),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_found_with_its_overlap_and_offset(tmp_path, surgeries, name):
    change, crf, first, last = COPIES[name]
    original = survey_video(encode(tmp_path / "original.mp4", surgeries["one"]))
    copy = survey_video(encode(tmp_path / "copy.mp4", change(surgeries["one"][first:last]), crf=crf))
    other = survey_video(encode(tmp_path / "other.mp4", surgeries["two"]))
    pairs = find_duplicates({"original": original, "copy": copy, "other": other})
    assert [(pair.first, pair.second) for pair in pairs] == [("copy", "original")]
    overlap = pairs[0].overlaps[0]
    length_s, cut_s = (last - first) / RATE_HZ, first / RATE_HZ
    assert pairs[0].overlap_s == pytest.approx(length_s, abs=0.1 * length_s)
    assert overlap.offset_s == pytest.approx(cut_s, abs=0.5)
    assert 0.5 <= overlap.score <= 1.0
    assert pairs[0].spans_of("original")[0] == pytest.approx(
        (overlap.start_s + overlap.offset_s, overlap.end_s + overlap.offset_s)
    )


def test_a_mirror_image_is_found_only_when_asked_for(tmp_path, surgeries):
    surveys = {
        "a": survey_video(encode(tmp_path / "a.mp4", surgeries["one"])),
        "b": survey_video(encode(tmp_path / "b.mp4", [frame[:, ::-1] for frame in surgeries["one"][20:90]])),
    }
    assert find_duplicates(surveys) == []
    (pair,) = find_duplicates(surveys, mirrored=True)
    assert pair.overlaps[0].mirrored
    assert pair.overlaps[0].offset_s == pytest.approx(-4.0, abs=0.5)


def test_other_operations_with_the_same_title_cards_fades_and_black_are_no_duplicates(tmp_path, surgeries):
    card = title("The same hospital\nDr. A. Surgeon", (255, 255, 255), (0, 0, 0))
    fade = [cv2.convertScaleAbs(card, alpha=k / 10) for k in range(10)]
    around = [np.zeros_like(card)] * 20 + fade + [card] * 40, [np.full_like(card, (200, 90, 20))] * 30
    surveys = {
        name: survey_video(encode(tmp_path / f"{name}.mp4", [*around[0], *frames, *around[1]]))
        for name, frames in surgeries.items()
    }
    assert find_duplicates(surveys) == []


def test_what_a_compilation_takes_from_two_videos_is_found_with_each_offset(tmp_path, surgeries):
    both = [*surgeries["one"][20:90], *surgeries["two"][40:110]]
    surveys = {name: survey_video(encode(tmp_path / f"{name}.mp4", frames)) for name, frames in surgeries.items()}
    surveys["both"] = survey_video(encode(tmp_path / "both.mp4", both))
    pairs = {pair.second: pair for pair in find_duplicates(surveys)}
    assert set(pairs) == {"one", "two"}
    assert pairs["one"].overlaps[0].offset_s == pytest.approx(4.0, abs=0.5)
    assert pairs["two"].overlaps[0].offset_s == pytest.approx(8.0 - 14.0, abs=0.5)
    assert duplicate_groups(list(pairs.values())) == [("both", "one", "two")]
    drops = propose_drops(list(pairs.values()), surveys)
    assert {(drop.name, drop.kept) for drop in drops} == {("one", "both"), ("two", "both")}
    assert all(drop.start_s is not None for drop in drops)  # neither of the two is dropped whole: half of each is new


def test_the_longest_is_proposed_to_be_kept_then_the_one_with_most_pixels_inside_its_border(tmp_path, surgeries):
    one = surgeries["one"]
    videos = {
        "cut but large": scaled(one[:90], (320, 180)),
        "whole in bars": barred(one, top=60),
        "whole and larger": scaled(one, (224, 126)),
    }
    surveys = {name: survey_video(encode(tmp_path / f"{name}.mp4", frames)) for name, frames in videos.items()}
    pairs = find_duplicates(surveys)
    assert {(drop.name, drop.kept, drop.start_s) for drop in propose_drops(pairs, surveys)} == {
        ("cut but large", "whole and larger", None),
        ("whole in bars", "whole and larger", None),
    }
    asked = propose_drops(pairs, surveys, stays=["cut but large"])
    assert "cut but large" not in {drop.name for drop in asked}
    assert {drop.kept for drop in asked if drop.start_s is not None} == {"cut but large"}


# -- screening -------------------------------------------------------------------------------------------------------


def cards():
    """Title cards, slides and blank screens of many kinds, 640x360."""
    size, surgery = (640, 360), cv2.resize(phantom_picture(), (240, 200))
    grounds = {
        "white": (255, 255, 255), "black": (0, 0, 0), "blue": (130, 60, 10), "dark red": (20, 20, 120),
        "orange": (0, 130, 240), "grey": (90, 90, 90), "green": (60, 120, 20),
    }  # fmt: skip
    for name, ground in grounds.items():
        ink = (0, 0, 0) if name == "white" else (255, 255, 255)
        yield f"one line on {name}", title("Dr. A. Surgeon", ground, ink, size, 0.8)
        yield f"title on {name}", title("Laparoscopic\ncholecystectomy", ground, ink, size, 1.6)
        text = "65 year old woman, BMI 32\nprevious appendectomy\ngallstones, thick wall"
        yield f"slide on {name}", title(text, ground, ink, size, 1.0)
        if name != "black":
            yield f"plain {name}", np.full((360, 640, 3), ground, np.uint8)
    yield "red on black", title("Warning", (0, 0, 0), (30, 30, 230), size, 1.5)
    yield "black", np.zeros((360, 640, 3), np.uint8)
    for name, ramp in (("blue", (160, 80, 20)), ("red", (20, 20, 150))):
        shade = (np.linspace(1, 0.1, 640)[None, :, None] * np.array(ramp)).repeat(360, 0).astype(np.uint8)
        cv2.putText(shade, "Laparoscopic surgery", (40, 190), FONT, 1.5, (255, 255, 255), 2, cv2.LINE_AA)
        yield f"gradient {name}", shade
    for ground, ink in (((255, 255, 255), (0, 0, 0)), ((90, 40, 0), (255, 255, 255))):
        slide = title("Port placement\n- umbilicus 10 mm\n- epigastric 5 mm", ground, ink, size, 0.9)
        slide[90:290, 380:620] = surgery
        yield f"slide with a picture on {ground[0]}", slide


def phantom_picture():
    return Phantom(240, 200, rate_hz=1, seed=3, duration_s=24).frame(8)[0]


def view_of(picture, box=None):
    whole = (0, 0, picture.shape[1], picture.shape[0])
    return View(int(views(survey_frames([(0.0, picture)], box or whole))[0]))


def test_every_title_card_slide_and_blank_screen_is_told_from_surgery():
    wrong = []
    for name, picture in cards():
        compressed = cv2.imdecode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
        expected = View.BLANK if name.startswith("plain") or name == "black" else View.TITLE_CARD
        if view_of(compressed) != expected:
            wrong.append((name, view_of(compressed).words))
    assert wrong == []


def test_the_phantoms_surgery_is_seen_as_in_the_body(surgeries):
    for frames in surgeries.values():
        found = views(survey_frames(((k / RATE_HZ, f) for k, f in enumerate(frames)), content_box(frames)))
        assert (found == View.IN_BODY).mean() > 0.97


def test_parts_are_found_with_their_times_and_short_ones_are_left_alone(surgeries):
    one = surgeries["one"]
    card, room = title(), noise(1, 25)
    frames = [*[card] * 20, *one[:50], *room, *one[50:80], card, *one[80:110], *[np.zeros_like(card)] * 15]
    survey = survey_frames(((k / RATE_HZ, f) for k, f in enumerate(frames)), (0, 0, *SIZE))
    found = screen(survey)
    assert [segment.reason for segment in found] == ["title card", "out of body", "blank"]
    starts_ends = [(segment.start_s, segment.end_s) for segment in found]
    np.testing.assert_allclose(starts_ends, [(0, 4), (14, 19), (31.2, 34.2)], atol=0.3)
    assert all(segment.score > 0.9 for segment in found)


def test_a_still_picture_of_surgery_is_a_slide_and_a_moving_one_is_not(surgeries):
    still = [surgeries["one"][40]] * 20
    frames = [*surgeries["one"][:40], *still, *surgeries["one"][41:81]]
    survey = survey_frames(((k / RATE_HZ, f) for k, f in enumerate(frames)), content_box(frames))
    (segment,) = screen(survey)
    assert segment.reason == "title card"
    np.testing.assert_allclose((segment.start_s, segment.end_s), (8, 12), atol=0.5)


def test_a_video_that_is_hardly_surgery_is_dropped_whole(surgeries):
    frames = [*noise(2, 100), *surgeries["one"][:30]]
    survey = survey_frames(((k / RATE_HZ, f) for k, f in enumerate(frames)), (0, 0, *SIZE))
    (segment,) = screen(survey)
    assert (segment.start_s, segment.end_s) == (None, None)
    assert segment.reason == "non-surgical: mostly out of body"


# -- the look through a video --------------------------------------------------------------------------------------


def test_a_survey_samples_by_time_whatever_the_frame_rate_and_is_cached_by_content(tmp_path, surgeries, monkeypatch):
    path = encode(tmp_path / "a.mp4", surgeries["one"][:50])
    survey = cached_survey(path, tmp_path / "cache", every_s=0.5)
    np.testing.assert_allclose(survey.times_s, np.arange(20) * 0.5)
    assert survey.duration_s == pytest.approx(10.0, abs=0.01)
    assert len(cached_survey(path, tmp_path / "cache", every_s=2.0, most=3).times_s) == 3
    slow = survey_video(encode(tmp_path / "slow.mp4", surgeries["one"][:50:5], rate_hz=1))
    np.testing.assert_allclose(slow.times_s, np.arange(20) * 0.5)
    assert (np.unpackbits(slow.hashes[::2] ^ survey.hashes[::2], axis=1).sum(axis=1) < 40).all()

    with monkeypatch.context() as patched:
        patched.setattr("surg_perception.data.video_survey.survey_video", None)
        again = cached_survey(path, tmp_path / "cache", every_s=0.5)  # would fail if it were looked at again
        np.testing.assert_array_equal(again.hashes, survey.hashes)
        np.testing.assert_array_equal(again.statistics, survey.statistics)
        assert again.box == survey.box
    encode(path, surgeries["two"][:40])
    assert len(cached_survey(path, tmp_path / "cache", every_s=0.5).times_s) == 16
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert len(cached_survey(path, tmp_path / "cache", every_s=0.5).times_s) == 16


def test_the_border_is_found_in_spite_of_a_logo_in_it(surgeries):
    framed = barred(surgeries["one"][::10], top=30, side=16)
    for frame in framed:
        cv2.rectangle(frame, (180, 4), (210, 14), (255, 255, 255), -1)
    inner = content_box(surgeries["one"][::10])
    assert content_box(framed) == (inner[0] + 16, inner[1] + 30, inner[2] + 16, inner[3] + 30)
    dark = np.zeros((90, 160, 3), np.uint8)
    assert content_box([dark]) == (0, 0, 160, 90)


def test_clock():
    assert [clock(time_s) for time_s in (0, 59.96, 3725.5)] == ["0:00:00.0", "0:01:00.0", "1:02:05.5"]


# -- the passes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path, surgeries):
    """A manifest of six videos: surgery with a title, a copy, another surgery, slides, a broken file, an address."""
    media = tmp_path / "media"
    media.mkdir()
    card = title()
    encode(media / "a.mp4", [*[card] * 20, *surgeries["one"]])
    encode(media / "copy.mp4", barred(scaled(surgeries["one"][10:110], (160, 90)), top=10), crf=28)
    encode(media / "b.mp4", surgeries["two"])
    encode(media / "slides.mp4", [*[card] * 40, *[title("Thank you", (255, 255, 255), (0, 0, 0))] * 40])
    (media / "broken.mp4").write_bytes((media / "a.mp4").read_bytes()[:3000])
    rows = [ManifestRow(name, f"media/{name}.mp4", "Colectomy") for name in ("a", "copy", "b", "slides", "broken")]
    return write_manifest(
        Manifest(tmp_path / "videos.csv", (*rows, ManifestRow("far", "https://youtu.be/aaaaaaaaaaa")))
    )


def command(*words):
    parser = argparse.ArgumentParser()
    commands.add_actions(parser.add_subparsers(dest="action", required=True))
    options = parser.parse_args([str(word) for word in words])
    return options.run(options)


def test_screening_drops_what_it_should_reports_the_broken_and_touches_no_file(shelf):
    before = {file: file.read_bytes() for file in (shelf.path.parent / "media").iterdir()}
    seen = []
    result = screen_videos(shelf, progress=lambda name, share: seen.append(name))
    assert set(result.unreadable) == {"broken"}
    assert result.away == ("far",)
    rows = {row.video: row for row in result.found}
    assert set(rows) == {"a", "slides", "broken"}
    assert (rows["a"].reason, rows["a"].start_s) == ("title card", 0.0)
    assert 3.5 <= rows["a"].end_s <= 4.5
    assert rows["slides"].whole
    assert rows["slides"].reason.startswith("non-surgical")
    assert rows["broken"].whole
    assert rows["broken"].reason.startswith("unreadable")
    assert read_decisions(shelf.decisions_path).rows == result.found
    assert [kept.row.id for kept in kept_videos(shelf)] == ["a", "copy", "b"]
    review = shelf.path.parent / "review"
    assert {file.name for file in review.iterdir()} == {"a.screen.png", "slides.screen.png"}
    assert cv2.imread(str(review / "a.screen.png")).shape[1] == 6 * 192
    assert {file: file.read_bytes() for file in before} == before
    assert set(seen) == {"a", "copy", "b", "slides", "broken"}
    data = open_manifest(shelf.path, 1.0)
    assert data.video("a").times_s[0] >= 4.0 - 0.5
    assert len(list(data.video("a").frames([0]))) == 1


def test_running_again_costs_no_second_look_keeps_what_a_person_said_and_undo_brings_back(shelf, monkeypatch, capsys):
    screen_videos(shelf)
    monkeypatch.setattr("surg_perception.data.video_survey._sampled", None)  # the broken file is read no further
    assert command("review", shelf.path, "--keep", "slides", "--by", "Ada") == 0
    assert command("review", shelf.path, "--drop", "b", "--reason", "another species", "--by", "Ada") == 0
    assert command("review", shelf.path, "--keep", "a", "--from", "1", "--to", "2", "--by", "Ada") == 0
    assert command("screen", shelf.path) == 0
    decisions = read_decisions(shelf.decisions_path)
    assert sum(row.by == "Ada" for row in decisions.rows) == 3
    assert decisions.kept_spans("slides") == [(0.0, math.inf)]
    assert decisions.kept_spans("b") == []
    assert decisions.kept_spans("a")[0] == (1.0, 2.0)
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "200")  # of the table
    assert command("review", shelf.path) == 0
    assert "another species" in capsys.readouterr().out
    assert command("review", shelf.path, "--undo", "b") == 0
    assert "another species" in capsys.readouterr().out
    assert read_decisions(shelf.decisions_path).kept_spans("b") == [(0.0, math.inf)]
    for words in (("--drop", "b"), ("--drop", "nobody", "--reason", "x"), ("--keep", "b", "--by", "screen v1")):
        with pytest.raises(DatasetError):
            command("review", shelf.path, *words)


def test_the_lesser_copy_is_dropped_unless_its_better_is_dropped_or_a_person_keeps_it(shelf, capsys):
    result = drop_duplicates(shelf)
    (row,) = result.found
    assert row.video == "copy"
    assert row.whole
    assert row.reason.startswith("duplicate of a")
    assert set(result.unreadable) == {"broken"}
    assert cv2.imread(str(shelf.path.parent / "review" / "copy.duplicates.png")).shape[0] == 2 * (22 + 108)
    assert [kept.row.id for kept in kept_videos(shelf)] == ["a", "b", "slides", "broken"]  # that is for screening

    said = read_decisions(shelf.decisions_path).said(Decision("a", None, None, "drop", "no", None, "Ada"))
    said.write()
    assert drop_duplicates(shelf).found == ()
    assert not (shelf.path.parent / "review" / "copy.duplicates.png").exists()
    assert "copy" in [kept.row.id for kept in kept_videos(shelf)]

    read_decisions(shelf.decisions_path).undone("a")[0].write()
    read_decisions(shelf.decisions_path).said(Decision("copy", None, None, "keep", "", None, "Ada")).write()
    assert command("duplicates", shelf.path, "--mirrored") == 0
    out = capsys.readouterr().out
    assert "group: a, copy" in out
    decisions = read_decisions(shelf.decisions_path)
    assert decisions.kept_spans("copy") == [(0.0, math.inf)]
    ((start_s, end_s),) = [row.span for row in decisions.of("a")]
    np.testing.assert_allclose((start_s, end_s), (6.0, 26.0), atol=1.0)


def test_a_missing_library_stops_a_pass_and_drops_nothing(shelf, monkeypatch):
    monkeypatch.setattr(manifest_passes, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="av"):
        screen_videos(shelf)
    assert not shelf.decisions_path.exists()


def test_a_video_cut_off_in_the_middle_is_used_up_to_there(tmp_path, surgeries):
    path = tmp_path / "a.mp4"
    options = {"crf": "20", "preset": "veryfast", "g": "10"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=RATE_HZ, options=options)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for frame in surgeries["one"]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    manifest = write_manifest(Manifest(tmp_path / "videos.csv", (ManifestRow("a", "a.mp4"),)))
    screen_videos(manifest)
    video = open_manifest(manifest.path, 1.0).video("a")
    assert 4 < video.times_s[-1] < 20
    assert len(list(video.frames())) == len(video.times_s)


def test_commands_import_resolve_and_check(tmp_path, surgeries, capsys):
    lists, media, out = tmp_path / "lists", tmp_path / "media", tmp_path / "videos.csv"
    lists.mkdir()
    media.mkdir()
    (lists / "colectomy.txt").write_text("https://youtu.be/aaaaaaaaaaa\nhttps://youtu.be/bbbbbbbbbbb\n")
    encode(media / "A [aaaaaaaaaaa].mp4", surgeries["one"][:10])
    assert command("manifest", "import", lists, "--out", out) == 0
    assert "2 videos, 0 of them here" in capsys.readouterr().out
    with pytest.raises(DatasetError, match="is there already"):
        command("manifest", "import", lists, "--out", out)
    assert command("manifest", "resolve", out, media) == 0
    assert "1 of 2 videos have files" in capsys.readouterr().out
    assert command("manifest", "check", out) == 0
    assert "1 are here and kept" in capsys.readouterr().out


# -- real surgery ----------------------------------------------------------------------------------------------------


def excerpt(source, target, start_s, end_s, size, bars, crf):
    """Part of a real clip, scaled, with a letterbox and a logo."""
    with av.open(str(source)) as container:
        frames = [f.to_ndarray(format="bgr24") for f in container.decode(video=0) if start_s <= f.time < end_s]
    return encode(target, with_logo(barred(scaled(frames, size), top=bars)), rate_hz=25, crf=crf)


def test_clips_of_one_surgery_are_no_duplicates_and_an_excerpt_is_found(shared_data, tmp_path):
    clips = {path.stem: path for path in sorted((shared_data / "cholec-clips").glob("VID[24][63]_*.mp4"))}
    assert sum(name.startswith("VID43") for name in clips) == 3
    assert sum(name.startswith("VID26") for name in clips) == 2
    surveys = {name: survey_video(path) for name, path in clips.items()}
    assert find_duplicates(surveys, mirrored=True) == []
    copy = excerpt(clips["VID43_0216"], tmp_path / "copy.mp4", 8.26, 24.0, (426, 240), 40, 35)
    (pair,) = find_duplicates({**surveys, "copy": survey_video(copy)})
    assert {pair.first, pair.second} == {"VID43_0216", "copy"}
    start_s, end_s = pair.spans_of("VID43_0216")[0]
    assert (start_s, end_s) == pytest.approx((8.26, 24.0), abs=1.0)
    assert all(screen(survey) == [] for survey in surveys.values())


# Looked at one by one on contact sheets, by "<surgery>-frame-<number>".
OOD_OUT_OF_BODY = {
    "00001-21711": (17066, 46322),
    "00003-22976": (0,),
    "00010-23313": (0, 6702, 63669),
    "00015-23925": (122417,),
    "00022-24972": (0, 33193),
    "00026-25794": (115824,),
}
OOD_BLANK = {
    "00003-22976": (151411,),
    "00006-23107": (215232,),
    "00008-23228": (139846, 149835, 159824, 169813, 179802, 189791),
}
# In the trocar with tissue in view, or one colour close up: nobody can say from the frame alone.
OOD_UNCLEAR = {
    "00003-22976": (87659,),
    "00006-23107": (169920, 192576),
    "00008-23228": (119868,),
    "00010-23313": (3351,),
    "00026-25794": (6096,),
}
# Frames of five Cholec80 surgeries and four of CholecT50 that are flagged and do show no tissue, or tissue only
# through a trocar whose inside fills the picture.
NOT_IN_BODY = {
    "video01": (36600, 36700, 39100, 41300, 41800, 41900, 42000, 42100, 42200, 42900, 43100, 43200, 43300),
    "video02": (5300, 10300, 10400, 10500, 10600, 10700, 10900, 63600, 63800, 63900, 64000, 70100, 70300, 70600,
                70700, 70800, 70900),
    "video03": (15600, 15700, 15800, 15900, 16900, 17200, 19100, 19300, 19400, 19700, 24000, 24200, 24400, 127500,
                127800, 127900, 132400, 133400, 133600, 133700, 144500, 144600, 144800, 145300, 145600, 145700),
    "video04": (4500, 6800, 6900, 34400, 34500, 34600, 38000),
    "video05": (16800, 17000, 17100, 17200, 20800, 21000, 21100, 38800, 38900, 39100, 39200, 39300, 39400, 39500,
                45000, 45100, 45200, 45300, 45600, 45800, 45900, 46300, 46400, 46600, 47200, 48000, 58600),
    "VID73": (1331,),
    "VID74": (1597, 1618),
}  # fmt: skip


def numbered_views(files):
    """View by number in the file name; the files are of one video."""
    files = sorted(files, key=lambda file: int(file.stem.rpartition("-")[2]))
    pictures = [cv2.imread(str(file)) for file in files]
    box = content_box(pictures[:: max(1, len(pictures) // 24)])
    found = views(survey_frames(((float(k), picture) for k, picture in enumerate(pictures)), box))
    return {int(file.stem.rpartition("-")[2]): View(int(view)) for file, view in zip(files, found, strict=True)}


def test_frames_out_of_the_body_and_blank_screens_of_another_hospital_are_found(shared_data):
    hits = misses = false_alarms = in_body = 0
    files = sorted((shared_data / "ood").glob("*.jpg"))
    for surgery in sorted({file.name.partition("-frame-")[0] for file in files}):
        found = numbered_views([file for file in files if file.name.startswith(surgery)])
        wanted = {*OOD_OUT_OF_BODY.get(surgery, ()), *OOD_BLANK.get(surgery, ())}
        for number, view in found.items():
            if number in wanted:
                hits, misses = hits + (view != View.IN_BODY), misses + (view == View.IN_BODY)
            elif number not in OOD_UNCLEAR.get(surgery, ()):
                in_body, false_alarms = in_body + 1, false_alarms + (view != View.IN_BODY)
    print(json.dumps({"ood": {"hits": hits, "misses": misses, "in body": in_body, "false alarms": false_alarms}}))
    assert hits + misses == 18
    assert hits >= 17
    assert in_body == 136
    assert false_alarms == 0


def test_hardly_a_frame_of_cholec80_and_cholect50_is_taken_for_something_else(shared_data):
    folders = sorted((shared_data / "cholect50" / "videos").iterdir())
    folders += sorted((shared_data / "cholec80" / "frames").iterdir())
    frames = flagged = false_alarms = 0
    for folder in folders:
        every = 4 if folder.name.startswith("video") else 1  # all of them: docs/gensurgery.md
        found = numbered_views(sorted(folder.glob("*.jpg"))[::every])
        dropped = {number for number, view in found.items() if view != View.IN_BODY}
        frames, flagged = frames + len(found), flagged + len(dropped)
        false_alarms += len(dropped - set(NOT_IN_BODY.get(folder.name, ())))
    print(json.dumps({"frames": frames, "flagged": flagged, "false alarms": false_alarms}))
    assert frames > 1900
    assert flagged >= 15
    assert false_alarms <= 2


def test_a_pass_signs_with_a_name_that_counts_as_a_machines():
    for by in (manifest_passes.SCREEN, manifest_passes.DUPLICATES):
        assert Decision("a", None, None, "drop", by=by).machine == by.partition(" ")[0]
    assert len(FrameStatistics._fields) == 8
