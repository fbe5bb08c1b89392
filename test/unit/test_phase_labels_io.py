# SPDX-License-Identifier: Apache-2.0
"""Phase files as they are met: names or numbers, 1 or 25 fps, any spelling; and what is wrong with them is said."""

from __future__ import annotations

import numpy as np
import pytest

from surg_perception.data.label_files import DatasetError
from surg_perception.data.labels import CHOLEC80_PHASES
from surg_perception.gsvit.phase_evaluation import evaluate_folders
from surg_perception.gsvit.phase_labels_io import (
    PhaseFileError,
    align_folders,
    match_video,
    read_phase_file,
    read_phase_folder,
    write_phase_file,
)

SECONDS = 1400
ALIASES = {
    "CalotTriangleDissection": "carlot-triangle-dissection",
    "ClippingCutting": "Clipping and cutting",
    "GallbladderRetraction": "gallbladder_extraction",
}


def surgery(seed):
    """Truth and prediction at 1 fps, phases 0..6."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(7), rng.multinomial(SECONDS - 7 * 30, np.ones(7) / 7) + 30)
    prediction = np.roll(truth, int(rng.integers(-12, 13)))
    wrong = rng.random(SECONDS) < 0.1
    prediction[wrong] = np.clip(prediction[wrong] + rng.choice([-2, -1, 1, 2], wrong.sum()), 0, 6)
    return truth, prediction


def write(path, ids, *, fps=1, step=25, phase=lambda index: CHOLEC80_PHASES[index], header=True, separator="\t"):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"Frame{separator}Phase"] if header else []
    lines += [f"{i * step}{separator}{phase(index)}" for i, index in enumerate(np.repeat(ids, fps))]
    path.write_text("\n".join(lines) + "\n")


def folders(tmp_path, truth_format, prediction_format):
    for number in (41, 42):
        truth, prediction = surgery(number)
        write(tmp_path / "labels" / f"video{number}-phase.txt", truth, **truth_format)
        write(tmp_path / "predictions" / f"video{number}-phase.txt", prediction, **prediction_format)
    return tmp_path / "labels", tmp_path / "predictions"


NAMES = {}
ZERO_BASED = {"phase": str}
ONE_BASED = {"phase": lambda index: index + 1}
FLOATS = {"phase": lambda index: f"{index}.0"}
SPELT = {"phase": lambda index: ALIASES.get(CHOLEC80_PHASES[index], CHOLEC80_PHASES[index].upper())}
COUNTERS = {"step": 1, "header": False}
AT_25_FPS = {"fps": 25, "step": 1}


@pytest.mark.parametrize(
    ("truth_format", "prediction_format"),
    [
        (NAMES, ZERO_BASED),
        (NAMES, ONE_BASED),
        (ONE_BASED, ZERO_BASED),
        (ZERO_BASED, FLOATS),
        (NAMES, SPELT),
        (NAMES, COUNTERS),
        (COUNTERS, COUNTERS),
        (AT_25_FPS, NAMES),
        (NAMES, AT_25_FPS),
        (AT_25_FPS, AT_25_FPS),
        (AT_25_FPS, COUNTERS | ONE_BASED),
        (COUNTERS, AT_25_FPS | ZERO_BASED),
        (NAMES, {"header": False, "separator": ","}),
    ],
)
def test_every_format_gives_the_same_metrics(tmp_path, truth_format, prediction_format):
    usual = evaluate_folders(*folders(tmp_path / "usual", NAMES, NAMES)).metrics
    other = evaluate_folders(*folders(tmp_path / "other", truth_format, prediction_format)).metrics
    assert usual["samples"] == 2 * SECONDS
    assert usual["strict"]["accuracy"]["mean"] < usual["relaxed_official"]["accuracy"]["mean"] < 99
    assert other == usual


def test_the_meaning_of_the_frame_column_can_be_forced(tmp_path):
    # Six seconds at 25 fps look like 150 seconds.
    truth = np.repeat([0, 1], 75)
    write(tmp_path / "labels" / "video01.txt", truth, step=1)
    write(tmp_path / "predictions" / "video01.txt", truth, step=1)
    for unit, samples in (("auto", 150), ("seconds", 150), ("frames", 6)):
        found = evaluate_folders(tmp_path / "labels", tmp_path / "predictions", frame_unit=unit).metrics
        assert found["samples"] == samples
    with pytest.raises(PhaseFileError, match="frame unit"):
        evaluate_folders(tmp_path / "labels", tmp_path / "predictions", frame_unit="minutes")


def test_numbers_that_do_not_tell_where_they_start(tmp_path):
    ids = np.repeat([1, 2, 3], 20)
    write(tmp_path / "labels" / "video01.txt", ids)
    write(tmp_path / "predictions" / "video01.txt", ids, phase=str)
    found = evaluate_folders(tmp_path / "labels", tmp_path / "predictions").metrics
    assert found["strict"]["accuracy"]["mean"] == 100
    assert any("taken as 0..6" in note for note in found["notes"])
    found = evaluate_folders(tmp_path / "labels", tmp_path / "predictions", first_number=1).metrics
    assert found["strict"]["accuracy"]["mean"] == 0
    assert not found["notes"]
    # The labels tell: they hold a 7.
    write(tmp_path / "labels" / "video01.txt", np.repeat([1, 2, 6], 20), phase=lambda index: index + 1)
    write(tmp_path / "predictions" / "video01.txt", ids, phase=lambda index: index + 1)
    found = evaluate_folders(tmp_path / "labels", tmp_path / "predictions").metrics
    assert found["strict"]["accuracy"]["mean"] == pytest.approx(200 / 3)
    assert any("taken as 1..7" in note for note in found["notes"])


def test_numbers_from_0_to_7_are_no_seven_phases(tmp_path):
    write(tmp_path / "video01.txt", np.repeat(np.arange(8), 5), phase=str)
    with pytest.raises(PhaseFileError, match="0 and 7 both occur"):
        evaluate_folders(tmp_path, tmp_path)


def test_m2cai16_is_evaluated_at_its_own_rate(tmp_path):
    truth = np.repeat(np.arange(8), 100)
    for folder in ("labels", "predictions"):
        write(tmp_path / folder / "test_workflow_video_01.txt", truth, fps=25, step=1, phase=str)
    found = evaluate_folders(tmp_path / "labels", tmp_path / "predictions", label_set="m2cai16").metrics
    assert found["samples"] == 800 * 25
    assert found["per_video"]["test_workflow_video_01"]["relaxed_window_samples"] == 250
    found = evaluate_folders(tmp_path / "labels", tmp_path / "predictions", label_set="m2cai16", rate_hz=1.0).metrics
    assert found["samples"] == 800
    with pytest.raises(DatasetError, match="unknown label set"):
        evaluate_folders(tmp_path / "labels", tmp_path / "predictions", label_set="cholec8")


def test_labels_may_hold_more_videos_than_the_predictions(tmp_path):
    labels, predictions = folders(tmp_path, NAMES, NAMES)
    write(labels / "video80-phase.txt", [0, 1])
    assert evaluate_folders(labels, predictions).metrics["videos"] == 2
    assert list(evaluate_folders(labels, predictions, videos=["42"]).metrics["per_video"]) == ["video42"]


def test_videos_are_matched_by_number_where_names_differ(tmp_path):
    labels, predictions = folders(tmp_path, NAMES, NAMES)
    (predictions / "video41-phase.txt").rename(predictions / "VID41_pred.txt")
    assert list(evaluate_folders(labels, predictions).metrics["per_video"]) == ["video41", "video42"]
    assert match_video("7", ["video17", "video07"], "here") == "video07"
    with pytest.raises(PhaseFileError, match="no video '8'"):
        match_video("8", ["video17", "video07"], "here")


def test_a_video_that_is_missing_is_named(tmp_path):
    labels, predictions = folders(tmp_path, NAMES, NAMES)
    with pytest.raises(PhaseFileError, match="no video 'video77'"):
        evaluate_folders(labels, predictions, videos=["video77"])
    (labels / "video42-phase.txt").unlink()
    with pytest.raises(PhaseFileError, match="labels has no video 'video42'"):
        evaluate_folders(labels, predictions)
    with pytest.raises(PhaseFileError, match="there is no folder"):
        evaluate_folders(tmp_path / "nowhere", predictions)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PhaseFileError, match=r"holds no \.txt"):
        evaluate_folders(labels, tmp_path / "empty")


def test_two_files_of_one_video_are_refused(tmp_path):
    write(tmp_path / "video01-phase.txt", [0])
    write(tmp_path / "video01.txt", [0])
    with pytest.raises(PhaseFileError, match="both of video01"):
        read_phase_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no labels"),
        ("Frame\tPhase\n", "no labels"),
        ("Frame\tPhase\n0\n", "line 2.*two columns"),
        ("Frame\tPhase\nx\tPreparation\n", "line 2.*whole frame number"),
        ("Frame\tPhase\n0\tPreparation\n0\tPreparation\n", "line 3.*twice"),
        ("Frame\tPhase\n25\tPreparation\n0\tPreparation\n", "line 3.*after 25"),
    ],
)
def test_a_file_that_cannot_be_read_names_its_line(tmp_path, text, message):
    path = tmp_path / "video01-phase.txt"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_phase_file(path)


def test_an_unknown_phase_is_named_with_its_frame(tmp_path):
    labels, predictions = folders(tmp_path, NAMES, NAMES)
    path = predictions / "video41-phase.txt"
    path.write_text(path.read_text().replace("\n50\tPreparation", "\n50\tSuturing"))
    with pytest.raises(PhaseFileError, match=r"video41-phase\.txt, frame 50: phase 'Suturing' is unknown"):
        evaluate_folders(labels, predictions)
    path.write_text("0\t0\n25\t12\n")
    with pytest.raises(PhaseFileError, match=r"'12' is unknown, expected 0\.\.6"):
        evaluate_folders(labels, predictions, videos=["41"])


def test_a_few_seconds_too_few_are_left_out_and_noted(tmp_path):
    truth, prediction = surgery(41)
    write(tmp_path / "labels" / "video41-phase.txt", truth)
    write(tmp_path / "predictions" / "video41-phase.txt", prediction[:-3])
    found = evaluate_folders(tmp_path / "labels", tmp_path / "predictions").metrics
    assert found["samples"] == SECONDS - 3
    assert found["per_video"]["video41"]["notes"] == [
        "video41-phase.txt lacks 3.0 s of its counterpart: left out of the scores"
    ]


@pytest.mark.parametrize("longer", ["labels", "predictions"])
def test_files_of_different_lengths_are_refused(tmp_path, longer):
    truth, prediction = surgery(41)
    cut = {"labels": SECONDS, "predictions": SECONDS, longer: SECONDS - 40}
    write(tmp_path / "labels" / "video41-phase.txt", truth[: cut["labels"]])
    write(tmp_path / "predictions" / "video41-phase.txt", prediction[: cut["predictions"]])
    with pytest.raises(PhaseFileError, match=r"lacks about 40 of the 1400 s"):
        evaluate_folders(tmp_path / "labels", tmp_path / "predictions")


def test_files_without_a_common_frame_are_refused(tmp_path):
    write(tmp_path / "labels" / "video41.txt", [0] * 40, step=50)
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "video41.txt").write_text("".join(f"{25 + 50 * i}\t0\n" for i in range(40)))
    with pytest.raises(PhaseFileError, match="lacks about"):
        evaluate_folders(tmp_path / "labels", tmp_path / "predictions")


def test_sparse_predictions_are_evaluated_where_they_are(tmp_path):
    truth, prediction = surgery(41)
    write(tmp_path / "labels" / "video41.txt", truth)
    write(tmp_path / "predictions" / "video41.txt", prediction[::4], step=100)
    found = evaluate_folders(tmp_path / "labels", tmp_path / "predictions").metrics
    assert found["samples"] == SECONDS / 4
    assert found["per_video"]["video41"]["step_s"] == 4.0
    assert found["per_video"]["video41"]["relaxed_window_samples"] == 2
    assert found["per_video"]["video41"]["notes"] == []


def test_what_is_written_is_read_back(tmp_path):
    times_s, ids = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0, -1, 6, 6])
    path = write_phase_file(tmp_path / "video01-phase.txt", times_s, ids, CHOLEC80_PHASES)
    assert path.read_text().splitlines() == [
        "Frame\tPhase",
        "0\tPreparation",
        "50\tGallbladderRetraction",
        "75\tGallbladderRetraction",
    ]
    tracks = read_phase_folder(tmp_path)
    (video,), notes = align_folders(tracks, tracks, CHOLEC80_PHASES)
    assert video.truth.tolist() == [0, 6, 6]
    assert video.times_s.tolist() == [0.0, 2.0, 3.0]
    assert notes == []


def test_more_samples_than_the_format_holds_are_refused(tmp_path):
    with pytest.raises(PhaseFileError, match="closer than 1/25 s"):
        write_phase_file(tmp_path / "video01.txt", np.arange(10) / 60.0, np.zeros(10, int), CHOLEC80_PHASES)
    assert not list(tmp_path.iterdir())


def test_all_cholec80_labels_are_read_and_agree_with_themselves(shared_data):
    folder = shared_data / "cholec80" / "labels" / "phase_1fps"
    found = evaluate_folders(folder, folder).metrics
    print(f"{found['videos']} videos, {found['samples']} seconds of Cholec80's own labels")
    assert (found["videos"], found["samples"]) == (80, 184498)
    assert found["relaxed_official"]["jaccard"] == {"mean": 100.0, "std": 0.0}
