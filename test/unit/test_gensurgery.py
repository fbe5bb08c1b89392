# SPDX-License-Identifier: Apache-2.0
"""Manifests and decisions: nothing is lost, everything wrong is named, a person has the last word."""

import math
import socket

import numpy as np
import pytest
from video_files import number_of, write_video

from surg_perception.data.datasets import DatasetError
from surg_perception.data.decisions import Decision, Decisions, read_decisions
from surg_perception.data.gensurgery import (
    KNOWN_PROCEDURES,
    Manifest,
    ManifestError,
    ManifestRow,
    check_manifest,
    import_address_lists,
    kept_videos,
    open_manifest,
    read_manifest,
    resolve,
    video_id,
    write_manifest,
)

HEADER = "id,source,procedure,approach,license,title\n"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an address was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def manifest_of(folder, *rows):
    return write_manifest(Manifest(folder / "videos.csv", rows))


def screened(video, start_s=None, end_s=None):
    return Decision(video, start_s, end_s, "drop", "title card", 0.9, "screen v1", "2030-01-02")


def person(video, decision, start_s=None, end_s=None):
    return Decision(video, start_s, end_s, decision, "seen", None, "Ada", "2030-01-03")


# -- the manifest's file ---------------------------------------------------------------------------------------------


def test_manifest_survives_reading_and_writing_with_foreign_columns_and_awkward_text(tmp_path):
    path = tmp_path / "videos.csv"
    text = (
        "reviewer,id,source,procedure,approach,title,ward\n"
        'Bo,a1,clips/a 1.mp4,Cholecystectomy,laparoscopic,"Gallbladder, ""hot"", day 2","4\nnorth"\n'
        ",b2,https://youtu.be/abcdefghijk,Whipple,robotic,Übung,\n"
    )
    path.write_text(text, "utf-8")
    manifest = read_manifest(path)
    assert manifest.columns == ("reviewer", "id", "source", "procedure", "approach", "title", "ward")
    assert manifest.rows[0].extra == {"reviewer": "Bo", "ward": "4\nnorth"}
    assert manifest.rows[1].is_address
    assert manifest.file_of(manifest.rows[1]) is None
    assert manifest.file_of(manifest.rows[0]) == tmp_path / "clips" / "a 1.mp4"
    written = write_manifest(manifest, tmp_path / "again.csv")
    again = read_manifest(tmp_path / "again.csv")
    assert again.rows == manifest.rows
    assert written.columns == (*manifest.columns, "license")
    assert write_manifest(again).path.read_text("utf-8").startswith(text.splitlines()[0])


def test_manifest_saved_by_a_spreadsheet_with_semicolons_and_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "videos.csv"
    path.write_bytes("\ufeffid;source;procedure;approach\r\na;a.mp4;Colectomy;Robotic\r\n;;;\r\n".encode())
    assert read_manifest(path).rows == (ManifestRow("a", "a.mp4", "Colectomy", "robotic"),)


@pytest.mark.parametrize(
    ("row", "column", "what"),
    [
        ("-x,a.mp4,Colectomy,robotic,,", "id", "formula"),
        ("#NAME?,a.mp4,Colectomy,robotic,,", "id", "letters"),
        ("a,,Colectomy,robotic,,", "source", "nothing found"),
        ("a,/data/a.mp4,Colectomy,robotic,,", "source", "relative"),
        ("a,C:\\a.mp4,Colectomy,robotic,,", "source", "relative"),
        ("a,ftp://x/a.mp4,Colectomy,robotic,,", "source", "https://"),
        ("a,a.mp4,,robotic,,", "procedure", "nothing found"),
        ("a,a.mp4,Colectomy,open,,", "approach", "laparoscopic, robotic, unknown"),
        ("ok,b.mp4,Colectomy,robotic,,", "id", "also in row 2"),
    ],
)
def test_a_wrong_cell_is_named_by_row_and_column(tmp_path, row, column, what):
    path = tmp_path / "videos.csv"
    path.write_text(f"{HEADER}ok,a.mp4,Colectomy,robotic,,\n{row}\n")
    with pytest.raises(ManifestError, match=rf"row 3, column {column}: .*{what}"):
        read_manifest(path)


def test_all_wrong_rows_are_listed_at_once_and_structure_is_checked(tmp_path):
    path = tmp_path / "videos.csv"
    path.write_text(f"{HEADER}a,,Colectomy,open,,\nb,b.mp4,Colectomy,robotic\nc,,Colectomy,robotic,,\n")
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert all(f"row {n}, column source" in str(caught.value) for n in (2, 4))
    assert "row 3" not in str(caught.value)  # cells that a spreadsheet leaves out at the end are empty
    path.write_text("id,source,approach\na,a.mp4,robotic\n")
    with pytest.raises(DatasetError, match="procedure must be there"):
        read_manifest(path)
    path.write_text(f"{HEADER}a,a.mp4,Colectomy,robotic,,one,two\n")
    with pytest.raises(DatasetError, match=r"row 2 has 7 cells.*'two'"):
        read_manifest(path)
    path.write_bytes(f"{HEADER}a,a.mp4,Colectomy,robotic,,".encode() + b"\xdc\n")
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_manifest(path)


def test_check_tells_of_strange_procedures_missing_files_twins_and_addresses(tmp_path):
    (tmp_path / "a.mp4").touch()
    manifest = manifest_of(
        tmp_path,
        ManifestRow("a", "a.mp4", "Cholecistectomy", "robotic"),
        ManifestRow("b", "a.mp4", "Colectomy", "robotic"),
        ManifestRow("c", "c.mp4", "Colectomy", "robotic"),
        ManifestRow("d", "https://youtu.be/abcdefghijk", "Craniotomy", "robotic"),
    )
    found = "\n".join(check_manifest(manifest))
    assert "a: procedure 'Cholecistectomy'" in found
    assert "did you mean 'Cholecystectomy'?" in found
    assert "d: procedure 'Craniotomy'" in found
    assert "kept as it is" in found
    assert "b: has the same source as a" in found
    assert "c: c.mp4 is not here" in found
    assert "1 of 4 videos are addresses" in found
    assert check_manifest(manifest_of(tmp_path, ManifestRow("a", "a.mp4", KNOWN_PROCEDURES[11]))) == []


# -- the authors' lists and files on disk --------------------------------------------------------------------------


def test_video_ids_of_all_forms_of_address():
    for address in (
        "https://youtu.be/-f8OnZ3dBZQ",
        "https://www.youtube.com/watch?v=-f8OnZ3dBZQ&list=PLx&t=10s",
        "http://youtu.be/-f8OnZ3dBZQ?t=3",
    ):
        assert video_id(address) == "-f8OnZ3dBZQ"
    assert video_id("https://example.org/surgery/case_12.mp4") == "case_12"
    for wrong in ("https://youtu.be/abcdefghij", "youtu.be/abcdefghijk", "https://example.org/", "words"):
        with pytest.raises(ManifestError):
            video_id(wrong)


def test_lists_become_a_manifest_with_repeats_contradictions_and_broken_lines_told(tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "robotic_chole.txt").write_text("https://www.youtube.com/watch?v=aaaaaaaaaaa\nhttps://youtu.be/short\n")
    (lists / "unsorted.txt").write_text("https://youtu.be/aaaaaaaaaaa\n\nhttps://youtu.be/ddddddddddd\n")
    (lists / "hernia.txt").write_text("https://youtu.be/-bbbbbbbbbb\nhttps://youtu.be/-bbbbbbbbbb\n")
    (lists / "IBS.txt").write_text("https://youtu.be/-bbbbbbbbbb\nnot an address\n")
    (lists / "thyroid_surgery.txt").write_text("https://example.org/v/case 1.mp4\n")
    manifest, notes = import_address_lists(lists, tmp_path / "videos.csv")
    rows = {row.id: row for row in manifest.rows}
    assert set(rows) == {"yt_aaaaaaaaaaa", "yt_-bbbbbbbbbb", "yt_ddddddddddd", "web_case_1"}
    chole = rows["yt_aaaaaaaaaaa"]
    assert (chole.procedure, chole.approach) == ("Cholecystectomy", "robotic")
    assert chole.extra["lists"] == "robotic_chole; unsorted"
    assert rows["yt_-bbbbbbbbbb"].procedure == "unknown"
    assert rows["yt_ddddddddddd"].procedure == "unknown"
    assert rows["web_case_1"].procedure == "Thyroid Surgery"
    told = "\n".join(notes)
    assert "robotic_chole.txt, line 2" in told
    assert "11 characters" in told
    assert "IBS.txt, line 2" in told
    assert "hernia.txt: 1 lines repeat" in told
    assert "yt_-bbbbbbbbbb: in the lists hernia; IBS" in told
    assert read_manifest(write_manifest(manifest).path).rows == manifest.rows
    with pytest.raises(ManifestError, match=r"no \*\.txt"):
        import_address_lists(tmp_path / "nothing", tmp_path / "videos.csv")


def test_files_are_found_by_id_under_all_usual_names_and_nothing_is_guessed(tmp_path):
    media = tmp_path / "media" / "deep"
    media.mkdir(parents=True)
    for name in (
        "Title [aaaaaaaaaaa].mp4",
        "watch?v=bbbbbbbbbbb.A title.mkv",
        "ccccccccccc.webm",
        "A title-ddddddddddd.mp4",
        "one eeeeeeeeeee.mp4",
        "two eeeeeeeeeee.mp4",
        "x-fffffffffffz.mp4",  # a longer word is not that id
        "AAAAAAAAAAA.mp4",  # nor is another case
        "ggggggggggg.txt",
    ):
        (media / name).touch()
    rows = [ManifestRow(f"yt_{c * 11}", f"https://youtu.be/{c * 11}") for c in "abcdefg"]
    manifest, notes = resolve(Manifest(tmp_path / "tables" / "videos.csv", tuple(rows)), tmp_path / "media")
    source = {row.id[3]: row.source for row in manifest.rows}
    assert source["a"] == "../media/deep/Title [aaaaaaaaaaa].mp4"
    assert source["b"].endswith("watch?v=bbbbbbbbbbb.A title.mkv")
    assert source["c"].endswith("/ccccccccccc.webm")
    assert source["d"].endswith("-ddddddddddd.mp4")
    assert manifest.rows[0].extra["address"] == "https://youtu.be/aaaaaaaaaaa"
    assert all(source[c].startswith("https://") for c in "efg")
    assert any(note.startswith("yt_eeeeeeeeeee: several files") for note in notes)
    assert any(note.startswith("yt_ggggggggggg: not here") for note in notes)
    assert len(notes) == 3
    (tmp_path / "tables").mkdir()
    again = read_manifest(write_manifest(manifest).path)
    assert again.file_of(again.rows[0]).is_file()


# -- decisions -------------------------------------------------------------------------------------------------------


def test_a_person_always_wins_and_the_last_word_counts():
    both = Decisions("", (person("a", "keep"), screened("a")))
    assert both.kept_spans("a") == [(0.0, math.inf)]
    assert Decisions("", (screened("a"),)).kept_spans("a") == []
    assert Decisions("", ()).kept_spans("a") == [(0.0, math.inf)]
    segments = Decisions("", (screened("a", None, 10), screened("a", 50, 60), person("a", "keep", 4, 8)))
    assert segments.kept_spans("a") == [(4.0, 8.0), (10.0, 50.0), (60.0, math.inf)]
    changed = Decisions("", (person("a", "drop"), person("a", "keep", 5, 9)))
    assert changed.kept_spans("a") == [(5.0, 9.0)]
    assert Decisions("", (person("a", "keep", 5, 9), person("a", "drop"))).kept_spans("a") == []
    assert Decisions("", (screened("b"),)).kept_spans("a") == [(0.0, math.inf)]


def test_running_a_pass_again_replaces_its_own_rows_and_never_a_persons(tmp_path):
    decisions = Decisions(tmp_path / "decisions.csv", (screened("a", 0, 5), screened("b"), person("a", "keep", 0, 2)))
    turned = Decision("a", 7.0, 8.0, "keep", "is tissue", 0.4, "screen v1", "2030-01-02")  # a person changed the word
    copied = Decision("a", None, None, "drop", "duplicate of b", 1.0, "duplicates v1", "2030-01-02")
    decisions = Decisions(decisions.path, (*decisions.rows, turned, copied))
    again = decisions.after_pass("screen v2", ["a"], [screened("a", 0, 4)])
    assert [row for row in again.rows if row.video == "b"] == [screened("b")]  # it was not looked at
    assert {row.by for row in again.of("a") if row.machine == "screen"} == {"screen v2"}
    assert [row.end_s for row in again.of("a") if row.machine == "screen"] == [4]
    assert [row for row in again.of("a") if row.machine is None] == [person("a", "keep", 0, 2), turned]
    assert copied in again.rows
    same = decisions.after_pass("screen v1", ["a", "b"], [Decision(*_cells(screened("a", 0, 5)), "2031-05-05")])
    assert [row.date for row in same.of("a") if row.machine == "screen"] == ["2030-01-02"]


def _cells(row):
    return row.video, row.start_s, row.end_s, row.decision, row.reason, row.score, row.by


def test_undo_brings_a_video_back_and_so_does_deleting_its_row(tmp_path):
    decisions = Decisions(tmp_path / "decisions.csv", (screened("a"), person("a", "drop", 1, 2), screened("b")))
    back, gone = decisions.undone("a")
    assert back.kept_spans("a") == [(0.0, math.inf)]
    assert back.kept_spans("b") == []
    assert gone == [screened("a"), person("a", "drop", 1, 2)]
    decisions.write()
    lines = decisions.path.read_text().splitlines()
    decisions.path.write_text("\n".join(line for line in lines if not line.startswith("b,")) + "\n")
    assert read_decisions(decisions.path).kept_spans("b") == [(0.0, math.inf)]


def test_decisions_survive_the_file_and_wrong_cells_are_named(tmp_path):
    path = tmp_path / "decisions.csv"
    assert read_decisions(path).rows == ()
    path.write_text(
        "video,start_s,end_s,decision,reason,score,by,date,seen by\n"
        'a,1.2345,,drop,"black, then white",0.75,screen v1,2030-01-02,Bo\nb,,,keep,,,,,\n'
    )
    decisions = read_decisions(path)
    assert decisions.rows[0] == Decision(
        "a", 1.2345, None, "drop", "black, then white", 0.75, "screen v1", "2030-01-02", {"seen by": "Bo"}
    )
    assert decisions.rows[1].machine is None
    before = path.read_text()
    decisions.write()
    assert path.read_text() == before
    path.write_text("video,start_s,end_s,decision\na,5,4,drop\nb,x,,drop\nc,,,maybe\n")
    with pytest.raises(DatasetError) as caught:
        read_decisions(path)
    for part in ("row 2, column end_s", "row 3, column start_s", "row 4, column decision"):
        assert part in str(caught.value)


def test_nobody_signs_as_a_machine_and_spans_are_checked():
    for row in (
        Decision("a", None, None, "drop", "x", None, "screen v1"),
        Decision("a", None, None, "drop", "x", None, " "),
        Decision("a", 5, 4, "drop", "x", None, "Ada"),
        Decision("a", None, None, "perhaps", "x", None, "Ada"),
    ):
        with pytest.raises(DatasetError):
            Decisions("").said(row)


# -- what training uses ----------------------------------------------------------------------------------------------


def test_open_manifest_gives_kept_frames_with_a_gap_where_a_part_is_dropped(tmp_path):
    (tmp_path / "media").mkdir()
    for name in ("a", "b", "c"):
        write_video(tmp_path / "media" / f"{name}.mp4", range(0, 10_000, 200), rate=5)
    manifest = manifest_of(
        tmp_path,
        ManifestRow("a", "media/a.mp4", "Colectomy", "robotic"),
        ManifestRow("b", "media/b.mp4"),
        ManifestRow("c", "media/c.mp4", "Colectomy"),
        ManifestRow("d", "https://youtu.be/ddddddddddd", "Colectomy"),
    )
    Decisions(manifest.decisions_path, (screened("a", 2, 5), screened("a", 9, None), person("c", "drop"))).write()
    assert [kept.row.id for kept in kept_videos(manifest)] == ["a", "b"]
    data = open_manifest(manifest.path, rate_hz=1.0)
    assert [(video.name, video.procedure) for video in data.videos] == [("a", "Colectomy"), ("b", "")]
    video = data.video("a")
    np.testing.assert_allclose(video.times_s, [0, 1, 5, 6, 7, 8])
    assert [number_of(frame) for frame in video.frames()] == [0, 5, 25, 30, 35, 40]
    assert (video.phases == -1).all()
    assert video.tools is None
    np.testing.assert_allclose(open_manifest(manifest.path, 2.0).video("a").times_s[:5], [0, 0.5, 1, 1.5, 5])
    Decisions(manifest.decisions_path, tuple(person(name, "drop") for name in "abc")).write()
    with pytest.raises(DatasetError, match="nothing to train on"):
        open_manifest(manifest.path)
